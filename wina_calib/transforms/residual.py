"""The rotation of the residual stream: pooled covariance first, then learned on the cost of masking."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from wina_calib.common.devices import has_16_bit_products
from wina_calib.common.progress import SILENT, Progress
from wina_calib.common.threads import read_ahead
from wina_calib.model.architecture import Architecture, Layer
from wina_calib.transforms.apply import folded_gain
from wina_calib.transforms.learn import Problem, checks, learn, low_rank
from wina_calib.transforms.plan import INPUT_SITES
from wina_calib.transforms.sinks import axes_with, keep_on_axes
from wina_calib.transforms.statistics import Statistics, check_tokens, sampled_layers

SITES_PER_STEP = 8
STEPS = 200
_PREPARE, _TURN = "rotate weights: read layers", "rotate weights: search"


def default_steps(width: int) -> int:
    """Descent steps: fewer for narrow models, which need fewer."""
    return min(STEPS, 2 * width)


def residual_work(arch: Architecture, steps: int | None) -> list[tuple[str, int, float]]:
    """The phases of the fit, as `fit_work` gives them."""
    layers, width = len(sampled_layers(arch)), arch.hidden_size
    steps, rows = default_steps(width) if steps is None else steps, SITES_PER_STEP * max(512, width)
    pace = 0.42 if has_16_bit_products(torch.bfloat16) else 0.8
    return [
        (_PREPARE, layers, layers * 4700.0 * arch.layer_weights),
        (_TURN, checks(steps), steps * pace * (8.0 * rows * width**2 + 16.0 * width**3)),
    ]


def rank_for(width: int) -> int:
    """Rank at which W^T W is kept: an eighth of the width loses nothing that shows, small models keep more."""
    return min(width, max(64, width // 8))


def fit_residual(
    arch: Architecture,
    load_layer: Callable[[int], Mapping[str, Tensor]],
    statistics: Statistics,
    *,
    steps: int | None,
    seed: int,
    device: torch.device | str,
    grouped: bool = False,
    progress: Progress = SILENT,
    saved: Mapping[str, Tensor] | None = None,
    save: Callable[[dict[str, Tensor]], None] | None = None,
) -> Tensor:
    """Fit the rotation (d, d) of the whole residual stream, float64 on the CPU; `saved` and `save` as for `learn`.

    Where weights are to be quantized in groups (`grouped`), massive first tokens are turned onto axes after the descent.

    Raises:
        TransformError: too few sampled tokens for the model's width.
    """
    width = arch.hidden_size
    tokens = sum(len(statistics.sample(index, site)) for index in sampled_layers(arch) for site in INPUT_SITES)
    check_tokens(tokens, width)
    pooled = torch.zeros(width, width, dtype=torch.float64, device=device)
    problems: list[Problem] = []
    generator = torch.Generator().manual_seed(seed)
    steps = default_steps(width) if steps is None else steps
    progress.phase(_PREPARE, len(sampled_layers(arch)))
    for index, weights in read_ahead(load_layer, sampled_layers(arch)):
        for site in INPUT_SITES:
            problem, energy = _problem(arch.layers[index], site, weights, statistics, generator, device)
            problems.append(problem)
            # Each site counts by its output's error relative to its output's energy, so its inputs by the gain of W.
            for rows in problem.inputs[0].split(1024):
                pooled.addmm_(rows.double().T, rows.double(), alpha=energy / problem.inputs.shape[1])
        del weights  # the layer after the next is read from now on
        progress.step(f"layer {index + 1}")
    massive = statistics.massive()
    first = massive[:, :0] if grouped else massive
    start = axes_with(first, pooled).to(device).unsqueeze(0)
    progress.phase(_TURN, checks(steps, int(saved["step"]) if saved else 0))
    rotation, _, _ = learn(
        problems,
        start,
        steps=steps,
        sites_per_step=min(SITES_PER_STEP, len(problems)),
        seed=seed,
        fixed=first.shape[1],
        saved=saved,
        save=save,
        progress=progress,
    )
    found = rotation[0].cpu()
    return keep_on_axes(found, massive) if grouped else found


def unfold_gain(x: Tensor, gain: Tensor | None) -> Tensor:
    """The norm's output without its gain, float32. A channel with gain 0 carries nothing and stays 0."""
    if gain is None:
        return x.float()
    scale = gain.to(x.device, torch.float32)
    return torch.where(scale == 0, 0.0, x.float() / torch.where(scale == 0, 1.0, scale))


def _problem(
    layer: Layer,
    site: str,
    weights: Mapping[str, Tensor],
    statistics: Statistics,
    generator: torch.Generator,
    device: torch.device | str,
) -> tuple[Problem, float]:
    """A site's problem, and trace(W^T W) over its output energy."""
    gain = folded_gain(layer, site, weights)
    inputs = unfold_gain(statistics.take(layer.index, site).to(device), gain)
    scale = 1.0 if gain is None else gain.to(device, torch.float32)
    matrices = [weights[f"{p.module}.weight"].to(device) for p in layer.site(site).projections]

    def times(block: Tensor) -> Tensor:
        out = torch.zeros(block.shape, device=device)
        right = block.to(device) * (scale if isinstance(scale, float) else scale.unsqueeze(1))
        for matrix in matrices:
            for start in range(0, len(matrix), 4096):
                rows = matrix[start : start + 4096].float()
                out.addmm_(rows.T, rows @ right)
        return out * (scale if isinstance(scale, float) else scale.unsqueeze(1))

    trace = energy = 0.0
    for matrix in matrices:
        for start in range(0, len(matrix), 4096):
            rows = matrix[start : start + 4096].float() * scale
            trace += float(rows.double().square().sum())
            energy += float((inputs[:1024] @ rows.T).double().square().sum()) / min(1024, len(inputs))
    factor, tail = low_rank(times, trace, layer.site(site).width, rank_for(layer.site(site).width), generator)
    weight = torch.tensor([1.0 / max(energy, 1e-30)], device=factor.device)
    problem = Problem(inputs.bfloat16().unsqueeze(0), factor.unsqueeze(0), tail.float().reshape(1), weight)
    return problem, trace / max(energy, 1e-30)
