"""`recover`: a sparse checkpoint in, one of the same sparsity out whose predictions are nearer to the dense model's.

1. The checkpoint's weights become a plain dense model, whose sites are masked while it trains (`masked_model.py`).
2. It learns the distribution of the original dense model on text (`train.py`); the best weights on held-out text are kept.
3. These are calibrated as any dense model, without a transform and with the checkpoint's own budget: thresholds are fitted
   in closed loop, and weights quantized if so asked.
4. Before and after are measured on text of the kind trained on and of other kinds (`measure.py`).
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wina_calib.calibration.likelihood import Quality
from wina_calib.calibration.quantize_sites import check_format
from wina_calib.calibration.run import digests
from wina_calib.checkpoint.card import write_card
from wina_calib.checkpoint.evaluation_file import calibration_fingerprint
from wina_calib.checkpoint.export_dense import export_dense
from wina_calib.checkpoint.local_paths import base_model_here
from wina_calib.checkpoint.reader import Checkpoint, open_checkpoint
from wina_calib.common.atomic import check_output, claimed, publish
from wina_calib.common.bars import Hearing, hearing
from wina_calib.common.devices import pick_device
from wina_calib.common.distributed import Ranks, shared_ranks
from wina_calib.common.progress import SILENT, Estimate, Part, Progress, Ticking, Within
from wina_calib.corpus.blocks import load_blocks
from wina_calib.corpus.sources import HELDOUT
from wina_calib.errors import OutputError, UsageError, WinaError
from wina_calib.model.architecture import describe
from wina_calib.model.folder import remote_code
from wina_calib.model.locate import load_tokenizer, resolve
from wina_calib.quantization.formats import WeightFormat
from wina_calib.recovery.masked_model import MaskedModel
from wina_calib.recovery.measure import measure
from wina_calib.recovery.models import load_plain, prepared, rotation_to, size_of
from wina_calib.recovery.options import RecoverOptions, make_options
from wina_calib.recovery.plan import TrainingPlan, available_memory, plan_training
from wina_calib.recovery.record import Trained
from wina_calib.recovery.result import (
    calibrate_trained,
    calibration_passes,
    stored_dtype,
    trained_weights,
    write_trained,
)
from wina_calib.recovery.tasks import read_tasks
from wina_calib.recovery.text import training_text
from wina_calib.recovery.train import Training
from wina_calib.storage.resume import RunState, open_run_state
from wina_calib.storage.resume_files import drop, has_finished, mark_finished, state_folder

MEASURED = {"built-in held-out": (HELDOUT,), "code": ("builtin:heldout:code",)}
MEASURED_TOKENS = 16_384


@dataclass(frozen=True)
class Recovery:
    """What a recovery made.

    Attributes:
        folder: the new checkpoint.
        plan: what was trained.
        trained: what the training came to.
        before: quality of the given checkpoint against the dense model, by kind of text and model sparsity.
        after: of the new one.
        tasks_before: share of items that it solved, by file of tasks and model sparsity; the dense model's at 0.
        tasks_after: the new one.
    """

    folder: Path
    plan: TrainingPlan
    trained: Trained
    before: dict[str, dict[float, Quality]]
    after: dict[str, dict[float, Quality]]
    tasks_before: dict[str, dict[float, float]]
    tasks_after: dict[str, dict[float, float]]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        texts = {
            name: {kind: {f"{s:g}": asdict(q) | {"rise": q.rise} for s, q in by.items()} for kind, by in found.items()}
            for name, found in (("before", self.before), ("after", self.after))
        }
        tasks = {
            name: {task: {f"{s:g}": share for s, share in by.items()} for task, by in found.items()}
            for name, found in (("tasks_before", self.tasks_before), ("tasks_after", self.tasks_after))
        }
        plain = {"folder": str(self.folder), "plan": asdict(self.plan), "training": asdict(self.trained)}
        return plain | texts | tasks


def recover(checkpoint: str | Path, output: str | Path, *, progress: Hearing = None, **options: Any) -> Recovery:
    """Train a sparse checkpoint to predict as its dense original does.

    Args:
        checkpoint: a calibrated folder, or a Hub id.
        output: folder to write; it appears whole or not at all.
        progress: hears the plan, phases and steps; True is a bar on standard error.
        **options: the fields of `RecoverOptions`: base, data, tokens, sparsities, lr, bits, max_time ...

    Raises:
        WinaError: with a message that says what to do.

    Example:
        ```python
        wina_calib.recover("demo-sparse", "demo-recovered", tokens=200_000)
        ```
    """
    chosen = make_options(options)
    _refuse_sharding()
    target = Path(output).expanduser().resolve()
    backend = "gloo" if chosen.device == "cpu" or not torch.cuda.is_available() else "cpu:gloo,cuda:nccl"
    with (
        remote_code(chosen.trust_remote_code),
        hearing(progress) as heard,
        shared_ranks(backend) as ranks,
        ExitStack() as held,
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        report = heard if ranks.is_first else SILENT
        try:
            work = ranks.agree(lambda: _begin(checkpoint, target, chosen, ranks, report, held))
            try:
                made = _Recovering(*work, target, chosen, ranks, report).run()
            except BaseException as error:
                if ranks.is_first and isinstance(error, WinaError) and not work[2].useful:
                    drop(state_folder(target))
                raise
            if ranks.is_first:
                drop(state_folder(target))
            return replace(made, folder=Path(output))
        except BaseException as error:
            error.__dict__["silent"] = not ranks.speaks(error)  # one process of several says what happened
            raise


def _refuse_sharding() -> None:
    for name, what in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(name, "").lower() in ("1", "true"):
            raise UsageError(
                f"{what} is set ({name}), and weights that it spreads cannot be trained under masks: start plain processes "
                "with torchrun; `recover` spreads weights over them itself where one device cannot hold them (--train sharded)."
            )


def _begin(
    checkpoint: str | Path, target: Path, chosen: RecoverOptions, ranks: Ranks, report: Progress, held: ExitStack
) -> tuple[Checkpoint, Path, RunState]:
    """Check what was given and lay hold of the output; the checkpoint, the dense model's folder, and the run's state."""
    folder, _ = resolve(checkpoint)
    if ranks.is_first:
        _clear_left_over(target, overwrite=chosen.overwrite)
        check_output(target, overwrite=chosen.overwrite, keep=folder, made=("config.json",))
    opened = open_checkpoint(folder)
    if opened.opened.is_reference:
        raise UsageError(
            f"{folder} has no weights of its own, and a recovery trains weights. Calibrate without --weights reference first."
        )
    base = _base(chosen, opened)
    if chosen.bits:
        check_format(opened.architecture, WeightFormat(chosen.bits, chosen.group_size))
    state = state_folder(target)
    if not ranks.is_first:
        return opened, base, RunState(state, ranks=ranks)
    held.enter_context(claimed(target, overwrite=chosen.overwrite))
    run = open_run_state(
        state, lambda: _identity(opened, base, chosen, ranks), restart=chosen.restart, ranks=ranks, report=report
    )
    return opened, base, run


def _clear_left_over(target: Path, *, overwrite: bool) -> None:
    """Remove the state of a run that gave the output its name and died before it removed its state.

    Raises:
        OutputError: the output is not to be replaced.
    """
    state = state_folder(target)
    if not has_finished(state, lambda: digests(target)):
        return
    drop(state)
    if not overwrite:
        raise OutputError(
            f"{target} was finished already; what was left of its making is removed. `wina-calib inspect {target}` tells of it; "
            "--overwrite (Python: overwrite=True) makes it anew."
        )


@dataclass(frozen=True)
class _Recovering:
    """A recovery under way."""

    opened: Checkpoint
    base: Path
    run_state: RunState
    target: Path
    chosen: RecoverOptions
    ranks: Ranks
    report: Progress

    def run(self) -> Recovery:
        """Train, calibrate and measure; every process calls this, the first one writes."""
        opened, chosen, ranks, report = self.opened, self.chosen, self.ranks, self.report
        assert self.run_state.folder is not None
        state, device = self.run_state.folder, pick_device(chosen.device)
        sparsities = chosen.sparsities or (opened.settings.sparsity,)
        if sparsities == (0.0,):
            raise UsageError(
                "the checkpoint is calibrated for sparsity 0; give the sparsities to train with --sparsities."
            )
        tasks = {Path(name).stem: read_tasks(Path(name), chosen.task_items) for name in chosen.tasks}
        dense = state / "dense"
        if not ranks.first(lambda _: (dense / "config.json").exists()):
            ranks.first(lambda _: export_dense(opened.folder, dense, overwrite=True))
        teacher = load_plain(self.base, device, "auto").eval().requires_grad_(False)
        tokenizer = load_tokenizer(self.base)
        _check_tokenizer(tokenizer, load_tokenizer(opened.folder), self.base)
        student = load_plain(dense, device, torch.float32)
        arch, free = describe(student), available_memory(device)
        plan = ranks.from_first(
            ranks.agree(lambda: plan_training(size_of(student, arch, teacher), chosen, free, ranks.size))
        )
        report.planned(_estimate(plan, opened, chosen, sparsities, len(tasks)))
        report.note(plan.describe(chosen, free))
        ids, held_out = ranks.first(lambda _: training_text(chosen, opened, tokenizer, teacher))
        texts = {"trained on": held_out, **_other_texts(tokenizer, held_out.shape[1], chosen.seed)}

        def measured(when: str, folder: Path, heard: Progress) -> Any:
            heard.phase(f"measure {when}", len(texts) + len(tasks))
            return measure(folder, teacher, tokenizer, sparsities, texts, tasks, heard)

        before = ranks.first(lambda tick: measured("before", opened.folder, Ticking(report, tick)))
        student = prepared(student, arch, plan, chosen, stored_dtype(dense))
        training = Training(
            student=student,
            teacher=teacher,
            masks=MaskedModel(student, opened, sparsities),
            architecture=arch,
            ids=ids,
            held_out=held_out,
            options=chosen,
            plan=plan,
            sparsities=sparsities,
            in_turn=chosen.in_turn or sparsities,
            turn=rotation_to(teacher, student, chosen, report),
            phase=self.run_state.phase("training"),
            ranks=ranks,
            report=report,
            device=device,
        )
        trained = training.run()
        del training
        values = trained_weights(student, plan, ranks)
        if not plan.sharded:
            student.to("meta")
        gc.collect()

        def finish(heard: Progress) -> Recovery:
            weights, made = state / "trained", state / "calibrated"
            write_trained(values, dense, weights)
            inner = Within(heard, "calibrate")
            calibrate_trained(weights, made, opened, chosen, sparsities, trained, self.base, inner)
            write_card(made, name=self.target.name)
            after = measured("after", made, heard)
            mark_finished(state, digests(made))
            publish(made, self.target)
            return Recovery(self.target, plan, trained, before[0], after[0], before[1], after[1])

        return ranks.first(lambda tick: finish(Ticking(report, tick)))


def _other_texts(tokenizer: Any, seq_len: int, seed: int) -> dict[str, Tensor]:
    """Text of other kinds than was trained on, (sequences, seq) by kind."""
    samples = max(1, MEASURED_TOKENS // seq_len)
    return {
        kind: load_blocks(data, tokenizer, samples=samples, seq_len=seq_len, seed=seed, min_tokens=1).ids
        for kind, data in MEASURED.items()
    }


def _base(chosen: RecoverOptions, opened: Checkpoint) -> Path:
    """The folder of the dense model to learn from."""
    name = chosen.base or opened.settings.provenance.get("base_model")
    if not isinstance(name, str) or not name:
        raise UsageError(f"{opened.folder} does not say which model it was made from. Give that with --base.")
    here = None if chosen.base else base_model_here(opened.settings.weights, name)
    try:
        return here or resolve(name)[0]
    except WinaError as error:
        raise UsageError(f"the base model cannot be had: {error} Give it with --base.") from error


def _identity(opened: Checkpoint, base: Path, chosen: RecoverOptions, ranks: Ranks) -> Mapping[str, Any]:
    operational = ("overwrite", "restart", "device", "trust_remote_code", "max_time", "tasks", "task_items")
    options = {k: v for k, v in asdict(chosen).items() if k not in operational}
    given = {"weights": opened.settings.weights, "calibration": calibration_fingerprint(opened.folder)}
    return {"checkpoint": given, "base": str(base.resolve()), "processes": ranks.size, "options": options}


def _check_tokenizer(base: Any, own: Any, folder: Path) -> None:
    probe = "The 3 quick brown foxes\n\tjump: naïve 東京, x = {y};"
    if base(probe).input_ids != own(probe).input_ids:
        raise UsageError(
            f"{folder} has another tokenizer than the checkpoint; give the model it was made from with --base."
        )


def _estimate(
    plan: TrainingPlan, opened: Checkpoint, chosen: RecoverOptions, sparsities: tuple[float, ...], tasks: int
) -> Estimate:
    """The parts of the work; costs in passes over a thousand tokens, a step counting four."""
    texts = 1 + len(MEASURED)
    measured = 2 * MEASURED_TOKENS * (1 + len(sparsities)) * (1 + tasks / texts) / 1000
    tokens = plan.steps * chosen.batch * chosen.seq_len
    parts = (
        Part("measure before", texts + tasks, measured),
        Part("train", plan.steps, 5 * tokens / 1000, 60 * chosen.max_time or math.inf),
        Part("calibrate", Within.STEPS, calibration_passes(opened, sparsities) / 1000),
        Part("measure after", texts + tasks, measured),
    )
    return Estimate(parts=parts, memory_bytes=plan.memory_bytes, tokens=tokens)
