"""Steps of vLLM: our sparse checkpoints beside its own bfloat16 and int4, one request to many. Needs vLLM (docs/serving.md).

    python -m benchmarks.serving make FOLDER [--shape tinyllama] [--layers 22]
    python -m benchmarks.serving run FOLDER [--requests 1,8,64] [--rounds 3] [--threads 2] [--eager] [--json FILE]

`make` writes four checkpoints of a model's shape. As only speed is asked, weights are random and two layers are repeated, their
thresholds are quantiles of the scores of a few tokens, and int4 is rounded to nearest: ours as calibration stores it, vLLM's
own (GPTQ's format) symmetric in groups of 128 inputs. `run` starts one engine in a
process for each, one after another, then lets them compute in turn, one at a time: some steps of one, as many of the next.
Requests stay and more are added, so that all steps decode. A step's time is the median of a turn; ratios are of two turns
of one round, and the middle one of all rounds is printed.
"""

import json
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path

import click
import torch
from safetensors.torch import load_file, save_file

SHAPES = {
    "tinyllama": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "head_dim": 64,
    },
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "head_dim": 128,
    },
}
WEIGHTS = "model-00001-of-00001.safetensors"
FEW, TOKENS, GROUP = 2, 64, 128
PROMPT, STEPS = 8, {1: 16, 8: 8, 64: 4}
PAIRS = (("sparse", "dense"), ("sparse-int4", "int4"), ("sparse-int4", "dense"))


def make_dense(folder, shape, layers):
    """A random model, whose layers repeat the first ones, in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**shape, num_hidden_layers=layers, dtype="bfloat16", bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder, max_shard_size="50GB")
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
    import tiny

    tiny.tokenizer().save_pretrained(folder)


def inputs_of(folder):
    """The inputs of every linear layer for a few tokens, by its name, and the weights."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, given, name=name: found.__setitem__(name, given[0][0].float()))
    with torch.inference_mode():
        model(torch.randint(3, model.config.vocab_size, (1, TOKENS)))
    return found, model


