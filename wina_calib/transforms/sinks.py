"""Massive activations kept on axes of their own.

The first token of a sequence, on which attention rests where it needs nothing, has a residual stream up to hundreds of times as
long as other tokens', in one or two directions that are axes of the model as it was trained. A rotation that was learned on the
other tokens spreads them over all axes, where each group of quantized weights then has to hold them, to an error that reaches
all tokens. On axes that the descent leaves alone they stay in one group. Turned onto axes after it, they cost masks a tenth more;
beside the axes of most energy, whose weights share their group, they cost int4 most.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from wina_calib.transforms.eigen import eigenvectors

MASSIVE = 8.0  # times the median length of the other tokens
_SHARE = 0.1  # of all massive states' energy that a direction must have
_MOST = 4


def massive_state(hidden: Tensor) -> Tensor:
    """The first token's state of a block, hidden (seq, width), as a unit vector (width,) float32; zeros if it is not massive."""
    lengths = hidden.float().norm(dim=-1)
    if len(hidden) < 2 or not bool(lengths[0] > MASSIVE * lengths[1:].median()):
        return torch.zeros(hidden.shape[-1])
    state: Tensor = hidden[0].float() / lengths[0]
    return state.cpu()


def massive_directions(states: Iterable[Tensor]) -> Tensor:
    """Orthonormal directions (width, n) float64 that hold nearly all of some unit vectors (width,) or zeros; n may be 0."""
    known = [state.double() for state in states]
    if not any(bool(state.any()) for state in known):
        return torch.zeros(len(known[0]) if known else 0, 0, dtype=torch.float64)
    rows = torch.stack(known)
    _, sizes, directions = torch.linalg.svd(rows, full_matrices=False)
    energy = sizes.square()
    count = int((energy[:_MOST] > _SHARE * energy.sum()).sum())
    chosen: Tensor = directions[:count].mT
    return chosen


def axes_with(directions: Tensor, pooled: Tensor) -> Tensor:
    """A rotation (d, d) float64 that begins with some directions, and goes on with the eigenvectors of what is left.

    Args:
        directions: (d, n) orthonormal.
        pooled: (d, d) symmetric.
    """
    count = directions.shape[1]
    if not count:
        return eigenvectors(pooled)
    given = directions.to(pooled)
    beside = torch.eye(len(given)).to(pooled) - given @ given.mT
    rest = eigenvectors(beside @ pooled @ beside)[:, : len(given) - count]
    both = torch.cat([directions.double(), rest], dim=1)
    q, r = torch.linalg.qr(both)  # orthogonal to rounding where eigenvalues are near 0 too
    turned: Tensor = q * r.diagonal().sign()
    return turned
