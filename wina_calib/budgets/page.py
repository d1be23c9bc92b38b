"""The budget page: one HTML file that needs no network, in which a person slides, pins and downloads."""

import base64
import hashlib
import json
import re
from importlib.resources import files

import numpy as np
from numpy.typing import ArrayLike

from wina_calib.budgets.file import FORMAT, HEADER, ModelKey
from wina_calib.budgets.model import DENSE_BITS, Budget, Cells, Curves
from wina_calib.budgets.patterns import shown
from wina_calib.budgets.target import MAX_SPARSITY, make_limits
from wina_calib.choices import SCORES
from wina_calib.errors import BudgetError


def _part(name: str) -> str:
    return files("wina_calib.budgets").joinpath(name).read_text(encoding="utf-8")


def _source(text: str) -> str:
    """The policy source that allows exactly this inline text."""
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def render_page(
    cells: Cells,
    curves: Curves,
    budget: Budget,
    model: ModelKey,
    *,
    score: str,
    lower: ArrayLike = 0.0,
    upper: ArrayLike = MAX_SPARSITY,
    fixed: ArrayLike | None = None,
) -> str:
    """The page's text.

    It opens on `budget` as given; the first move solves anew with the same mathematics as `solve_global`.

    Args:
        cells: the model.
        curves: predicted loss rise of each cell.
        budget: what the page shows first.
        model: what the downloaded file says it is for.
        score: what the downloaded file says it was chosen on.
        lower: bounds of free cells, scalar or (layers, sites).
        upper: as `lower`.
        fixed: (layers, sites), NaN where free: cells that are pinned at first.

    Returns:
        A whole HTML document. Its content security policy lets only its own script and style run.

    Raises:
        BudgetError: shapes do not agree, or the bounds are impossible, or the score is unknown.
    """
    if not cells.weights.shape == curves.loss.shape[:2] == budget.sparsities.shape:
        raise BudgetError(
            f"cells {cells.weights.shape}, curves {curves.loss.shape[:2]} and budget {budget.sparsities.shape} differ"
        )
    if score not in SCORES:
        raise BudgetError(f"score must be one of {', '.join(SCORES)}, found {shown(score)}")
    free = make_limits(cells, lower, upper, last_level=float(curves.levels[-1]))
    make_limits(cells, lower, upper, fixed)  # refuses pins of another shape or outside [0, 1)
    pins = np.broadcast_to(np.nan if fixed is None else np.asarray(fixed, dtype=np.float64), cells.weights.shape)
    data = {
        "format": FORMAT,
        "header": list(HEADER),
        "model": vars(model),
        "score": score,
        "sites": list(cells.sites),
        "weights": cells.weights.reshape(-1).tolist(),
        "other_decoder": cells.other_decoder,
        "lm_head": cells.lm_head,
        "runtime_matrices": cells.runtime_matrices,
        "share": cells.bits / DENSE_BITS,
        "head_share": cells.head_bits / DENSE_BITS,
        "levels": curves.levels.tolist(),
        "loss": curves.loss.reshape(cells.weights.size, -1).tolist(),
        "measured": curves.measured.tolist(),
        "lower": free.lower.reshape(-1).tolist(),
        "upper": free.upper.reshape(-1).tolist(),
        "fixed": [None if np.isnan(value) else float(value) for value in pins.reshape(-1)],
        "budget": budget.sparsities.reshape(-1).tolist(),
    }
    style, script = _part("page.css"), _part("solver.js") + _part("page.js")
    policy = (
        f"default-src 'none'; img-src data:; script-src {_source(script)}; style-src {_source(style)};"
        " base-uri 'none'; form-action 'none'"
    )
    # "<" never stands in the data block, so no text of the model can end it.
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {"CSP": policy, "STYLE": style, "SCRIPT": script, "DATA": text}
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda match: parts[match[1]], _part("page.html"))
