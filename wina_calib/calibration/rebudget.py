"""A calibrated checkpoint's budget chosen anew, and what sparsity costs it: its frontier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from wina_calib.budgets import Budget, Cells, Curves, Setting, Target, Totals, fixed_cells, perplexity_rise, totals
from wina_calib.budgets.anchors import Bounds, solve, solve_rows, spread
from wina_calib.budgets.count import model_key
from wina_calib.budgets.file import file_budget
from wina_calib.budgets.model import Floats
from wina_calib.calibration.scale_curves import stored_curves
from wina_calib.checkpoint.format import stored_cells
from wina_calib.checkpoint.reader import Checkpoint
from wina_calib.checkpoint.verdict import HELD_OUT, HeldOut
from wina_calib.errors import BudgetError

_OWN = 0.01  # mean difference of site sparsities up to which a budget is the checkpoint's own


@dataclass(frozen=True)
class Request:
    """What a budget is asked to be."""

    file: str | None = None  # a budget file to start from instead of the stored budget
    target: Target | None = None  # what the budget must meet; None keeps the model sparsity
    settings: tuple[Setting, ...] = ()  # cells to set and pin
    frozen: tuple[str, ...] = ()  # patterns of cells to pin at what they have
    lowest: tuple[str, ...] = ()  # lower bounds of free cells, each `[PATTERN=]SPARSITY`
    highest: tuple[str, ...] = ()  # upper bounds, likewise


@dataclass(frozen=True, eq=False)
class Choice:
    """A budget chosen for a checkpoint."""

    opened: Checkpoint  # the checkpoint
    cells: Cells  # its element counts
    curves: Curves | None  # its predicted loss rises; None where calibration computed no gradients
    budget: Budget  # the site sparsities
    sparsity: float  # their model sparsity
    name: str  # how they were chosen, for the checkpoint's settings
    bounds: Bounds  # bounds of free cells
    fixed: Floats | None  # (layers, sites), NaN where a cell is free; None where all are
    kind: str  # `stored` (the checkpoint's own at this sparsity), `file` (as in a file) or `solved`

    @property
    def totals(self) -> Totals:
        """What the budget costs and is predicted to do."""
        return totals(self.cells, self.budget, self.curves)

    @property
    def quantizing(self) -> float:
        """Loss rise (nats/token) over the original model that quantizing alone costs, which curves leave out; 0 without it."""
        if self.opened.settings.weight_format is None:
            return 0.0
        held = HeldOut.from_dict(self.opened.settings.provenance.get(HELD_OUT))
        return 0.0 if held is None else held.base

    def over_original(self, loss_rise: float | None) -> float | None:
        """Predicted relative rise of perplexity over the original model; None where weights are not quantized, or unknown."""
        return None if loss_rise is None or not self.quantizing else perplexity_rise(loss_rise + self.quantizing)

    @property
    def verdict_rise(self) -> float | None:
        """The rise of perplexity that the checkpoint's verdict tells at this sparsity; None where the budget is another one."""
        held = HeldOut.from_dict(self.opened.settings.provenance.get(HELD_OUT))
        if held is None or np.abs(self.opened.sparsities(self.sparsity) - self.budget.sparsities).mean() > _OWN:
            return None
        return held.rise_at(self.sparsity)

    def rows(self, anchors: Sequence[float]) -> Floats:
        """Site sparsities (anchors, layers, sites): this budget at its own sparsity, and what goes with it elsewhere."""
        own = np.array(self.budget.sparsities)
        if self.kind == "stored":
            rows = np.stack([self.opened.sparsities(anchor) for anchor in anchors])
        elif self.kind == "file":
            rows = spread(anchors, self.cells, own)
        else:
            others = [anchor for anchor in anchors if anchor != self.sparsity]
            solved = iter(solve_rows(self.cells, others, -1.0, self.bounds, self.curves, self.fixed) if others else ())
            rows = np.stack([own if anchor == self.sparsity else next(solved) for anchor in anchors])
        for index, anchor in enumerate(anchors):
            if anchor == self.sparsity:
                rows[index] = own
        return rows

    def at(self, sparsity: float) -> Budget:
        """The budget that goes with this one at another model sparsity; pinned cells stay, or the sparsity is refused.

        Raises:
            BudgetError: pinned cells and bounds leave no room for it.
        """
        if self.kind != "solved":
            return Budget(self.rows([sparsity])[0])
        lower, upper = self.bounds.at(sparsity, strict=False)
        return solve(self.cells, self.curves, Target("sparsity", sparsity), lower, upper, self.fixed)


