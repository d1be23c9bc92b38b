"""What a solver is asked for, and the room it has: targets, bounds and pinned cells."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from wina_calib.budgets.model import Budget, Cells, Curves, Floats, perplexity_rise
from wina_calib.errors import BudgetError

MAX_SPARSITY = 0.99
"""Highest site sparsity that a solver gives when no upper bound is asked."""

# Room for rounding where a target lies exactly at the end of what is possible.
_SLACK = 1e-12

TargetKind = Literal["sparsity", "read_fraction", "bits_read", "loss_rise", "perplexity_rise"]


@dataclass(frozen=True)
class Target:
    """What a budget must meet.

    Raises:
        BudgetError: the value is impossible for any model.
    """

    # `sparsity` (model sparsity, met exactly), `read_fraction` (lm_head included, met exactly), `bits_read` (bits of
    # decoder weights read over their number, met exactly), or the highest model sparsity whose predicted `loss_rise`
    # (nats per token) or `perplexity_rise` (0.03 is 3 %) stays within `value`
    kind: TargetKind
    value: float  # the number asked for

    def __post_init__(self) -> None:
        if self.kind not in get_args(TargetKind):
            raise BudgetError(f"unknown target {self.kind!r}: use one of {', '.join(get_args(TargetKind))}")
        if not math.isfinite(self.value):
            raise BudgetError(f"target {self.kind} must be a finite number, found {self.value}")
        if self.kind == "sparsity" and not 0 <= self.value < 1:
            raise BudgetError(f"target sparsity must be in [0, 1), found {self.value}")
        if self.kind != "sparsity" and self.value < 0:
            raise BudgetError(f"target {self.kind} must not be negative, found {self.value}")

    @classmethod
    def of(cls, target: "Target | float") -> "Target":
        """`target` itself, or a number as a model sparsity."""
        return target if isinstance(target, Target) else cls("sparsity", float(target))


@dataclass(frozen=True, eq=False)
class Limits:
    """Lowest and highest sparsity of each cell, (layers, sites) float64; equal where a cell is pinned."""

    cells: Cells
    lower: Floats
    upper: Floats

    def sparsity_range(self) -> tuple[float, float]:
        """Lowest and highest model sparsity within the limits."""
        weights, total = self.cells.weights, self.cells.sparse_total
        return float((weights * self.lower).sum() / total), float((weights * self.upper).sum() / total)


def _field(cells: Cells, name: str, value: ArrayLike) -> Floats:
    array = np.asarray(value, dtype=np.float64)
    if array.ndim and array.shape != cells.weights.shape:
        raise BudgetError(f"{name} has shape {array.shape}, expected a number or {cells.weights.shape}")
    return np.broadcast_to(array, cells.weights.shape).copy()


def _first(cells: Cells, wrong: Floats | np.ndarray) -> tuple[int, int] | None:
    found = np.argwhere(wrong)
    return (int(found[0][0]), int(found[0][1])) if len(found) else None


def make_limits(
    cells: Cells,
    lower: ArrayLike = 0.0,
    upper: ArrayLike = MAX_SPARSITY,
    fixed: ArrayLike | None = None,
    *,
    last_level: float = 1.0,
) -> Limits:
    """Check bounds and pinned cells and put them together.

    Args:
        cells: the model.
        lower: scalar or (layers, sites), in [0, 1).
        upper: scalar or (layers, sites), in [0, 1), not below `lower`.
        fixed: (layers, sites), NaN where a cell is free; a pinned cell may lie outside the bounds.
        last_level: a free cell is not taken beyond it (where curves end), unless its lower bound is above.

    Raises:
        BudgetError: a bound or pinned value is outside [0, 1), or a lower bound above its upper bound.
    """
    low, high = _field(cells, "lower", lower), _field(cells, "upper", upper)
    pinned = _field(cells, "fixed", np.nan if fixed is None else fixed)
    for name, array in (("lower bound", low), ("upper bound", high), ("pinned value", pinned)):
        inside = (array >= 0) & (array < 1) | (np.isnan(array) & (name == "pinned value"))
        if where := _first(cells, ~inside):
            raise BudgetError(f"{cells.name(*where)}: {name} {array[where]} is outside [0, 1)")
    if where := _first(cells, low > high):
        raise BudgetError(
            f"{cells.name(*where)}: the lower bound {low[where]:g} is above the upper bound {high[where]:g}"
        )
    high = np.maximum(np.minimum(high, last_level), low)
    free = np.isnan(pinned)
    return Limits(cells, np.where(free, low, pinned), np.where(free, high, pinned))


def _impossible(limits: Limits, asked: str, found: str) -> BudgetError:
    lowest, highest = limits.sparsity_range()
    least, most = (limits.cells.read_fraction_at(s) for s in (highest, lowest))
    return BudgetError(
        f"{asked} cannot be met{found}. With these bounds and pinned cells model sparsity {lowest:.4g} to"
        f" {highest:.4g} (read fraction {most:.4g} to {least:.4g}) is possible; widen the bounds, free cells or change"
        " the target"
    )


def meet(
    limits: Limits, target: Target | float, curves: Curves | None, spread: Callable[[float], Floats]
) -> tuple[float, Floats]:
    """Find the model sparsity that a target asks for and spread it.

    Args:
        limits: bounds and pinned cells.
        target: what to meet; a number is a model sparsity.
        curves: needed for the targets of predicted quality.
        spread: from a model sparsity within the limits to sparsities (layers, sites).

    Returns:
        The model sparsity and the sparsities (layers, sites).

    Raises:
        BudgetError: the limits leave no room for the target; the message gives the range that is possible.
    """
    target = Target.of(target)
    cells = limits.cells
    lowest, highest = limits.sparsity_range()
    exact = {"sparsity": lambda value: value, "read_fraction": cells.sparsity_at, "bits_read": cells.sparsity_at_bits}
    if target.kind in exact:
        sparsity = exact[target.kind](target.value)
        if cells.site_bits is not None and target.kind != "sparsity":
            sparsity = _read_at(cells, target, spread, lowest, highest)
        if not lowest - _SLACK <= sparsity <= highest + _SLACK:
            label, why = "model sparsity", ""
            if target.kind != "sparsity":
                label, why = target.kind.replace("_", " "), f": it needs model sparsity {sparsity:.4g}"
            raise _impossible(limits, f"{label} {target.value:g}", why)
        sparsity = min(max(sparsity, lowest), highest)
        return sparsity, spread(sparsity)
    if curves is None:
        raise BudgetError(
            f"a target of predicted {target.kind} needs loss curves, and there are none: calibrate with --budget global."
        )
    limit = target.value if target.kind == "loss_rise" else math.log1p(target.value)

    def loss(sparsity: float) -> float:
        return Budget(spread(sparsity)).predicted_loss(curves)

    least = loss(lowest)
    if least > limit + _SLACK:
        prediction = f"loss rise {least:.4g}, perplexity rise {perplexity_rise(least):.2%}"
        raise _impossible(
            limits, f"{target.kind} of at most {target.value:g}", f": the lowest sparsity already predicts {prediction}"
        )
    sparsity = highest if loss(highest) <= limit else _bisect(loss, limit, lowest, highest)
    return sparsity, spread(sparsity)


def _read_at(cells: Cells, target: Target, spread: Callable[[float], Floats], lowest: float, highest: float) -> float:
    """The model sparsity that reads as much as asked where sites differ in bits; outside the limits where none does."""

    def read(sparsity: float) -> float:
        at = cells.read_fraction_at if target.kind == "read_fraction" else cells.bits_read_at
        return -at(spread(sparsity))

    if -read(lowest) < target.value - _SLACK:
        return -1.0
    if -read(highest) > target.value + _SLACK:
        return 2.0
    return _bisect(read, -target.value, lowest, highest)


def _bisect(loss: Callable[[float], float], limit: float, low: float, high: float) -> float:
    """The last sparsity with `loss` within `limit`, given that it is within at `low` and above at `high`."""
    while True:
        middle = (low + high) / 2
        if not low < middle < high or high - low < 1e-13:
            return low
        low, high = (middle, high) if loss(middle) <= limit else (low, middle)
