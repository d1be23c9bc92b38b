"""The masked dense product: what every other kernel is tested against, and the path that works everywhere."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_mask(x: Tensor, norm: Tensor, threshold: Tensor, dense_rows: Tensor | None = None) -> Tensor:
    """The inputs that are kept: `abs(x) * norm > threshold`, compared in float32.

    Args:
        x: (rows, in), any float dtype.
        norm: (in,) float32 factors of the score.
        threshold: () float32; -1 keeps everything.
        dense_rows: (rows,) bool, rows that are never masked.

    Returns:
        (rows, in) bool. A NaN counts as kept, so that it shows in the output as it does in a dense model.
    """
    # 16-bit values times float32 factors are float32; a conversion of its own would be one more pass.
    keep = (x.abs() * norm).le(threshold).logical_not_()
    return keep if dense_rows is None else keep | dense_rows[:, None]


def mask_input(x: Tensor, norm: Tensor, threshold: Tensor, dense_rows: Tensor | None = None) -> Tensor:
    """`x` with its dropped inputs at zero, for callers that do the product themselves.

    A kept value is multiplied by one, which is exact, so at threshold -1 the result has the bits of `x` and
    `F.linear(mask_input(x, ...), W, bias)` the bits of `F.linear(x, W, bias)`. Arguments as for `keep_mask`.
    """
    return x * keep_mask(x, norm, threshold, dense_rows)


def sparse_site(
    x: Tensor,
    weight_t: Tensor,
    norm: Tensor,
    threshold: Tensor,
    dense_rows: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Masked dense product, differentiable, on either layout of `weight_t`. Arguments as for `dispatch.sparse_site`."""
    return torch.nn.functional.linear(mask_input(x, norm, threshold, dense_rows), weight_t.t(), bias)
