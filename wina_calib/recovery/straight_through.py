"""Weights that are quantized in the forward pass and trained as if they were not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from wina_calib.model.architecture import Architecture
from wina_calib.quantization.formats import WeightFormat
from wina_calib.quantization.scales import quantize_nearest

TOGETHER = 1 << 25  # weights that are rounded together


@contextmanager
def straight_through(model: nn.Module, arch: Architecture, form: WeightFormat) -> Iterator[None]:
    """Within the context every projection's weight is as `form` would hold it; gradients are then those of the weight itself.

    A step goes forward and back inside, and moves the weights outside.
    """
    weights = [
        model.get_submodule(layer.prefix + projection.module).get_parameter("weight")
        for layer, site in arch.sites
        for projection in site.projections
    ]
    own = [weight.data for weight in weights]
    for weight, near in zip(weights, rounded(own, form), strict=True):
        weight.data = near
    try:
        yield
    finally:
        for weight, before in zip(weights, own, strict=True):
            weight.data = before


@torch.no_grad()
def rounded(weights: Sequence[Tensor], form: WeightFormat) -> list[Tensor]:
    """Weights (out, in) rounded to the nearest values of a format; many at once, side by side along their outputs."""
    values: dict[int, Tensor] = {}
    by_width: dict[int, list[list[int]]] = defaultdict(lambda: [[]])
    for index, weight in enumerate(weights):
        parts = by_width[weight.shape[1]]
        if parts[-1] and sum(weights[i].numel() for i in parts[-1]) + weight.numel() > TOGETHER:
            parts.append([])
        parts[-1].append(index)
    for part in (part for parts in by_width.values() for part in parts):
        together = torch.cat([weights[i].t().float() for i in part], dim=1)
        near = quantize_nearest(together, form).dequantize().to(weights[part[0]].dtype)
        split = near.split([weights[i].shape[0] for i in part], dim=1)
        values |= {i: one.t().contiguous() for i, one in zip(part, split, strict=True)}
    return [values[i] for i in range(len(weights))]
