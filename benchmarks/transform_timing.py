"""How long the transforms' decompositions and descent take at a width, on random weights: for the benchmark page."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from wina_calib.transforms.eigen import eigenvectors, gram
from wina_calib.transforms.learn import Problem, learn
from wina_calib.transforms.residual import SITES_PER_STEP, rank_for
from wina_calib.transforms.statistics import rows_per_site


def seconds(width: int, device: torch.device | str, *, steps: int = 3) -> dict[str, float]:
    """Time the parts of a fit.

    Args:
        width: of the residual stream. Weights are (width, width) and (3.5 width, width), as in Llama 3.
        device: where to compute.
        steps: descent steps to average over.

    Returns:
        Seconds: "gram" of both weights, "eigh" of it, "svd" of the square weight, which the fit avoids, "step" of the
        residual descent with a check after each of up to 8, where a fit has one in 25. `paper` and `stacked` pay gram and eigh
        for every site, `global` one eigh and its steps for the whole model.
    """
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(rows, width, generator=generator) for rows in (width, width * 7 // 2)]
    out: dict[str, float] = {}
    matrix = _timed(out, "gram", device, lambda: gram(weights, None, device))
    vectors = _timed(out, "eigh", device, lambda: eigenvectors(matrix))
    square = weights[0].to(device).double()
    _timed(out, "svd", device, lambda: torch.linalg.svd(square).Vh)
    problem = Problem(
        inputs=torch.randn(1, rows_per_site("attn_in", width), width, generator=generator).bfloat16().to(device),
        factor=torch.randn(1, rank_for(width), width, generator=generator).to(device),
        tail=torch.ones(1, device=device),
        weight=torch.ones(1, device=device),
    )
    start = vectors.to(device).unsqueeze(0)
    sites = [problem] * SITES_PER_STEP
    learn(sites, start, steps=1, sites_per_step=SITES_PER_STEP, seed=0)
    descent = partial(learn, sites, start, steps=steps, sites_per_step=SITES_PER_STEP, seed=0)
    _timed(out, "step", device, lambda: descent()[0])
    out["step"] /= steps
    return out


def _timed(
    out: dict[str, float], name: str, device: torch.device | str, work: Callable[[], torch.Tensor]
) -> torch.Tensor:
    started = time.perf_counter()
    result = work()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    out[name] = time.perf_counter() - started
    return result
