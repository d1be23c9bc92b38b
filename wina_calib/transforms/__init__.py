"""Orthogonal transforms that make dropped inputs cheaper, exact in real arithmetic.

`plan` resolves a name for a model, `Statistics` samples activations in the dense pass, `fit` finds the matrices, and
`apply_layer`, `embedding_rows` and `head_rows` fold them into weights.
"""

from wina_calib.transforms.apply import apply_layer, embedding_rows, fold_final_norm, head_rows
from wina_calib.transforms.fit import fit, fit_work
from wina_calib.transforms.plan import INPUT_SITES, Plan, Rotations, plan, reason_not_exact, run_time_weights, uses_norm
from wina_calib.transforms.statistics import Statistics, needed_sites

__all__ = [
    "INPUT_SITES",
    "Plan",
    "Rotations",
    "Statistics",
    "apply_layer",
    "embedding_rows",
    "fit",
    "fit_work",
    "fold_final_norm",
    "head_rows",
    "needed_sites",
    "plan",
    "reason_not_exact",
    "run_time_weights",
    "uses_norm",
]
