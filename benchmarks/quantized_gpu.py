"""Quantized sparse sites on a GPU: the products of a layer alone, and whole compiled steps beside the stock model. Needs a GPU.

    python benchmarks/quantized_gpu.py [--model llama-3-8b] [--only products,int4,int8,stock,prompts,torchao] [--json FILE]

Models: the presets of `wina-calib flops`, and qwen3-8b. Products run in a CUDA graph of several layers with weights of their own,
so that no cache serves them. A step is a token of a compiled model with random weights and a static cache, after a prompt of 64;
times are medians of five runs of 32 tokens. The fixed cost is a step whose sites drop all inputs. `stock` is transformers' model
in bfloat16, `torchao` the same quantized by that package, where it is installed. Launch shapes are measured first, where no
earlier run has.
"""

import argparse
import json
import statistics
from pathlib import Path

import click
import torch
from products import captured, medians
from random_sites import config_of, random_site, shapes_of
from torch import nn
from torch.nn import functional as F

from wina_calib.budgets.count import count_cells
from wina_calib.model.architecture import describe
from wina_calib.model.loading import language_model, meta_model
from wina_calib.quantization.formats import QuantizedRows, WeightFormat
from wina_calib.runtime.kernels import dispatch, quantized_cuda
from wina_calib.runtime.load import choose_sparsity, sparse_sites
from wina_calib.studies.bench import decode, models
from wina_calib.studies.bench.instruments import seconds

DEVICE = torch.device("cuda")
FORMATS = {"int4": WeightFormat(4, 64), "int8": WeightFormat(8)}
SPARSITIES = {"int4": (0.0, 0.25, 0.4), "int8": (0.0, 0.5)}
LAYERS, PROMPT, NEW, CHUNK, CHUNKS = 6, 64, 256, 32, 5
ROWS = (2, 4, 8, 16, 24, 32)
LIMIT = 4.3e12  # bytes a second of a large copy on an H200
STD = 0.02  # of random weights


def cut(x, sparsity):
    """The threshold that drops this share of x."""
    if sparsity in (0.0, 1.0):
        return torch.full((), -1.0 if sparsity == 0.0 else torch.inf, device=DEVICE)
    return torch.quantile(x.float().abs().flatten()[: 1 << 20], sparsity)


def products(name):
    """Microseconds of a layer's products, and the share of what the bytes allow."""
    shapes = shapes_of(name)
    found = {}
    for kind, form in FORMATS.items():
        layers = [[random_site(form, *shape, DEVICE) for shape in shapes] for _ in range(LAYERS)]
        size = sum(t.nbytes for weight in layers[0] for t in weight.named().values())

        def time_of(rows, sparsity, layers=layers):
            given = []
            for width, _ in shapes:
                x = torch.randn(rows, width, device=DEVICE, dtype=torch.bfloat16)
                given.append((x, torch.ones(width, device=DEVICE), cut(x, sparsity)))

            def run():
                for layer in layers:
                    for weight, (x, norm, threshold) in zip(layer, given, strict=True):
                        dispatch.quantized_site(x, weight, norm, threshold)

            return medians({"run": captured(run)}, 15)["run"] / LAYERS

        for sparsity in (*SPARSITIES[kind], 0.65, 1.0):
            took = time_of(1, sparsity)
            share = size * (1 - sparsity) / LIMIT * 1e6 / took
            found[f"{kind} {sparsity} products"] = took
            click.echo(f"{name} {kind}, {sparsity} dropped: {took:.1f} us a layer, {share:.2f} of the limit")
        for rows in ROWS:
            found[f"{kind} rows {rows}"] = dense, sparse = [time_of(rows, s) for s in (0.0, 0.4)]
            click.echo(f"{name} {kind}, {rows} rows: dense {dense:.1f}, 40 % dropped {sparse:.1f}")
        x = [torch.randn(512, width, device=DEVICE, dtype=torch.bfloat16) for width, _ in shapes]
        dense = [torch.randn(out, width, device=DEVICE, dtype=torch.bfloat16) for width, out in shapes]
        many = captured(
            lambda x=x, layers=layers: [quantized_cuda.dense_site(*v) for v in zip(x, layers[0], strict=True)]
        )
        plain = captured(lambda x=x, dense=dense: [F.linear(*v) for v in zip(x, dense, strict=True)])
        found[f"{kind} 512 rows"] = medians({"quantized": many, "bfloat16": plain}, 15)
        click.echo(f"{name} {kind}, 512 rows: {found[f'{kind} 512 rows']}")
    head = QuantizedRows(
        torch.randint(-127, 128, (128256, 4096), device=DEVICE).to(torch.int8), torch.ones(128256, device=DEVICE)
    )
    x = torch.randn(1, 4096, device=DEVICE, dtype=torch.bfloat16)
    found["lm_head"] = medians({"head": captured(lambda: dispatch.quantized_rows(x, head))}, 15)["head"]
    click.echo(f"lm_head in int8, 128256 x 4096: {found['lm_head']:.1f} us")
    return found