def write_sparse(few, like, out, shape, layers, sparsity):
    """A checkpoint of the layers of `few`, repeated, in the form of another one; in 16 bits it has the dense model's weights."""
    from wina_calib.checkpoint.reader import open_checkpoint
    from wina_calib.masks.score import column_norms
    from wina_calib.model.architecture import describe
    from wina_calib.quantization.formats import quantize_rows
    from wina_calib.quantization.scales import quantize_nearest

    inputs, model = inputs_of(few)
    template, arch = open_checkpoint(like), describe(model)
    form, stored = template.settings.weight_format, dict(model.state_dict())
    known = {site.name: template.site(layer, site) for layer, site in template.architecture.sites}
    made = {}
    for layer, site in arch.sites:
        path, old = f"{layer.prefix}wina.{site.name}", known[site.name]
        names = [f"{layer.prefix}{projection.module}" for projection in site.projections]
        weights = [stored[f"{name}.weight"] for name in names]
        norm = column_norms(weights)
        scores = inputs[names[0]].abs() * norm
        made |= {f"{path}.budget": old.budget, f"{path}.error": old.error, f"{path}.shared.norm": norm}
        made[f"{path}.shared.table"] = old.tables["shared"]
        made[f"{path}.shared.threshold"] = scores.flatten()[:: max(1, scores.numel() // 100_000)].quantile(sparsity)
        if form is None:
            continue
        quantized = quantize_nearest(torch.cat(weights).t(), form)
        made |= {f"{path}.shared.{part}": tensor for part, tensor in quantized.named().items()}
        for name in names:
            del stored[f"{name}.weight"]
    if form is not None:
        head = quantize_rows(stored.pop("lm_head.weight"))
        made |= {"lm_head.codes": head.codes, "lm_head.scales": head.scales}
        stored["model.norm.weight"] = stored["model.norm.weight"].view(1, -1)  # as stored, see docs/format.md
    section = json.loads((like / "config.json").read_text())["quantization_config"]
    section |= {"budget": "uniform", "curve_levels": [], "samples": 0, "whole_layers": False, "vocab": 0}
    changes = shape | {"num_hidden_layers": layers, "quantization_config": section}
    write(like, out, repeated(stored | made, layers), changes, None if form else out.with_name("dense") / WEIGHTS)


def repeated(tensors, layers):
    """Tensors of a model with more layers, which are those that there are again and again."""
    made = {}
    for name, tensor in tensors.items():
        before, found, after = name.partition("model.layers.")
        number, _, rest = after.partition(".")
        for layer in range(int(number), layers, FEW) if found else ():
            made[f"{before}{found}{layer}.{rest}"] = tensor.clone()
        if not found:
            made[name] = tensor
    return made


def write(folder, out, tensors, changes, weights=None):
    """A checkpoint with the config of another, changed; `weights` is a file that holds its weights already."""
    out.mkdir(parents=True, exist_ok=True)
    parts = {WEIGHTS: {}, "wina.safetensors": {}}
    for name, tensor in tensors.items():
        added = ".wina." in name and "codes" not in name
        parts["wina.safetensors" if added else WEIGHTS][name] = tensor.contiguous()
    for file, held in parts.items():
        if file == WEIGHTS and weights is not None:
            (out / file).unlink(missing_ok=True)
            os.link(weights, out / file)
        elif held:
            save_file(held, out / file, {"format": "pt"})
    weight_map = {name: file for file, held in parts.items() for name in held}
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = json.loads((folder / "config.json").read_text()) | changes
    config.pop("layer_types", None)
    (out / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / name).write_bytes((folder / name).read_bytes())


def write_int4(few, out, layers):
    """GPTQ's format, rounded to nearest."""
    tensors = load_file(few / "model.safetensors")
    made = {}
    for name, weight in tensors.items():
        if ".layers." not in name or weight.ndim != 2:
            made[name] = weight
            continue
        stem, (outs, width) = name.removesuffix(".weight"), weight.shape
        groups = weight.float().t().reshape(width // GROUP, GROUP, outs)
        scales = (groups.abs().amax(1) / 7).bfloat16()
        codes = (groups / scales.float()[:, None]).round_().clamp_(-8, 7).to(torch.int32).view(width, outs) + 8
        shifts = torch.arange(0, 32, 4, dtype=torch.int64)[:, None]
        packed = (codes.long().view(width // 8, 8, outs) << shifts).sum(1)
        made[f"{stem}.qweight"] = torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)
        made[f"{stem}.qzeros"] = torch.full((width // GROUP, outs // 8), 0x77777777, dtype=torch.int32)
        made[f"{stem}.scales"] = scales
        made[f"{stem}.g_idx"] = (torch.arange(width) // GROUP).to(torch.int32)
    method = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
    write(few, out, repeated(made, layers), {"num_hidden_layers": layers, "quantization_config": method})


@click.group()
def main():
    pass


@main.command()
@click.argument("folder", type=Path)
@click.option("--shape", default="tinyllama", type=click.Choice(SHAPES))
@click.option("--layers", default=22)
def make(folder, shape, layers):
    """Write the checkpoints."""
    import wina_calib

    folder.mkdir(parents=True, exist_ok=True)
    few = folder / "few"
    make_dense(few, SHAPES[shape], FEW)
    write(few, folder / "dense", repeated(load_file(few / "model.safetensors"), layers), {"num_hidden_layers": layers})
    write_int4(few, folder / "int4", layers)
    for name, sparsity, bits in (("sparse", 0.5, 0), ("sparse-int4", 0.4, 4)):
        like = folder / f"demo-{bits}"
        if not like.exists():
            text = {"budget": "uniform", "samples": 32, "seq_len": 256, "grid": (sparsity,)}
            wina_calib.calibrate("demo", like, sparsity=sparsity, bits=bits, **text)
        write_sparse(few, like, folder / name, SHAPES[shape], layers, sparsity)
        click.echo(f"{name} stands")


def engine(connection, model, options, log):
    """One engine, which makes steps when it is told to."""
    noise = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(noise, 1)
    os.dup2(noise, 2)
    start = time.monotonic()
    from vllm import LLM, SamplingParams

    imported = time.monotonic()
    found = LLM(model, dtype="bfloat16", max_model_len=512, max_num_seqs=64, enable_prefix_caching=False, **options)
    ready = time.monotonic()
    connection.send({"import": imported - start, "start": ready - imported})
    core = found.llm_engine
    count = 0
    while True:
        asked = connection.recv()
        if asked is None:
            return
        wanted, steps = asked
        params = SamplingParams(temperature=0, max_tokens=480, ignore_eos=True, detokenize=False)
        for number in range(count, wanted):
            core.add_request(
                str(number), {"prompt_token_ids": [3 + (number * 7 + i) % 300 for i in range(PROMPT)]}, params
            )
        begun: set[str] = {str(number) for number in range(count)}
        while len(begun) < wanted:
            begun |= {out.request_id for out in core.step()}
        count = wanted
        core.step()
        times = []
        for _ in range(steps):
            before = time.perf_counter()
            outs = core.step()
            times.append(time.perf_counter() - before)
            assert len(outs) == wanted, (len(outs), wanted)
        connection.send(times)


@main.command()
@click.argument("folder", type=Path)
@click.option("--requests", default="1,8,64")
@click.option("--rounds", default=3)
@click.option("--threads", default=2)
@click.option("--eager", is_flag=True)
@click.option("--only", default="dense,sparse,int4,sparse-int4")
@click.option("--json", "file", type=Path)
def run(folder, requests, rounds, threads, eager, only, file):
    """Start the engines and compare their steps."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
    }
    context = multiprocessing.get_context("spawn")
    engines, starts = {}, {}
    for name in only.split(","):
        here, there = context.Pipe()
        log = folder / f"{name}.log"
        process = context.Process(
            target=engine, args=(there, str(folder / name), {"enforce_eager": eager}, str(log)), daemon=False
        )
        process.start()
        there.close()
        try:
            starts[name] = here.recv()
        except EOFError:
            raise click.ClickException(f"{name} did not start:\n{log.read_text()[-3000:]}") from None
        engines[name] = here, process
        click.echo(f"{name:12} import {starts[name]['import']:6.1f} s, start {starts[name]['start']:6.1f} s")
    medians: dict[int, dict[str, list[float]]] = {}
    try:
        for count in map(int, requests.split(",")):
            found = medians[count] = {name: [] for name in engines}
            for _ in range(rounds):
                for name, (connection, _) in engines.items():
                    connection.send((count, STEPS.get(count, 4)))
                    found[name].append(statistics.median(connection.recv()))
            show(count, found)
    finally:
        for connection, process in engines.values():
            connection.send(None)
            process.join(60)
            if process.is_alive():
                process.terminate()
    if file is not None:
        file.write_text(json.dumps({"starts": starts, "step_seconds": medians}, indent=1))


def show(count, found):
    steps = ", ".join(f"{name} {1e3 * statistics.median(times):.1f}" for name, times in found.items())
    click.echo(f"{count:3} requests: ms a step: {steps}")
    for ours, theirs in PAIRS:
        if ours in found and theirs in found:
            ratios = sorted(b / a for a, b in zip(found[ours], found[theirs], strict=True))
            click.echo(
                f"             {ours} is {statistics.median(ratios):.2f} times as fast as {theirs} "
                f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
            )


if __name__ == "__main__":
    main()
