import numpy as np
import pytest
from budget_cases import small_cells, smooth_curves
from hypothesis import given, settings
from hypothesis import strategies as st

from wina_calib.budgets import budget_at, solve_global
from wina_calib.errors import BudgetError

ANCHORS = np.array([0.25, 0.5, 0.65])
CELLS = small_cells()
ROWS = np.stack([solve_global(CELLS, smooth_curves(), float(s)).sparsities for s in ANCHORS])


@given(st.floats(0, 1, exclude_max=True))
@settings(deadline=None)
def test_exact_in_model_sparsity_and_within_range(sparsity):
    found = budget_at(ANCHORS, ROWS, sparsity)
    assert ((found >= 0) & (found <= 1)).all()
    assert (CELLS.weights * found).sum() / CELLS.sparse_total == pytest.approx(sparsity, abs=1e-9)


@given(st.floats(0, 0.999), st.floats(0, 0.999))
@settings(deadline=None)
def test_monotone_where_anchors_are(one, other):
    less, more = (budget_at(ANCHORS, ROWS, s) for s in sorted((one, other)))
    assert (less <= more + 1e-12).all()


def test_anchors_come_back_exactly():
    for anchor, row in zip(ANCHORS, ROWS, strict=True):
        assert (budget_at(ANCHORS, ROWS, float(anchor)) == row).all()
    assert (budget_at(ANCHORS, ROWS, 0.0) == 0).all()


def test_one_layer_and_one_anchor():
    assert budget_at([0.5], [[0.4, 0.6]], 0.25) == pytest.approx(np.array([0.2, 0.3]))
    assert budget_at([0.5], [[0.4, 0.6]], 0.75) == pytest.approx(np.array([0.7, 0.8]))
    assert budget_at([0.0, 0.5], [0.0, 0.4], 0.25) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("anchors", "rows", "sparsity"),
    [
        ([0.5, 0.5], [[0.1], [0.2]], 0.3),
        ([0.5, 1.0], [[0.1], [0.2]], 0.3),
        ([0.5], [[0.1], [0.2]], 0.3),
        ([0.5], [[np.nan]], 0.3),
        ([0.5], [[0.5]], 1.0),
        ([0.5], [[0.5]], -0.1),
        ([], [], 0.1),
    ],
)
def test_wrong_arguments_are_refused(anchors, rows, sparsity):
    with pytest.raises(BudgetError):
        budget_at(anchors, rows, sparsity)
