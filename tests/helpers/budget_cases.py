"""Small models and curves that the budget tests share."""

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from wina_calib.budgets import Cells, Curves

SITES = ("attn_in", "attn_out", "mlp_in", "mlp_out")


def small_cells(layers: int = 6, **others: float) -> Cells:
    return Cells(SITES, np.tile([300, 200, 700, 350], (layers, 1)), **others)


def smooth_curves(layers: int = 6, seed: int = 0, last: float = 0.95) -> Curves:
    """Convex curves like a calibration's: flat at first, steep at the end."""
    rng = np.random.default_rng(seed)
    levels = np.linspace(0, last, 20)
    scale, power = rng.uniform(0.01, 0.1, (layers, 4, 1)), rng.uniform(1.5, 4, (layers, 4, 1))
    return Curves(levels, scale * levels**power)


@st.composite
def problems(draw, *, convex=True, max_layers=4, max_levels=7):
    """(cells, curves) with weights over three orders of magnitude and levels at any place."""
    layers, sites = draw(st.integers(1, max_layers)), draw(st.integers(1, 4))
    shape = (layers, sites)
    weights = draw(hnp.arrays(np.int64, shape, elements=st.integers(1, 1000)))
    steps = draw(hnp.arrays(np.float64, draw(st.integers(1, max_levels)), elements=st.integers(1, 20)))
    levels = np.concatenate(([0.0], np.cumsum(steps) / steps.sum()))
    levels *= draw(st.sampled_from([0.6, 0.9, 0.95, 1.0]))
    slopes = draw(hnp.arrays(np.float64, (*shape, len(steps)), elements=st.integers(0, 50).map(lambda n: n / 100)))
    loss = np.cumsum(np.sort(slopes, axis=2) * np.diff(levels), axis=2) if convex else slopes
    return Cells(SITES[:sites], weights), Curves(levels, np.concatenate((np.zeros((*shape, 1)), loss), axis=2))


@st.composite
def bounds(draw, cells, last):
    """lower, upper, fixed of a model, with room between lower and upper."""
    shape = cells.weights.shape
    unit = st.integers(0, 100).map(lambda n: n / 100)
    lower = draw(hnp.arrays(np.float64, shape, elements=unit)) * draw(st.sampled_from([0.0, 0.5])) * last
    upper = lower + draw(hnp.arrays(np.float64, shape, elements=unit)) * (min(last, 0.99) - lower)
    pinned = draw(hnp.arrays(np.bool_, shape)) & draw(st.booleans())
    value = draw(hnp.arrays(np.float64, shape, elements=st.integers(0, 99).map(lambda n: n / 100)))
    return lower, upper, np.where(pinned, value, np.nan)
