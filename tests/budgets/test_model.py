import math

import numpy as np
import pytest
from budget_cases import SITES, small_cells

from wina_calib.budgets import Budget, Cells, Curves, Target, perplexity_rise, totals, uniform
from wina_calib.errors import BudgetError


def test_totals_by_hand():
    cells = Cells(("attn_in", "mlp_in"), [[100, 300], [100, 500]], other_decoder=50, lm_head=150, runtime_matrices=80)
    budget = Budget([[0.5, 0.1], [0.0, 0.9]])
    dropped = 50 + 30 + 0 + 450
    curves = Curves([0, 0.5, 1], [[[0, 1, 3], [0, 0.1, 1]], [[0, 5, 6], [0, 0.2, 0.7]]])
    found = totals(cells, budget, curves)
    assert found.model_sparsity == pytest.approx(dropped / 1000, abs=1e-15)
    assert found.read_fraction == pytest.approx((1000 - dropped + 50 + 150 + 80) / 1200, abs=1e-15)
    assert found.read_fraction_decoder == pytest.approx((1000 - dropped + 50 + 80) / 1050, abs=1e-15)
    assert found.speedup_limit == pytest.approx(1200 / (1280 - dropped))
    loss = 1 + 0.1 * 0.2 + 0 + (0.2 + 0.5 * 0.8)
    assert found.loss_rise == pytest.approx(loss)
    assert found.perplexity_rise == pytest.approx(math.exp(loss) - 1)
    assert cells.sparsity_at(found.read_fraction) == pytest.approx(found.model_sparsity)


def test_quantized_weights_are_counted_by_their_bits():
    cells = Cells(("mlp_in",), [[1000]], other_decoder=50, lm_head=200, runtime_matrices=80, bits=4.0, head_bits=8.0)
    assert cells.read_fraction_at(0.4) == pytest.approx((600 / 4 + 50 + 100 + 80) / 1250)
    assert cells.read_fraction_at(0.4, lm_head=False) == pytest.approx((600 / 4 + 50 + 80) / 1050)
    assert cells.sparsity_at(cells.read_fraction_at(0.4)) == pytest.approx(0.4)
    assert cells.bits_read_at(0.4) == pytest.approx(0.6 * 4 + 16 * 0.08)
    assert cells.sparsity_at_bits(cells.bits_read_at(0.4)) == pytest.approx(0.4)
    assert Cells(("mlp_in",), [[1000]]).bits_read_at(0.5) == 8


def test_sites_of_different_bits_are_counted_one_by_one():
    cells = Cells(("attn_in", "mlp_in"), [[100, 300], [100, 500]], site_bits=np.array([[16.0, 4.0], [4.0, 4.0]]))
    assert cells.bits == pytest.approx((16 * 100 + 4 * 900) / 1000)
    budget = Budget([[0.5, 0.1], [0.0, 0.9]])
    read = 16 * 50 + 4 * (270 + 100 + 50)
    assert cells.bits_read_at(budget.sparsities) == pytest.approx(read / 1000)
    assert budget.read_fraction(cells) == pytest.approx(read / 16 / 1000)
    assert cells.bits_read_at(0.25) == pytest.approx(0.75 * cells.bits)
    for target in (Target("bits_read", 2.0), Target("read_fraction", 0.2)):
        found = uniform(cells, target)
        assert found.read_fraction(cells) == pytest.approx(2.0 / 16 if target.kind == "bits_read" else 0.2)
    with pytest.raises(BudgetError, match="bits read 6 cannot be met"):
        uniform(cells, Target("bits_read", 6.0))


def test_dense_budget_reads_everything():
    cells = small_cells(other_decoder=7, lm_head=11)
    dense = Budget(np.zeros((6, 4)))
    assert totals(cells, dense).read_fraction == 1.0
    assert totals(cells, dense).loss_rise is None


def test_curve_goes_on_past_its_last_level_and_never_below_zero():
    curves = Curves([0, 0.5, 0.9], [[[0, 1, 2], [0, 2, 0.1]]])
    assert curves.at([[0.98, 0.98]]) == pytest.approx(np.array([[2.2, 0.0]]))
    assert curves.at([[0.5, 0.9]]) == pytest.approx(np.array([[1, 0.1]]))


