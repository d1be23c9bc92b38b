"""Massive activations stay on axes of their own under a rotation."""

import torch

from wina_calib.transforms.eigen import eigenvectors
from wina_calib.transforms.learn import Problem, learn
from wina_calib.transforms.sinks import MASSIVE, axes_with, keep_on_axes, massive_directions, massive_state


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


def test_directions_come_first_and_the_rest_is_sorted() -> None:
    spread = rotation(24) * torch.arange(24, 0, -1)
    pooled, directions = spread @ spread.mT, rotation(24, seed=1)[:, :2]
    axes = axes_with(directions, pooled)
    assert torch.allclose(axes.mT @ axes, torch.eye(24, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(axes[:, :2], directions, atol=1e-12)
    energy = (axes.mT @ pooled @ axes)[2:, 2:]
    assert (energy - energy.diag().diag()).abs().max() < 1e-9
    assert bool((energy.diag().diff() <= 0).all())
    assert torch.equal(axes_with(directions[:, :0], pooled), eigenvectors(pooled))


def test_a_descent_leaves_them_alone_and_lowers_the_cost() -> None:
    generator = torch.Generator().manual_seed(0)
    mixing, direction = rotation(32, seed=2), rotation(32, seed=3)[:, :1]
    sparse = torch.randn(2000, 32, generator=generator) ** 3
    inputs = (sparse @ mixing.float().mT).unsqueeze(0)
    weights = torch.randn(1, 32, 32, generator=generator)
    problem = Problem(inputs, weights, torch.zeros(1), torch.ones(1))
    pooled = inputs[0].double().mT @ inputs[0].double()
    options = {"steps": 40, "sites_per_step": 1, "seed": 0}
    found, cost, before = learn([problem], axes_with(direction, pooled).unsqueeze(0), fixed=1, **options)
    assert torch.allclose(found[0, :, :1], direction, atol=1e-6)
    assert torch.allclose(found[0].mT @ found[0], torch.eye(32, dtype=torch.float64), atol=1e-12)
    assert cost < 0.95 * before


def test_directions_become_axes_and_little_else_turns() -> None:
    before, directions = rotation(24), rotation(24, seed=1)[:, :2]
    after = keep_on_axes(before, directions)
    assert torch.allclose(after.mT @ after, torch.eye(24, dtype=torch.float64), atol=1e-12)
    assert torch.allclose((after.mT @ directions).abs().amax(0), torch.ones(2, dtype=torch.float64), atol=1e-12)
    assert int(torch.linalg.matrix_rank(after - before, atol=1e-9)) <= 4  # a plane each
    assert torch.equal(keep_on_axes(before, directions[:, :0]), before)
