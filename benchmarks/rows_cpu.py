"""Several rows of a quantized layer on a CPU: each masked by itself, over the same rows with nothing dropped.

    python benchmarks/rows_cpu.py [--shape qwen2.5-1.5b] [--rows 2,4,8] [--sparsity 0,0.25,0.4] [--bits 4] [--threads 2]

The products of one decoder layer, random codes and inputs, so that rows have as little in common as they can. Dense and sparse
products take turns; what is printed is the median of as many turns and how many times as fast as dense each sparsity is.
"""

import json
import statistics
import time

import click
import torch
from random_sites import random_site, shapes_of

from wina_calib.quantization.formats import WeightFormat
from wina_calib.runtime.kernels import quantized_cpu


def measure(weights, rows, sparsities, turns):
    """Milliseconds of the products of `rows` rows: dense, and at each sparsity, by turns."""
    inputs = [torch.randn(rows, weight.width).bfloat16() for weight in weights]
    norms = [torch.ones(weight.width) for weight in weights]
    cuts = [
        torch.tensor(2**0.5 * float(torch.erfinv(torch.tensor(s)))) if s else torch.tensor(-1.0) for s in sparsities
    ]
    times = [[] for _ in range(1 + len(cuts))]
    for turn in range(-2, turns):  # the first two are not counted
        for n, found in enumerate(times):
            before = time.perf_counter()
            for x, weight, norm in zip(inputs, weights, norms, strict=True):
                if n:
                    quantized_cpu.sparse_site(x, weight, norm, cuts[n - 1])
                else:
                    quantized_cpu.dense_site(x, weight)
            if turn >= 0:
                found.append(1e3 * (time.perf_counter() - before))
    return [statistics.median(found) for found in times]


@click.command()
@click.option("--shape", default="qwen2.5-1.5b", show_default=True, help="A preset, config file or folder.")
@click.option("--rows", default="2,3,4,6,8,12,16,24,32,40,48,64", show_default=True)
@click.option("--sparsity", default="0,0.25,0.4", show_default=True)
@click.option("--bits", default=4, show_default=True)
@click.option("--group-size", default=64, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--turns", default=25, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(shape, rows, sparsity, bits, group_size, threads, turns, as_json):
    """Print dense milliseconds and the speed of each sparsity over it, a line for each number of rows."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    sparsities = [float(s) for s in sparsity.split(",")]
    weights = [random_site(WeightFormat(bits, group_size), *s, "cpu") for s in shapes_of(shape)]
    found = {}
    for count in map(int, rows.split(",")):
        dense, *others = measure(weights, count, sparsities, turns)
        found[count] = {"dense_ms": dense} | {f"{s:.0%}": dense / t for s, t in zip(sparsities, others, strict=True)}
        if not as_json:
            ratios = "  ".join(f"{s:.0%} {dense / t:5.2f}" for s, t in zip(sparsities, others, strict=True))
            click.echo(f"{count:4} rows: dense {dense:8.2f} ms  {ratios}")
    if as_json:
        click.echo(json.dumps(found))


if __name__ == "__main__":
    main()
