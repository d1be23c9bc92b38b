import io
import json
import re

import numpy as np
import pytest
from budget_cases import small_cells, smooth_curves

from wina_calib.budgets import Budget, Curves, render_table, solve_global, to_json, use_ascii, use_color
from wina_calib.errors import BudgetError

CELLS = small_cells(2, other_decoder=10, lm_head=1000)
BUDGET = Budget([[0.0, 0.25, 0.5, 0.99], [0.1, 0.2, 0.3, 0.4]])


def test_table_exactly():
    fixed = np.full((2, 4), np.nan)
    fixed[0, 1] = 0.25
    curves = Curves([0, 1], np.tile([0, 0.01], (2, 4, 1)))
    found = render_table(CELLS, BUDGET, curves, fixed=fixed, ascii_only=True)
    assert found == (
        "layer  attn_in       attn_out      mlp_in        mlp_out       mean\n"
        "    0  0.000 ......  0.250*##....  0.500 ###...  0.990 ######  0.482\n"
        "    1  0.100 #.....  0.200 #.....  0.300 ##....  0.400 ##....  0.271\n"
        " mean  0.050 ......  0.225 #.....  0.400 ##....  0.695 ####..  0.376\n"
        "\n"
        "model sparsity          0.3763\n"
        "read fraction           0.7162  (decoder alone 0.6249)\n"
        "decode speedup limit    1.40x\n"
        "predicted loss rise     0.0274 nats/token\n"
        "predicted perplexity    +2.78%\n"
        "* pinned (1 of 8 cells)\n"
    )


def test_unicode_bars_have_one_width():
    lines = render_table(CELLS, BUDGET).splitlines()
    assert "0.500 ███···" in lines[1]
    assert "\x1b" not in "".join(lines)
    assert len(lines[1]) == len(lines[2]) == len(lines[3])
    assert not any("predicted" in line for line in lines)


def test_color_only_adds_escapes():
    colored = render_table(CELLS, BUDGET, color=True)
    assert "\x1b[38;5;" in colored
    assert re.sub(r"\x1b\[[0-9;]*m", "", colored) == render_table(CELLS, BUDGET)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_color_follows_terminal_and_environment():
    assert use_color(Terminal(), {"TERM": "xterm"})
    assert not use_color(Terminal(), {"NO_COLOR": "1"})
    assert use_color(Terminal(), {"NO_COLOR": ""})
    assert not use_color(Terminal(), {"TERM": "dumb"})
    assert not use_color(io.StringIO(), {})


@pytest.mark.parametrize(("encoding", "expected"), [("utf-8", False), ("ascii", True), ("latin-1", True)])
def test_ascii_follows_encoding(encoding, expected):
    assert use_ascii(io.TextIOWrapper(io.BytesIO(), encoding=encoding)) is expected


def test_huge_rise_is_a_factor():
    curves = smooth_curves(2)
    assert "predicted perplexity    x " in render_table(CELLS, BUDGET, curves.scaled(200), ascii_only=True)


def test_json_holds_the_same():
    cells, curves = small_cells(), smooth_curves()
    budget = solve_global(cells, curves, 0.5)
    found = json.loads(json.dumps(to_json(cells, budget, curves, fixed=np.where(np.eye(6, 4) > 0, 0.5, np.nan))))
    assert list(found["cells"]) == cells.names()
    assert list(found["cells"].values()) == budget.sparsities.reshape(-1).tolist()
    assert found["pinned"] == ["layers.0.attn_in", "layers.1.attn_out", "layers.2.mlp_in", "layers.3.mlp_out"]
    assert found["model_sparsity"] == pytest.approx(0.5)
    assert to_json(cells, budget)["predicted_loss_rise"] is None


def test_budget_of_another_model_is_refused():
    with pytest.raises(BudgetError, match="shape"):
        render_table(small_cells(), BUDGET)
