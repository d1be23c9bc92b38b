"""Calibrate a model: a causal language model in, a sparse-ready checkpoint out."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from wina_calib.budgets.count import count_cells
from wina_calib.calibration import phases
from wina_calib.calibration.choose_budget import settle
from wina_calib.calibration.compute import Compute
from wina_calib.calibration.held_out import held_out_blocks, held_out_tokens
from wina_calib.calibration.identity import identity
from wina_calib.calibration.job import Job
from wina_calib.calibration.options import CalibrateOptions, make_options
from wina_calib.calibration.quantize_sites import check_format, kept_modules, weight_format
from wina_calib.checkpoint.by_reference import check_plain, check_possible
from wina_calib.checkpoint.card import write_card
from wina_calib.checkpoint.format import WINA_FILE
from wina_calib.checkpoint.reader import open_checkpoint, read_settings
from wina_calib.checkpoint.settings import Settings
from wina_calib.checkpoint.side_files import check_side_files
from wina_calib.checkpoint.verdict import Verdict
from wina_calib.common.atomic import check_output, claimed, publish
from wina_calib.common.bars import Hearing, hearing
from wina_calib.common.devices import default_micro_batch, pick_device, pick_dtype
from wina_calib.common.distributed import Ranks, shared_ranks
from wina_calib.common.memory import advice, ran_out
from wina_calib.common.own_folder import refuse_foreign
from wina_calib.common.progress import SILENT, Progress
from wina_calib.common.threads import Background
from wina_calib.corpus.blocks import MIN_TOKENS, QUICK_MIN_TOKENS, Blocks, data_for, load_blocks
from wina_calib.errors import HubError, OutputError, RankError, StateError, UsageError, WinaError
from wina_calib.model.folder import config_file, remote_code
from wina_calib.model.source import fitting_length, open_source
from wina_calib.storage.resume import RunState, open_run_state
from wina_calib.storage.resume_files import check_same, drop, has_finished, mark_finished, state_folder
from wina_calib.transforms import plan


@dataclass(frozen=True)
class Result:
    """What a calibration made: the folder, and the settings in its config."""

    folder: Path
    settings: Settings

    @property
    def verdict(self) -> Verdict:
        """What to expect of it."""
        found = Verdict.from_facts(self.settings.provenance)
        assert found is not None
        return found


def calibrate(model: str | Path, output: str | Path, *, progress: Hearing = None, **options: Any) -> Result:
    """Calibrate a causal language model and write a sparse-ready checkpoint.

    Args:
        model: a Hugging Face model folder, a Hub repository id, or `demo`.
        output: folder to write; it appears whole or not at all.
        progress: as `wina_calib.common.bars.hearing` takes it: True for a bar, or a `Progress`.
        **options: the fields of `CalibrateOptions`: sparsity, transform, data, samples, seq_len ...

    Raises:
        WinaError: with a message that says what to do.

    Example:
        ```python
        wina_calib.calibrate("demo", "demo-sparse", sparsity=0.5)
        ```
    """
    return run_calibration(model, output, make_options(options), progress)


def run_calibration(
    model: str | Path,
    output: str | Path,
    chosen: CalibrateOptions,
    progress: Hearing = None,
    *,
    held_tokens: int | None = None,
) -> Result:
    """As `calibrate`, measured on `held_tokens` held-out tokens: few for who measures the checkpoint afterwards, and drops it."""
    with remote_code(chosen.trust_remote_code), shared_ranks() as ranks, hearing(progress) as report:
        try:
            job, base = ranks.agree(lambda: prepare(model, Path(output), chosen, report, ranks, held_tokens))
            if ranks.is_first:
                job.report.planned(job.estimate(base))
                for note in (*job.source.notes, *job.blocks.notes):
                    job.report.note(note)
                if chosen.weights == "reference" and job.source.commit is None and held_tokens is None:
                    job.report.note(
                        "the base model is a local folder: this checkpoint needs it on this machine, and cannot be pushed. "
                        "Calibrate by a Hub id, or without --weights reference, to push it"
                    )
            # A caller's no_grad or inference_mode would take away the gradients that a budget is chosen by.
            with (
                advice(job.compute.micro_batch, job.blocks.ids.shape),
                torch.inference_mode(False),
                torch.enable_grad(),
            ):
                return Result(Path(output), _run(job, base, Path(output)))
        except BaseException as error:
            error.__dict__["silent"] = not ranks.speaks(error)  # one process of several says what happened
            raise


def prepare(
    model: str | Path,
    target: Path,
    chosen: CalibrateOptions,
    progress: Progress,
    ranks: Ranks,
    held_tokens: int | None = None,
) -> tuple[Job, Blocks]:
    """Check everything that can be checked before the work, and read the text.

    Returns:
        The job, and the text of the original model's perplexity.
    """
    state = state_folder(target.expanduser().resolve())
    if not chosen.restart:
        refuse_foreign(state)
    overwrite = chosen.overwrite or _is_left_over(state, target.expanduser())
    check_output(target, overwrite=overwrite)
    source = open_source(model, revision=chosen.revision)
    by_reference = chosen.weights == "reference"
    check_output(target, overwrite=overwrite, keep=source.folder, made=(WINA_FILE,))
    transform = plan("none" if by_reference and chosen.transform == "auto" else chosen.transform, source.architecture)
    if by_reference:
        check_possible(transform)
        check_plain(source)
    else:
        check_side_files(source.opened)
    if source.opened.runs_code and (by_reference or not transform.is_free):
        what = "weights by reference" if by_reference else f"the run-time matrices of transform {transform.name}"
        raise UsageError(
            f"{model} runs Python code of its own, which does not go with {what}. Leave --weights reference out, and take "
            "--transform none, global, head or auto."
        )
    chosen = settle(chosen, source.architecture, count_cells(source.architecture, transform.name))
    form = weight_format(chosen)
    if form is not None:
        check_format(source.architecture, form, kept_modules(chosen, source.architecture))
    device = pick_device(chosen.device)
    tokenizer = source.tokenizer()
    chosen = replace(chosen, data=data_for(tokenizer, chosen.data))
    seq_len = fitting_length(source, chosen.seq_len)
    job = Job(
        source=source,
        options=chosen,
        transform=transform,
        blocks=load_blocks(
            chosen.data,
            tokenizer,
            samples=chosen.samples,
            seq_len=seq_len,
            seed=chosen.seed,
            min_tokens=QUICK_MIN_TOKENS if chosen.quick else MIN_TOKENS,
            quick_tokens=0 if chosen.quick else QUICK_MIN_TOKENS,
        ),
        compute=Compute(
            device,
            pick_dtype(chosen.dtype, source.dtype, device),
            chosen.micro_batch or default_micro_batch(device, seq_len, source.architecture.width),
            ranks,
        ),
        report=progress if ranks.is_first else SILENT,
    )
    return job, held_out_blocks(tokenizer, seq_len, held_tokens or held_out_tokens(device, chosen.quick))


def _run(job: Job, base: Blocks, output: Path) -> Settings:
    """Do the work under a lock on the output, with its state beside it."""
    ranks = job.compute.ranks
    target = output.expanduser().resolve()
    state = state_folder(target)
    work, spill = state / "output", state / "spill"
    with ExitStack() as held:

        def begin() -> RunState | Settings:
            left_over = _is_left_over(state, target)
            held.enter_context(claimed(target, overwrite=job.options.overwrite or left_over))
            known = Background(lambda: identity(job, base))
            if left_over and _clear(state, target, known, job):
                return read_settings(target)
            run_state = open_run_state(state, known, restart=job.options.restart, ranks=ranks, report=job.report)
            shutil.rmtree(spill, ignore_errors=True)
            for folder in (work, spill):
                folder.mkdir(exist_ok=True)
            return run_state

        def end(settings: Settings) -> Settings:
            open_checkpoint(work)
            write_card(work, name=target.name)
            if job.options.keep_state:
                publish(work, target)
                return settings
            mark_finished(state, digests(work))
            publish(work, target)
            drop(state)
            return settings

        begun = ranks.agree(lambda: begin() if ranks.is_first else RunState(state, ranks=ranks))
        finished = ranks.from_first(begun if isinstance(begun, Settings) else None)
        if finished is not None or isinstance(begun, Settings):
            assert finished is not None
            return finished
        run_state = begun
        try:
            settings = phases.run(
                replace(job, run_state=run_state, compute=replace(job.compute, spill=spill)), work, base
            )
            return ranks.first(lambda _: end(settings))
        except BaseException as error:
            if ranks.is_first:
                _leave(error, state, run_state, job.report)
            raise


def _is_left_over(state: Path, target: Path) -> bool:
    """Whether a run gave the output its name and died before it removed its state."""
    return not (state / "output").exists() and has_finished(state, lambda: digests(target))


def digests(folder: Path) -> dict[str, str]:
    """What tells one result from another: its settings and its fitted tensors."""
    files = (config_file(folder), folder / WINA_FILE)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _clear(state: Path, target: Path, known: Callable[[], Mapping[str, Any]], job: Job) -> bool:
    """Remove the state of a run that had finished; whether it was the same as this one, so that nothing is left to do.

    Raises:
        OutputError: it was another, and the output is not to be replaced.
    """
    try:
        check_same(state, known())
        same = True
    except StateError:
        same = False
    drop(state)
    if same:
        job.report.note(f"{target} was finished already; what was left of its making is removed")
    elif not job.options.overwrite:
        raise OutputError(
            f"{target} exists, made with other options; what was left of its making is removed. Give another folder, or "
            "--overwrite (Python: overwrite=True) to replace it."
        )
    return same


def _leave(error: BaseException, state: Path, run_state: RunState, report: Progress) -> None:
    """Keep the state of a run that failed if the same command may go on with it, and say so."""
    hopeless = isinstance(error, WinaError) and not isinstance(error, OutputError | RankError | HubError | StateError)
    if hopeless or not run_state.useful:
        drop(state)
        return
    shutil.rmtree(state / "spill", ignore_errors=True)
    if isinstance(error, StateError):  # it says itself what to do about the state
        return
    text = f"what is finished is kept in {state}: the same command goes on from there"
    if ran_out(error):
        text += "; with other options add --restart"
    if isinstance(error, KeyboardInterrupt):
        raise KeyboardInterrupt(f"Stopped; {text}.") from error
    report.note(text)
