"""Scores and masks: which inputs of a site are kept. Pure functions on tensors.

The score of input j is `abs(x_j) * norm_j` (WINA, arXiv 2505.19427, section 3); input j is kept where its score is above the
threshold. TEAL's score (arXiv 2408.14690) is the same with all norms 1. `weight` and `random` exist for ablations.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

SCORES = ("wina", "teal", "weight", "random")
SELECT = ("threshold", "topk")
KEEP_ALL = -1.0
Cut = Tensor | int  # a threshold, scalar float32, or how many inputs each row keeps
_ROWS, _ELEMENTS = 1024, 1 << 20  # squared at a time, at most
_TOGETHER = {"cpu": 1 << 20, "cuda": 1 << 24}  # on a GPU, starting the work on a million takes longer than the work


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
        score: one of `SCORES`.

    Returns:
        float32 tensor of the shape of x, not negative.
    """
    if score == "weight":
        return norm.expand(x.shape)
    if score == "random":
        return _hash_uniform(x)
    return x.float().abs_() * norm if x.dtype != torch.float32 else x.abs() * norm


def keep_mask(x: Tensor, norm: Tensor, cut: Cut, score: str = "wina", dense_rows: Tensor | None = None) -> Tensor:
    """Boolean mask of the inputs that are kept: score above the threshold or among the highest, or any in a dense row.

    A NaN counts as kept, so that it shows in the output as it does in a dense model.

    Args:
        x: (..., in).
        norm: (in,) float32.
        cut: scalar float32 tensor, the threshold; a negative one keeps everything. Or how many each row keeps.
        score: one of `SCORES`.
        dense_rows: boolean tensor of the leading shape of x; rows that are never masked.
    """
    found = scores(x, norm, score)
    keep = (found <= cut).logical_not_() if isinstance(cut, Tensor) else keep_top(found, cut)
    return keep if dense_rows is None else keep | dense_rows.unsqueeze(-1)


def mask_input(x: Tensor, norm: Tensor, cut: Cut, score: str = "wina", dense_rows: Tensor | None = None) -> Tensor:
    """Return x with the inputs that are not kept set to zero. Kept values are unchanged, bit for bit."""
    return x.masked_fill(~keep_mask(x, norm, cut, score, dense_rows), 0)


def kept_inputs(width: int, sparsity: float) -> int:
    """How many of `width` inputs top-k selection keeps at a site sparsity: the nearest whole number, at least one."""
    return max(1, width - int(sparsity * width + 0.5))


def keep_top(score: Tensor, keep: int) -> Tensor:
    """Boolean mask (..., in) of the `keep` largest scores of each row; among equal ones the first are kept.

    A NaN counts as kept, so that it shows in the output as it does in a dense model.
    """
    if keep >= score.shape[-1]:
        return torch.ones_like(score, dtype=torch.bool)
    last = _ascending(score, score.shape[-1] - keep)
    kept = (score < last).logical_not_()
    if not torch.compiler.is_compiling() and int(kept.sum()) == keep * kept[..., 0].numel():
        return kept  # no equal scores at the border, as nearly always
    above, equal = (score <= last).logical_not_(), score == last
    room = keep - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= room))


def _ascending(score: Tensor, position: int) -> Tensor:
    """The value (..., 1) at a position of each row in ascending order, NaN last."""
    if score.device.type == "cpu" and score.dtype == torch.float32 and not torch.compiler.is_compiling():
        # NumPy's partition takes a tenth of the time of torch's selection.
        parted = np.partition(score.detach().numpy(), position, axis=-1)
        return torch.from_numpy(parted[..., position : position + 1])
    return score.kthvalue(position + 1, dim=-1, keepdim=True).values


def _hash_uniform(x: Tensor) -> Tensor:
    """A repeatable stand-in for random scores: the bits of (value, column) hashed to [0, 1)."""
    bits = x.float().contiguous().view(torch.int32).to(torch.int64)
    column = torch.arange(x.shape[-1], device=x.device)
    mixed = (bits * 0x2545F491 + column * 0x9E3779B1) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 12)) * 0x297A2D39) & 0xFFFFFFFF
    return ((mixed ^ (mixed >> 15)) >> 8).to(torch.float32) / float(1 << 24)


def rows_together(x: Tensor) -> int:
    """How many rows of x (..., width) are looked at together, so that copies of them take little memory."""
    return max(1, _TOGETHER.get(x.device.type, _TOGETHER["cpu"]) // x.shape[-1])
