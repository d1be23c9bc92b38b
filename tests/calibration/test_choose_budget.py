"""Bounds, budget files and anchors: what a calibration is told to fit."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from budget_cases import small_cells, smooth_curves

from wina_calib.budgets import Budget, explicit, write_budget
from wina_calib.budgets.anchors import Bounds, solve_rows, spread
from wina_calib.budgets.count import count_cells, model_key
from wina_calib.budgets.file import file_budget
from wina_calib.calibration.choose_budget import allocate, allowed, settle
from wina_calib.calibration.options import make_options
from wina_calib.calibration.scale_curves import measured_pairs, scale
from wina_calib.checkpoint.reader import open_checkpoint
from wina_calib.errors import BudgetError, UsageError
from wina_calib.masks.rule import MaskRule
from wina_calib.model.architecture import Architecture
from wina_calib.model.source import open_source


@pytest.fixture(scope="module")
def arch() -> Architecture:
    return open_source("demo").architecture


def means(rows: np.ndarray) -> np.ndarray:
    weights = small_cells().weights
    return (rows * weights).sum((1, 2)) / weights.sum()


def test_rows_meet_every_anchor() -> None:
    cells, curves = small_cells(), smooth_curves()
    bounds = Bounds.parse(cells, (), ())
    for given in (None, curves):
        rows = solve_rows(cells, (0.25, 0.5, 0.65), 0.5, bounds, given)
        np.testing.assert_allclose(means(rows), (0.25, 0.5, 0.65), atol=1e-12)


def test_bounds_hold_where_asked_and_give_way_elsewhere() -> None:
    cells, curves = small_cells(), smooth_curves()
    bounds = Bounds.parse(cells, ("0.3", "layers.0.*=0.4"), ("layers.*.mlp_out=0.45",))
    low, asked, high = solve_rows(cells, (0.25, 0.5, 0.65), 0.5, bounds, curves)
    assert (asked[0, :3] >= 0.4 - 1e-12).all()
    assert (asked[1:] >= 0.3 - 1e-12).all()
    assert (asked[:, 3] <= 0.45 + 1e-12).all()
    np.testing.assert_allclose(means(np.stack([low, high])), (0.25, 0.65), atol=1e-12)
    with pytest.raises(BudgetError, match="cannot be met"):
        solve_rows(cells, (0.25,), 0.25, bounds, curves)


@pytest.mark.parametrize("text", ["1.0", "-0.1", "+0.1", "x", "layers.99.*=0.2", "layers.0.attn=0.2", "nan"])
def test_bad_bounds_name_the_option(text: str) -> None:
    with pytest.raises(BudgetError, match="--min"):
        Bounds.parse(small_cells(), (text,), ())


def test_pins_stay_at_every_anchor_that_has_room() -> None:
    cells, curves = small_cells(), smooth_curves()
    fixed = np.full(cells.weights.shape, np.nan)
    fixed[0] = 0.6
    rows = solve_rows(cells, (0.05, 0.5), 0.5, Bounds.parse(cells, (), ()), curves, fixed)
    assert (rows[1, 0] == 0.6).all()
    assert (rows[0, 0] < 0.6).all()  # 0.6 in the first layer alone is more than 0.05 of the model
    np.testing.assert_allclose(means(rows), (0.05, 0.5), atol=1e-12)


def test_spread_goes_through_the_budget() -> None:
    cells = small_cells()
    budget = np.random.default_rng(0).uniform(0, 0.95, cells.weights.shape)
    own = Budget(budget).model_sparsity(cells)
    rows = spread((0.2, own, 0.8), cells, budget)
    assert (rows[1] == budget).all()
    np.testing.assert_allclose(means(rows), (0.2, own, 0.8), atol=1e-12)
    assert ((rows >= 0) & (rows < 1)).all()


def test_a_file_sets_the_sparsity(arch: Architecture, tmp_path: Path) -> None:
    cells = count_cells(arch, "none")
    path, budget = tmp_path / "b.yaml", Budget(np.full(cells.weights.shape, 0.37))
    write_budget(path, explicit(budget, cells, model_key(arch, cells), 0.37, "wina"))
    assert settle(make_options({"budget": str(path)}), arch, cells).sparsity == pytest.approx(0.37)
    assert (file_budget(str(path), model_key(arch, cells), cells)[0] == 0.37).all()
    with pytest.raises(BudgetError, match="model sparsity 0.37"):
        settle(make_options({"budget": str(path), "sparsity": 0.6}), arch, cells)
    with pytest.raises(BudgetError, match="do not apply to a budget file"):
        settle(make_options({"budget": str(path), "min": 0.1}), arch, cells)


def test_what_cannot_be_met_is_refused_before_any_work(arch: Architecture) -> None:
    cells = count_cells(arch, "none")
    for values, message in [
        ({"max": 0.3, "sparsity": 0.5}, "cannot be met"),
        ({"min": 0.6, "sparsity": 0.5}, "cannot be met"),
        ({"max": 0.1}, "leave room for model sparsities from 0.000 to 0.100"),
        ({"min": 0.5, "max": 0.6}, "from 0.500 to 0.600, and none of --grid"),
        ({"budget": "greedy", "max": "0.9"}, "greedy"),
        ({"budget": "missing.yaml"}, "no such budget file"),
    ]:
        with pytest.raises(BudgetError, match=message):
            settle(make_options(values), arch, cells)


@pytest.mark.parametrize("name", ["gready", "globl", "Uniform", "missing/folder", "budget.txt"])
def test_a_budget_that_nothing_is_called_is_refused_as_an_option(name: str, tmp_path: Path) -> None:
    (tmp_path / "budget.txt").write_text("")
    with pytest.raises(
        UsageError, match=f"budget is '{name}'; expected global, greedy, uniform, a budget file .*folder"
    ):
        make_options({"budget": name})
    for fine in ("greedy", "mine.yaml", "MINE.JSON", str(tmp_path)):
        assert make_options({"budget": fine}).budget == fine


def test_quality_chooses_where_the_bounds_hold(arch: Architecture) -> None:
    cells = count_cells(arch, "none")
    assert allowed(make_options({}), cells) == (0.0, 0.65)
    assert allowed(make_options({"max": 0.5}), cells) == (0.2, 0.4)
    assert allowed(make_options({"min": 0.3}), cells) == (0.4, 0.65)


def test_a_file_for_another_model_is_refused(arch: Architecture, tmp_path: Path) -> None:
    other = small_cells()
    path = tmp_path / "b.yaml"
    budget = Budget(np.full(other.weights.shape, 0.5))
    write_budget(path, explicit(budget, other, model_key(arch, other), 0.5, "wina"))
    with pytest.raises(BudgetError, match="another model"):
        settle(make_options({"budget": str(path)}), arch, count_cells(arch, "none"))


def test_one_factor_for_all_curves() -> None:
    assert scale([0.02, 0.32], [0.04, 0.16]) == pytest.approx(1.0)  # a half and twice
    assert scale([-0.002, 0.1], [0.01, 0.2]) == pytest.approx(0.5)  # a fall says nothing
    assert scale([0.0], [0.1]) == scale([0.1], [0.0]) == 1.0


def test_measured_rises_count_as_far_as_their_noise_allows() -> None:
    facts = {"predicted": [0.01, 0.1, 0.4], "loss_rise": [0.007, 0.1, 0.5], "kl": [0.01, 0.1, 0.5]}
    np.testing.assert_allclose(
        measured_pairs(facts | {"tokens": 10**9}), [[0.01, 0.007], [0.1, 0.1], [0.4, 0.5]], rtol=1e-3
    )
    few = measured_pairs(facts | {"tokens": 1000})
    np.testing.assert_allclose(few[0], [0.01, 0.00971], rtol=1e-3)  # nearly the others' ratio to the divergence
    fall = measured_pairs(facts | {"loss_rise": [-0.5, -0.1, 0.4], "tokens": 10**9})
    np.testing.assert_allclose(fall[:, 1], [0.002, 0.02, 0.4], rtol=1e-3)  # never no rise at all
    assert measured_pairs({}).shape == (0, 2)


@pytest.mark.parametrize(
    "change", [{"kl": [1]}, {"tokens": "many"}, {"predicted": None}, {"loss_rise": [[1], [2], [3]]}]
)
def test_facts_that_are_none_are_refused(change: dict) -> None:
    facts = {"predicted": [0.01, 0.1, 0.4], "loss_rise": [0.007, 0.1, 0.5], "kl": [0.01, 0.1, 0.5], "tokens": 1000}
    with pytest.raises(BudgetError, match="measured"):
        measured_pairs(facts | change)


def test_the_spread_of_another_checkpoint_is_taken_at_every_anchor(
    demo_sparse: Path, calibrated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arch = open_source("demo").architecture
    cells = count_cells(arch, "none")
    options = make_options({"budget": str(demo_sparse), "grid": (0.3, 0.5)})
    settled = settle(options, arch, cells)
    assert settled.sparsity == 0.5  # its own
    assert settle(replace(options, sparsity=0.3), arch, cells).sparsity == 0.3
    other = open_checkpoint(demo_sparse)
    monkeypatch.setattr("wina_calib.calibration.choose_budget.measure_curves", lambda *_, **__: None)
    found = allocate(settled, arch, cells, MaskRule(), 8192, lambda tokens: SimpleNamespace(tokens=tokens))
    np.testing.assert_array_equal(found.rows, [other.sparsities(0.3), other.sparsities(0.5)])
    with pytest.raises(BudgetError, match="other sizes than this model"):
        settle(replace(options, budget=str(calibrated)), arch, cells)
