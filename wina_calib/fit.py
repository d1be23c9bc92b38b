"""Closed-loop thresholds: every site is fitted on what all sparse sites before it, in its own layer too, produce.

A layer is fitted for one sparsity in phases over all micro-batches. A phase runs the layer's own forward up to the next site,
whose scores are collected; later phases mask the sites that are fitted already, and replay the attention block's output
instead of computing it again. All phases together cost q, k, v, o and down once, gate and up twice: for a Llama layer about
1.6 plain forward passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from wina_calib.errors import NumericError
from wina_calib.masked import MaskedLayer
from wina_calib.score import scores
from wina_calib.sketch import ScoreHistogram
from wina_calib.streaming import HiddenStates, LayerStream
from wina_calib.tables import LEVELS, threshold_at

Reduce = Callable[[ScoreHistogram], None]


@dataclass(frozen=True)
class SiteFit:
    """What one anchor's fit of one site gives.

    Attributes:
        tables: score quantiles at `LEVELS` by mask group, (levels,) float32.
        sparsity: the site sparsity asked for.
        error: relative output error on the first block.
    """

    tables: dict[str, Tensor]
    sparsity: float
    error: float


@torch.no_grad()
def fit_layer(
    stream: LayerStream,
    masked: MaskedLayer,
    hidden: HiddenStates,
    targets: Mapping[str, float],
    reduce: Reduce,
) -> dict[str, SiteFit]:
    """Fit all sites of one loaded layer for one anchor and replace `hidden` by the sparse layer's outputs.

    Args:
        stream: batches and layer arguments.
        masked: the layer; its thresholds are set on return.
        hidden: the layer's inputs as the sparse layers before it make them.
        targets: sparsity of every site.
        reduce: adds a histogram's counts over all ranks, in place.

    Raises:
        NumericError: a site's input is NaN or infinite.
    """
    layer, batches = masked.layer, range(len(stream.batches))
    o_proj = masked.module.get_submodule(layer.site("attn_out").projections[0].module)
    attention = stream.store()
    masked.thresholds = {}
    fits: dict[str, SiteFit] = {}
    for site in layer.sites:
        histograms = {group.key: ScoreHistogram(stream.device) for group in masked.groups[site.name]}
        sample: Tensor | None = None
        for index in batches:
            kwargs = stream.kwargs(layer.index, index)
            if site.name.startswith("mlp"):
                with masked.replay_attention(attention[index]):
                    x = masked.input_of(site.name, hidden[index], kwargs)
            else:
                x = masked.input_of(site.name, hidden[index], kwargs)
            for key, histogram in histograms.items():
                histogram.update(scores(x[:, 1:], masked.norms[key], masked.rule.score))
            if site.name == "attn_out":
                attention[index] = x
            sample = x[:1] if sample is None else sample
        for histogram in histograms.values():
            reduce(histogram)
            if not histogram.finite:
                raise NumericError(
                    f"layer {layer.index}, {site.name}: inputs are NaN or infinite in {stream.dtype}. Try --dtype float32, or "
                    "check the model with text."
                )
        tables = {key: histogram.quantiles(LEVELS).float() for key, histogram in histograms.items()}
        for key, table in tables.items():
            value = threshold_at(table, targets[site.name])
            masked.thresholds[key] = torch.tensor(value, dtype=torch.float32, device=stream.device)
        assert sample is not None
        error = masked.output_error(site, sample)
        if not math.isfinite(error):
            raise NumericError(
                f"layer {layer.index}, {site.name}: outputs overflow in {stream.dtype}. Try --dtype float32."
            )
        fits[site.name] = SiteFit(tables, targets[site.name], error)
        if site.name == "attn_out":
            group = masked.groups["attn_out"][0]
            for index in batches:
                attention[index] = o_proj.forward(masked.mask(group, attention[index]))  # past the hooks
    for index in batches:
        with masked.replay_attention(attention[index]):
            hidden[index] = masked.run(hidden[index], stream.kwargs(layer.index, index))
    attention.clear()
    return fits
