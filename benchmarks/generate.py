"""End-to-end decoding on a GPU: compiled dense against compiled sparse, and where the time goes. Needs a GPU.

    python benchmarks/generate.py [--out FOLDER] [--models llama-3-8b,llama-2-7b] [--seconds 400] [--generate-only]

For each shape: a check of the results; `generate` with a static cache; site products; prompts; then `studies.bench` with
torch.compile, counts of compiled graphs and CUDA graph skips, kernel times of one step.
What does not fit in the time is left out, and said.
"""

import argparse
import collections
import json
import time
from pathlib import Path

import click
import torch
from torch._dynamo.utils import counters

import wina_calib
from wina_calib.studies.bench import compare, decode, models, products
from wina_calib.studies.bench.instruments import seconds

START = time.monotonic()
SPARSITIES = (0.5, 0.65)
PROMPT, NEW = 64, 64
DEVICE = torch.device("cuda")


def left(options):
    return options.seconds - (time.monotonic() - START)


def say(*what):
    click.echo(" ".join(map(str, (f"[{time.monotonic() - START:5.0f} s]", *what))))


def graphs():
    return {
        "graphs": counters["stats"].get("unique_graphs", 0),
        "breaks": sum(counters["graph_break"].values()),
        "cudagraph_skips": counters["inductor"].get("cudagraph_skips", 0),
    }


def check(pair, ids):
    """Relative error of the sparse model's logits at sparsity 0 against the dense model's, and of compiled ones."""
    with torch.no_grad():
        wina_calib.set_sparsity(pair.sparse, 0.0)
        dense, sparse = (m(ids[:, :PROMPT]).logits.float() for m in (pair.dense, pair.sparse))
        found = {"sparsity 0, prompt": float((dense - sparse).norm() / dense.norm())}
        steps = {}
        for name, model in (("dense", pair.dense), ("sparse", pair.sparse)):
            run = decode.session(model, ids, PROMPT, compiled=False)
            run.prefill()
            out = model(input_ids=ids[:, PROMPT : PROMPT + 1], use_cache=True, **run.given)
            steps[name] = out.logits.float()
        found["sparsity 0, one token"] = float((steps["dense"] - steps["sparse"]).norm() / steps["dense"].norm())
    return found


def profile(session, name, report):
    """Kernel times of one compiled step."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with torch.no_grad():
        session.prefill()
        session.steps(4)
        torch.cuda.synchronize()
        with profiler(activities=[ProfilerActivity.CUDA]) as found:
            session.steps(4)
            torch.cuda.synchronize()
    times, counts = collections.Counter(), collections.Counter()
    for event in found.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name] += event.device_time_total / 4
            counts[event.name] += 1 / 4
    report[name] = [(n, round(t, 1), counts[n]) for n, t in times.most_common(30)]
    click.echo(f"kernels of one {name} step: {sum(times.values()):.0f} us in {sum(counts.values()):.0f} launches")
    for kernel, t in times.most_common(14):
        click.echo(f"  {t:8.1f} us {counts[kernel]:6.1f} x {kernel[:110]}")


def generate(model, ids, new):
    """Milliseconds a token of `generate` with a static cache: the slope between two lengths."""
    options = {"do_sample": False, "cache_implementation": "static", "pad_token_id": 0, "eos_token_id": None}
    prompt = ids[:, :PROMPT]

    def run(count):
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, min_new_tokens=count, **options
        )

    for _ in range(2):
        run(new)
    long = [seconds(lambda: run(new), DEVICE) for _ in range(5)]
    short = [seconds(lambda: run(2), DEVICE) for _ in range(5)]
    return 1e3 * (sorted(long)[2] - sorted(short)[2]) / (new - 2)


def one(name, options, report):
    """Everything for one shape, the most wanted first."""
    pair = models.random_pair(name, device=DEVICE, dtype=torch.bfloat16, seed=0)
    ids = torch.randint(pair.dense.config.vocab_size, (1, PROMPT + NEW), device=DEVICE)
    say(name, "made")
    models.fit(pair, SPARSITIES, ids, PROMPT)
    entry = report.setdefault(name, {"check": check(pair, ids)})
    say("fitted;", entry["check"])
    counters.clear()
    entry["generate"] = generated(pair, ids)
    say("generate ms/token:", entry["generate"], graphs())
    save(report, options)
    if options.generate_only:
        return
    alone = products(name, sparsities=(0.0, 0.5, 0.65), device=DEVICE, dtype=torch.bfloat16)
    click.echo(alone.render())
    entry["products"] = alone.to_dict()
    entry["prefill"] = {policy: prompts(pair, policy) for policy in ("sparse", "dense")}
    say("prefill ms (dense, sparse, ratio):", entry["prefill"])
    save(report, options)
    if left(options) < 100:
        say("no time for the steps alone")
        return
    counters.clear()
    groups = decode.make_variants(pair, SPARSITIES, ids, PROMPT, compiled=True)
    result = compare(pair, SPARSITIES, ids, PROMPT, rounds=5, compiled=True, groups=groups)
    say("compared;", graphs())
    click.echo(result.render())
    entry |= {"bench": result.to_dict(), "graphs": graphs(), "kernels": {}}
    for kind, group in (("dense", groups[0]), ("sparse", groups[1])):
        group[0].select()
        profile(group[0].session, kind, entry["kernels"])
    save(report, options)


def generated(pair, ids):
    """Milliseconds a token of `generate`: everything the sparse model has without sparsity, sparse, and stock dense."""
    found = {}
    pair.state.dense = True
    found["dense, merged"] = generate(pair.sparse, ids, 66)
    pair.state.dense = False
    for sparsity in SPARSITIES:
        wina_calib.set_sparsity(pair.sparse, sparsity)
        found[str(sparsity)] = generate(pair.sparse, ids, 66)
    found["dense"] = generate(pair.dense, ids, 66)
    return found


def save(report, options):
    (Path(options.out) / "generate_bench.json").write_text(json.dumps(report, indent=1))


def prompts(pair, policy):
    """Prefill times, dense and sparse, at several lengths."""
    found = {}
    wina_calib.set_prefill(pair.sparse, policy)
    for length in (64, 512, 2048):
        ids = torch.randint(32000, (1, length), device=DEVICE)
        times = {"dense": [], "sparse": []}
        with torch.no_grad():
            for turn in range(10):
                for key, model in (("dense", pair.dense), ("sparse", pair.sparse)):
                    took = seconds(lambda model=model, ids=ids: model(ids, logits_to_keep=1), DEVICE)
                    if turn:
                        times[key].append(1e3 * took)
        dense, sparse = (sorted(times[key])[4] for key in ("dense", "sparse"))
        found[length] = (round(dense, 2), round(sparse, 2), round(sparse / dense, 3))
    wina_calib.set_prefill(pair.sparse, "sparse")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=".")
    parser.add_argument("--models", default="llama-3-8b,llama-2-7b")
    parser.add_argument("--seconds", type=float, default=400.0)
    parser.add_argument("--generate-only", action="store_true", help="only the times of `generate`")
    options = parser.parse_args()
    say(torch.cuda.get_device_name(), "torch", torch.__version__)
    report = {}
    names = options.models.split(",")
    for name in names:
        if left(options) < 100 and name != names[0]:
            say("no time for", name)
            continue
        one(name, options, report)
        torch._dynamo.reset()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
