"""Passes of a calibration over its text, one decoder layer in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wina_calib.calibration.fit_layer import SiteFit, dense_tables, fit_layer, run_layer
from wina_calib.calibration.held_out import HeldOutRun
from wina_calib.calibration.layer_stream import LayerStream
from wina_calib.calibration.masked_layer import MaskedLayer
from wina_calib.calibration.options import CalibrateOptions
from wina_calib.calibration.quantize_sites import Quantizer
from wina_calib.checkpoint.format import SiteTensors
from wina_calib.common.progress import SILENT, Progress
from wina_calib.masks.rule import MaskRule
from wina_calib.masks.thresholds import site_sparsity, threshold_between
from wina_calib.model.architecture import SITES, Architecture
from wina_calib.storage.resume import NOT_SAVED, Phase


def fit_thresholds(
    stream: LayerStream,
    rule: MaskRule,
    options: CalibrateOptions,
    rows: np.ndarray[Any, Any],
    *,
    quantizer: Quantizer | None = None,
    held_out: HeldOutRun | None = None,
    phase: Phase = NOT_SAVED,
    progress: Progress = SILENT,
) -> dict[str, Tensor]:
    """Fit thresholds at every anchor, of a layer as soon as its weights are quantized, where they are.

    Args:
        stream: the dense model, transformed already, and the tokens to use.
        rule: how masks are made.
        options: anchors, the asked sparsity and the kind of loop; thresholds are those for the last anchor where none is asked.
        rows: (anchors, layers, sites) site sparsities.
        quantizer: quantizes and writes the weights, or None.
        held_out: run beside the fit.
        phase: where every layer's outputs and tensors are saved.
        progress: hears of every layer.

    Returns:
        The tensors to store.
    """
    arch, anchors = stream.source.architecture, options.anchors
    if held_out is not None and quantizer is not None:
        held_out.with_unmasked()
    start = stream.embed()
    states = [start, *(stream.store() for _ in anchors[1:])]
    dense = stream.store() if options.loop == "open" else None
    for state in [*states[1:], *([] if dense is None else [dense])]:
        state.copy_from(start)
    stores = {f"sparse{a}": state for a, state in enumerate(states)} | ({} if dense is None else {"dense": dense})
    if quantizer is not None:
        stores |= quantizer.begin(stream, start)
    tensors: dict[str, Tensor] = phase.tensors()
    if phase.done_items and held_out is not None:
        held_out.restore(phase)
    more = {} if held_out is None else held_out.stores
    for (index, module), done in phase.each(stream.layers, stores, stream.blocks, progress, more=more):
        layer = arch.layers[index]
        fits: list[dict[str, SiteFit]] = []
        original = None if quantizer is None else deepcopy(module)  # before hooks are on it
        with MaskedLayer(layer, module, rule, stream.rotations(index)) as masked:
            tables = dense_tables(stream, masked, dense) if dense is not None else None
            if held_out is not None:
                held_out.run_dense(masked)  # before its weights change
            if quantizer is not None and original is not None:
                quantizer.quantize_layer(masked, original)
            for a in range(len(anchors)):
                targets = dict(zip(SITES, rows[a, index].tolist(), strict=True))
                if tables is not None:
                    fits.append(run_layer(stream, masked, states[a], targets, tables))
                else:
                    fits.append(fit_layer(stream, masked, states[a], targets))
                if held_out is not None:
                    held_out.run_sparse(masked, a)
            if held_out is not None:
                held_out.run_unmasked(masked)
            new: dict[str, Tensor] = {}
            for s, site in enumerate(layer.sites):
                of_site = [fit[site.name] for fit in fits]
                new |= site_tensors(masked, site.name, of_site, rows[:, index, s], options).named(
                    layer.prefix, site.name
                )
        tensors |= new
        worst = max(fits[-1].items(), key=lambda item: item[1].error)
        done(
            f"layer {index + 1}: own output off by {worst[1].error:.0%} at most ({worst[0]}, at {anchors[-1]:.0%} sparsity)",
            tensors=new,
            values=None if held_out is None else held_out.values,
            prepare=None if quantizer is None else quantizer.sync,
        )
    for state in stores.values():
        state.clear()
    return tensors


def site_tensors(
    masked: MaskedLayer, site: str, fits: Sequence[SiteFit], budget: np.ndarray[Any, Any], options: CalibrateOptions
) -> SiteTensors:
    """What is stored for one site: `fits` and the site's sparsities `budget` (anchors,), one for each anchor."""
    anchors, groups = options.anchors, masked.groups[site]
    budget = budget.astype(np.float32)  # as it is stored, so that loading computes the same thresholds
    tables = {g.name: torch.stack([f.tables[g.key] for f in fits]) for g in groups}
    sparsity = anchors[-1] if options.sparsity is None else options.sparsity
    asked = site_sparsity(anchors, budget, sparsity)
    return SiteTensors(
        norms={g.name: masked.norms[g.key].cpu() for g in groups},
        tables=tables,
        thresholds={
            name: torch.tensor(threshold_between(table, anchors, sparsity, asked)) for name, table in tables.items()
        },
        budget=torch.from_numpy(budget.copy()),
        error=torch.tensor([f.error for f in fits]),
    )


def at_sparsity(
    tensors: Mapping[str, Tensor], arch: Architecture, rule: MaskRule, anchors: Sequence[float], sparsity: float
) -> dict[str, Tensor]:
    """The tensors of a calibration with the thresholds for another model sparsity, from their tables."""
    changed = dict(tensors)
    for layer, site in arch.sites:
        path = f"{layer.prefix}wina.{site.name}"
        own = site_sparsity(anchors, tensors[f"{path}.budget"].numpy(), sparsity)
        for group in rule.groups(site):
            table = tensors[f"{path}.{group.name}.table"]
            changed[f"{path}.{group.name}.threshold"] = torch.tensor(threshold_between(table, anchors, sparsity, own))
    return changed
