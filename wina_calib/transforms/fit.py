"""Fit a transform's rotations, one decoder layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from wina_calib.errors import TransformError
from wina_calib.families import Architecture, Layer
from wina_calib.transforms.apply import folded_gain
from wina_calib.transforms.eigen import eigenvectors, gram
from wina_calib.transforms.plan import INPUT_SITES, Rotations, plan
from wina_calib.transforms.statistics import Statistics

LoadLayer = Callable[[int], Mapping[str, Tensor]]
Progress = Callable[[str], None]
# The paper takes the singular vectors of one projection of each site.
_PAPER_PROJECTION = {"attn_in": ("k_proj", "qkv_proj"), "mlp_in": ("gate_proj", "gate_up_proj")}
# Pooled tokens a dimension below which a covariance is mostly noise.
MIN_TOKENS_PER_DIMENSION = 4


def fit(
    name: str,
    arch: Architecture,
    load_layer: LoadLayer,
    statistics: Statistics | None = None,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Rotations:
    """Fit the rotations of a transform.

    Args:
        name: the transform; "auto" is resolved by `plan`.
        arch: the model's description.
        load_layer: returns all tensors of one decoder layer, keyed by their path inside it.
        statistics: the finished sample of the dense pass; None for transforms that look at weights alone
            (`needed_sites` is empty).
        seed: of the random choices of the fit.
        device: where decompositions and products run.
        progress: called with a short line after each step.

    Raises:
        TransformError: the transform is not exact here, or the sample is too small for it.
    """
    wanted = plan(name, arch)
    report = progress or (lambda _: None)
    sites: dict[tuple[int, str], Tensor] = {}
    if wanted.sites:
        for layer in arch.layers:
            weights = load_layer(layer.index)
            for site in wanted.sites:
                sites[layer.index, site] = _site_rotation(wanted.name, layer, site, weights, device)
            report(f"{wanted.name}: layer {layer.index + 1} of {len(arch.layers)}")
    if (wanted.residual or wanted.heads) and statistics is None:
        raise TransformError(f"transform {wanted.name!r} needs the statistics of a dense pass.")
    residual = heads = None
    if wanted.residual and statistics is not None:
        residual = _covariance_rotation(arch, load_layer, statistics, device, report)
    if wanted.heads and statistics is not None:
        heads = tuple(_head_rotations(layer, statistics, device) for layer in arch.layers)
    return Rotations(residual=residual, heads=heads, sites=sites)


def _site_rotation(
    name: str, layer: Layer, site: str, weights: Mapping[str, Tensor], device: torch.device | str
) -> Tensor:
    chosen = [p for p in layer.site(site).projections if name == "stacked" or p.name in _PAPER_PROJECTION[site]]
    stacked = (weights[f"{p.module}.weight"] for p in chosen)
    return eigenvectors(gram(stacked, folded_gain(layer, site, weights), device))


def _covariance_rotation(
    arch: Architecture, load_layer: LoadLayer, statistics: Statistics, device: torch.device | str, report: Progress
) -> Tensor:
    pooled = torch.zeros(arch.hidden_size, arch.hidden_size, dtype=torch.float64, device=device)
    tokens = 0
    for layer in arch.layers:
        weights = load_layer(layer.index)
        for site in INPUT_SITES:
            gain = folded_gain(layer, site, weights)
            energy = sum(
                float((weights[f"{p.module}.weight"].double() * (1.0 if gain is None else gain)).square().sum())
                for p in layer.site(site).projections
            )
            x = unfold_gain(statistics.sample(layer.index, site).to(device), gain)
            pooled.addmm_(x.T, x, alpha=energy / len(x))
            tokens += len(x)
        report(f"covariance: layer {layer.index + 1} of {len(arch.layers)}")
    if tokens < MIN_TOKENS_PER_DIMENSION * arch.hidden_size:
        raise TransformError(
            f"a rotation of {arch.hidden_size} dimensions needs {MIN_TOKENS_PER_DIMENSION * arch.hidden_size} sampled "
            f"tokens and got {tokens}: calibrate on more text, or use --transform none."
        )
    return eigenvectors(pooled)


def unfold_gain(x: Tensor, gain: Tensor | None) -> Tensor:
    """The norm's output without its gain, float64. A channel with gain 0 carries nothing and stays 0."""
    if gain is None:
        return x.double()
    scale = gain.to(x.device)
    return torch.where(scale == 0, 0.0, x.double() / torch.where(scale == 0, 1.0, scale))


def _head_rotations(layer: Layer, statistics: Statistics, device: torch.device | str) -> Tensor:
    x = statistics.sample(layer.index, "attn_out").to(device).double()
    split = x.reshape(len(x), layer.kv_heads, layer.heads // layer.kv_heads, layer.head_dim)
    covariance = torch.einsum("thqv,thqw->hvw", split, split)
    return torch.stack([eigenvectors(c) for c in covariance])
