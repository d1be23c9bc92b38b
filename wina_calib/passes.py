"""Passes of a calibration over its text, one decoder layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wina_calib.checkpoint import SiteTensors
from wina_calib.families import SITES
from wina_calib.fit import SiteFit, dense_tables, fit_layer, run_layer
from wina_calib.masked import MaskedLayer, MaskRule
from wina_calib.options import CalibrateOptions
from wina_calib.streaming import HiddenStates, LayerStream
from wina_calib.tables import site_sparsity, threshold_between

Observe = Callable[[int, str, Tensor, int], None]


@torch.no_grad()
def dense_pass(
    stream: LayerStream, observe: Observe | None = None, progress: Callable[[str], None] = lambda _: None
) -> HiddenStates:
    """Run the dense model and return its last hidden states.

    Args:
        stream: the model and the tokens.
        observe: sees each site's inputs without first tokens, as `observe(layer, site, rows, first_row)`.
        progress: called for every layer.
    """
    arch = stream.source.architecture
    hidden = stream.embed()
    for index, module, _ in stream.layers():
        first = 0
        with MaskedLayer(arch.layers[index], module, MaskRule("teal"), {}) as layer:
            for batch, ids in enumerate(stream.batches):
                rows = first
                if observe is not None:
                    layer.observe = lambda site, x: observe(index, site, x[:, 1:].flatten(0, 1), rows)  # noqa: B023
                hidden[batch] = layer.run(hidden[batch], stream.kwargs(index, batch))
                first += len(ids) * (ids.shape[1] - 1)
        progress(f"layer {index + 1}")
    return hidden


def fit_thresholds(
    stream: LayerStream,
    rule: MaskRule,
    options: CalibrateOptions,
    rows: np.ndarray[Any, Any],
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[dict[str, Tensor], list[HiddenStates]]:
    """Fit thresholds at every anchor.

    Args:
        stream: the dense model, transformed already, and the tokens to use.
        rule: how masks are made.
        options: anchors, the asked sparsity and the kind of loop.
        rows: (anchors, layers, sites) site sparsities.
        progress: called for every layer.

    Returns:
        The tensors to store, and the last hidden states of the sparse model at each anchor.
    """
    arch, anchors = stream.source.architecture, options.anchors
    start = stream.embed()
    states = [start, *(stream.store() for _ in anchors[1:])]
    for state in states[1:]:
        state.copy_from(start, len(stream.batches))
    dense = stream.store() if options.loop == "open" else None
    if dense is not None:
        dense.copy_from(start, len(stream.batches))
    tensors: dict[str, Tensor] = {}
    for index, module, _ in stream.layers():
        rotations = {s: q.to(stream.device, stream.dtype) for s, q in stream.source.rotations(index).items()}
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
                stored = site_tensors(masked, site.name, [f[site.name] for f in fits], rows[:, index, s], options)
                tensors |= stored.named(layer.prefix, site.name)
        worst = max(fits[-1].items(), key=lambda item: item[1].error)
        progress(f"layer {index + 1}: {worst[0]} off by {worst[1].error:.0%} at {anchors[-1]:.0%}")
    if dense is not None:
        dense.clear()
    return tensors, states


def site_tensors(
    masked: MaskedLayer, site: str, fits: Sequence[SiteFit], budget: np.ndarray[Any, Any], options: CalibrateOptions
) -> SiteTensors:
    """What is stored for one site: `fits` and the site's sparsities `budget` (anchors,), one for each anchor."""
    anchors, groups = options.anchors, masked.groups[site]
    budget = budget.astype(np.float32)  # as it is stored, so that loading computes the same thresholds
    tables = {g.name: torch.stack([f.tables[g.key] for f in fits]) for g in groups}
    asked = site_sparsity(anchors, budget, options.sparsity)
    return SiteTensors(
        norms={g.name: masked.norms[g.key].cpu() for g in groups},
        tables=tables,
        thresholds={
            name: torch.tensor(threshold_between(table, anchors, options.sparsity, asked))
            for name, table in tables.items()
        },
        budget=torch.from_numpy(budget.copy()),
        error=torch.tensor([f.error for f in fits]),
    )
