"""One calibration under way: its phases in order, from the dense model to the finished checkpoint."""

from __future__ import annotations

import platform
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import wina_calib
from wina_calib.allocation import Allocation, allocate, choice_passes, curve_tensors, scaled_curves, stored_name
from wina_calib.cells import count_cells
from wina_calib.checkpoint import model_names, write_calibration, write_weights
from wina_calib.corpus import Blocks
from wina_calib.estimate import Estimate, estimate
from wina_calib.masked import MaskRule
from wina_calib.options import CalibrateOptions
from wina_calib.passes import dense_pass, fit_thresholds
from wina_calib.progress import Progress
from wina_calib.reference import write_reference
from wina_calib.sensitivity import CURVE_LEVELS
from wina_calib.settings import Settings
from wina_calib.source import Source, open_source
from wina_calib.streaming import LayerStream, next_token_nll
from wina_calib.transforms import Plan, Rotations, Statistics, fit, needed_sites

TRANSFORM_SHARE = 4  # one block in this many is kept for fitting the transform
_SPILL_BYTES = 4 << 30
_BACKWARD_TOKENS = {"cpu": 2048, "cuda": 8192}
_BACKWARD_SPILL = 64 << 20  # elements of all layers' inputs


@dataclass(frozen=True)
class Job:
    """One calibration under way."""

    source: Source
    options: CalibrateOptions
    transform: Plan
    blocks: Blocks
    device: torch.device
    dtype: torch.dtype
    micro_batch: int
    report: Progress

    def estimate(self) -> Estimate:
        """What the work will take."""
        return estimate(
            self.source,
            tokens=self.blocks.tokens,
            seq_len=self.blocks.ids.shape[1],
            micro_batch=self.micro_batch,
            anchors=len(self.options.anchors),
            transform=self.transform,
            dtype=self.dtype,
            requested=self.blocks.requested,
            budget_passes=choice_passes(self.options, len(self._threshold_ids) * self.blocks.ids.shape[1]),
        )

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
        if len(self.blocks.ids) < 2 or not needed_sites(self.transform.name, self.source.architecture):
            return 0
        return max(1, len(self.blocks.ids) // TRANSFORM_SHARE)

    def run(self, folder: Path, base: Blocks) -> Settings:
        """Write the whole checkpoint into `folder`, the card left out; returns its settings."""
        base_ppl = self._perplexity(base)
        rotations = self._rotations(folder)
        dense, untied = self._write_weights(rotations, folder)
        del rotations
        chosen = self._budget(dense, folder)
        tensors, curve_facts = self.fit(dense, chosen, folder)
        settings = Settings(
            sparsity=self.options.sparsity,
            anchors=self.options.anchors,
            score=self.options.score,
            masks=self.options.masks,
            select=self.options.select,
            first_token=self.options.first_token,
            exponent=self.options.exponent,
            transform=self.transform.name,
            budget=stored_name(self.options),
            curve_levels=CURVE_LEVELS if chosen.curves is not None else (),
            prefill=self.options.prefill,
            weights=dense.shards.fingerprint(model_names(dense.shards, dense.architecture)),
            provenance=self._provenance(base_ppl, base, untied) | curve_facts,
        )
        if self.options.weights == "reference":
            write_reference(folder, tensors, settings, self.source)
        else:
            runtime = not self.transform.is_free
            write_calibration(folder, tensors, settings, self.source, untied=untied, runtime=runtime)
        return settings

    def fit(self, source: Source, chosen: Allocation, folder: Path | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Fit thresholds at every anchor.

        Args:
            source: the dense model with its transformed weights.
            chosen: the site sparsities.
            folder: where hidden states may be spilled.

        Returns:
            The tensors to store, and for the provenance what was measured.
        """
        stream = self._stream(source, self._threshold_ids, folder)
        self.report.phase("fit thresholds", len(source.architecture.layers))
        tensors, states = fit_thresholds(stream, self._rule, self.options, chosen.rows, self.report.step)
        curves, facts = scaled_curves(chosen, self.options.anchors, stream, states)
        for state in states:
            state.clear()
        return tensors | curve_tensors(source.architecture, curves), facts

    def _write_weights(self, rotations: Rotations, folder: Path) -> tuple[Source, bool]:
        """The dense model to fit on, and whether its embeddings were untied: written here, or the source as it is."""
        if self.options.weights == "reference":
            return self.source, False
        self.report.phase("write weights", len(self.source.architecture.layers))
        untied = write_weights(
            self.source, self.transform, rotations, folder, device=self.device, progress=self.report.step
        )
        return open_source(str(folder), calibrated=True), untied

    def _stream(self, source: Source, ids: Tensor, folder: Path | None) -> LayerStream:
        hidden = ids.numel() * source.architecture.hidden_size * self.dtype.itemsize * (len(self.options.anchors) + 1)
        spill = folder if folder is not None and hidden > _SPILL_BYTES else None
        return LayerStream(source, ids, micro_batch=self.micro_batch, dtype=self.dtype, device=self.device, spill=spill)

    def _perplexity(self, blocks: Blocks) -> float:
        stream = self._stream(self.source, blocks.ids, None)
        self.report.phase("dense perplexity", len(self.source.architecture.layers))
        return float(next_token_nll(stream, dense_pass(stream, progress=self.report.step)).double().mean().exp())

    def _rotations(self, folder: Path) -> Rotations:
        arch = self.source.architecture
        statistics: Statistics | None = None
        if needed_sites(self.transform.name, arch):
            ids = self._transform_ids
            statistics = Statistics(
                arch, self.transform.name, tokens=len(ids) * (ids.shape[1] - 1), seed=self.options.seed
            )
            self.report.phase("statistics", len(arch.layers))
            dense_pass(self._stream(self.source, ids, folder), statistics.update, self.report.step).clear()
        self.report.phase(f"fit transform {self.transform.name}", 0)
        return fit(
            self.transform.name,
            arch,
            self.source.load_layer,
            statistics,
            seed=self.options.seed,
            device=self.device,
            progress=self.report.step,
        )

    def _budget(self, source: Source, folder: Path) -> Allocation:
        arch, ids = source.architecture, self._threshold_ids
        seq_len = ids.shape[1]

        def stream(tokens: int) -> LayerStream:
            self.report.phase("choose budget", 2 * len(arch.layers))
            some = ids[: max(1, tokens // seq_len)]
            return LayerStream(
                source,
                some,
                micro_batch=max(1, _BACKWARD_TOKENS.get(self.device.type, 2048) // seq_len),
                dtype=self.dtype,
                device=self.device,
                spill=folder if some.numel() * arch.hidden_size * len(arch.layers) > _BACKWARD_SPILL else None,
            )

        return allocate(
            self.options, arch, count_cells(arch, self.transform.name), self._rule, stream, self.report.step
        )

    @property
    def _rule(self) -> MaskRule:
        chosen = self.options
        return MaskRule(
            chosen.score, chosen.masks, chosen.exponent, self.transform.name, chosen.select, chosen.first_token
        )

    def _provenance(self, base_ppl: float, base: Blocks, untied: bool) -> dict[str, Any]:
        return {
            "base_model": self.source.name,
            "base_commit": self.source.commit,
            "base_ppl": base_ppl,
            "base_ppl_data": list(base.data),
            "base_ppl_tokens": base.tokens,
            "base_ppl_fingerprint": base.fingerprint,
            "data": list(self.blocks.data),
            "data_fingerprint": self.blocks.fingerprint,
            "samples": self.blocks.requested,
            "blocks": len(self.blocks.ids),
            "seq_len": self.blocks.ids.shape[1],
            "seed": self.options.seed,
            "loop": self.options.loop,
            "compute_dtype": str(self.dtype).removeprefix("torch."),
            "untied": untied,
            "command": _command(),
            "versions": versions(),
        }


def versions() -> dict[str, str]:
    """Versions of what computes."""
    return {
        "wina_calib": wina_calib.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _command() -> str:
    name = Path(sys.argv[0]).name if sys.argv else ""
    return (
        shlex.join(["wina-calib", *sys.argv[1:]]) if name in ("wina-calib", "__main__.py") else "wina_calib.calibrate"
    )
