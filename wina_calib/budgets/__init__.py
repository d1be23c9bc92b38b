"""Sparsity budgets: how sparse every site of every layer is, how to choose it, and how to keep it."""

from wina_calib.budgets.anchors import budget_at
from wina_calib.budgets.file import (
    BudgetFile,
    ModelKey,
    explicit,
    format_budget,
    parse_budget,
    read_budget,
    write_budget,
)
from wina_calib.budgets.model import Budget, Cells, Curves, Totals, perplexity_rise, totals
from wina_calib.budgets.page import render_page
from wina_calib.budgets.patterns import Setting, apply_settings, fixed_cells, select
from wina_calib.budgets.solve import solve_global, uniform
from wina_calib.budgets.table import render_table, to_json, use_ascii, use_color
from wina_calib.budgets.target import MAX_SPARSITY, Limits, Target, make_limits

__all__ = [
    "MAX_SPARSITY",
    "Budget",
    "BudgetFile",
    "Cells",
    "Curves",
    "Limits",
    "ModelKey",
    "Setting",
    "Target",
    "Totals",
    "apply_settings",
    "budget_at",
    "explicit",
    "fixed_cells",
    "format_budget",
    "make_limits",
    "parse_budget",
    "perplexity_rise",
    "read_budget",
    "render_page",
    "render_table",
    "select",
    "solve_global",
    "to_json",
    "totals",
    "uniform",
    "use_ascii",
    "use_color",
    "write_budget",
]
