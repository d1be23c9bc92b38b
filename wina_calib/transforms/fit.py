"""Fit a transform's rotations, one decoder layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from wina_calib.errors import TransformError
from wina_calib.families import Architecture, Layer
from wina_calib.transforms.apply import folded_gain
from wina_calib.transforms.eigen import eigenvectors, gram
from wina_calib.transforms.heads import fit_heads
from wina_calib.transforms.plan import Rotations, plan
from wina_calib.transforms.residual import fit_residual
from wina_calib.transforms.statistics import Statistics

LoadLayer = Callable[[int], Mapping[str, Tensor]]
Progress = Callable[[str], None]
# The paper takes the singular vectors of one projection of each site.
_PAPER_PROJECTION = {"attn_in": ("k_proj", "qkv_proj"), "mlp_in": ("gate_proj", "gate_up_proj")}


def fit(
    name: str,
    arch: Architecture,
    load_layer: LoadLayer,
    statistics: Statistics | None = None,
    *,
    seed: int = 0,
    steps: int | None = None,
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
        steps: descent steps for the learned rotations, None for each one's default, 0 for covariance eigenvectors.
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
    if wanted.is_free and wanted.name != "none" and statistics is None:
        raise TransformError(f"transform {wanted.name!r} needs the statistics of a dense pass.")
    residual = heads = None
    if wanted.residual and statistics is not None:
        residual = fit_residual(arch, load_layer, statistics, steps=steps, seed=seed, device=device, report=report)
    if wanted.heads and statistics is not None:
        found = []
        for layer in arch.layers:
            weights = load_layer(layer.index)
            found.append(fit_heads(layer, weights, statistics, steps=steps, seed=seed, device=device))
            report(f"head: layer {layer.index + 1} of {len(arch.layers)}")
        heads = tuple(found)
    return Rotations(residual=residual, heads=heads, sites=sites)


def _site_rotation(
    name: str, layer: Layer, site: str, weights: Mapping[str, Tensor], device: torch.device | str
) -> Tensor:
    chosen = [p for p in layer.site(site).projections if name == "stacked" or p.name in _PAPER_PROJECTION[site]]
    stacked = (weights[f"{p.module}.weight"] for p in chosen)
    return eigenvectors(gram(stacked, folded_gain(layer, site, weights), device))
