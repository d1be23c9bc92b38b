"""Massive activations kept on axes of their own.

The first token of a sequence, on which attention rests where it needs nothing, has a residual stream up to hundreds of times as
long as other tokens', in one or two directions that are axes of the model as it was trained. A rotation that was learned on the
other tokens spreads them over all axes, where each group of quantized weights then has to hold them, to an error that reaches
all tokens. On an axis of their own they stay in one group. There are two ways to have one. Given before the descent, masks cost
least. Turned onto it afterwards (`keep_on_axes`), masks cost a tenth more, and weights of 4 bits much less: what all tokens have
in common is then spread over many axes, among which errors of columns make up for each other, instead of lying on two.
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


def keep_on_axes(rotation: Tensor, directions: Tensor) -> Tensor:
    """Turn a rotation as little as brings directions onto axes.

    Args:
        rotation: (d, d) orthogonal, new axes as columns.
        directions: (d, n) orthonormal.

    Returns:
        (d, d) orthogonal float64, of which n columns are the directions, up to sign.
    """
    rotation = rotation.double()
    free = torch.ones(len(rotation), dtype=torch.bool)
    for direction in directions.double().mT:
        seen = rotation.mT @ direction
        axis = int((seen.abs() * free).argmax())
        free[axis] = False
        aim = torch.zeros_like(seen)
        aim[axis] = 1.0 if seen[axis] >= 0 else -1.0
        both = seen + aim  # the plane rotation that takes `seen` to `aim`
        turn = torch.eye(len(seen), dtype=torch.float64) - torch.outer(both, both) / (1 + seen @ aim)
        turn += 2 * torch.outer(aim, seen)
        rotation = rotation @ turn.mT
    return rotation
