import numpy as np
import pytest
from budget_cases import SITES, small_cells, smooth_curves

from wina_calib.budgets import Budget, Setting, apply_settings, fixed_cells, select, solve_global
from wina_calib.errors import BudgetError

CELLS = small_cells()


def named(pattern):
    return {name for name, chosen in zip(CELLS.names(), select(pattern, CELLS).reshape(-1), strict=True) if chosen}


def test_patterns_select():
    assert named("layers.5.attn_in") == {"layers.5.attn_in"}
    assert named("layers.0-1.*") == {f"layers.{i}.{s}" for i in (0, 1) for s in SITES}
    assert named("layers.*.mlp_out") == {f"layers.{i}.mlp_out" for i in range(6)}
    assert named("layers.0,2-3.attn_in,mlp_in") == {f"layers.{i}.{s}" for i in (0, 2, 3) for s in ("attn_in", "mlp_in")}
    assert named("layers.1.mlp_*") == {"layers.1.mlp_in", "layers.1.mlp_out"}
    assert named("*") == named("layers.*.*") == set(CELLS.names())


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("layers.0.mlp_oot", "did you mean mlp_out"),
        ("layers.0.experts", "known are attn_in, attn_out, mlp_in, mlp_out"),
        ("layers.0.attn_in.q_proj", "4 parts"),
        ("layer.3.attn_in", r"such as layers\.[35]\.attn_in"),
        ("model.layers.3.attn_in", r"layers\.3\.attn_in"),
        ("layers.6.*", "no layer 6, the model has layers 0-5"),
        ("layers.4-9.*", "no layer 9"),
        ("layers.0-999999999.*", "no layer 999999999"),
        ("layers.3-1.*", "write 1-3"),
        ("layers.-1.*", "is no layer"),
        ("layers..attn_in", "is no layer"),
        ("layers.1.", "no site ''"),
        ("layers.1.attn_in,", "no site ''"),
        ("layers.1.[a-z]*", "no site"),
        ("", "names no cell"),
        ("layers.٣.attn_in", "is no layer"),
    ],
)
def test_patterns_that_match_nothing_are_refused(pattern, message):
    with pytest.raises(BudgetError, match=message):
        select(pattern, CELLS)


def test_values_absolute_and_relative():
    base = np.full((6, 4), 0.5)
    settings = [Setting.parse_option(text) for text in ("layers.0.*=0.2", "layers.0.attn_in=+0.1", "*= -0.05")]
    found = apply_settings(base, settings, CELLS)
    assert found[0] == pytest.approx(np.array([0.25, 0.15, 0.15, 0.15]))
    assert found[1:] == pytest.approx(np.full((5, 4), 0.45))
    assert (base == 0.5).all()


@pytest.mark.parametrize(
    "value", ["nan", "inf", "1e999", "", "0,5", "half", "0x1p-1", "1_0", "٠.٥", "+", "0.1.2", "%", "5%%", "nan%"]
)
def test_values_that_are_no_numbers_are_refused(value):
    with pytest.raises(BudgetError, match="not a number"):
        Setting.parse("*", value)


def test_values_in_percent():
    texts = ("layers.0.*=30%", "layers.0.attn_in=+10%", "layers.0.mlp_in= -2.5 %")
    found = apply_settings(np.full((6, 4), 0.5), [Setting.parse_option(text) for text in texts], CELLS)
    assert found[0] == pytest.approx(np.array([0.4, 0.3, 0.275, 0.3]))


def test_option_without_equals_is_refused():
    with pytest.raises(BudgetError, match="PATTERN=VALUE"):
        Setting.parse_option("layers.0.*")


@pytest.mark.parametrize("value", ["1.0", "+0.5", "-0.6", "7"])
def test_cell_outside_is_named(value):
    with pytest.raises(BudgetError, match=r"layers\.2\.attn_in.*outside \[0, 1\)"):
        apply_settings(np.full((6, 4), 0.5), [Setting.parse("layers.2.*", value)], CELLS)


def test_fixed_cells_pin_settings_and_frozen():
    base = Budget(np.full((6, 4), 0.5))
    fixed = fixed_cells(base, CELLS, [Setting.parse("layers.0.attn_in", "+0.1")], ["layers.0-1.*"])
    assert fixed[0] == pytest.approx(np.array([0.6, 0.5, 0.5, 0.5]))
    assert (fixed[1] == 0.5).all()
    assert np.isnan(fixed[2:]).all()


def test_solving_around_pins_keeps_the_total():
    curves = smooth_curves()
    base = solve_global(CELLS, curves, 0.5)
    fixed = fixed_cells(base, CELLS, [Setting.parse("layers.*.mlp_out", "0.2")], ["layers.5.attn_in"])
    found = solve_global(CELLS, curves, 0.5, fixed=fixed)
    assert (found.sparsities[:, 3] == 0.2).all()
    assert found.sparsities[5, 0] == base.sparsities[5, 0]
    assert found.model_sparsity(CELLS) == pytest.approx(0.5, abs=1e-9)


def test_message_never_carries_control_characters_or_long_input():
    with pytest.raises(BudgetError) as caught:
        select("layers.0.\x1b[31m" + "x" * 100000, CELLS)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 500
