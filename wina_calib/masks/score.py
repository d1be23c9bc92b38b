"""Column norms and scores, by which inputs of a site are kept. Pure functions on tensors.

The score of input j is `abs(x_j) * norm_j` (WINA, arXiv 2505.19427, section 3); input j is kept where its score is above the
threshold. TEAL's score (arXiv 2408.14690) is the same with all norms 1. `weight` and `random` exist for ablations.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_ROWS, _ELEMENTS = 1024, 1 << 20  # squared at a time, at most


def column_norms(weights: Iterable[Tensor]) -> Tensor:
    """Joint column norm `c_j = sqrt(sum_p ||W_p[:, j]||^2)` of the projections that share a mask.

    Args:
        weights: one or more tensors of shape (out_p, in).

    Returns:
        float32 tensor of shape (in,), summed in float64.
    """
    total: Tensor | None = None
    for weight in weights:
        for rows in weight.split(max(1, min(_ROWS, _ELEMENTS // weight.shape[1]))):
            square = rows.double().square().sum(0)
            total = square if total is None else total.add_(square)
    if total is None:
        raise ValueError("column_norms needs at least one weight")
    return total.sqrt().float()


def stored_norm(score: str, weights: Iterable[Tensor], exponent: float = 1.0) -> Tensor:
    """The norm vector that the score is computed with: column norms to the power `exponent`, ones for `teal`."""
    norm = column_norms(weights)
    return torch.ones_like(norm) if score == "teal" else norm.pow_(exponent)


def scores(x: Tensor, norm: Tensor, score: str = "wina") -> Tensor:
    """Score of every input.

    Args:
        x: (..., in) inputs of a site, any float dtype.
        norm: (in,) float32, from `stored_norm`.
        score: one of `choices.SCORES`.

    Returns:
        float32 tensor of the shape of x, not negative.
    """
    if score == "weight":
        return norm.expand(x.shape)
    if score == "random":
        return _hash_uniform(x)
    return x.float().abs_() * norm if x.dtype != torch.float32 else x.abs() * norm


def _hash_uniform(x: Tensor) -> Tensor:
    """A repeatable stand-in for random scores: the bits of (value, column) hashed to [0, 1)."""
    bits = x.float().contiguous().view(torch.int32).to(torch.int64)
    column = torch.arange(x.shape[-1], device=x.device)
    mixed = (bits * 0x2545F491 + column * 0x9E3779B1) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 12)) * 0x297A2D39) & 0xFFFFFFFF
    return ((mixed ^ (mixed >> 15)) >> 8).to(torch.float32) / float(1 << 24)
