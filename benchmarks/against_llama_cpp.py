"""Decoding on a CPU beside llama.cpp: the same shape or the same model, the same threads, by turns in one run.

    python -m venv llama && llama/bin/pip install llama-cpp-python gguf numpy      # builds llama.cpp for this processor
    python benchmarks/against_llama_cpp.py --llama-python llama/bin/python --files gguf --random qwen2.5-1.5b
    python benchmarks/against_llama_cpp.py --llama-python llama/bin/python --model FOLDER --gguf Q4_K_M=model.gguf

With --random both sides have random weights of the shape; llama.cpp quantizes its own. Ours is one model with quantized sites and
an int8 lm_head at several sparsities, thresholds from the tokens that are run; stock is transformers in bfloat16, with the faster
of oneDNN's products and torch's. A round is a prompt and some tokens of everyone in turn; medians of a token's time are printed.
llama.cpp runs in a process of its own, which sleeps while others run.
"""

import json
import statistics
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import click
import torch

from wina_calib.common.devices import device_name
from wina_calib.quantization.formats import WeightFormat
from wina_calib.runtime.fast_path import attention, lm_head
from wina_calib.runtime.kernels import native_build
from wina_calib.studies.bench.decode import Session, achieved, make_variants
from wina_calib.studies.bench.instruments import copy_bandwidth
from wina_calib.studies.bench.models import fit, open_pair, random_pair
from wina_calib.studies.flops import find_config

CHILD = Path(__file__).with_name("llama_cpp_process.py")
CPU = torch.device("cpu")
STARTED = time.monotonic()


def say(what):
    """One line of progress."""
    click.echo(f"{time.monotonic() - STARTED:6.0f} s  {what}", err=True)


