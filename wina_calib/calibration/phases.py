"""The phases of a calibration in order, from the dense model to the finished checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from wina_calib.budgets.count import count_cells
from wina_calib.calibration.choose_budget import ChosenBudget, allocate
from wina_calib.calibration.cost import DENSE, FIT, GREEDY, HEAD, MEASURE, STATISTICS, WRITE
from wina_calib.calibration.dense_pass import dense_pass
from wina_calib.calibration.fit_thresholds import fit_thresholds
from wina_calib.calibration.held_out import HeldOutRun
from wina_calib.calibration.job import Begun, Job
from wina_calib.calibration.layer_stream import LayerStream, head_parts
from wina_calib.calibration.likelihood import next_token_nll, perplexity
from wina_calib.calibration.quantize_sites import Quantizer, weight_format
from wina_calib.calibration.result import write_result
from wina_calib.calibration.scale_curves import curve_tensors, scaled_curves
from wina_calib.checkpoint.dense_weights import write_weights
from wina_calib.checkpoint.quantized_weights import QuantizedWeights, has_shards
from wina_calib.checkpoint.settings import Settings
from wina_calib.checkpoint.verdict import HELD_OUT
from wina_calib.common.distributed import ALONE
from wina_calib.common.progress import Progress, Ticking
from wina_calib.corpus.blocks import Blocks
from wina_calib.model.source import Source, open_source
from wina_calib.storage.resume import Phase, RunState
from wina_calib.transforms import Rotations, Statistics
from wina_calib.transforms import fit as fit_transform

PUZZLED = 1000.0  # perplexity of built-in text above which a model cannot have been made for it


def run(job: Job, folder: Path, base: Blocks) -> Settings:
    """Write the whole checkpoint into `folder`, the card left out; returns its settings.

    Every process of `ranks` calls this; the first one writes.
    """
    base_ppl = _perplexity(job, base)
    quantizes = weight_format(job.options) is not None
    return finish(job, folder, base, begin(job, folder.with_name("dense") if quantizes else folder, base_ppl))


def begin(job: Job, folder: Path, base_ppl: float) -> Begun:
    """Transform the weights and choose the budget: what jobs have in common that differ in how weights are stored.

    The transformed weights go into `folder`, which is the checkpoint's where they are not quantized.
    """
    dense, untied = _transformed(job, folder)
    return Begun(dense, untied, _budget(job, dense), base_ppl)


def finish(job: Job, folder: Path, base: Blocks, begun: Begun) -> Settings:
    """Fit thresholds, quantize, and write the checkpoint into `folder`, as `run` does.

    Where weights are not quantized, `folder` is the one that `begin` wrote.
    """
    quantizes = weight_format(job.options) is not None
    tensors, measured = fit(job, begun.dense, begun.chosen, base, folder if quantizes else None)
    return job.compute.ranks.first(lambda _: write_result(job, folder, begun, tensors, base, measured))


def fit(
    job: Job, source: Source, chosen: ChosenBudget, held: Blocks, folder: Path | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Fit thresholds at every anchor, and quantize the layers' weights where the options say so.

    Quantized layers are written into `folder`; None leaves weights as they are.

    Returns:
        The tensors to store, and for the provenance what was measured.
    """
    phase = job.run_state.phase("thresholds")
    begun = phase.done_items or phase.finished
    if folder is not None and begun and not job.compute.ranks.first(lambda _: has_shards(source, job.settings, folder)):
        phase.forget()
    if phase.finished:
        return phase.tensors(), phase.values
    anchors, arch = job.options.anchors, source.architecture
    stream = job.stream(source, job.threshold_ids, states=job.fit_states)
    held_out = HeldOutRun(job.stream(source, held.ids, states=len(anchors) + 1), anchors, held.data)
    job.announce(FIT, len(arch.layers), phase)
    with _quantizer(job, source, folder, phase) as quantizer:
        tensors = fit_thresholds(
            stream,
            job.rule,
            job.options,
            chosen.rows,
            quantizer=quantizer,
            held_out=held_out,
            phase=phase,
            progress=job.report,
        )
    job.report.phase(MEASURE, head_parts(arch, job.compute.dtype))
    measured = held_out.measured(job.report)
    curves, facts = scaled_curves(chosen, measured)
    added, facts = curve_tensors(arch, curves), facts | {HELD_OUT: measured.to_dict()}
    phase.finish(tensors=added, values=facts)
    return tensors | added, facts


