"""One calibration: what it works on and with, and what follows from that before any work."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from wina_calib.budgets.count import count_cells
from wina_calib.calibration.choose_budget import GREEDY_TOKENS, ChosenBudget, stored_name
from wina_calib.calibration.compute import Compute
from wina_calib.calibration.cost import Workload, estimate, hidden_bytes
from wina_calib.calibration.layer_stream import LayerStream
from wina_calib.calibration.loss_curves import usable_tokens
from wina_calib.calibration.options import CalibrateOptions
from wina_calib.calibration.quantize_sites import kept_modules, weight_format
from wina_calib.checkpoint.quantized_weights import planned_shards
from wina_calib.checkpoint.settings import QUANTIZED_VERSION, Settings
from wina_calib.common.devices import backward_batch
from wina_calib.common.memory import resident_bytes
from wina_calib.common.progress import Estimate, Progress
from wina_calib.corpus.blocks import Blocks
from wina_calib.masks.rule import MaskRule
from wina_calib.model.source import Source
from wina_calib.quantization.bits import UNQUANTIZED_BITS
from wina_calib.storage.resume import Phase, RunState
from wina_calib.storage.safetensors_layout import nbytes
from wina_calib.transforms import Plan, needed_sites

QUICK_STEPS = 30
TRANSFORM_SHARE = 4  # one block in this many is kept for fitting the transform


@dataclass(frozen=True)
class Job:
    """One calibration."""

    source: Source  # the model
    options: CalibrateOptions  # what was asked for
    transform: Plan  # the plan of its transform
    blocks: Blocks  # the text
    compute: Compute  # where and how
    report: Progress  # hears how it goes on
    run_state: RunState = field(default_factory=RunState)  # what of it is finished already

    def estimate(self, base: Blocks) -> Estimate:
        """What the work will take; `base` is the text of the original model's perplexity."""
        tokens, options = self.threshold_ids.numel(), self.options
        work = Workload(
            compute=self.compute,
            seq_len=self.blocks.ids.shape[1],
            requested=self.blocks.requested,
            tokens=self.blocks.tokens,
            heldout=base.tokens,
            transform=self.transform_ids.numel() if self.looks_at_text else 0,
            thresholds=tokens,
            curves=0 if self.options.budget in ("uniform", "greedy") else usable_tokens(tokens),
            greedy=min(GREEDY_TOKENS, tokens) if options.budget == "greedy" else 0,
            anchors=len(options.anchors),
            closed=options.loop == "closed",
            states=self.fit_states,
            backward=self.backward_batch,
            by_reference=options.weights == "reference",
            steps=self.steps,
            bits=options.bits,
            written=self.written_bytes if options.bits else self.dense_bytes,
            dense=self.dense_bytes if options.bits else 0,
            resident=resident_bytes(),
        )
        return estimate(self.source, self.transform, work)

    @property
    def dense_bytes(self) -> int:
        """Of the transformed weights; 0 where none are written."""
        if self.options.weights == "reference":
            return 0
        return sum(info.nbytes for info in self.source.shards.values()) + self._added_bytes

    @property
    def written_bytes(self) -> int:
        """Of the quantized weights."""
        files = planned_shards(self.source, self.settings).values()
        return sum(nbytes(*spec) for specs in files for spec in specs.values()) + self._added_bytes

    @property
    def _added_bytes(self) -> int:
        """Of run-time matrices, and of the embeddings once more where the transform makes another matrix of a tied lm_head."""
        arch, name = self.source.architecture, self.transform.name
        untied = self.source.shards[f"{arch.embed}.weight"].nbytes if arch.tied and self.transform.residual else 0
        return untied + count_cells(arch, name).runtime_matrices * self.source.dtype.itemsize

    @property
    def steps(self) -> int | None:
        """Steps of the transform's descents; None for its own number."""
        return QUICK_STEPS if self.options.quick else None

    @property
    def looks_at_text(self) -> bool:
        """Whether the transform is fitted on text."""
        return bool(needed_sites(self.transform.name, self.source.architecture))

    @property
    def transform_ids(self) -> Tensor:
        """Blocks that a transform is fitted on."""
        return self.blocks.ids[: self._split or None]

    @property
    def threshold_ids(self) -> Tensor:
        """Blocks that thresholds are fitted on: not the transform's, on which scores are smaller than on new text."""
        return self.blocks.ids[self._split :]

    @property
    def _split(self) -> int:
        if len(self.blocks.ids) < 2 or not self.looks_at_text:
            return 0
        return max(1, len(self.blocks.ids) // TRANSFORM_SHARE)

    @property
    def fit_states(self) -> int:
        """Hidden states during the fit: one an anchor, the attention block's outputs, in open loop the dense model's.

        Where weights are quantized, those of the original and of the quantized model too, and one more of attention.
        """
        return len(self.options.anchors) + 1 + (self.options.loop == "open") + 3 * (self.options.bits > 0)

    @property
    def backward_batch(self) -> int:
        """Blocks that go backward together."""
        return backward_batch(self.compute.device, self.blocks.ids.shape[1], self.source.architecture.width)

    @property
    def rule(self) -> MaskRule:
        """How masks are made."""
        return self.settings.rule

    @property
    def settings(self) -> Settings:
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

    def stream(self, source: Source, ids: Tensor, *, states: int = 1, spill: bool = True) -> LayerStream:
        """A stream of which `states` hidden states are held at a time."""
        return LayerStream(source, ids, self.holding(ids, states) if spill else replace(self.compute, spill=None))

    def holding(self, ids: Tensor, states: int) -> Compute:
        """Where and how to compute what holds `states` hidden states of some tokens at a time."""
        nbytes = hidden_bytes(self.source.architecture, ids.numel(), self.compute.dtype)
        return self.compute.holding(states, nbytes)

    def announce(self, name: str, steps: int, saved: Phase) -> None:
        """Report a phase that begins, or goes on after what is saved of it."""
        if saved.done_items:
            self.report.note(f"{name}: going on after {saved.done_items} of {steps}")
        self.report.phase(name, steps - saved.done_items)


@dataclass(frozen=True)
class Begun:
    """What a calibration has before thresholds are fitted."""

    dense: Source  # the dense model with its transformed weights
    untied: bool  # whether its embeddings were untied
    chosen: ChosenBudget  # the site sparsities
    base_ppl: float  # perplexity of the original model
