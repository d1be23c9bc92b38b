"""Massive activations stay on axes of their own under a rotation."""

import torch

from wina_calib.transforms.sinks import MASSIVE, keep_on_axes, massive_directions, massive_state


def rotation(size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q


def test_a_first_token_far_longer_than_the_others_is_massive() -> None:
    hidden = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    assert not massive_state(hidden).any()
    hidden[0] = 0
    hidden[0, 5] = -2 * MASSIVE * hidden[1:].norm(dim=-1).median()
    assert torch.equal(massive_state(hidden), -torch.eye(16)[5])


def test_directions_are_those_that_hold_the_energy() -> None:
    axes = torch.eye(16)
    found = massive_directions([torch.zeros(16), axes[3], -axes[3], axes[7], (axes[7] + 0.01 * axes[1])])
    assert found.shape == (16, 2)
    assert torch.allclose(found.square().sum(1)[[3, 7]], torch.ones(2, dtype=torch.float64), atol=1e-3)
    assert massive_directions([torch.zeros(16)]).shape == (16, 0)


def test_directions_become_axes_and_little_else_turns() -> None:
    before, directions = rotation(24), rotation(24, seed=1)[:, :2]
    after = keep_on_axes(before, directions)
    assert torch.allclose(after.mT @ after, torch.eye(24, dtype=torch.float64), atol=1e-12)
    assert torch.allclose((after.mT @ directions).abs().amax(0), torch.ones(2, dtype=torch.float64), atol=1e-12)
    assert int(torch.linalg.matrix_rank(after - before, atol=1e-9)) <= 4  # a plane each
    assert torch.equal(keep_on_axes(before, directions[:, :0]), before)
