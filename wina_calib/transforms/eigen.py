"""Rotations found by one eigen-decomposition: right singular vectors of weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def gram(weights: Iterable[Tensor], gain: Tensor | None, device: torch.device | str) -> Tensor:
    """Sum of W^T W over weights (out_p, in) in float64, with the norm's gain (in,) folded in."""
    total: Tensor | None = None
    for weight in weights:
        for start in range(0, len(weight), 2048):
            part = weight[start : start + 2048].to(device).double()
            part = part if gain is None else part * gain.to(device)
            total = part.T @ part if total is None else total.addmm_(part.T, part)
    if total is None:
        raise ValueError("gram needs at least one weight")
    return total


def eigenvectors(matrix: Tensor) -> Tensor:
    """Orthogonal eigenvectors (d, d) of a symmetric matrix as columns, largest eigenvalue first, on the CPU.

    Each is signed so that its largest element is positive: devices and libraries differ in signs only, as long as the
    eigenvalues are distinct.
    """
    vectors: Tensor = torch.linalg.eigh(matrix).eigenvectors.flip(1).cpu()
    largest = vectors.abs().argmax(0, keepdim=True)
    return vectors * vectors.gather(0, largest).sign()
