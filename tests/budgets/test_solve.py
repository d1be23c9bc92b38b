"""Properties of the solvers: exact, within bounds, pinned cells kept, optimal, monotone."""

import itertools
import math

import numpy as np
import pytest
from budget_cases import bounds, problems, small_cells, smooth_curves
from hypothesis import given, settings
from hypothesis import strategies as st

from wina_calib.budgets import Cells, Curves, Target, make_limits, solve_global, totals, uniform
from wina_calib.budgets.solve import lower_hull
from wina_calib.errors import BudgetError

unit = st.floats(0, 1)


@st.composite
def bounded(draw, *, convex=True):
    cells, curves = draw(problems(convex=convex))
    last = float(curves.levels[-1])
    lower, upper, fixed = draw(bounds(cells, last))
    limits = make_limits(cells, lower, upper, fixed, last_level=last)
    low, high = limits.sparsity_range()
    return cells, curves, {"lower": lower, "upper": upper, "fixed": fixed}, limits, low + draw(unit) * (high - low)


@given(bounded(convex=False))
@settings(deadline=None)
def test_budget_met_within_bounds_and_pins(case):
    cells, curves, options, limits, sparsity = case
    for budget in (solve_global(cells, curves, sparsity, **options), uniform(cells, sparsity, **options)):
        assert budget.model_sparsity(cells) == pytest.approx(sparsity, abs=1e-9)
        assert (budget.sparsities >= limits.lower).all()
        assert (budget.sparsities <= np.where(np.isnan(options["fixed"]), options["upper"], options["fixed"])).all()
        pinned = ~np.isnan(options["fixed"])
        assert (budget.sparsities[pinned] == options["fixed"][pinned]).all()


@given(bounded(convex=False))
@settings(deadline=None)
def test_never_worse_than_uniform(case):
    cells, curves, options, _, sparsity = case
    best = solve_global(cells, curves, sparsity, **options).predicted_loss(curves)
    assert best <= uniform(cells, sparsity, **options).predicted_loss(curves) + 1e-9


@given(bounded(), unit)
@settings(deadline=None)
def test_monotone_in_the_target(case, share):
    cells, curves, options, limits, high = case
    low = limits.sparsity_range()[0]
    less, more = (solve_global(cells, curves, s, **options) for s in (low + share * (high - low), high))
    assert (less.sparsities <= more.sparsities + 1e-9).all()
    assert less.predicted_loss(curves) <= more.predicted_loss(curves) + 1e-9


def brute_force(cells: Cells, curves: Curves, limits, sparsity: float) -> float:
    """Least loss: with piecewise linear curves some optimum has all cells but one on a level or bound."""
    weights, lower, upper = (a.reshape(-1) for a in (cells.weights, limits.lower, limits.upper))
    wanted = sparsity * cells.sparse_total
    choices = [
        sorted({low, high, *curves.levels[(curves.levels > low) & (curves.levels < high)].tolist()})
        for low, high in zip(lower.tolist(), upper.tolist(), strict=True)
    ]
    best = math.inf
    for last in range(len(weights)):
        others = [index for index in range(len(weights)) if index != last]
        for combination in itertools.product(*(choices[index] for index in others)):
            values = np.empty(len(weights))
            values[others] = combination
            values[last] = (wanted - (weights[others] * values[others]).sum()) / weights[last]
            if lower[last] - 1e-9 <= values[last] <= upper[last] + 1e-9:
                best = min(best, float(curves.at(values.reshape(cells.weights.shape)).sum()))
    return best


@st.composite
def tiny(draw, convex=True):
    cells, curves = draw(problems(convex=convex, max_layers=1, max_levels=3))
    lower, upper, _ = draw(bounds(cells, float(curves.levels[-1])))
    limits = make_limits(cells, lower, upper, last_level=float(curves.levels[-1]))
    low, high = limits.sparsity_range()
    return cells, curves, limits, low + draw(unit) * (high - low)