class Llama:
    """llama.cpp with one file, in a process that answers to lines."""

    def __init__(self, python, file, threads, stack):
        command = [python, str(CHILD), "serve", str(file), str(threads)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        self.process = stack.enter_context(subprocess.Popen(command, **pipes))
        stack.callback(self.process.kill)
        self.system = self.process.stdout.readline().strip()
        self.size = Path(file).stat().st_size

    def ask(self, line):
        """Milliseconds that what the line asks for took."""
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def files_of(python, files, random, kinds):
    """A GGUF file of each kind with random weights of a shape, made if need be."""
    folder = Path(files or tempfile.mkdtemp()) / random
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.json"
    config.write_text(json.dumps(find_config(random).to_dict()))
    subprocess.run(
        [python, str(CHILD), "make", str(config), str(folder), *kinds], check=True, stderr=subprocess.DEVNULL
    )
    return {kind: folder / f"{kind}.gguf" for kind in kinds}


def measure(variants, servers, prompt, new, rounds):
    """Milliseconds of a token and of the prompt, a list for each name."""
    steps, prompts = {}, {}
    for turn in range(-1, rounds):  # the first is not counted
        say(f"round {turn + 1} of {rounds}" if turn >= 0 else "warm up")
        for name, server in servers.items():
            first, step = server.ask(f"prompt {prompt}"), server.ask(str(new))
            if turn >= 0:
                prompts.setdefault(name, []).append(first)
                steps.setdefault(name, []).append(step)
        for name, variant in variants.items():
            variant.select()
            variant.prefill_ms.clear()
            variant.step_ms.clear()
            with torch.no_grad():
                variant.prefill()
                variant.decode(new)
            if turn >= 0:
                prompts.setdefault(name, []).append(variant.prefill_ms[0])
                steps.setdefault(name, []).append(variant.step_ms[0])
    return steps, prompts


@click.command()
@click.option("--llama-python", required=True, help="A Python that has llama-cpp-python, gguf and numpy.")
@click.option("--random", help="Shape with random weights, for both: a preset, config file or folder.")
@click.option("--model", help="A plain model folder, instead; its GGUF files are given by --gguf.")
@click.option("--gguf", multiple=True, metavar="NAME=FILE", help="With --model: files of the same model.")
@click.option("--files", help="Where GGUF files of random weights are kept.")
@click.option("--kinds", default="Q4_0,Q4_K_M", show_default=True)
@click.option("--sparsity", default="0,0.25,0.4", show_default=True)
@click.option("--bits", default=4, show_default=True)
@click.option("--group-size", default=64, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--prompt", default=32, show_default=True)
@click.option("--new", default=8, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(
    llama_python, random, model, gguf, files, kinds, sparsity, bits, group_size, threads, prompt, new, rounds, as_json
):
    """Print medians of a token's time, by turns."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    sparsities = tuple(float(s) for s in sparsity.split(","))
    found = dict(pair.split("=", 1) for pair in gguf)
    say("weights")
    if random:
        found = files_of(llama_python, files, random, kinds.split(","))
        pair = random_pair(random, device=CPU, dtype=torch.bfloat16, seed=0)
    else:
        pair = open_pair(model, device=CPU, dtype=torch.bfloat16)
    vocabulary = pair.dense.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (1, prompt + new))
    say("thresholds")
    fit(pair, sparsities, ids, prompt, WeightFormat(bits, group_size))
    say("what is dropped, and which of torch's products is the faster")
    real = [achieved(pair, s, ids, prompt) for s in sparsities]
    ((stock, *ours),) = make_variants(pair, sparsities, ids, prompt, compiled=False)
    for module in (attention, lm_head):
        module.prefer(pair.dense)
    assert isinstance(stock.session, Session)
    variants = {"transformers, bfloat16": stock}
    variants |= {f"wina_calib, int{bits} x {s:.0%}": v for s, v in zip(sparsities, ours, strict=True)}
    read = {
        "transformers, bfloat16": pair.itemsize
        * (pair.cells.sparse_total + pair.cells.other_decoder + pair.cells.lm_head)
    }
    read |= {name: pair.bytes_read(s) for name, s in zip(list(variants)[1:], real, strict=True)}
    with ExitStack() as stack:
        servers = {f"llama.cpp, {name}": Llama(llama_python, file, threads, stack) for name, file in found.items()}
        steps, prompts = measure(variants, servers, prompt, new, rounds)
        system = [server.system for server in servers.values()]
        read |= {name: server.size for name, server in servers.items()}
    medians = {name: statistics.median(values) for name, values in steps.items()}
    rows = {
        name: {
            "ms_per_token": value,
            "fastest": min(steps[name]),
            "tokens_per_s": 1e3 / value,
            "gb": read[name] / 1e9,
            "prompt_ms": statistics.median(prompts[name]),
        }
        for name, value in medians.items()
    }
    result = {
        "model": random or model,
        "processor": device_name(CPU),
        "threads": threads,
        "prompt": prompt,
        "new": new,
        "rounds": rounds,
        "copy_gb_s": copy_bandwidth(CPU) / 1e9,
        "llama_cpp": system[0] if system else "",
        "flags": [*native_build.FLAGS, *native_build.TARGETS[0]],
        "rows": rows,
    }
    if as_json:
        click.echo(json.dumps(result))
        return
    click.echo(
        f"{result['model']} on {result['processor']}, {threads} threads, {prompt} + {new} tokens, {rounds} rounds in turn"
    )
    click.echo(
        f"copies at {result['copy_gb_s']:.1f} GB/s; ours built with {' '.join(result['flags'])}\n{result['llama_cpp']}\n"
    )
    click.echo(f"{'':30} {'ms/token':>9} {'fastest':>9} {'tokens/s':>9} {'GB':>6} {'prompt ms':>10}")
    for name, row in rows.items():
        step, fast, speed, size, first = row.values()
        click.echo(f"{name:30} {step:9.1f} {fast:9.1f} {speed:9.1f} {size:6.2f} {first:10.1f}")


if __name__ == "__main__":
    main()
