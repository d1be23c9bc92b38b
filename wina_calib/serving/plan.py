"""What a server needs of a checkpoint: masks and thresholds by the names of projections. Nothing here knows vLLM."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from wina_calib.checkpoint.format import head_names
from wina_calib.checkpoint.reader import Checkpoint, open_checkpoint
from wina_calib.checkpoint.settings import Settings
from wina_calib.checkpoint.weight_sample import matches
from wina_calib.choices import PREFILL, is_sparsity
from wina_calib.errors import RuntimeLoadError, UsageError
from wina_calib.masks.thresholds import site_sparsity, threshold_between
from wina_calib.model.folder import open_folder
from wina_calib.model.loading import ask, open_weights
from wina_calib.model.locate import resolve
from wina_calib.model.tensor_names import is_rotation
from wina_calib.quantization.formats import Quantized, QuantizedRows
from wina_calib.storage import Shards

VARIABLES = {
    "sparsity": "WINA_SPARSITY",
    "prefill": "WINA_PREFILL",
    "sparse_rows": "WINA_SPARSE_ROWS",
    "calibration": "WINA_CALIBRATION",
}


@dataclass(frozen=True)
class Options:
    """What is chosen at start.

    Attributes:
        calibration: folder or Hub id of a checkpoint by reference to the model that is served; None where that is calibrated.
        sparsity: of the model; None is the checkpoint's.
        prefill: `sparse` or `dense`; None is the checkpoint's.
        sparse_rows: rows of a step up to which each reads its own columns; None is what was measured for the processor.
    """

    sparsity: float | None = None
    prefill: str | None = None
    sparse_rows: int | None = None
    calibration: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.calibration, str | None):
            raise UsageError(f"calibration is {self.calibration!r:.80}; expected a folder or Hub id.")
        if self.sparsity is not None and not is_sparsity(self.sparsity):
            raise UsageError(f"sparsity is {self.sparsity!r:.80}; expected a number in [0, 1).")
        if self.prefill is not None and self.prefill not in PREFILL:
            raise UsageError(f"prefill is {self.prefill!r:.80}; expected one of {', '.join(PREFILL)}.")
        if self.sparse_rows is not None and (type(self.sparse_rows) is not int or self.sparse_rows < 0):
            raise UsageError(f"sparse_rows is {self.sparse_rows!r:.80}; expected a whole number of rows.")


@dataclass(frozen=True)
class Mask:
    """One mask and what it is for.

    Attributes:
        path: how the names of its tensors begin.
        projections: full names of the modules that share it, in order.
        norm: (in,) float32, of the whole model.
        threshold: an input is kept where its score is above it.
        outs: outputs of each projection.
        sample: (projections, samples) elements of their weights; None where there are none.
    """

    path: str
    projections: tuple[str, ...]
    norm: Tensor
    threshold: float
    outs: tuple[int, ...]
    sample: Tensor | None = None

    def knows(self, weight: Tensor) -> bool:
        """Whether a weight (sum of outs, in), the projections' below each other, is the calibration's, as far as is stored."""
        return self.sample is None or all(map(matches, self.sample, weight.split(self.outs)))


@dataclass(frozen=True)
class ServingPlan:
    """A checkpoint as it is served.

    Attributes:
        folder: where it is.
        settings: with the sparsity and the prefill that were chosen.
        calibrated: sparsity that it was calibrated for.
        masks: all, in order.
        layers: how many.
        sites: how many.
        head: names of the codes and scales of lm_head in int8; None where it is not.
        tied: whether the embedding is lm_head's.
        sparse_rows: as in `Options`.
    """

    folder: Path
    settings: Settings
    calibrated: float
    masks: tuple[Mask, ...]
    layers: int
    sites: int
    head: tuple[str, str] | None
    tied: bool
    sparse_rows: int | None = None

    def by_projection(self) -> dict[str, Mask]:
        """The mask of each projection."""
        return {name: mask for mask in self.masks for name in mask.projections}

    def quantized(self, mask: Mask) -> Quantized | None:
        """The weights of a mask's projections from the files; None where they are not quantized."""
        form, shards = self.settings.weight_format, _shards(self.folder)
        if form is None:
            return None
        parts = [f"{mask.path}.{part}" for part in ("codes", "scales", "zeros")]
        return Quantized.of(form, {name.rpartition(".")[2]: shards.load(name) for name in parts if name in shards})

    def quantized_head(self) -> QuantizedRows | None:
        """lm_head in int8 from the files; None where it is not."""
        return None if self.head is None else QuantizedRows(*(_shards(self.folder).load(name) for name in self.head))


@cache
def _shards(folder: Path) -> Shards:
    return Shards.open(folder)


