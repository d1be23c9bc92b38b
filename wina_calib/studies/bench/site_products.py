"""The site products of one decoder layer alone: what the kernels gain before the rest of the model dilutes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from wina_calib.common.devices import device_name
from wina_calib.masks.score import column_norms
from wina_calib.model.architecture import Site
from wina_calib.model.loading import describe_config
from wina_calib.runtime.kernels import cpu, dispatch
from wina_calib.studies.bench.instruments import copy_bandwidth, onednn, onednn_pays, seconds, versions
from wina_calib.studies.bench.results import Products, Timing
from wina_calib.studies.flops import check_sparsities, find_config

# Weights that a measurement runs through, so that no cache holds those of the run before.
SPAN_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
REPEATS = {"cpu": 15, "cuda": 60}


@dataclass(frozen=True)
class SiteWeights:
    """One site's weights in both forms, an input row and the score's norm."""

    dense: tuple[Tensor, ...]  # a row-major (out, in) weight a projection
    sparse: Tensor  # (in, sum of outs), column-contiguous where `dispatch.column_layout_pays`, else a row-major view
    norm: Tensor  # (in,) float32
    x: Tensor  # (1, in)
    threshold: Tensor  # () float32

    def run_dense(self) -> None:
        """The products as a stock model does them, one a projection."""
        for weight in self.dense:
            linear(self.x, weight)

    def run_sparse(self) -> None:
        """The masked product of the whole site."""
        dispatch.sparse_site(self.x, self.sparse, self.norm, self.threshold)

    def set_sparsity(self, sparsity: float) -> int:
        """Set the threshold so that this share of the inputs is dropped; returns how many are."""
        scores = (self.x.float().abs() * self.norm).flatten()
        dropped = round(sparsity * scores.numel())
        self.threshold.fill_(float(scores.sort().values[dropped - 1]) if dropped else -1.0)
        return int((scores <= self.threshold).sum())


@torch.no_grad()
def products(
    model: str, *, sparsities: Sequence[float], device: torch.device, dtype: torch.dtype, seed: int = 0
) -> Products:
    """Time the site products of one layer with random weights and normal inputs, in a CUDA graph on CUDA.

    Shapes are those of `model`: a preset, config file, folder or Hub id.
    """
    check_sparsities(sparsities)
    arch = describe_config(find_config(model))
    sites = arch.layers[0].sites
    layer_bytes = sum(site.weights for site in sites) * dtype.itemsize
    span = SPAN_BYTES.get(device.type, SPAN_BYTES["cpu"])
    layers = max(1, min(len(arch.layers), -(-span // layer_bytes)))
    generator = torch.Generator(device=device).manual_seed(seed)
    highest = max(sparsities)
    made = [_site(site, device, dtype, highest, generator) for _ in range(layers) for site in sites]
    roof = copy_bandwidth(device)
    dense = _runner([s.run_dense for s in made], device)
    sparse = _runner([s.run_sparse for s in made], device)
    repeats = REPEATS.get(device.type, REPEATS["cpu"])
    with_onednn = onednn_pays(dense, device, dtype)
    results = []
    all_dense: list[float] = []
    for sparsity in sparsities:
        dropped = [site.set_sparsity(sparsity) * site.sparse.shape[1] for site in made]
        real = sum(dropped) / sum(site.sparse.numel() for site in made)
        with nullcontext() if with_onednn else onednn(False):
            pairs = [(seconds(dense, device), seconds(sparse, device)) for _ in range(repeats)]
        all_dense += [d for d, _ in pairs]
        row = _row([s for _, s in pairs], layers, layer_bytes * (1 - real), roof)
        ratio = Timing.of([d / s for d, s in pairs])
        results.append(
            {"sparsity": sparsity, "achieved_sparsity": real, "read_fraction": 1 - real}
            | row
            | {"speedup": ratio.median, "speedup_spread": ratio.spread}
        )
    return Products(
        model=model,
        device=device_name(device),
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads() if device.type == "cpu" else 0,
        onednn=with_onednn,
        layers=layers,
        roof_gb_s=roof / 1e9,
        versions=versions(device),
        dense=_row(all_dense, layers, layer_bytes, roof),
        results=tuple(results),
    )


def _row(samples: Sequence[float], layers: int, read: float, roof: float) -> dict[str, object]:
    time = Timing.of([s / layers for s in samples])
    return {
        "ms_per_layer": 1e3 * time.median,
        "ms_per_layer_spread": (1e3 * time.low, 1e3 * time.high),
        "bytes_per_layer": round(read),
        "roof_share": read / time.median / roof,
    }


def _site(
    site: Site, device: torch.device, dtype: torch.dtype, sparsity: float, generator: torch.Generator
) -> SiteWeights:
    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)

    weights = tuple(normal(p.out_features, site.width).div_(site.width**0.5) for p in site.projections)
    pays = dispatch.column_layout_pays(device.type, dtype, site.width, site.out_features, sparsity)
    sparse = cpu.column_storage(weights) if pays else torch.cat(weights).t()
    norm = column_norms(weights).to(device)
    return SiteWeights(weights, sparse, norm, normal(1, site.width), torch.zeros((), device=device))


def _runner(calls: Sequence[Callable[[], None]], device: torch.device) -> Callable[[], None]:
    """All calls one after another: in a CUDA graph on CUDA, warmed up (and tuned) before."""

    def run() -> None:
        for call in calls:
            call()

    if device.type != "cuda":
        run()
        return run
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
