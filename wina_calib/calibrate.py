"""The pass itself: a model in, a sparse-ready checkpoint out."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import transformers
from torch import Tensor

import wina_calib
from wina_calib.allocation import Allocation, allocate, choice_passes, curve_tensors, scaled_curves, settle, stored_name
from wina_calib.card import write_card
from wina_calib.cells import count_cells
from wina_calib.checkpoint import WINA_FILE, SiteTensors, model_names, open_checkpoint, write_calibration, write_weights
from wina_calib.corpus import HELDOUT_DATA, Blocks, load_blocks
from wina_calib.errors import UsageError
from wina_calib.estimate import Estimate, estimate
from wina_calib.families import SITES
from wina_calib.fit import SiteFit, dense_tables, fit_layer, run_layer
from wina_calib.masked import MaskedLayer, MaskRule
from wina_calib.options import CalibrateOptions, make_options
from wina_calib.output import check_output, output_folder
from wina_calib.reference import check_possible, write_reference
from wina_calib.sensitivity import CURVE_LEVELS
from wina_calib.settings import Settings
from wina_calib.source import Source, open_source
from wina_calib.streaming import HiddenStates, LayerStream, next_token_nll
from wina_calib.tables import site_sparsity, threshold_between
from wina_calib.transforms import Plan, Rotations, Statistics, fit, needed_sites, plan

BASE_TOKENS = 16_384
BASE_SEQ_LEN = 2048
TRANSFORM_SHARE = 4  # one block in this many is kept for fitting the transform
_MICRO_BATCH_TOKENS = {"cpu": 4096, "cuda": 16_384}
_SPILL_BYTES = 4 << 30
_BACKWARD_TOKENS = {"cpu": 2048, "cuda": 8192}
_BACKWARD_SPILL = 64 << 20  # elements of all layers' inputs


class Progress(Protocol):
    """Hears how a calibration goes on."""

    def planned(self, estimate: Estimate) -> None:
        """The work to come, before it begins."""

    def phase(self, name: str, steps: int) -> None:
        """A phase of `steps` steps begins."""

    def step(self, note: str) -> None:
        """One step of the phase is done."""


class Silent:
    """Reports nothing."""

    def planned(self, estimate: Estimate) -> None:
        """Ignore the estimate."""

    def phase(self, name: str, steps: int) -> None:
        """Ignore the phase."""

    def step(self, note: str) -> None:
        """Ignore the step."""


@dataclass(frozen=True)
class Result:
    """What a calibration made: the folder and the settings in its config."""

    folder: Path
    settings: Settings


def calibrate(model: str | Path, output: str | Path, *, progress: Progress | None = None, **options: Any) -> Result:
    """Calibrate a causal language model and write a sparse-ready checkpoint.

    Args:
        model: a Hugging Face model folder, a Hub repository id, or `demo`.
        output: folder to write; it appears whole or not at all.
        progress: hears the estimate, phases and steps.
        **options: the fields of `CalibrateOptions`: sparsity, transform, data, samples, seq_len ...

    Raises:
        WinaError: with a message that says what to do.

    Example:
        ```python
        wina_calib.calibrate("demo", "demo-sparse", sparsity=0.5)
        ```
    """
    chosen = make_options(options)
    target = Path(output)
    check_output(target, overwrite=chosen.overwrite)
    source = open_source(str(model), revision=chosen.revision, trust_remote_code=chosen.trust_remote_code)
    by_reference = chosen.weights == "reference"
    check_output(target, overwrite=chosen.overwrite, keep=source.folder, made=(WINA_FILE,))
    transform = plan("none" if by_reference and chosen.transform == "auto" else chosen.transform, source.architecture)
    if by_reference:
        check_possible(transform)
    chosen = settle(chosen, source.architecture, count_cells(source.architecture, transform.name))
    device = pick_device(chosen.device)
    tokenizer = source.tokenizer()
    seq_len = fitting_length(source, chosen.seq_len)
    blocks = load_blocks(chosen.data, tokenizer, samples=chosen.samples, seq_len=seq_len, seed=chosen.seed)
    job = Job(
        source=source,
        options=chosen,
        transform=transform,
        blocks=blocks,
        device=device,
        dtype=pick_dtype(chosen.dtype, source.dtype, device),
        micro_batch=chosen.micro_batch or default_micro_batch(device, seq_len),
        report=progress or Silent(),
    )
    job.report.planned(job.estimate())
    # A caller's no_grad or inference_mode would take away the gradients that a budget is chosen by.
    with output_folder(target, overwrite=chosen.overwrite) as folder, torch.inference_mode(False), torch.enable_grad():
        settings = job.run(folder, base_blocks(tokenizer, min(seq_len, BASE_SEQ_LEN)))
        open_checkpoint(folder)
        write_card(folder)
    return Result(target, settings)


def base_blocks(tokenizer: Any, seq_len: int) -> Blocks:
    """The stated sample on which the original model's perplexity is kept: built-in held-out text."""
    return load_blocks(
        HELDOUT_DATA, tokenizer, samples=max(1, BASE_TOKENS // seq_len), seq_len=seq_len, seed=0, min_tokens=1
    )


def pick_device(name: str) -> torch.device:
    """`auto` is the first CUDA device where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device, dtype=torch.float64).item()
    except (RuntimeError, AssertionError, TypeError) as error:
        raise UsageError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def pick_dtype(name: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """`auto` is the stored dtype on an accelerator and float32 on a CPU, where 16-bit products are mostly slow."""
    if name != "auto":
        return getattr(torch, name)  # type: ignore[no-any-return]
    return torch.float32 if device.type == "cpu" else stored


def default_micro_batch(device: torch.device, seq_len: int) -> int:
    """Blocks of this length that are computed together on a device."""
    return max(1, _MICRO_BATCH_TOKENS.get(device.type, 4096) // seq_len)


def fitting_length(source: Source, seq_len: int) -> int:
    """Cut a block length to what the model takes."""
    return min(seq_len, int(getattr(source.config, "max_position_embeddings", seq_len)))


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

    def _write_weights(self, rotations: Rotations, folder: Path) -> tuple[Source, bool]:
        """The dense model to fit on, and whether its embeddings were untied: written here, or the source as it is."""
        if self.options.weights == "reference":
            return self.source, False
        self.report.phase("write weights", len(self.source.architecture.layers))
        untied = write_weights(
            self.source, self.transform, rotations, folder, device=self.device, progress=self.report.step
        )
        trust = self.options.trust_remote_code
        return open_source(str(folder), trust_remote_code=trust, calibrated=True), untied

    def _stream(self, source: Source, ids: Tensor, folder: Path | None) -> LayerStream:
        hidden = ids.numel() * source.architecture.hidden_size * self.dtype.itemsize * (len(self.options.anchors) + 1)
        spill = folder if folder is not None and hidden > _SPILL_BYTES else None
        return LayerStream(source, ids, micro_batch=self.micro_batch, dtype=self.dtype, device=self.device, spill=spill)

    def _perplexity(self, blocks: Blocks) -> float:
        stream = self._stream(self.source, blocks.ids, None)
        hidden = self._dense_pass(stream, "dense perplexity", lambda layer, site, x, first: None)
        return float(next_token_nll(stream, hidden).double().mean().exp())

    def _rotations(self, folder: Path) -> Rotations:
        arch = self.source.architecture
        statistics: Statistics | None = None
        if needed_sites(self.transform.name, arch):
            ids = self._transform_ids
            statistics = Statistics(
                arch, self.transform.name, tokens=len(ids) * (ids.shape[1] - 1), seed=self.options.seed
            )
            self._dense_pass(self._stream(self.source, ids, folder), "statistics", statistics.update).clear()
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

    @torch.no_grad()
    def _dense_pass(
        self, stream: LayerStream, name: str, observe: Callable[[int, str, Tensor, int], None]
    ) -> HiddenStates:
        """Run the dense model; show each site's inputs without first tokens to `observe(layer, site, rows, first_row)`."""
        arch = self.source.architecture
        self.report.phase(name, len(arch.layers))
        hidden = stream.embed()
        for index, module, _ in stream.layers():
            first = 0
            with MaskedLayer(arch.layers[index], module, MaskRule("teal"), {}) as layer:
                for batch, ids in enumerate(stream.batches):
                    rows = first
                    layer.observe = lambda site, x: observe(index, site, x[:, 1:].flatten(0, 1), rows)  # noqa: B023
                    hidden[batch] = layer.run(hidden[batch], stream.kwargs(index, batch))
                    first += len(ids) * (ids.shape[1] - 1)
            self.report.step(f"layer {index + 1}")
        return hidden

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

    def fit(self, source: Source, chosen: Allocation, folder: Path | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Fit thresholds at every anchor.

        Args:
            source: the dense model with its transformed weights.
            chosen: the site sparsities.
            folder: where hidden states may be spilled.

        Returns:
            The tensors to store, and for the provenance what was measured.
        """
        arch, anchors, rows, rule = source.architecture, self.options.anchors, chosen.rows, self._rule
        stream = self._stream(source, self._threshold_ids, folder)
        self.report.phase("fit thresholds", len(arch.layers))
        start = stream.embed()
        states = [start, *(stream.store() for _ in anchors[1:])]
        for state in states[1:]:
            state.copy_from(start, len(stream.batches))
        dense = stream.store() if self.options.loop == "open" else None
        if dense is not None:
            dense.copy_from(start, len(stream.batches))
        tensors: dict[str, Tensor] = {}
        for index, module, _ in stream.layers():
            rotations = {s: q.to(self.device, self.dtype) for s, q in source.rotations(index).items()}
            layer = arch.layers[index]
            fits: list[dict[str, SiteFit]] = []
            with MaskedLayer(layer, module, rule, rotations) as masked:
                tables = None if dense is None else dense_tables(stream, masked, dense, lambda histogram: None)
                for a, hidden in enumerate(states):
                    targets = dict(zip(SITES, rows[a, index].tolist(), strict=True))
                    fits.append(
                        fit_layer(stream, masked, hidden, targets, lambda histogram: None)
                        if tables is None
                        else run_layer(stream, masked, hidden, targets, tables)
                    )
                for s, site in enumerate(layer.sites):
                    stored = self._site_tensors(masked, site.name, [f[site.name] for f in fits], rows[:, index, s])
                    tensors |= stored.named(layer.prefix, site.name)
            worst = max(fits[-1].items(), key=lambda item: item[1].error)
            self.report.step(f"layer {index + 1}: {worst[0]} off by {worst[1].error:.0%} at {anchors[-1]:.0%}")
        curves, facts = scaled_curves(chosen, anchors, stream, states)
        for state in (*states, *([dense] if dense is not None else [])):
            state.clear()
        return tensors | curve_tensors(arch, curves), facts

    def _site_tensors(
        self, masked: MaskedLayer, site: str, fits: list[SiteFit], budget: np.ndarray[Any, Any]
    ) -> SiteTensors:
        anchors, groups = self.options.anchors, masked.groups[site]
        budget = budget.astype(np.float32)  # as it is stored, so that loading computes the same thresholds
        tables = {g.name: torch.stack([f.tables[g.key] for f in fits]) for g in groups}
        asked = site_sparsity(anchors, budget, self.options.sparsity)
        return SiteTensors(
            norms={g.name: masked.norms[g.key].cpu() for g in groups},
            tables=tables,
            thresholds={
                name: torch.tensor(threshold_between(table, anchors, self.options.sparsity, asked))
                for name, table in tables.items()
            },
            budget=torch.from_numpy(budget.copy()),
            error=torch.tensor([f.error for f in fits]),
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
            "versions": {
                "wina_calib": wina_calib.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
        }


def _command() -> str:
    name = Path(sys.argv[0]).name if sys.argv else ""
    return (
        shlex.join(["wina-calib", *sys.argv[1:]]) if name in ("wina-calib", "__main__.py") else "wina_calib.calibrate"
    )
