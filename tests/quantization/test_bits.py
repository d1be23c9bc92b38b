"""Bits read."""

import pytest

from wina_calib.quantization.bits import bits_read


def test_bits_read_are_weighted_by_weights() -> None:
    assert bits_read([(100, 16, 0.5)]) == 8
    assert bits_read([(300, 4.25, 0.4), (100, 16, 0)]) == pytest.approx((300 * 2.55 + 1600) / 400)
    assert bits_read([]) == 0