def choose(opened: Checkpoint, request: Request) -> Choice:
    """Choose site sparsities for a checkpoint.

    Raises:
        BudgetError: the request is impossible, names no cell, or comes from a file for another model.
    """
    settings = opened.settings
    cells = stored_cells(opened.architecture, settings)
    curves = stored_curves(opened)
    bounds = Bounds.parse(cells, request.lowest, request.highest)
    if request.file is not None:
        base, own = file_budget(request.file, model_key(opened.architecture, cells), cells)
    else:
        base, own = opened.sparsities(settings.sparsity), settings.sparsity
    fixed = None
    if request.settings or request.frozen:
        fixed = fixed_cells(Budget(base), cells, request.settings, request.frozen)
    target, bounded = request.target, bool(request.lowest or request.highest)
    if target is None and fixed is None and not bounded:
        # A free global budget is what the solver gives at every sparsity, exactly and beyond the anchors too.
        own_kind = "solved" if settings.budget == "global" and curves is not None else "stored"
        kind, name = ("file", "file") if request.file is not None else (own_kind, settings.budget)
        return Choice(opened, cells, curves, Budget(base), own, name, bounds, None, kind)
    if target is None:
        all_pinned = fixed is not None and not np.isnan(fixed).any()
        pinned = Budget(fixed).model_sparsity(cells) if all_pinned and fixed is not None else own
        target = Target("sparsity", pinned)
    lower, upper = bounds.at(target.value if target.kind == "sparsity" else 0.0, strict=True)
    budget = solve(cells, curves, target, lower, upper, fixed)
    sparsity = target.value if target.kind == "sparsity" else budget.model_sparsity(cells)
    if curves is None and fixed is None and not bounded and request.file is None:
        stored = Budget(opened.sparsities(sparsity))
        return Choice(opened, cells, None, stored, sparsity, settings.budget, bounds, None, "stored")
    name = "custom" if fixed is not None or bounded else "uniform" if curves is None else "global"
    return Choice(opened, cells, curves, budget, sparsity, name, bounds, fixed, "solved")


class Measure(Protocol):
    """Measures a budget: (perplexity, dense perplexity, achieved model sparsity)."""

    def __call__(self, sparsity: float, budget: Budget) -> tuple[float, float, float]:
        """Measure `budget`, whose model sparsity is `sparsity`."""


def frontier(choice: Choice, step: float, measure: Measure | None = None) -> list[dict[str, float | None]]:
    """What sparsity costs, from 0 to 0.9: predicted, and measured where a way to measure is given."""
    base = choice.opened.settings.provenance.get("base_ppl")
    dense = float(base) if isinstance(base, int | float) else None
    points: list[dict[str, float | None]] = []
    for sparsity in np.arange(0.0, 0.9 + step / 2, step).round(4).tolist():
        try:
            budget = choice.at(sparsity)
        except BudgetError:
            continue
        sums = totals(choice.cells, budget, choice.curves)
        point: dict[str, float | None] = {
            "sparsity": sparsity,
            "read_fraction": sums.read_fraction,
            "speedup_limit": sums.speedup_limit,
            "predicted_loss_rise": sums.loss_rise,
            "predicted_ppl": None
            if dense is None or sums.loss_rise is None
            else dense * (1 + perplexity_rise(sums.loss_rise + choice.quantizing)),
        }
        if choice.quantizing:
            point["predicted_rise_over_original"] = choice.over_original(sums.loss_rise)
        if measure is not None:
            ppl, dense_ppl, achieved = measure(sparsity, budget)
            rise = sums.loss_rise
            point |= {
                "predicted_ppl": None if rise is None else dense_ppl * float(np.exp(rise)),
                "measured_ppl": ppl,
                "measured_sparsity": achieved,
            }
        points.append(point)
    if not points:
        raise BudgetError("no model sparsity on the grid is possible with these pins and bounds. Free some cells.")
    return points
