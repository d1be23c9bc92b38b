"""A smooth curve through rising points, which rises everywhere (Fritsch and Carlson, SIAM J. Numer. Anal. 17, 1980)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


def slopes(xs: Sequence[float], ys: Sequence[float]) -> Values:
    """The curve's slopes (points,) at two or more points of ascending x: 0 where the steps beside one turn back."""
    width = np.diff(xs)
    step = np.diff(ys) / width
    if len(step) == 1:
        return np.repeat(step, 2)
    left, right = 2 * width[1:] + width[:-1], width[1:] + 2 * width[:-1]
    rising = step[:-1] * step[1:] > 0
    safe = np.where(step == 0, 1.0, step)
    inner = np.where(rising, (left + right) / (left / safe[:-1] + right / safe[1:]), 0.0)
    ends = (_end(*width[:2], *step[:2]), _end(*width[:-3:-1], *step[:-3:-1]))
    return np.concatenate([ends[:1], inner, ends[1:]])


def _end(width: float, next_width: float, step: float, next_step: float) -> float:
    """The slope at an end, by the parabola through three points, as far as it does not turn."""
    slope = ((2 * width + next_width) * step - width * next_step) / (width + next_width)
    return float(np.clip(slope, min(0.0, 3 * step), max(0.0, 3 * step)))


def curve(x: float, xs: Sequence[float], ys: Sequence[float], slopes: Values) -> float:
    """The curve through points (points,) with these slopes there; level before the first and after the last one."""
    if not xs[0] < x < xs[-1]:
        return float(ys[0] if x <= xs[0] else ys[-1])
    i = int(np.searchsorted(xs, x, side="right")) - 1
    width = xs[i + 1] - xs[i]
    t = (x - xs[i]) / width
    rest = 1 - t
    return float(
        ys[i] * rest**2 * (1 + 2 * t)
        + ys[i + 1] * t**2 * (1 + 2 * rest)
        + width * t * rest * (rest * slopes[i] - t * slopes[i + 1])
    )
