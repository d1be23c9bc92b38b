"""Fit a transform's rotations, one decoder layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from wina_calib.common.progress import SILENT, Progress
from wina_calib.common.threads import read_ahead
from wina_calib.errors import TransformError
from wina_calib.model.architecture import Architecture, Layer
from wina_calib.storage.resume import NOT_SAVED, Phase
from wina_calib.transforms.apply import folded_gain
from wina_calib.transforms.eigen import eigenvectors, gram
from wina_calib.transforms.heads import fit_heads, heads_flops
from wina_calib.transforms.plan import Rotations, plan
from wina_calib.transforms.residual import fit_residual, residual_work
from wina_calib.transforms.statistics import Statistics

LoadLayer = Callable[[int], Mapping[str, Tensor]]
_SITES, _HEADS = "rotate weights: sites", "rotate weights: heads"
_DESCENT = "descent."  # what a descent under way is saved under
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
    grouped: bool = False,
    phase: Phase = NOT_SAVED,
    progress: Progress = SILENT,
) -> Rotations:
    """Fit the rotations of a transform.

    Args:
        name: the transform; "auto" is resolved by `plan`.
        arch: the model's description.
        load_layer: returns all tensors of one decoder layer, keyed by their path inside it.
        statistics: the finished sample of the dense pass, used up by the fit; None for transforms that look at weights alone
            (`needed_sites` is empty).
        seed: of the random choices of the fit.
        steps: descent steps for the learned rotations, None for each one's default, 0 for covariance eigenvectors.
        device: where decompositions and products run.
        grouped: whether weights are to be quantized in groups.
        phase: where every matrix is saved.
        progress: hears of phases (`fit_phases`), and of every step.

    Raises:
        TransformError: the transform is not exact here, or the sample is too small for it.
    """
    wanted = plan(name, arch)
    rotations = phase.tensors()

    def keep(new: Mapping[str, Tensor], line: str | None = None) -> None:
        rotations.update(new)
        phase.save(phase.done_items + 1, tensors=new)
        if line is not None:
            progress.step(line)

    if wanted.sites and not phase.finished:
        progress.phase(_SITES, sum(f"{i}.{wanted.sites[-1]}" not in rotations for i in range(len(arch.layers))))
    for layer in arch.layers if wanted.sites else ():
        if f"{layer.index}.{wanted.sites[-1]}" not in rotations:
            weights = load_layer(layer.index)
            new = {f"{layer.index}.{s}": _site_rotation(wanted.name, layer, s, weights, device) for s in wanted.sites}
            keep(new, f"{wanted.name}: layer {layer.index + 1} of {len(arch.layers)}")
    if wanted.is_free and wanted.name != "none" and statistics is None and not phase.finished:
        raise TransformError(f"transform {wanted.name!r} needs the statistics of a dense pass.")
    if wanted.residual and "residual" not in rotations and statistics is not None:
        fitted = fit_residual(
            arch,
            load_layer,
            statistics,
            steps=steps,
            seed=seed,
            device=device,
            grouped=grouped,
            progress=progress,
            saved={
                name.removeprefix(_DESCENT): value for name, value in rotations.items() if name.startswith(_DESCENT)
            },
            save=lambda state: phase.save(
                phase.done_items + 1, passing={_DESCENT + name: value for name, value in state.items()}
            ),
        )
        keep({"residual": fitted})
    rotations = {name: value for name, value in rotations.items() if not name.startswith(_DESCENT)}
    if wanted.heads and statistics is not None:
        left = [layer.index for layer in arch.layers if f"{layer.index}.heads" not in rotations]
        if left:
            progress.phase(_HEADS, len(left))
        for index, weights in read_ahead(load_layer, left):
            turned = fit_heads(arch.layers[index], weights, statistics, steps=steps, seed=seed, device=device)
            del weights
            keep({f"{index}.heads": turned}, f"head: layer {index + 1} of {len(arch.layers)}")
    return Rotations(
        residual=rotations.get("residual"),
        heads=tuple(rotations[f"{layer.index}.heads"] for layer in arch.layers) if wanted.heads else None,
        sites={
            (layer.index, site): rotations[f"{layer.index}.{site}"] for layer in arch.layers for site in wanted.sites
        },
    )


def fit_work(name: str, arch: Architecture, steps: int | None = None) -> list[tuple[str, int, float]]:
    """The phases of a fit: name, steps, and the floating-point operations of a model's products that take as long."""
    wanted, layers = plan(name, arch), len(arch.layers)
    parts: list[tuple[str, int, float]] = []
    if wanted.sites:
        widths = [arch.layers[0].site(site).width for site in wanted.sites]
        parts.append((_SITES, layers, layers * sum(400.0 * width**3 for width in widths)))
    if wanted.residual:
        parts += residual_work(arch, steps)
    if wanted.heads:
        parts.append((_HEADS, layers, layers * heads_flops(arch.layers[0], steps)))
    return parts


def _site_rotation(
    name: str, layer: Layer, site: str, weights: Mapping[str, Tensor], device: torch.device | str
) -> Tensor:
    chosen = [p for p in layer.site(site).projections if name == "stacked" or p.name in _PAPER_PROJECTION[site]]
    stacked = (weights[f"{p.module}.weight"] for p in chosen)
    return eigenvectors(gram(stacked, folded_gain(layer, site, weights), device))
