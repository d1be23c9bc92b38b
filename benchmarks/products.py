"""Site products of a decoder layer inside one CUDA graph, sparse against cuBLAS. Needs a GPU.

    python benchmarks/products.py [--json FILE] [--layers 4] [--dtype bfloat16]

Each graph holds several layers with weights of their own, so that nothing is served from the cache between them.
Dense and sparse graphs are replayed in turn; medians are printed. Dense is `F.linear` on row-major weights.
"""

import argparse
import json
import statistics
import subprocess
from pathlib import Path

import click
import torch
from torch.nn import functional as F

from wina_calib.runtime.kernels import cpu, cuda, dispatch

MODELS = {
    "Llama-3-8B": {"qkv": (4096, 6144), "o": (4096, 4096), "gate_up": (4096, 28672), "down": (14336, 4096)},
    "Llama-2-7B": {"qkv": (4096, 12288), "o": (4096, 4096), "gate_up": (4096, 22016), "down": (11008, 4096)},
}
SPARSITIES = (0.0, 0.1, 0.25, 0.4, 0.5, 0.65)


def captured(fn):
    """A CUDA graph of `fn`, warmed up first (which also tunes)."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        fn()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return graph


def medians(graphs, replays=60):
    """Median microseconds of each graph, replayed in turn."""
    times = {name: [] for name in graphs}
    for _ in range(replays):
        for name, graph in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


class Site:
    """Weights of one site for several layers, in both layouts, and its threshold."""

    def __init__(self, width, out, layers, rows, dtype):
        self.x = torch.randn(rows, width, device="cuda", dtype=dtype)
        self.norm = torch.exp(0.2 * torch.randn(width, device="cuda"))
        self.threshold = torch.zeros((), device="cuda")
        self.dense = [torch.randn(out, width, device="cuda", dtype=dtype) / width**0.5 for _ in range(layers)]
        self.sparse = [cpu.column_storage([w]) for w in self.dense]

    def set(self, sparsity):
        score = self.x.float().abs() * self.norm
        value = torch.quantile(score.flatten()[: 1 << 20], sparsity) if sparsity else torch.tensor(-1.0)
        self.threshold.copy_(value)

    def check(self):
        y = cuda.sparse_site(self.x, self.sparse[0], self.norm, self.threshold)
        kept = dispatch.mask_inputs(self.x, self.norm, self.threshold).double()
        expected = kept @ self.dense[0].t().double()
        assert (y - expected).norm() <= 1e-2 * expected.norm(), "wrong result"

    def run_dense(self, layer):
        F.linear(self.x, self.dense[layer])

    def run_sparse(self, layer):
        # The kernel itself, also for numbers of rows for which the seam would choose the dense product.
        cuda.sparse_site(self.x, self.sparse[layer], self.norm, self.threshold)


def compare(sites, layers, label, results):
    """Print and record one row a sparsity for a list of sites run one after the other."""
    everything = [(site, layer) for layer in range(layers) for site in sites]
    graphs = {
        "dense": captured(lambda: [site.run_dense(layer) for site, layer in everything]),
        "sparse": captured(lambda: [site.run_sparse(layer) for site, layer in everything]),
    }
    for sparsity in SPARSITIES:
        for site in sites:
            site.set(sparsity)
            site.check()
        times = {name: value / layers for name, value in medians(graphs).items()}
        speedup = times["dense"] / times["sparse"]
        results.append({"site": label, "sparsity": sparsity, **times, "speedup": speedup})
        click.echo(f"| {label} | {sparsity} | {times['dense']:.1f} | {times['sparse']:.1f} | {speedup:.3f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", default="1")
    parser.add_argument("--models", default=",".join(MODELS))
    options = parser.parse_args()
    torch.manual_seed(0)
    import triton

    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout.strip()
    click.echo(
        f"{torch.cuda.get_device_name()}, driver {driver}, torch {torch.__version__}, triton {triton.__version__}"
    )
    report = {"device": torch.cuda.get_device_name(), "driver": driver, "torch": torch.__version__, "results": []}
    with torch.no_grad():
        for model in options.models.split(","):
            for rows in map(int, options.rows.split(",")):
                dtype = getattr(torch, options.dtype)
                click.echo(
                    f"\n{model}, {options.dtype}, {rows} row(s)\n| site | sparsity | dense us | sparse us | ratio |"
                )
                click.echo("| --- | --- | --- | --- | --- |")
                shapes = MODELS[model]
                sites = {name: Site(*shape, options.layers, rows, dtype) for name, shape in shapes.items()}
                results = []
                if rows == 1:
                    for name, site in sites.items():
                        compare([site], options.layers, name, results)
                compare(list(sites.values()), options.layers, "layer", results)
                report["results"].append({"model": model, "rows": rows, "table": results})
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
