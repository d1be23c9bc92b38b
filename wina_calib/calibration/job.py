"""One calibration under way: its phases in order, from the dense model to the finished checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from wina_calib.budgets import budget_at
from wina_calib.budgets.count import count_cells
from wina_calib.calibration.choose_budget import GREEDY_TOKENS, ChosenBudget, allocate, allowed, stored_name
from wina_calib.calibration.compute import Compute
from wina_calib.calibration.cost import (
    DENSE,
    FIT,
    GREEDY,
    MEASURE,
    STATISTICS,
    WRITE,
    Workload,
    estimate,
    hidden_bytes,
)
from wina_calib.calibration.dense_pass import dense_pass
from wina_calib.calibration.dropped_levels import CURVE_LEVELS
from wina_calib.calibration.fit_thresholds import at_sparsity, fit_thresholds
from wina_calib.calibration.held_out import HeldOutRun
from wina_calib.calibration.layer_stream import LayerStream, head_parts
from wina_calib.calibration.likelihood import next_token_nll, perplexity
from wina_calib.calibration.loss_curves import usable_tokens
from wina_calib.calibration.options import CalibrateOptions
from wina_calib.calibration.quantize_sites import Quantizer, kept_modules, weight_format
from wina_calib.calibration.scale_curves import curve_tensors, scaled_curves
from wina_calib.checkpoint.by_reference import write_reference
from wina_calib.checkpoint.dense_weights import write_weights
from wina_calib.checkpoint.format import model_names, stored_cells
from wina_calib.checkpoint.local_paths import published, published_command, remember
from wina_calib.checkpoint.quantized_weights import QuantizedWeights, has_shards
from wina_calib.checkpoint.settings import QUANTIZED_VERSION, SAMPLES, Settings
from wina_calib.checkpoint.side_files import copy_side_files
from wina_calib.checkpoint.verdict import HELD_OUT, QUICK, VERDICT, HeldOut, Verdict
from wina_calib.checkpoint.weight_sample import stored_samples
from wina_calib.checkpoint.writer import write_calibration
from wina_calib.common.devices import backward_batch
from wina_calib.common.distributed import ALONE
from wina_calib.common.memory import resident_bytes
from wina_calib.common.progress import Estimate, Progress, Ticking
from wina_calib.corpus.blocks import Blocks
from wina_calib.masks.rule import MaskRule
from wina_calib.model.locate import DEMO
from wina_calib.model.source import Source, open_source
from wina_calib.quantization.bits import UNQUANTIZED_BITS
from wina_calib.storage import Shards
from wina_calib.storage.resume import Phase, RunState
from wina_calib.transforms import Plan, Rotations, Statistics, fit, needed_sites
from wina_calib.version import versions

QUICK_STEPS = 30
TRANSFORM_SHARE = 4  # one block in this many is kept for fitting the transform


@dataclass(frozen=True)
class Begun:
    """What a calibration has before thresholds are fitted.

    Attributes:
        dense: the dense model with its transformed weights.
        untied: whether its embeddings were untied.
        chosen: the site sparsities.
        base_ppl: perplexity of the original model.
    """

    dense: Source
    untied: bool
    chosen: ChosenBudget
    base_ppl: float


@dataclass(frozen=True)
class Job:
    """One calibration under way."""

    source: Source
    options: CalibrateOptions
    transform: Plan
    blocks: Blocks
    compute: Compute
    report: Progress
    run_state: RunState = field(default_factory=RunState)

    def estimate(self, base: Blocks) -> Estimate:
        """What the work will take; `base` is the text of the original model's perplexity."""
        tokens, options = self._threshold_ids.numel(), self.options
        work = Workload(
            compute=self.compute,
            seq_len=self.blocks.ids.shape[1],
            requested=self.blocks.requested,
            tokens=self.blocks.tokens,
            heldout=base.tokens,
            transform=self._transform_ids.numel() if self._looks_at_text else 0,
            thresholds=tokens,
            curves=usable_tokens(tokens) if self._goes_backward else 0,
            greedy=min(GREEDY_TOKENS, tokens) if options.budget == "greedy" else 0,
            anchors=len(options.anchors),
            closed=options.loop == "closed",
            states=self._fit_states,
            backward=self._backward_batch,
            by_reference=options.weights == "reference",
            steps=self._steps,
            bits=options.bits,
            asked=options.sparsity is not None,
            resident=resident_bytes(),
        )
        return estimate(self.source, self.transform, work)

    @property
    def _steps(self) -> int | None:
        """Steps of the transform's descents; None for its own number."""
        return QUICK_STEPS if self.options.quick else None

    @property
    def _looks_at_text(self) -> bool:
        """Whether the transform is fitted on text."""
        return bool(needed_sites(self.transform.name, self.source.architecture))

    @property
    def _transform_ids(self) -> Tensor:
        """Blocks that a transform is fitted on."""
        return self.blocks.ids[: self._split or None]

    @property
    def _threshold_ids(self) -> Tensor:
        """Blocks that thresholds are fitted on: not the transform's, on which scores are smaller than on new text."""
        return self.blocks.ids[self._split :]

    @property
    def _split(self) -> int:
        if len(self.blocks.ids) < 2 or not self._looks_at_text:
            return 0
        return max(1, len(self.blocks.ids) // TRANSFORM_SHARE)

    def run(self, folder: Path, base: Blocks) -> Settings:
        """Write the whole checkpoint into `folder`, the card left out; returns its settings.

        Every process of `ranks` calls this; the first one writes.
        """
        base_ppl = self._perplexity(base)
        quantizes = weight_format(self.options) is not None
        return self.finish(folder, base, self.begin(folder.with_name("dense") if quantizes else folder, base_ppl))

    def begin(self, folder: Path, base_ppl: float) -> Begun:
        """Transform the weights and choose the budget: what jobs have in common that differ in how weights are stored.

        Args:
            folder: where the transformed weights go. Where they are not quantized it is the checkpoint's.
            base_ppl: perplexity of the original model.
        """
        dense, untied = self._transformed(folder)
        return Begun(dense, untied, self._budget(dense), base_ppl)

    def finish(self, folder: Path, base: Blocks, begun: Begun) -> Settings:
        """Fit thresholds, quantize, and write the checkpoint into `folder`, as `run` does.

        Args:
            folder: the checkpoint's; the one that `begin` wrote where weights are not quantized.
            base: the text of the original model's perplexity.
            begun: what `begin` gave.
        """
        quantizes = weight_format(self.options) is not None
        tensors, measured = self.fit(begun.dense, begun.chosen, base, folder if quantizes else None)
        return self.compute.ranks.first(lambda _: self._write(folder, begun, tensors, base, measured))

    def fit(
        self, source: Source, chosen: ChosenBudget, held: Blocks, folder: Path | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Fit thresholds at every anchor, and quantize the layers' weights where the options say so.

        Args:
            source: the dense model with its transformed weights.
            chosen: the site sparsities.
            held: the text that the sparse model is measured on.
            folder: where quantized layers are written; None leaves weights as they are.

        Returns:
            The tensors to store, and for the provenance what was measured.
        """
        phase = self.run_state.phase("thresholds")
        begun = phase.done_items or phase.finished
        if (
            folder is not None
            and begun
            and not self.compute.ranks.first(lambda _: has_shards(source, self._settings, folder))
        ):
            phase.forget()
        if phase.finished:
            return phase.tensors(), phase.values
        anchors, arch = self.options.anchors, source.architecture
        stream = self._stream(source, self._threshold_ids, states=self._fit_states)
        held_out = HeldOutRun(self._stream(source, held.ids, states=len(anchors) + 1), anchors, held.data)
        self._phase(FIT, len(arch.layers), phase)
        with self._quantizer(source, folder, phase) as quantizer:
            tensors = fit_thresholds(
                stream,
                self._rule,
                self.options,
                chosen.rows,
                quantizer=quantizer,
                held_out=held_out,
                phase=phase,
                progress=self.report,
            )
        self.report.phase(MEASURE, head_parts(arch, self.compute.dtype))
        found = held_out.measured(self.report)
        curves, facts = scaled_curves(chosen, found)
        added, facts = curve_tensors(arch, curves), facts | {HELD_OUT: found.to_dict()}
        phase.finish(tensors=added, values=facts)
        return tensors | added, facts

    @contextmanager
    def _quantizer(self, source: Source, folder: Path | None, phase: Phase) -> Iterator[Quantizer | None]:
        """What quantizes layers and writes them into a folder, going on after those of the phase."""
        form = weight_format(self.options)
        if form is None or folder is None:
            yield None
            return
        into = (
            QuantizedWeights(source, self._settings, folder, phase.done_items) if self.compute.ranks.is_first else None
        )
        try:
            yield Quantizer(form, into, self._settings.modules_to_not_convert)
        except BaseException:
            if into is not None:
                into.leave(keep=phase.is_saved)
            raise
        if into is not None:
            into.leave(keep=True)

    @property
    def _settings(self) -> Settings:
        """The checkpoint's settings, as far as the options say them."""
        chosen, form = self.options, weight_format(self.options)
        settings = Settings(
            sparsity=chosen.anchors[-1] if chosen.sparsity is None else chosen.sparsity,
            anchors=chosen.anchors,
            score=chosen.score,
            masks=chosen.masks,
            select=chosen.select,
            first_token=chosen.first_token,
            exponent=chosen.exponent,
            transform=self.transform.name,
            budget=stored_name(chosen),
            prefill=chosen.prefill,
        )
        if form is None:
            return settings
        return replace(
            settings,
            bits=form.bits,
            group_size=form.group_size,
            zero_point=form.zero_point,
            head_bits=UNQUANTIZED_BITS if chosen.keep_head else 8,
            modules_to_not_convert=kept_modules(chosen, self.source.architecture),
            format_version=QUANTIZED_VERSION,
        )

    def _write(
        self, folder: Path, begun: Begun, tensors: dict[str, Tensor], base: Blocks, measured: dict[str, Any]
    ) -> Settings:
        dense = begun.dense
        held = HeldOut.from_dict(measured[HELD_OUT])
        assert held is not None
        asked, limit = self.options.sparsity, None
        if asked is None:
            limit = self.options.max_ppl_rise
            lowest, highest = allowed(self.options, count_cells(dense.architecture, self.transform.name))
            asked = min(max(held.choose(limit), lowest), highest)
            tensors = at_sparsity(tensors, dense.architecture, self._rule, self.options.anchors, asked)
        stored, settings = dense.shards, replace(self._settings, sparsity=asked)
        if settings.weight_format is not None:
            QuantizedWeights(dense, settings, folder, len(dense.architecture.layers)).write_ends()
            copy_side_files(dense.opened, folder)
            stored = Shards.open(folder)
        budget = partial(budget_at, self.options.anchors, begun.chosen.rows)
        verdict = Verdict.of(held, stored_cells(dense.architecture, settings), asked, limit, budget)
        settings = replace(
            settings,
            curve_levels=CURVE_LEVELS if begun.chosen.curves is not None else (),
            weights=stored.fingerprint(model_names(stored, dense.architecture)),
            samples=SAMPLES if settings.weight_format is None else 0,
            whole_layers=True,
            vocab=dense.architecture.vocab_size,
            provenance=self._provenance(begun, base) | measured | {VERDICT: verdict.to_dict()},
        )
        tensors = {**tensors, **stored_samples(dense.shards, dense.architecture, settings)}
        is_local = self.source.commit is None and self.source.name != DEMO
        base_model = self.source.folder if is_local else None
        remember(settings.weights, settings.provenance, base_model=base_model, data=self.blocks.data)
        if self.options.weights == "reference":
            write_reference(folder, tensors, settings, self.source)
        else:
            write_calibration(
                folder, tensors, settings, self.source, untied=begun.untied, runtime=not self.transform.is_free
            )
        return settings

    def _phase(self, name: str, steps: int, saved: Phase) -> None:
        """Report a phase that begins, or goes on after what is saved of it."""
        if saved.done_items:
            self.report.note(f"{name}: going on after {saved.done_items} of {steps}")
        self.report.phase(name, steps - saved.done_items)

    def _transformed(self, folder: Path) -> tuple[Source, bool]:
        """The dense model to fit on, and whether its embeddings were untied: written here, or the source as it is."""
        if self.options.weights == "reference":
            return self.source, False
        # Only the first process fits and writes: what it saves, it saves alone.
        if self.compute.ranks.is_first:
            folder.mkdir(exist_ok=True)
        run_state = self.run_state if self.compute.ranks.is_first else RunState()
        transform, weights = (run_state.phase(name, ranks=ALONE) for name in ("transform", "weights"))
        statistics = None if self.compute.ranks.from_first(transform.finished) else self._statistics()
        untied = self.compute.ranks.first(
            lambda tick: self._write_weights(folder, statistics, transform, weights, tick)
        )
        return open_source(folder, calibrated=True), untied

    def _write_weights(
        self, folder: Path, statistics: Statistics | None, transform: Phase, weights: Phase, tick: Callable[[], None]
    ) -> bool:
        report = Ticking(self.report, tick)
        rotations = self._rotations(statistics, transform, report)
        self._phase(WRITE, len(self.source.architecture.layers), weights)
        return write_weights(
            self.source, self.transform, rotations, folder, device=self.compute.device, phase=weights, progress=report
        )

    def _stream(self, source: Source, ids: Tensor, *, states: int = 1, spill: bool = True) -> LayerStream:
        """A stream of which `states` hidden states are held at a time."""
        return LayerStream(source, ids, self._holding(ids, states) if spill else replace(self.compute, spill=None))

    def _holding(self, ids: Tensor, states: int) -> Compute:
        nbytes = hidden_bytes(self.source.architecture, ids.numel(), self.compute.dtype)
        return self.compute.holding(states, nbytes)

    @property
    def _fit_states(self) -> int:
        """Hidden states during the fit: one an anchor, the attention block's outputs, and the dense model's where they count."""
        quantizes_dense = self.options.bits > 0 and self.options.sparsity not in self.options.anchors
        return len(self.options.anchors) + 1 + (self.options.loop == "open" or quantizes_dense)

    def _perplexity(self, blocks: Blocks) -> float:
        phase = self.run_state.phase("dense-perplexity")
        if phase.finished:
            return float(phase.values["perplexity"])
        stream = self._stream(self.source, blocks.ids, spill=False)
        arch = self.source.architecture
        self._phase(DENSE, len(arch.layers) + head_parts(arch, self.compute.dtype), phase)
        hidden = dense_pass(stream, phase=phase, progress=self.report)
        found = perplexity(float(next_token_nll(stream, hidden, self.report).double().mean()))
        phase.finish(values={"perplexity": found})
        return found

    def _statistics(self) -> Statistics | None:
        """What the fit of the transform needs to know of activations; None where it looks at weights alone."""
        arch, ids = self.source.architecture, self._transform_ids
        if not self._looks_at_text:
            return None
        phase = self.run_state.phase("statistics")
        statistics = Statistics(arch, self.transform.name, tokens=len(ids) * (ids.shape[1] - 1), seed=self.options.seed)
        if phase.finished:
            statistics.load_state_dict(phase.tensors())
            return statistics
        self._phase(STATISTICS, len(arch.layers), phase)
        dense_pass(self._stream(self.source, ids), statistics, phase=phase, progress=self.report).clear()
        phase.finish()
        return statistics

    def _rotations(self, statistics: Statistics | None, phase: Phase, report: Progress) -> Rotations:
        found = fit(
            self.transform.name,
            self.source.architecture,
            self.source.load_layer,
            statistics,
            seed=self.options.seed,
            steps=self._steps,
            device=self.compute.device,
            phase=phase,
            progress=report,
        )
        if not phase.finished:
            phase.finish()
        return found

    def _budget(self, source: Source) -> ChosenBudget:
        arch, ids = source.architecture, self._threshold_ids
        seq_len = ids.shape[1]
        phase = self.run_state.phase("budget")

        def stream(tokens: int) -> LayerStream:
            if not phase.finished and self.options.budget == "greedy":
                self._phase(GREEDY, len(arch.layers), phase)
            some = ids[: max(1, tokens // seq_len)]
            compute = self._holding(some, len(arch.layers) + 1)
            return LayerStream(source, some, replace(compute, micro_batch=self._backward_batch))

        cells = count_cells(arch, self.transform.name)
        return allocate(self.options, arch, cells, self._rule, ids.numel(), stream, phase=phase, progress=self.report)

    @property
    def _goes_backward(self) -> bool:
        """Whether the budget is chosen by curves."""
        return self.options.budget not in ("uniform", "greedy")

    @property
    def _backward_batch(self) -> int:
        """Blocks that go backward together."""
        return backward_batch(self.compute.device, self.blocks.ids.shape[1], self.source.architecture.width)

    @property
    def _rule(self) -> MaskRule:
        chosen = self.options
        return MaskRule(
            chosen.score, chosen.masks, chosen.exponent, self.transform.name, chosen.select, chosen.first_token
        )

    def _provenance(self, begun: Begun, base: Blocks) -> dict[str, Any]:
        return {
            "base_model": self.source.name if self.source.commit is not None else published(self.source.name),
            "base_commit": self.source.commit,
            "base_ppl": begun.base_ppl,
            "base_ppl_data": list(base.data),
            "base_ppl_tokens": base.tokens,
            "base_ppl_fingerprint": base.fingerprint,
            "data": list(map(published, self.blocks.data)),
            "data_fingerprint": self.blocks.fingerprint,
            "samples": self.blocks.requested,
            "blocks": len(self.blocks.ids),
            "seq_len": self.blocks.ids.shape[1],
            "seed": self.options.seed,
            "loop": self.options.loop,
            "compute_dtype": str(self.compute.dtype).removeprefix("torch."),
            "untied": begun.untied,
            "command": _command(),
            "versions": versions(),
        } | ({QUICK: True} if self.options.quick else {})


def _command() -> str:
    program = Path(sys.argv[0]) if sys.argv and sys.argv[0] else Path("python")
    ours = program.name == "wina-calib" or program.parts[-2:] == ("wina_calib", "__main__.py")
    return published_command(["wina-calib", *sys.argv[1:]]) if ours else "wina_calib.calibrate"