def options_from(overrides: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> Options:
    """Options as they were given: by name in `overrides`, else in the environment.

    Raises:
        UsageError: a value is out of its range.
    """
    given: dict[str, Any] = {}
    for name, variable in VARIABLES.items():
        if overrides.get(name) is not None:
            given[name] = overrides[name]
        elif environ.get(variable):
            text = environ[variable]
            try:
                given[name] = {"sparsity": float, "sparse_rows": int}.get(name, str)(text)
            except ValueError:
                raise UsageError(f"{variable} is {text!r:.80}; expected a number.") from None
    return Options(**given)


def make_plan(folder: Path, options: Options) -> ServingPlan:
    """Open a checkpoint, check it and choose its thresholds.

    Args:
        folder: of the model that is served: a checkpoint, or the base model that `options.calibration` refers to.
        options: as chosen.

    Raises:
        CheckpointError: it is damaged, incomplete, not calibrated or of a newer format, or made for other weights.
        RuntimeLoadError: it is sound and cannot be served.
    """
    checkpoint, weights = _opened(folder, options.calibration)
    _refuse_what_is_not_served(checkpoint, weights)
    stored = checkpoint.settings
    settings = replace(
        stored,
        sparsity=stored.sparsity if options.sparsity is None else float(options.sparsity),
        prefill=options.prefill or stored.prefill,
    )
    masks = _masks(checkpoint, options.sparsity)
    arch = checkpoint.architecture
    return ServingPlan(
        checkpoint.folder,
        settings,
        stored.sparsity,
        masks,
        len(arch.layers),
        len(list(arch.sites)),
        head_names(arch) if stored.head_bits == 8 else None,
        arch.tied,
        options.sparse_rows,
    )


def _opened(folder: Path, calibration: str | None) -> tuple[Checkpoint, Shards]:
    """A checkpoint, and where the weights that it is for are."""
    checkpoint = open_checkpoint(folder if calibration is None else resolve(calibration)[0])
    if calibration is None and not checkpoint.opened.is_reference:
        return checkpoint, checkpoint.shards
    if calibration is None:
        base = checkpoint.verify_weights()
        return checkpoint, open_weights(base, ask(base))
    if not checkpoint.opened.is_reference:
        raise RuntimeLoadError(
            f"{checkpoint.folder} has weights of its own. Serve it as it is, without WINA_CALIBRATION and --quantization."
        )
    base = open_folder(folder)
    weights = open_weights(base, ask(base))
    checkpoint.verify_base(base, weights)
    return checkpoint, weights


def _masks(checkpoint: Checkpoint, sparsity: float | None) -> tuple[Mask, ...]:
    settings, masks = checkpoint.settings, []
    for layer, site in checkpoint.architecture.sites:
        stored = checkpoint.site(layer, site)
        own = 0.0 if sparsity is None else site_sparsity(settings.anchors, np.asarray(stored.budget), sparsity)
        for group in settings.rule.groups(site):
            threshold = (
                float(stored.thresholds[group.name])
                if sparsity is None
                else threshold_between(stored.tables[group.name], settings.anchors, sparsity, own)
            )
            names = tuple(layer.prefix + p.module for p in group.projections)
            path = f"{layer.prefix}wina.{group.key}"
            rows = [site.projections.index(p) for p in group.projections]
            outs = tuple(p.out_features for p in group.projections)
            sample = None if stored.sample is None else stored.sample[rows]
            masks.append(Mask(path, names, stored.norms[group.name], threshold, outs, sample))
    return tuple(masks)


def _refuse_what_is_not_served(checkpoint: Checkpoint, weights: Shards) -> None:
    """Raise RuntimeLoadError for a checkpoint that vLLM would not compute as wina_calib does."""
    settings, where = checkpoint.settings, checkpoint.folder
    if any(is_rotation(name) for name in checkpoint.shards):
        raise RuntimeLoadError(
            f"{where} needs run-time matrices (transform {settings.transform}), which vLLM has no place for. Calibrate with "
            "--transform auto or none, or load it with wina_calib.load."
        )
    if not settings.has_kernels:
        raise RuntimeLoadError(
            f"{where} was calibrated with select {settings.select} and score {settings.score}; vLLM serves scores wina and teal "
            "above a threshold. Calibrate again without these options, or load it with wina_calib.load."
        )
    if settings.modules_to_not_convert:
        raise RuntimeLoadError(
            f"{where} holds quantized weights and {len(settings.modules_to_not_convert)} projections in 16 bits; vLLM serves "
            "checkpoints of one kind. Calibrate without --keep-16-bit, or load it with wina_calib.load."
        )
    if settings.weight_format is not None:
        return
    dtypes = {
        weights[f"{layer.prefix}{projection.module}.weight"].dtype
        for layer, site in checkpoint.architecture.sites
        for projection in site.projections
    }
    if len(dtypes) > 1:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise RuntimeLoadError(
            f"{where} holds projections of several dtypes ({names}), which vLLM would round to one. Save the model in one dtype "
            "and calibrate it again."
        )