def token(run):
    """Milliseconds of a token."""
    run.prefill()
    run.steps(6)
    times = []
    for _ in range(CHUNKS):
        if run.position + CHUNK > PROMPT + NEW:
            run.prefill()
            run.steps(2)
        times.append(1e3 * seconds(lambda: run.steps(CHUNK), DEVICE) / CHUNK)
    return statistics.median(times)


def light_model(config):
    """A model whose projections have weights of next to no memory, all columns alike: quantized ones take their place."""
    model = meta_model(config, torch.bfloat16)
    inside = {p.module for p in (p for site in describe(model).layers[0].sites for p in site.projections)}
    for name, module in model.named_modules():
        for own, parameter in list(module.named_parameters(recurse=False)):
            out, *rest = parameter.shape
            if not rest:
                value = torch.full((out,), 0.0 if own == "bias" else 1.0)
            elif any(name.endswith(f".{projection}") for projection in inside):
                value = (torch.randn(out, 1, device=DEVICE) * STD).bfloat16().expand(out, *rest)
            else:
                value = torch.empty(out, *rest, device=DEVICE, dtype=torch.bfloat16).normal_(0.0, STD)
            setattr(module, own, nn.Parameter(value.to(DEVICE, torch.bfloat16), requires_grad=False))
    model.tie_weights()
    return model.to(DEVICE).eval()


def quantized_model(name, form, sparsities, ids):
    """A quantized sparse model with random codes, and thresholds for these sparsities."""
    config = language_model(config_of(name)).config
    like, sparse = light_model(config), light_model(config)
    pair = models.Pair(name, like, sparse, count_cells(describe(sparse), "none"), False, None)
    models.fit(pair, sparsities, ids[:, : PROMPT + CHUNK], PROMPT, form)
    return sparse


@torch.no_grad()
def steps(name, kinds):
    """Milliseconds a token of whole models, and of prompts."""
    found = {}
    ids = torch.randint(30000, (1, PROMPT + NEW), device=DEVICE)
    for kind in [kind for kind in FORMATS if kind in kinds]:
        fitted = tuple(s for s in SPARSITIES[kind] if s)
        sparse = quantized_model(name, FORMATS[kind], fitted, ids)
        run = decode.session(sparse, ids, PROMPT, compiled=True)
        for sparsity in SPARSITIES[kind]:
            choose_sparsity(sparse, sparsity)
            found[f"{kind} {sparsity}"] = took = token(run)
            click.echo(f"{name} {kind} x {sparsity}: {took:.3f} ms, {1e3 / took:.0f} tokens/s")
        for site in sparse_sites(sparse):
            for group in site.groups:
                site.group(group.name).threshold.fill_(torch.inf)
        found[f"{kind} fixed"] = token(run)
        click.echo(f"{name} {kind}, nothing read at its sites: {found[f'{kind} fixed']:.3f} ms")
        if "prompts" in kinds:
            choose_sparsity(sparse, fitted[-1])
            found[f"{kind} prompts"] = {n: prompt(sparse, n) for n in (512, 2048)}
            click.echo(f"{name} {kind}, prompts: {found[f'{kind} prompts']}")
        del run, sparse
        torch._dynamo.reset()
    if "stock" in kinds:
        dense = models.random_model(language_model(config_of(name)).config, DEVICE, torch.bfloat16, 0)
        found["stock"] = token(decode.session(dense, ids, PROMPT, compiled=True))
        click.echo(f"{name} stock bfloat16, compiled: {found['stock']:.3f} ms")
        if "prompts" in kinds:
            found["stock prompts"] = {n: prompt(dense, n) for n in (512, 2048)}
            click.echo(f"{name} stock bfloat16, prompts: {found['stock prompts']}")
        del dense
        torch._dynamo.reset()
    if "torchao" in kinds:
        found |= of_torchao(name, ids)
    return found


def of_torchao(name, ids):
    """Milliseconds a token of transformers' model with torchao's weights of 4 and 8 bits, dense and compiled."""
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    found = {}
    ways = {
        "int4, groups of 64": Int4WeightOnlyConfig(group_size=64, int4_packing_format="tile_packed_to_4d"),
        "int8": Int8WeightOnlyConfig(),
    }
    for kind, way in ways.items():
        dense = models.random_model(language_model(config_of(name)).config, DEVICE, torch.bfloat16, 0)
        quantize_(dense.model, way)
        found[f"torchao {kind}"] = took = token(decode.session(dense, ids, PROMPT, compiled=True))
        click.echo(f"{name} torchao {kind}: {took:.3f} ms, {1e3 / took:.0f} tokens/s")
        del dense
        torch._dynamo.reset()
    return found


def prompt(model, length):
    """Milliseconds of a prompt, not compiled."""
    ids = torch.randint(30000, (1, length), device=DEVICE)
    return 1e3 * statistics.median(seconds(lambda: model(ids, logits_to_keep=1), DEVICE) for _ in range(7))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--only", default="products,int4,int8,stock,prompts")
    parser.add_argument("--json")
    options = parser.parse_args()
    click.echo(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    torch.manual_seed(0)
    kinds = options.only.split(",")
    with torch.no_grad():
        found = products(options.model) if "products" in kinds else {}
    found |= steps(options.model, kinds)
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
