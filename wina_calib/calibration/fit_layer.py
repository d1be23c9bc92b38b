"""Closed-loop thresholds: every site is fitted on what all sparse sites before it, in its own layer too, produce.

A layer is fitted for one sparsity in phases over all micro-batches. A phase runs the layer's own forward up to the next site,
whose scores are collected; later phases mask the sites that are fitted already, and replay the attention block's output
instead of computing it again. All phases together cost q, k, v, o and down once, gate and up twice: for a Llama layer about
1.6 plain forward passes.

In open loop, which the papers use, tables come from the dense model's inputs, one pass for all sparsities.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from wina_calib.calibration.layer_stream import LayerStream
from wina_calib.calibration.masked_layer import MaskedLayer
from wina_calib.errors import NumericError
from wina_calib.masks.histogram import ScoreHistogram
from wina_calib.masks.thresholds import LEVELS
from wina_calib.model.architecture import Layer, Site
from wina_calib.storage.hidden_states import HiddenStates

COUNTED_TOKENS = 1 << 13  # so many tokens' scores give a site's quantiles far more exactly than new text meets them


@dataclass(frozen=True)
class SiteFit:
    """What one anchor's fit of one site gives."""

    tables: dict[str, Tensor]  # score quantiles at `LEVELS` by mask group, (levels,) float32
    sparsity: float  # the site sparsity asked for
    error: float  # relative output error on the first block


@torch.no_grad()
def fit_layer(
    stream: LayerStream,
    masked: MaskedLayer,
    hidden: HiddenStates,
    targets: Mapping[str, float],
) -> dict[str, SiteFit]:
    """Fit all sites of one loaded layer for one anchor and replace `hidden` by the sparse layer's outputs.

    `hidden` is what the sparse layers before it make, `targets` the sparsity of every site. The layer's cuts are set on return.

    Raises:
        NumericError: a site's input is NaN or infinite.
    """
    layer, batches = masked.layer, stream.mine
    o_proj = masked.module.get_submodule(layer.site("attn_out").projections[0].module)
    attention = stream.store()
    masked.cuts = {}
    fits: dict[str, SiteFit] = {}
    for site in layer.sites:
        histograms = {group.key: ScoreHistogram(stream.device) for group in masked.groups[site.name]}
        sample: Tensor | None = None
        for index in batches:
            x = site_input(stream, masked, site, hidden, attention, index)
            counted = counted_rows(stream, masked, x)
            for group in masked.groups[site.name]:
                masked.count(group, counted, histograms[group.key])
            if site.name == "attn_out":
                attention[index] = x
            sample = x[:1].clone() if sample is None else sample
        tables = _tables(stream, layer, site, histograms)
        _set_cuts(stream, masked, site, tables, targets[site.name])
        fits[site.name] = SiteFit(tables, targets[site.name], _error(stream, masked, site, sample))
        if site.name == "attn_out":
            group = masked.groups["attn_out"][0]
            for index in batches:
                attention[index] = o_proj.forward(masked.mask_inputs(group, attention[index]))  # past the hooks
    for index in batches:
        with masked.replay_attention(attention[index]):
            hidden[index] = masked.run(hidden[index], stream.kwargs(layer.index, index))
    attention.clear()
    return fits


def site_input(
    stream: LayerStream, masked: MaskedLayer, site: Site, hidden: HiddenStates, attention: HiddenStates, index: int
) -> Tensor:
    """A site's input (batch, seq, width) in a micro-batch; `attention` are the attention block's outputs once it is fitted."""
    kwargs = stream.kwargs(masked.layer.index, index)
    if not site.name.startswith("mlp"):
        return masked.input_of(site.name, hidden[index], kwargs)
    with masked.replay_attention(attention[index]):
        return masked.input_of(site.name, hidden[index], kwargs)


@torch.no_grad()
def dense_tables(stream: LayerStream, masked: MaskedLayer, hidden: HiddenStates) -> dict[str, dict[str, Tensor]]:
    """Score quantiles of one loaded layer on the dense model's inputs, by site and mask group; see `fit_layer`.

    `hidden`, the layer's inputs, is replaced by its outputs.
    """
    layer = masked.layer
    histograms = {s.name: {g.key: ScoreHistogram(stream.device) for g in masked.groups[s.name]} for s in layer.sites}

    def observe(site: str, x: Tensor) -> None:
        counted = counted_rows(stream, masked, x)
        for group in masked.groups[site]:
            masked.count(group, counted, histograms[site][group.key])

    masked.cuts = {}
    stream.run(masked, hidden, observe)
    return {site.name: _tables(stream, layer, site, histograms[site.name]) for site in layer.sites}


@torch.no_grad()
def run_layer(
    stream: LayerStream,
    masked: MaskedLayer,
    hidden: HiddenStates,
    targets: Mapping[str, float],
    tables: Mapping[str, dict[str, Tensor]],
) -> dict[str, SiteFit]:
    """Mask one loaded layer by given tables and replace `hidden` by its outputs; arguments and result as for `fit_layer`."""
    layer, samples = masked.layer, dict[str, Tensor]()
    for site in layer.sites:
        _set_cuts(stream, masked, site, tables[site.name], targets[site.name])

    def observe(site: str, x: Tensor) -> None:
        if site not in samples:
            samples[site] = x[:1].clone()

    stream.run(masked, hidden, observe)
    errors = {site.name: _error(stream, masked, site, samples.get(site.name)) for site in layer.sites}
    return {name: SiteFit(tables[name], targets[name], error) for name, error in errors.items()}


def counted_rows(stream: LayerStream, masked: MaskedLayer, x: Tensor) -> Tensor:
    """The rows (.., width) of x (batch, seq, width) whose scores are counted: those masked, of long texts evenly some."""
    rows = masked.rule.masked_rows(x)
    every = stream.tokens // COUNTED_TOKENS
    if every <= 1:
        return rows
    # Over the blocks laid end to end, by a step without a common factor with their length: else some places in short blocks
    # would be counted again and again, and others never.
    blocks, length = rows.shape[:2]
    while math.gcd(every, length) > 1:
        every -= 1
    chosen = torch.arange(0, blocks * length, every, device=x.device)
    return rows[chosen // length, chosen % length]


def _tables(
    stream: LayerStream, layer: Layer, site: Site, histograms: Mapping[str, ScoreHistogram]
) -> dict[str, Tensor]:
    for histogram in histograms.values():
        stream.ranks.add(histogram.counts)
        if not histogram.finite:
            raise NumericError(
                f"layer {layer.index}, {site.name}: inputs are NaN or infinite in {stream.dtype}. Try --dtype float32, or "
                "check the model with text."
            )
    return {key: histogram.quantiles(LEVELS).float() for key, histogram in histograms.items()}


def _set_cuts(
    stream: LayerStream, masked: MaskedLayer, site: Site, tables: Mapping[str, Tensor], sparsity: float
) -> None:
    for key, table in tables.items():
        masked.cuts[key] = masked.rule.cut(table, sparsity, site.width, stream.device)


def _error(stream: LayerStream, masked: MaskedLayer, site: Site, sample: Tensor | None) -> float:
    """Relative output error of a masked site on the first process's sample of its inputs (blocks, seq, width)."""
    mine = masked.output_error(site, sample) if stream.ranks.is_first and sample is not None else 0.0
    error = stream.ranks.from_first(mine)
    if not math.isfinite(error):
        raise NumericError(
            f"layer {masked.layer.index}, {site.name}: outputs overflow in {stream.dtype}. Try --dtype float32."
        )
    return error
