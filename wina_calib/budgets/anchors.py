"""A family of budgets, one for each sparsity, from the few that a checkpoint stores."""

import numpy as np
from numpy.typing import ArrayLike

from wina_calib.budgets.model import Floats
from wina_calib.errors import BudgetError


def budget_at(anchors: ArrayLike, rows: ArrayLike, sparsity: float) -> Floats:
    """Site sparsities at any model sparsity.

    Linear between anchors; below the first the first row shrinks to 0 with the sparsity; above the last the kept share
    of the last row shrinks to 0 as the sparsity goes to 1. All three keep weighted means: where every row's weighted
    mean is its anchor, the result's is `sparsity`, whatever the weights.

    Args:
        anchors: (A,) model sparsities, ascending, in [0, 1).
        rows: (A, ...) site sparsities at each anchor, in [0, 1]; the trailing shape is free.
        sparsity: the model sparsity wanted, in [0, 1).

    Returns:
        Site sparsities of the trailing shape, float64; exactly a stored row at an anchor.

    Raises:
        BudgetError: an argument is outside its range or the shapes do not agree.
    """
    known: Floats = np.asarray(anchors, dtype=np.float64)
    table: Floats = np.asarray(rows, dtype=np.float64)
    if known.ndim != 1 or not known.size or table.ndim < 1 or table.shape[0] != known.size:
        raise BudgetError(f"anchors {known.shape} and their budgets {table.shape} do not agree")
    if not ((known >= 0) & (known < 1)).all() or (np.diff(known) <= 0).any():
        raise BudgetError(f"anchors must ascend in [0, 1), found {known.tolist()}")
    if not ((table >= 0) & (table <= 1)).all():
        raise BudgetError("a stored budget holds a sparsity outside [0, 1]")
    if not 0 <= sparsity < 1:
        raise BudgetError(f"sparsity must be in [0, 1), found {sparsity}")
    right = int(np.searchsorted(known, sparsity))
    found: Floats
    if right < known.size and known[right] == sparsity:
        found = table[right].copy()
    elif right == 0:
        found = table[0] * (sparsity / known[0])
    elif right == known.size:
        found = 1.0 - (1.0 - table[-1]) * ((1.0 - sparsity) / (1.0 - known[-1]))
    else:
        share = (sparsity - known[right - 1]) / (known[right] - known[right - 1])
        found = table[right - 1] * (1.0 - share) + table[right] * share
    return found
