"""At which level each input is dropped: pure functions."""

from __future__ import annotations

import torch
from torch import Tensor

from wina_calib.masks.histogram import BINS, bin_numbers
from wina_calib.masks.mask import kept_inputs

CURVE_LEVELS = tuple(round(0.025 * i, 3) for i in range(39))


def first_dropped(score: Tensor, thresholds: Tensor) -> Tensor:
    """Index of the first of ascending thresholds (levels,) that each score (rows, in) is at most; uint8, their number if none."""
    if score.is_cuda:
        return torch.bucketize(score.contiguous(), thresholds, out_int32=True).to(torch.uint8)
    # What torch.bucketize finds, in a tenth of its time: the thresholds in lower bins are looked up, those in the same bin
    # are compared one after another.
    counts = torch.bincount(bin_numbers(thresholds), minlength=BINS)
    lower = (counts.cumsum(0) - counts).to(torch.uint8)
    ends = torch.cat([thresholds, thresholds.new_full((1,), torch.inf)])
    level, scores = lower.index_select(0, bin_numbers(score)), score.reshape(-1)
    for _ in range(int(counts.max())):
        level += ends.index_select(0, level.int()) < scores
    return level.view(score.shape)


def dropped_sums(values: Tensor, first: Tensor, levels: int) -> Tensor:
    """Sum of each row's values that a level drops, for every level.

    Args:
        values: (rows, in).
        first: (rows, in), the first level that drops each value, from `first_dropped`.
        levels: their number.

    Returns:
        (rows, levels) float64; NaN or infinite in a row that holds such a value.
    """
    # As whole numbers: these add up to the same in any order, which a GPU's scatter does not keep.
    largest = values.abs().amax(1, keepdim=True).clamp_(min=torch.finfo(values.dtype).tiny).double()
    unit = largest * (values.shape[1] * 2.0**-62)
    bins = torch.zeros(len(values), levels + 1, dtype=torch.int64, device=values.device)
    bins.scatter_add_(1, first.long(), values.double().div_(unit).long())
    return bins[:, :-1].cumsum(1) * unit


def ranks(score: Tensor) -> Tensor:
    """Rank of each score (rows, in) in its row, float32, 1 for the one that top-k selection drops first."""
    order = score.argsort(dim=1, descending=True, stable=True)
    position = torch.arange(score.shape[1], 0, -1, dtype=torch.float32, device=score.device)
    return torch.empty_like(score).scatter_(1, order, position.expand_as(score))


def dropped_ranks(width: int) -> Tensor:
    """Highest rank that top-k selection drops of `width` inputs at the levels above 0, (levels - 1,) float32."""
    return torch.tensor([width - kept_inputs(width, level) for level in CURVE_LEVELS[1:]], dtype=torch.float32)
