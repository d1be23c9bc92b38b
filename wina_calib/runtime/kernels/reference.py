"""The masked dense product: what every other kernel is tested against, and the path that works everywhere."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from wina_calib.masks.mask import mask_inputs
from wina_calib.quantization.formats import TILE_ELEMENTS, Quantized, QuantizedRows


def sparse_site(
    x: Tensor,
    weight_t: Tensor,
    norm: Tensor,
    threshold: Tensor,
    dense_rows: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Masked dense product, differentiable, on either layout of `weight_t`. Arguments as for `dispatch.sparse_site`."""
    return linear(mask_inputs(x, norm, threshold, dense_rows=dense_rows), weight_t.t(), bias)


def dense_quantized(x: Tensor, weight: Quantized) -> Tensor:
    """`x @ W^T` (..., out) of x (..., in) with a mask group's quantized weights, dequantized to x's dtype by tiles."""
    unit = 128  # a whole number of groups, of which an even number share bytes of zeros
    step = max(unit, TILE_ELEMENTS // max(1, weight.width) // unit * unit)
    out = weight.out_features
    parts = (weight.outputs(first, min(first + step, out)) for first in range(0, out, step))
    return torch.cat([linear(x, part.whole(x.dtype)) for part in parts], dim=-1)


def dense_rows_product(x: Tensor, weight: QuantizedRows) -> Tensor:
    """`x @ W^T` (..., rows) of x (..., width) with a matrix quantized by rows, dequantized to x's dtype some rows at a time."""
    rows, width = weight.codes.shape
    step = max(1, TILE_ELEMENTS // max(1, width))
    parts = (QuantizedRows(weight.codes[i : i + step], weight.scales[i : i + step]) for i in range(0, rows, step))
    return torch.cat([linear(x, part.dequantize(x.dtype)) for part in parts], dim=-1)
