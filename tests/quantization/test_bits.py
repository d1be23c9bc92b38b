"""Bits read."""

import pytest

from wina_calib.quantization.bits import bits_read, sparsity_for_bits


def test_bits_read_are_weighted_by_weights() -> None:
    assert bits_read([(100, 16, 0.5)]) == 8
    assert bits_read([(300, 4.25, 0.4), (100, 16, 0)]) == pytest.approx((300 * 2.55 + 1600) / 400)
    assert bits_read([]) == 0


def test_the_sparsity_that_gives_bits() -> None:
    assert bits_read([(7, 4.25, sparsity_for_bits(4.25, 2.6))]) == pytest.approx(2.6)
    assert sparsity_for_bits(4.25, 8) == 0
