"""What sparsity costs: a budget's predictions, and measurements, at every model sparsity."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from wina_calib.budgets import Budget, totals
from wina_calib.calibration.rebudget import Choice
from wina_calib.errors import BudgetError


class Measure(Protocol):
    """Measures a budget: (perplexity, dense perplexity, achieved model sparsity)."""

    def __call__(self, sparsity: float, budget: Budget) -> tuple[float, float, float]:
        """Measure `budget`, whose model sparsity is `sparsity`."""


def frontier(choice: Choice, step: float, measure: Measure | None = None) -> list[dict[str, float | None]]:
    """What sparsity costs, from 0 to 0.9: predicted, and measured where a way to measure is given.

    Args:
        choice: pins and bounds to keep.
        step: between model sparsities.
        measure: for instance an evaluation on text.
    """
    base = choice.opened.settings.provenance.get("base_ppl")
    dense = float(base) if isinstance(base, int | float) else None
    points: list[dict[str, float | None]] = []
    for sparsity in np.arange(0.0, 0.9 + step / 2, step).round(4).tolist():
        try:
            budget = choice.at(sparsity)
        except BudgetError:
            continue
        found = totals(choice.cells, budget, choice.curves)
        point: dict[str, float | None] = {
            "sparsity": sparsity,
            "read_fraction": found.read_fraction,
            "speedup_limit": found.speedup_limit,
            "predicted_loss_rise": found.loss_rise,
            "predicted_ppl": None
            if dense is None or found.loss_rise is None
            else dense * float(np.exp(found.loss_rise)),
        }
        if measure is not None:
            ppl, dense_ppl, achieved = measure(sparsity, budget)
            rise = found.loss_rise
            point |= {
                "predicted_ppl": None if rise is None else dense_ppl * float(np.exp(rise)),
                "measured_ppl": ppl,
                "measured_sparsity": achieved,
            }
        points.append(point)
    if not points:
        raise BudgetError("no model sparsity on the grid is possible with these pins and bounds. Free some cells.")
    return points
