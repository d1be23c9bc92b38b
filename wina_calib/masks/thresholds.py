"""From stored quantile tables to thresholds: the one rule that calibration and runtime share.

A table holds, for one mask group, the score quantiles at `LEVELS` seen at each anchor, a model sparsity at which the model was
run sparse. A threshold at another model sparsity is interpolated between the two anchors around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wina_calib.budgets import budget_at
from wina_calib.masks.mask import KEEP_ALL

LEVELS = torch.linspace(0.0, 1.0, 201, dtype=torch.float64)


def site_sparsity(anchors: Sequence[float], budget: Any, model_sparsity: float) -> float:
    """A site's sparsity at any model sparsity, from its sparsity (anchors,) at each anchor; exact in the weighted mean."""
    return float(budget_at(anchors, np.asarray(budget, dtype=np.float64), model_sparsity))


def threshold_at(table: Tensor, sparsity: float) -> float:
    """Threshold that drops a share of the scores whose quantiles at `LEVELS` are `table`.

    Args:
        table: (levels,) ascending.
        sparsity: share to drop, in [0, 1].

    Returns:
        The threshold; `KEEP_ALL` for sparsity 0.
    """
    if sparsity <= 0:
        return KEEP_ALL
    position = min(sparsity, 1.0) * (len(LEVELS) - 1)
    low = min(int(position), len(LEVELS) - 2)
    below, above = float(table[low]), float(table[low + 1])
    return below + (above - below) * (position - low)


def threshold_between(tables: Tensor, anchors: Sequence[float], model_sparsity: float, site_sparsity: float) -> float:
    """Threshold of a mask group at any model sparsity.

    Args:
        tables: (anchors, levels) float32.
        anchors: ascending model sparsities at which the rows were fitted.
        model_sparsity: sparsity of the whole model, which decides what inputs the group sees.
        site_sparsity: share of this site's inputs to drop.
    """
    above = next((i for i, anchor in enumerate(anchors) if anchor >= model_sparsity), len(anchors) - 1)
    below = max(above - 1, 0) if anchors[above] > model_sparsity else above
    high = threshold_at(tables[above], site_sparsity)
    if below == above or site_sparsity <= 0:
        return high
    share = (model_sparsity - anchors[below]) / (anchors[above] - anchors[below])
    return (1.0 - share) * threshold_at(tables[below], site_sparsity) + share * high