@given(tiny())
@settings(deadline=None, max_examples=60)
def test_optimal_against_brute_force(case):
    cells, curves, limits, sparsity = case
    budget = solve_global(cells, curves, sparsity, lower=limits.lower, upper=limits.upper)
    assert budget.predicted_loss(curves) == pytest.approx(brute_force(cells, curves, limits, sparsity), abs=1e-7)


@given(tiny(convex=False))
@settings(deadline=None, max_examples=40)
def test_curves_that_are_not_convex_cost_at_most_their_gap(case):
    cells, curves, limits, sparsity = case
    loss = solve_global(cells, curves, sparsity, lower=limits.lower, upper=limits.upper).predicted_loss(curves)
    best = brute_force(cells, curves, limits, sparsity)
    gap = 0.0
    for curve in curves.loss.reshape(-1, curves.levels.size):
        hull = lower_hull(curves.levels, curve)
        gap += float((curve - np.interp(curves.levels, curves.levels[hull], curve[hull])).max())
    # Bounds cut the curve, and a hull between bounds lies above the hull of the whole: the gap is at most this.
    assert best - 1e-7 <= loss <= best + gap + 1e-7


@given(problems(convex=False))
@settings(deadline=None)
def test_hull_is_convex_below_and_touches(case):
    _, curves = case
    for curve in curves.loss.reshape(-1, curves.levels.size):
        hull = lower_hull(curves.levels, curve)
        assert hull[0] == 0
        assert hull[-1] == curves.levels.size - 1
        slopes = np.diff(curve[hull]) / np.diff(curves.levels[hull])
        assert (np.diff(slopes) > -1e-12).all()
        assert (np.interp(curves.levels, curves.levels[hull], curve[hull]) <= curve + 1e-12).all()


def test_equal_cells_get_equal_sparsities():
    cells = small_cells()
    levels = np.linspace(0, 0.9, 10)
    # Loss in proportion to the weight: every price is the same up to rounding.
    curves = Curves(levels, cells.weights[..., None] * levels**2)
    found = solve_global(cells, curves, 0.4321).sparsities
    assert np.ptp(found) < 1e-12


def test_a_sensitive_cell_is_spared():
    cells = Cells(("attn_in", "mlp_in"), [[100, 100]])
    levels = np.linspace(0, 0.9, 10)
    curves = Curves(levels, np.stack([10 * levels**2, levels**2])[None])
    found = solve_global(cells, curves, 0.4).sparsities
    assert found[0, 0] < 0.15 < 0.65 < found[0, 1]


def test_free_cells_stay_within_the_measured_levels():
    cells, curves = small_cells(), smooth_curves(last=0.8)
    assert solve_global(cells, curves, 0.8).sparsities.max() <= 0.8
    with pytest.raises(BudgetError, match="0 to 0.8"):
        solve_global(cells, curves, 0.85)


def test_bits_read_are_a_target():
    """2.6 bits of int4 with its scales, of which run-time matrices take their part."""
    cells = small_cells(other_decoder=100, lm_head=3000, runtime_matrices=20, bits=4.3125, head_bits=8.0)
    for budget in (
        solve_global(cells, smooth_curves(), Target("bits_read", 2.6)),
        uniform(cells, Target("bits_read", 2.6)),
    ):
        assert cells.bits_read_at(budget.model_sparsity(cells)) == pytest.approx(2.6, abs=1e-12)
    with pytest.raises(BudgetError, match=r"bits read 9 cannot be met: it needs model sparsity -\d"):
        uniform(cells, Target("bits_read", 9))


def test_read_fraction_target_counts_head_and_runtime_matrices():
    cells = small_cells(other_decoder=100, lm_head=3000, runtime_matrices=500)
    for budget in (
        solve_global(cells, smooth_curves(), Target("read_fraction", 0.7)),
        uniform(cells, Target("read_fraction", 0.7)),
    ):
        assert budget.read_fraction(cells) == pytest.approx(0.7, abs=1e-12)