@contextmanager
def _quantizer(job: Job, source: Source, folder: Path | None, phase: Phase) -> Iterator[Quantizer | None]:
    """What quantizes layers and writes them into a folder, going on after those of the phase."""
    form = weight_format(job.options)
    if form is None or folder is None:
        yield None
        return
    into = QuantizedWeights(source, job.settings, folder, phase.done_items) if job.compute.ranks.is_first else None
    try:
        yield Quantizer(form, into, job.settings.modules_to_not_convert)
    except BaseException:
        if into is not None:
            into.shelf.leave(keep=phase.is_saved)
        raise
    if into is not None:
        into.shelf.leave(keep=True)


def _transformed(job: Job, folder: Path) -> tuple[Source, bool]:
    """The dense model to fit on, and whether its embeddings were untied: written here, or the source as it is."""
    if job.options.weights == "reference":
        return job.source, False
    # Only the first process fits and writes: what it saves, it saves alone.
    if job.compute.ranks.is_first:
        folder.mkdir(exist_ok=True)
    run_state = job.run_state if job.compute.ranks.is_first else RunState()
    transform, weights = (run_state.phase(name, ranks=ALONE) for name in ("transform", "weights"))
    statistics = None if job.compute.ranks.from_first(transform.finished) else _statistics(job)
    untied = job.compute.ranks.first(lambda tick: _write_weights(job, folder, statistics, transform, weights, tick))
    return open_source(folder, calibrated=True), untied


def _write_weights(
    job: Job, folder: Path, statistics: Statistics | None, transform: Phase, weights: Phase, tick: Callable[[], None]
) -> bool:
    report = Ticking(job.report, tick)
    rotations = _rotations(job, statistics, transform, report)
    job.announce(WRITE, len(job.source.architecture.layers), weights)
    return write_weights(
        job.source, job.transform, rotations, folder, device=job.compute.device, phase=weights, progress=report
    )


def _perplexity(job: Job, blocks: Blocks) -> float:
    phase = job.run_state.phase("dense-perplexity")
    if phase.finished:
        return float(phase.values["perplexity"])
    stream = job.stream(job.source, blocks.ids, spill=False)
    arch = job.source.architecture
    job.announce(DENSE, len(arch.layers), phase)
    hidden = dense_pass(stream, phase=phase, progress=job.report)
    job.report.phase(HEAD, head_parts(arch, job.compute.dtype))
    dense_ppl = perplexity(float(next_token_nll(stream, hidden, job.report).double().mean()))
    if dense_ppl > PUZZLED:
        job.report.note(
            f"the original model's perplexity on {', '.join(blocks.data)} is {dense_ppl:,.0f}: it predicts none of that text, so "
            "no figure below means much. Check that its weights and its tokenizer belong together and are whole"
        )
    phase.finish(values={"perplexity": dense_ppl})
    return dense_ppl


def _statistics(job: Job) -> Statistics | None:
    """What the fit of the transform needs to know of activations; None where it looks at weights alone."""
    arch, ids = job.source.architecture, job.transform_ids
    if not job.looks_at_text:
        return None
    phase = job.run_state.phase("statistics")
    statistics = Statistics(arch, job.transform.name, tokens=len(ids) * (ids.shape[1] - 1), seed=job.options.seed)
    if phase.finished:
        statistics.load_state_dict(phase.tensors())
        return statistics
    job.announce(STATISTICS, len(arch.layers), phase)
    dense_pass(job.stream(job.source, ids), statistics, phase=phase, progress=job.report).clear()
    phase.finish()
    return statistics


def _rotations(job: Job, statistics: Statistics | None, phase: Phase, report: Progress) -> Rotations:
    rotations = fit_transform(
        job.transform.name,
        job.source.architecture,
        job.source.load_layer,
        statistics,
        seed=job.options.seed,
        steps=job.steps,
        device=job.compute.device,
        grouped=job.options.bits == 4,
        phase=phase,
        progress=report,
    )
    if not phase.finished:
        phase.finish()
    return rotations


def _budget(job: Job, source: Source) -> ChosenBudget:
    arch, ids = source.architecture, job.threshold_ids
    seq_len = ids.shape[1]
    phase = job.run_state.phase("budget")

    def stream(tokens: int) -> LayerStream:
        if not phase.finished and job.options.budget == "greedy":
            job.announce(GREEDY, len(arch.layers), phase)
        some = ids[: max(1, tokens // seq_len)]
        compute = job.holding(some, len(arch.layers) + 1)
        return LayerStream(source, some, replace(compute, micro_batch=job.backward_batch))

    cells = count_cells(arch, job.transform.name)
    return allocate(job.options, arch, cells, job.rule, ids.numel(), stream, phase=phase, progress=job.report)
