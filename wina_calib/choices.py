"""The words that options take. Nothing is imported here, so that help and mistakes in options are told at once."""

from numbers import Real
from typing import Any, cast

BUDGETS = ("global", "greedy", "uniform")
BUDGET_FILES = {".yaml": "yaml", ".yml": "yaml", ".json": "json"}  # kinds by how names end
SCORES = ("wina", "teal", "weight", "random")
SELECT = ("threshold", "topk")
MASKS = ("shared", "per-projection")
PREFILL = ("sparse", "dense")
FIRST_TOKEN = ("dense", "sparse")
TRANSFORMS = ("auto", "none", "paper", "stacked", "global", "head", "global+head")
BITS = (4, 8)
GROUP_SIZES = (32, 64)
DTYPES = ("auto", "float32", "bfloat16", "float16")


def is_sparsity(value: Any) -> bool:
    """Whether a value is a number in [0, 1), NumPy's included."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    return bool(0 <= cast(Any, value) < 1)  # not float(value): an integer may be too large for it