@pytest.mark.parametrize("kind", ["loss_rise", "perplexity_rise"])
@pytest.mark.parametrize("solver", ["global", "uniform"])
def test_quality_target_finds_the_highest_sparsity(kind, solver):
    cells, curves = small_cells(), smooth_curves()

    def solve(target):
        return solve_global(cells, curves, target) if solver == "global" else uniform(cells, target, curves=curves)

    budget = solve(Target(kind, 0.03))
    assert getattr(totals(cells, budget, curves), kind) == pytest.approx(0.03, abs=1e-9)
    beyond = solve(budget.model_sparsity(cells) + 1e-4)
    assert getattr(totals(cells, beyond, curves), kind) > 0.03


def test_global_reaches_more_than_uniform_at_equal_quality():
    cells, curves = small_cells(), smooth_curves()
    target = Target("perplexity_rise", 0.03)
    found = solve_global(cells, curves, target).model_sparsity(cells)
    assert found > uniform(cells, target, curves=curves).model_sparsity(cells) + 0.01


def test_generous_quality_target_ends_at_the_bounds():
    budget = solve_global(small_cells(), smooth_curves(), Target("perplexity_rise", 1e9), upper=0.7)
    assert (budget.sparsities == 0.7).all()


def test_uniform_is_exactly_the_number():
    assert (uniform(small_cells(), 0.3).sparsities == 0.3).all()
    assert (uniform(small_cells(), 0.0).sparsities == 0.0).all()


def test_uniform_with_a_pin_lifts_the_others_alike():
    cells = Cells(("attn_in", "mlp_in"), [[100, 100], [100, 100]])
    fixed = np.array([[0.1, np.nan], [np.nan, np.nan]])
    found = uniform(cells, 0.4, fixed=fixed).sparsities
    assert found == pytest.approx(np.array([[0.1, 0.5], [0.5, 0.5]]))


def test_impossible_targets_say_what_is_possible():
    cells, curves = small_cells(lm_head=1000), smooth_curves()
    with pytest.raises(
        BudgetError, match=r"0\.9 cannot be met\. With .* 0\.2 to 0\.6 \(read fraction 0\.8194 to 0\.4583\)"
    ):
        solve_global(cells, curves, 0.9, lower=0.2, upper=0.6)
    with pytest.raises(
        BudgetError, match=r"read fraction 0\.95 cannot be met: it needs model sparsity 0\.05538.*0\.8194 to 0\.4583"
    ):
        solve_global(cells, curves, Target("read_fraction", 0.95), lower=0.2, upper=0.6)
    with pytest.raises(BudgetError, match="lowest sparsity already predicts"):
        solve_global(cells, curves, Target("perplexity_rise", 0.001), lower=0.6)
    with pytest.raises(BudgetError, match="cannot be met"):
        solve_global(cells, curves, 0.5, fixed=np.full((6, 4), 0.3))
    assert (solve_global(cells, curves, 0.3, fixed=np.full((6, 4), 0.3)).sparsities == 0.3).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lower": 0.6, "upper": 0.4}, r"layers.0.attn_in: the lower bound 0.6 is above"),
        ({"lower": -0.1}, "lower bound -0.1 is outside"),
        ({"upper": 1.0}, "upper bound 1.0 is outside"),
        ({"upper": math.nan}, "upper bound nan is outside"),
        ({"fixed": np.full((6, 4), 1.5)}, "pinned value 1.5 is outside"),
        ({"fixed": np.full((2, 4), 0.5)}, "fixed has shape"),
    ],
)
def test_wrong_limits_are_refused(options, message):
    with pytest.raises(BudgetError, match=message):
        solve_global(small_cells(), smooth_curves(), 0.5, **options)


@pytest.mark.parametrize(
    ("kind", "value"),
    [("sparsity", 1.0), ("sparsity", -0.1), ("read_fraction", -1), ("loss_rise", math.nan), ("speed", 0.5)],
)
def test_wrong_targets_are_refused(kind, value):
    with pytest.raises(BudgetError):
        Target(kind, value)


def test_quality_target_needs_curves():
    with pytest.raises(BudgetError, match="needs loss curves.*--budget global"):
        uniform(small_cells(), Target("loss_rise", 0.1))


def test_curves_of_another_model_are_refused():
    with pytest.raises(BudgetError, match="curves are for"):
        solve_global(small_cells(5), smooth_curves(6), 0.5)
