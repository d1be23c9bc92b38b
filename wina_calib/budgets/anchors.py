"""A family of budgets, one for each sparsity, from the few that a checkpoint stores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from wina_calib.budgets.model import Budget, Cells, Curves, Floats
from wina_calib.budgets.patterns import Setting, select
from wina_calib.budgets.solve import solve_global, uniform
from wina_calib.budgets.target import Target
from wina_calib.errors import BudgetError

MAX_SITE = 0.95


def budget_at(anchors: ArrayLike, rows: ArrayLike, sparsity: float) -> Floats:
    """Site sparsities at any model sparsity.

    Linear between anchors; below the first the first row shrinks to 0 with the sparsity; above the last the kept share
    of the last row shrinks to 0 as the sparsity goes to 1. All three keep weighted means: where every row's weighted
    mean is its anchor, the result's is `sparsity`, whatever the weights.

    Args:
        anchors: (A,) model sparsities, ascending, in [0, 1).
        rows: (A, ...) site sparsities at each anchor, in [0, 1]; the trailing shape is free.
        sparsity: the model sparsity wanted, in [0, 1).

    Returns:
        Site sparsities of the trailing shape, float64; exactly a stored row at an anchor.

    Raises:
        BudgetError: an argument is outside its range or the shapes do not agree.
    """
    known: Floats = np.asarray(anchors, dtype=np.float64)
    table: Floats = np.asarray(rows, dtype=np.float64)
    if known.ndim != 1 or not known.size or table.ndim < 1 or table.shape[0] != known.size:
        raise BudgetError(f"anchors {known.shape} and their budgets {table.shape} do not agree")
    if not ((known >= 0) & (known < 1)).all() or (np.diff(known) <= 0).any():
        raise BudgetError(f"anchors must ascend in [0, 1), found {known.tolist()}")
    if not ((table >= 0) & (table <= 1)).all():
        raise BudgetError("a stored budget holds a sparsity outside [0, 1]")
    if not 0 <= sparsity < 1:
        raise BudgetError(f"sparsity must be in [0, 1), found {sparsity}")
    right = int(np.searchsorted(known, sparsity))
    between: Floats
    if right < known.size and known[right] == sparsity:
        between = table[right].copy()
    elif right == 0:
        between = table[0] * (sparsity / known[0])
    elif right == known.size:
        between = 1.0 - (1.0 - table[-1]) * ((1.0 - sparsity) / (1.0 - known[-1]))
    else:
        share = (sparsity - known[right - 1]) / (known[right] - known[right - 1])
        between = table[right - 1] * (1.0 - share) + table[right] * share
    return between


@dataclass(frozen=True)
class Bounds:
    """Lowest and highest sparsity of every cell, (layers, sites); NaN where nothing was asked."""

    lower: Floats
    upper: Floats

    @classmethod
    def parse(cls, cells: Cells, lowest: Sequence[str], highest: Sequence[str]) -> Bounds:
        """From option texts: a number for all cells, or `PATTERN=NUMBER`; later ones win.

        Raises:
            BudgetError: a text does not parse, matches nothing, or is outside [0, 1).
        """
        return cls(_bound(cells, lowest, "--min"), _bound(cells, highest, "--max"))

    def at(self, sparsity: float, *, strict: bool) -> tuple[Floats, Floats]:
        """Bounds for a solver at a model sparsity.

        Without `strict` they give way as far as needed to contain `sparsity`: bounds are asked for one model sparsity,
        and the anchors around it must stay possible. An upper bound that was not asked for is `MAX_SITE`, or `sparsity`
        if that is more.
        """
        lower, upper = np.nan_to_num(self.lower, nan=0.0), np.nan_to_num(self.upper, nan=max(MAX_SITE, sparsity))
        if strict:
            return lower, upper
        return np.minimum(lower, sparsity), np.maximum(upper, sparsity)


def solve_rows(
    cells: Cells,
    anchors: Sequence[float],
    asked: float,
    bounds: Bounds,
    curves: Curves | None,
    fixed: Floats | None = None,
) -> Floats:
    """Site sparsities (anchors, layers, sites): `global` with curves, `uniform` without.

    Pinned cells keep their sparsity at every anchor that leaves room for them; elsewhere all cells are free.

    Raises:
        BudgetError: bounds and pinned cells leave no room for the asked sparsity.
    """
    rows: list[Any] = []
    for anchor in anchors:
        lower, upper = bounds.at(anchor, strict=anchor == asked)
        try:
            rows.append(solve(cells, curves, anchor, lower, upper, fixed).sparsities)
        except BudgetError:
            if anchor == asked or fixed is None:
                raise
            rows.append(solve(cells, curves, anchor, lower, upper, None).sparsities)
    return np.array(rows)


def spread(anchors: Sequence[float], cells: Cells, sparsities: Floats) -> Floats:
    """Rows (anchors, layers, sites) through one given budget (layers, sites): less and more of the same."""
    own = float((cells.weights * sparsities).sum() / cells.sparse_total)
    if own == 0:
        return np.stack([np.full_like(sparsities, anchor) if anchor else sparsities for anchor in anchors])
    return np.stack([sparsities if anchor == own else budget_at([own], sparsities[None], anchor) for anchor in anchors])


def solve(
    cells: Cells, curves: Curves | None, target: Target | float, lower: Floats, upper: Floats, fixed: Floats | None
) -> Budget:
    """The global budget where there are curves, the uniform one otherwise."""
    if curves is None:
        return uniform(cells, target, lower=lower, upper=upper, fixed=fixed)
    return solve_global(cells, curves, target, lower=lower, upper=upper, fixed=fixed)


def _bound(cells: Cells, texts: Sequence[str], flag: str) -> Floats:
    values = np.full(cells.weights.shape, np.nan)
    for text in texts:
        try:
            setting = Setting.parse_option(text if "=" in text else f"*={text}")
            if setting.relative or not 0 <= setting.value < 1:
                raise BudgetError("expected a sparsity in [0, 1)")
            values[select(setting.pattern, cells)] = setting.value
        except BudgetError as error:
            raise BudgetError(f"{flag} {text}: {error}") from error
    return values
