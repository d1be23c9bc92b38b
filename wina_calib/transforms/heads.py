"""A rotation for each key/value head between the value projection and o_proj."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from wina_calib.model.architecture import Layer
from wina_calib.transforms.eigen import eigenvectors
from wina_calib.transforms.learn import Problem, held_out_cost, learn
from wina_calib.transforms.statistics import Statistics, check_tokens

STEPS = 100


def heads_flops(layer: Layer, steps: int | None) -> float:
    """Floating-point operations of a model's products that take as long as the fit of a layer."""
    taken = 20 + 1.2 * (STEPS if steps is None else steps)
    return taken * (1e7 + 20.0 * layer.heads * 512 * layer.head_dim**2)


def fit_heads(
    layer: Layer,
    weights: Mapping[str, Tensor],
    statistics: Statistics,
    *,
    steps: int | None,
    seed: int,
    device: torch.device | str,
) -> Tensor:
    """Fit the rotations (kv_heads, head_dim, head_dim) of one layer, float64 on the CPU.

    Starts at the covariance eigenvectors of all query heads of a group; a head whose held-out cost would not fall keeps
    the identity.

    Raises:
        TransformError: too few sampled tokens for the heads' width.
    """
    group = layer.heads // layer.kv_heads
    x = statistics.take(layer.index, "attn_out").to(device)
    check_tokens(len(x) * group, layer.head_dim)
    values = x.reshape(len(x), layer.kv_heads, group, layer.head_dim).permute(1, 2, 0, 3)
    weight = weights[f"{layer.site('attn_out').projections[0].module}.weight"].to(device)
    columns = weight.reshape(len(weight), layer.kv_heads, group, layer.head_dim).permute(1, 2, 0, 3)
    flat = values.flatten(1, 2).double()
    covariance = flat.mT @ flat
    grams = (columns.double().mT @ columns.double()).float()  # (kv_heads, group, head_dim, head_dim)
    floats = values.float()
    energy = ((floats @ grams) * floats).sum((1, 3)).mean(1)  # (kv_heads,): of all query heads of a group
    size, vectors = torch.linalg.eigh(grams.double())
    factors = (size.clamp_min(0).sqrt().unsqueeze(-1) * vectors.mT).float()
    problems = [
        Problem(
            inputs=values[:, q].contiguous(),
            factor=factors[:, q],
            tail=torch.zeros(layer.kv_heads, device=device),
            weight=1.0 / energy.clamp_min(1e-30),
        )
        for q in range(group)
    ]
    start = torch.stack([eigenvectors(c) for c in covariance]).to(device)
    identity = torch.eye(layer.head_dim, dtype=torch.float64, device=device).expand_as(start)
    turns, cost, _ = learn(
        problems, start, steps=STEPS if steps is None else steps, sites_per_step=min(2, group), seed=seed
    )
    plain = held_out_cost(problems, identity)
    return torch.where((cost < plain)[:, None, None], turns, identity).cpu()
