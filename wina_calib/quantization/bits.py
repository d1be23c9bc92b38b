"""Bits of decoder weights that are read for a token: the axis on which sparse, quantized and both are compared."""

from __future__ import annotations

from collections.abc import Iterable

UNQUANTIZED_BITS = 16


def bits_read(sites: Iterable[tuple[int, float, float]]) -> float:
    """Bits read over the number of weights.

    Args:
        sites: of each site its weights, the bits that each of them takes with its part of scales and zeros, and its sparsity.
    """
    read = total = 0.0
    for weights, bits, sparsity in sites:
        read += weights * bits * (1 - sparsity)
        total += weights
    return read / total if total else 0.0