def test_scaled_curves():
    curves = Curves([0, 0.5], [[[0, 1]]]).scaled(1.5)
    assert curves.at([[0.5]]).tolist() == [[1.5]]
    with pytest.raises(BudgetError, match="positive"):
        curves.scaled(0)


def test_whole_goes_through_measured_pairs():
    curves = Curves(np.array([0.0, 1.0]), np.array([[[0.0, 1.0]]]), np.array([[0.01, 0.005], [0.1, 0.1], [0.4, 0.2]]))
    for known, whole in curves.measured:
        assert curves.total(known) == pytest.approx(whole, rel=1e-12)
    assert curves.total(0.001) == pytest.approx(0.0005)  # the ratio of the first pair
    assert curves.total(0.8) == pytest.approx(0.4)
    assert curves.total(np.sqrt(0.001)) == pytest.approx(np.sqrt(0.0005))  # halfway, in logarithms
    assert curves.total(0.0) == 0.0
    rises = [curves.total(rise) for rise in np.linspace(0, 1, 200)]
    assert (np.diff(rises) > 0).all()
    assert Budget(np.array([[0.1]])).predicted_loss(curves) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "pairs", [[[0.1, 0.0]], [[0.2, 0.1], [0.1, 0.2]], [[0.1, 0.2], [0.2, 0.1]], [[1.0]], [[np.nan, 1]]]
)
def test_wrong_measured_pairs_are_refused(pairs):
    with pytest.raises(BudgetError, match="measured"):
        Curves(np.array([0.0, 1.0]), np.array([[[0.0, 1.0]]]), np.array(pairs))


def test_huge_loss_does_not_overflow():
    assert perplexity_rise(1e6) == math.expm1(700)


def test_arrays_are_copies_that_cannot_be_written():
    source = np.full((6, 4), 0.5)
    budget = Budget(source)
    source[0, 0] = 2
    assert budget.sparsities[0, 0] == 0.5
    with pytest.raises(ValueError, match="read-only"):
        budget.sparsities[0, 0] = 0.1


@pytest.mark.parametrize("value", [1.0, -0.1, math.nan, math.inf])
def test_sparsity_outside_is_refused_with_its_cell(value):
    sparsities = np.zeros((6, 4))
    sparsities[3, 2] = value
    with pytest.raises(BudgetError, match=r"layer 3, site 2.*outside \[0, 1\)"):
        Budget(sparsities)


@pytest.mark.parametrize(
    ("levels", "loss", "message"),
    [
        ([0.1, 0.5], [[[0, 1]]], "ascend from 0"),
        ([0, 0.5, 0.5], [[[0, 1, 2]]], "ascend from 0"),
        ([0, 1.5], [[[0, 1]]], "at most 1"),
        ([0, 0.5], [[[0.1, 1]]], "0 at level 0"),
        ([0, 0.5], [[[0, -1]]], "nowhere negative"),
        ([0, 0.5], [[[0, math.nan]]], "not finite"),
        ([0, 0.5], [[0, 1]], "loss"),
        ([0], [[[0]]], "levels"),
    ],
)
def test_wrong_curves_are_refused(levels, loss, message):
    with pytest.raises(BudgetError, match=message):
        Curves(levels, loss)


@pytest.mark.parametrize(
    ("sites", "weights", "others"),
    [
        (SITES, [[1, 2]], {}),
        (("a", "b"), [[1, 0]], {}),
        (("a", "b"), [[1, 2]], {"lm_head": -1}),
        (("a", "a"), [[1, 2]], {}),
        (("a", "b.c"), [[1, 2]], {}),
        ((), np.zeros((0, 0)), {}),
    ],
)
def test_wrong_cells_are_refused(sites, weights, others):
    with pytest.raises(BudgetError):
        Cells(sites, weights, **others)


def test_budget_of_another_shape_is_refused():
    with pytest.raises(BudgetError, match="shape"):
        Budget(np.zeros((5, 4))).model_sparsity(small_cells())
    with pytest.raises(BudgetError, match="curves are for"):
        Curves([0, 1], np.zeros((2, 2, 2))).at(np.zeros((1, 2)))


def test_fingerprint_depends_on_sparse_shapes_only():
    assert small_cells().fingerprint() == small_cells(lm_head=5, runtime_matrices=3).fingerprint()
    assert small_cells().fingerprint() != small_cells(layers=5).fingerprint()
