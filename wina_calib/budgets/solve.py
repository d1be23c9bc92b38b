"""Spreading a sparsity over the cells: the same everywhere, or where the loss feels it least."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from wina_calib.budgets.model import Budget, Cells, Curves, Floats
from wina_calib.budgets.target import MAX_SPARSITY, Limits, Target, make_limits, meet
from wina_calib.errors import BudgetError

# Slopes this close (relatively) are one tie: a sum of products in another order moves a slope by less.
_TIE = 1e-12
# Levels this close to a bound make no segment of their own.
_NARROW = 1e-12


def uniform(
    cells: Cells,
    target: Target | float,
    *,
    curves: Curves | None = None,
    lower: ArrayLike = 0.0,
    upper: ArrayLike = MAX_SPARSITY,
    fixed: ArrayLike | None = None,
) -> Budget:
    """One sparsity for all free cells, clipped to each cell's bounds.

    Args:
        cells: the model.
        target: what to meet; a number is a model sparsity.
        curves: needed only for targets of predicted quality.
        lower: scalar or (layers, sites).
        upper: scalar or (layers, sites).
        fixed: (layers, sites), NaN where a cell is free.

    Returns:
        The budget, exact in model sparsity.

    Raises:
        BudgetError: the target is impossible; the message gives the range that is possible.
    """
    limits = make_limits(cells, lower, upper, fixed)
    _, sparsities = meet(limits, target, curves, lambda sparsity: _level(limits, sparsity))
    return Budget(sparsities)


def solve_global(
    cells: Cells,
    curves: Curves,
    target: Target | float,
    *,
    lower: ArrayLike = 0.0,
    upper: ArrayLike = MAX_SPARSITY,
    fixed: ArrayLike | None = None,
) -> Budget:
    """The budget with the least predicted loss rise, over all layers and sites at once.

    Each cell's curve is replaced by its lower convex hull between its bounds. The multiplier of the budget constraint is
    then a price per element: every hull segment cheaper than it is taken whole, those at the price are taken in the same
    share, so that equal cells get equal sparsities and the budget is met exactly. On convex curves this is the optimum. On
    others it is at most the gap between curve and hull of the cells on the last segments away from it, and never worse than
    `uniform` with the same limits. A free cell does not go beyond the curves' last level. Arguments are as for `uniform`.

    Returns:
        The budget, exact in model sparsity.

    Raises:
        BudgetError: the target is impossible, or the curves are for another shape.
    """
    if curves.loss.shape[:2] != cells.weights.shape:
        raise BudgetError(
            f"curves are for {curves.loss.shape[:2]} (layers, sites), the model has {cells.weights.shape}"
        )
    limits = make_limits(cells, lower, upper, fixed, last_level=float(curves.levels[-1]))
    segments = _segments(limits, curves)

    def spread(sparsity: float) -> Floats:
        bought, level = _buy(limits, segments, sparsity), _level(limits, sparsity)
        bought_loss, level_loss = float(curves.at(bought).sum()), float(curves.at(level).sum())
        # Only curves that are not convex get here: a chord of the hull promises more than the curve keeps.
        return level if level_loss < bought_loss - 1e-12 * max(1.0, bought_loss) else bought

    _, sparsities = meet(limits, target, curves, spread)
    return Budget(sparsities)


def lower_hull(x: Floats, y: Floats) -> list[int]:
    """Indices of the points on the lower convex hull, x ascending; points on a hull edge are left out."""
    hull: list[int] = []
    for point in range(len(x)):
        while len(hull) >= 2:
            a, b = hull[-2], hull[-1]
            if (y[b] - y[a]) * (x[point] - x[b]) < (y[point] - y[b]) * (x[b] - x[a]):
                break
            hull.pop()
        hull.append(point)
    return hull


@dataclass(frozen=True, eq=False)
class _Segments:
    """Hull segments of all cells, cheapest first. Arrays (n,); group arrays have one entry for each tie."""

    cell: NDArray[np.int64]
    length: Floats
    group: NDArray[np.int64]
    group_size: Floats
    group_before: Floats


def _segments(limits: Limits, curves: Curves) -> _Segments:
    weights = limits.cells.weights.reshape(-1)
    lower, upper = limits.lower.reshape(-1), limits.upper.reshape(-1)
    at_lower, at_upper = curves.at(limits.lower).reshape(-1), curves.at(limits.upper).reshape(-1)
    loss = curves.loss.reshape(len(weights), -1)
    segments: list[tuple[float, int, float]] = []  # price per element, cell, length
    for cell in range(len(weights)):
        if upper[cell] - lower[cell] <= _NARROW:
            continue
        inside = (curves.levels > lower[cell] + _NARROW) & (curves.levels < upper[cell] - _NARROW)
        x = np.concatenate(([lower[cell]], curves.levels[inside], [upper[cell]]))
        y = np.concatenate(([at_lower[cell]], loss[cell][inside], [at_upper[cell]]))
        hull = lower_hull(x, y)
        for a, b in zip(hull[:-1], hull[1:], strict=True):
            length = float(x[b] - x[a])
            segments.append((float(y[b] - y[a]) / (length * float(weights[cell])), cell, length))
    segments.sort(key=lambda segment: segment[0])
    group: list[int] = []
    first = 0.0
    for index, (price, _, _) in enumerate(segments):
        if index == 0 or price > first + _TIE * abs(first):
            first = price
            group.append(group[-1] + 1 if group else 0)
        else:
            group.append(group[-1])
    cells = np.array([cell for _, cell, _ in segments], dtype=np.int64)
    lengths = np.array([length for _, _, length in segments], dtype=np.float64)
    groups = np.array(group, dtype=np.int64)
    size: Floats = np.bincount(groups, weights=lengths * weights[cells]).astype(np.float64)
    before: Floats = np.cumsum(size) - size
    return _Segments(cells, lengths, groups, size, before)


def _buy(limits: Limits, segments: _Segments, sparsity: float) -> Floats:
    """Take segments from the cheapest on until the model sparsity is met."""
    weights = limits.cells.weights
    wanted = sparsity * limits.cells.sparse_total - float((weights * limits.lower).sum())
    if not len(segments.cell):
        return limits.lower.copy()
    share = np.clip((wanted - segments.group_before) / segments.group_size, 0.0, 1.0)
    added = np.bincount(segments.cell, weights=share[segments.group] * segments.length, minlength=weights.size)
    bought: Floats = np.clip(limits.lower + added.reshape(weights.shape), limits.lower, limits.upper)
    return bought


def _level(limits: Limits, sparsity: float) -> Floats:
    """clip(v, lower, upper) with the one v that meets the model sparsity."""
    weights, wanted = limits.cells.weights, sparsity * limits.cells.sparse_total
    if (limits.lower <= sparsity).all() and (sparsity <= limits.upper).all():
        return np.full(weights.shape, sparsity)
    marks = np.unique(np.concatenate((limits.lower.reshape(-1), limits.upper.reshape(-1))))
    reached = np.array([(weights * np.clip(mark, limits.lower, limits.upper)).sum() for mark in marks])
    right = int(np.clip(np.searchsorted(reached, wanted), 1, max(len(marks) - 1, 1)))
    if len(marks) == 1:
        return limits.lower.copy()
    rise = reached[right] - reached[right - 1]
    share = (wanted - reached[right - 1]) / rise if rise > 0 else 1.0
    value = marks[right - 1] + min(max(share, 0.0), 1.0) * (marks[right] - marks[right - 1])
    level: Floats = np.clip(value, limits.lower, limits.upper)
    return level
