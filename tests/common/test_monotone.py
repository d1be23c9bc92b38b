"""A curve through rising points that rises everywhere."""

import numpy as np
import pytest

from wina_calib.common.monotone import curve, slopes


def on(xs: list[float], ys: list[float], at: np.ndarray) -> np.ndarray:
    return np.array([curve(float(x), xs, ys, slopes(xs, ys)) for x in at])


def test_it_goes_through_its_points_and_is_level_beside_them() -> None:
    xs, ys = [0.0, 0.5, 2.0, 3.0], [-1.0, 0.0, 4.0, 4.5]
    assert on(xs, ys, np.array(xs)) == pytest.approx(ys)
    assert on(xs, ys, np.array([-5.0, 9.0])) == pytest.approx([-1.0, 4.5])


def test_a_line_and_nearly_a_parabola_come_back() -> None:
    xs = [0.0, 0.7, 1.2]
    at = np.linspace(0, 1.2, 50)
    assert on(xs, [2 * x - 1 for x in xs], at) == pytest.approx(2 * at - 1)
    bent = on(xs, [(1 + x) ** 2 for x in xs], at)
    assert np.abs(bent - (1 + at) ** 2).max() < 0.03


@pytest.mark.parametrize("seed", range(20))
def test_it_rises_wherever_its_points_do(seed: int) -> None:
    random = np.random.default_rng(seed)
    xs, ys = (np.cumsum(random.exponential(size=6) ** 3 + 1e-9).tolist() for _ in range(2))
    found = on(xs, ys, np.linspace(xs[0], xs[-1], 500))
    assert np.all(np.diff(found) >= -1e-9 * ys[-1])
    assert slopes(xs[:2], ys[:2]) == pytest.approx([(ys[1] - ys[0]) / (xs[1] - xs[0])] * 2)
