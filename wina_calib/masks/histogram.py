"""A mergeable histogram of scores with fixed relative resolution.

Bins are the leading bits of a float32: sign 0, 8 exponent bits, 8 mantissa bits. A bin's edges differ by at most 1/256, so a
quantile is off by less than 0.4 % of its value, whatever the number of tokens. Counts are integers: adding those of two
histograms is exact and does not depend on order.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SHIFT = 15
BINS = 1 << (31 - _SHIFT)
_FINITE_BINS = 0xFF << (23 - _SHIFT)
# torch counts so many bins on a GPU in the fast memory of a multiprocessor; more of them in contended global memory.
_WINDOW = 6000
RELATIVE_ERROR = 2.0 ** (_SHIFT - 23)


class ScoreHistogram:
    """Counts of non-negative float32 scores in 65,280 bins of relative width at most 1/256 (512 KiB)."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64, device=device)

    def update(self, scores: Tensor) -> None:
        """Add scores (any shape, float32, not negative)."""
        index = bin_numbers(scores)
        self.counts += windowed_counts(index) if index.is_cuda else torch.bincount(index, minlength=BINS)

    @property
    def total(self) -> int:
        """Number of scores seen."""
        return int(self.counts.sum())

    @property
    def finite(self) -> bool:
        """Whether every score was finite."""
        return not bool(self.counts[_FINITE_BINS:].any())

    def quantiles(self, levels: Tensor) -> Tensor:
        """Scores below which the given shares lie.

        Args:
            levels: (n,) float64 in [0, 1].

        Returns:
            (n,) float64, interpolated linearly inside a bin; level 0 gives the lower edge of the first bin in use.
        """
        counts = self.counts[:_FINITE_BINS].cpu()
        cumulative = counts.cumsum(0).double()
        target = levels.double().cpu() * cumulative[-1]
        index = torch.searchsorted(cumulative, target).clamp_(max=_FINITE_BINS - 1)
        first = int(torch.nonzero(counts)[0]) if bool(counts.any()) else 0
        index.clamp_(min=first)
        inside = (target - (cumulative[index] - counts[index])) / counts[index].clamp(min=1)
        low, high = _edge(index), _edge(index + 1)
        return low + (high - low) * inside.clamp(0.0, 1.0)


def bin_numbers(scores: Tensor) -> Tensor:
    """The bin of each score (any shape, float32, not negative), (n,) int32."""
    bits = scores.reshape(-1).contiguous().view(torch.int32) & 0x7FFFFFFF  # a NaN may carry a sign
    return bits >> _SHIFT


def windowed_counts(index: Tensor) -> Tensor:
    """How often each bin number of `index` (n,) occurs, (BINS,) int64, quickly where few lie far below the largest.

    Nearly all scores of a site lie within 24 octaves: these are counted first, the few below apart.
    """
    counts = torch.zeros(BINS, dtype=torch.int64, device=index.device)
    if not index.numel():
        return counts
    low = max(0, int(index.max()) + 1 - _WINDOW)
    counts[low : low + _WINDOW] = torch.bincount((index - low).clamp_(min=0), minlength=_WINDOW)
    below = index[index < low]
    counts[low] -= below.numel()
    return counts + torch.bincount(below, minlength=BINS)


def _edge(index: Tensor) -> Tensor:
    """Lower edge of a bin as float64; the edge after the last finite bin is the largest float32."""
    edges = (index.clamp(max=_FINITE_BINS - 1).to(torch.int32) << _SHIFT).view(torch.float32).double()
    return torch.where(index >= _FINITE_BINS, torch.full_like(edges, torch.finfo(torch.float32).max), edges)
