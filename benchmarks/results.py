"""Run the experiments of docs/results.md and write the page. `make results` does it; stopped, it goes on where it was.

python benchmarks/results.py            run what is not there yet in build/results, then write page, figures and results.json
python benchmarks/results.py --fresh    run everything again, finished cells of comparisons too
python benchmarks/results.py --page     only write the page and the figures from docs/results.json
python benchmarks/results.py demo ref   only steps whose names begin so; the others keep their stored figures
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).parent.parent
WORK = Path("build/results")  # relative to ROOT, as in the commands
STORED = ROOT / "docs" / "results.json"
PAGE = ROOT / "docs" / "results.md"
FIGURES = ROOT / "docs" / "figures"
DEMO, REF = "demo", "../shared/models/ref-llama-14m"
_CALIBRATE = "--samples 32 --seq-len 512 --grid 0.25,0.5,0.65,0.7,0.8,0.9 --overwrite"
_COMPARE = "--samples 24 --seq-len 512 --tokens"
_AMOUNTS = "--samples 72 --seq-len 512 --tokens"
PRESETS = ("llama-2-7b", "llama-3-8b", "qwen2.5-7b", "phi-4")
STEPS: dict[str, str] = {
    **{f"flops-{name}": f"flops {name} --sparsity 0.25,0.4,0.5,0.65 --transform paper" for name in PRESETS},
    "bounds": "bounds --synthetic",
    "demo-calibrate": f"calibrate {DEMO} -o {WORK}/demo-sparse {_CALIBRATE}",
    "demo-bounds": f"bounds {DEMO} --tokens 2048",
    "demo-compare": f"compare {DEMO} -o {WORK}/demo --methods papers,-ours,-teal,-wina-paper -s 0.5,0.65 {_COMPARE} 8192",
    "demo-mild": f"compare {DEMO} -o {WORK}/demo --methods ours,wina,teal-uniform,cats -s 0.25,0.4 {_COMPARE} 8192",
    "demo-ablation": f"compare {DEMO} -o {WORK}/demo --methods ablation,-budget-greedy -s 0.5 {_COMPARE} 8192",
    "demo-amounts": f"compare {DEMO} -o {WORK}/amounts --methods ours,text-half,text-quarter -s 0.5 {_AMOUNTS} 8192",
    "demo-diagnose": f"diagnose {WORK}/demo-sparse --fit-seq-len 128",
    "ref-calibrate": f"calibrate {REF} -o {WORK}/ref-sparse {_CALIBRATE}",
    "ref-bounds": f"bounds {REF} --tokens 1024",
    "ref-compare": f"compare {REF} -o {WORK}/ref --methods ours,wina,wina-paper-uniform,teal-uniform -s 0.5,0.65 {_COMPARE} 4096",
    "ref-diagnose": f"diagnose {WORK}/ref-sparse --what importance,propagation,extremes --tokens 2048",
    "ref-texts": f"diagnose {WORK}/ref-sparse --what texts --tokens 4096 --fit-seq-len 128",
    "transfer-demo-to-ref": f"transfer {WORK}/demo-sparse {WORK}/ref-sparse -s 0.5,0.65 --tokens 4096",
    "transfer-ref-to-demo": f"transfer {WORK}/ref-sparse {WORK}/demo-sparse -s 0.5,0.65 --tokens 4096",
}
MODELS = {"demo": "the demo model (5 M parameters)", "ref": "`ref-llama-14m` (14 M parameters)"}
Table = Sequence[Sequence[str]]


def main() -> None:
    """Run steps, write results and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", help="beginnings of names of steps; all by default")
    parser.add_argument("--fresh", action="store_true", help="run steps again that are there")
    parser.add_argument("--page", action="store_true", help="run nothing")
    args = parser.parse_args()
    os.chdir(ROOT)
    stored: dict[str, Any] = json.loads(STORED.read_text("utf-8")) if STORED.is_file() else {}
    chosen = {
        name: command
        for name, command in STEPS.items()
        if not args.page and (not args.steps or name.startswith(tuple(args.steps)))
    }
    if args.fresh:  # a comparison goes on with the cells in its folder, which earlier code may have made
        for folder in filter(None, map(output_folder, chosen.values())):
            shutil.rmtree(folder, ignore_errors=True)
    for name, command in chosen.items():
        if "ref" in name and not (ROOT / REF).is_dir():
            click.echo(f"{name}: {REF} is not here; its stored figures stay", err=True)
            continue
        stored[name] = run(name, command, fresh=args.fresh)
    stored = {name: stored[name] for name in STEPS if name in stored}
    STORED.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n", "utf-8")
    PAGE.write_text(page(stored), "utf-8")
    figures(stored)


def output_folder(command: str) -> Path | None:
    """The folder that a step writes, where it does."""
    words = shlex.split(command)
    return ROOT / words[words.index("-o") + 1] if "-o" in words else None


def run(name: str, command: str, *, fresh: bool = False) -> dict[str, Any]:
    """Run one step from the repository's root, or take what build/results has of it: command, seconds, result."""
    kept = ROOT / WORK / f"{name}.json"
    if kept.is_file() and not fresh:
        found: dict[str, Any] = json.loads(kept.read_text("utf-8"))
        if found["command"] == command:
            return found
    click.echo(f"{name}: wina-calib {command}", err=True)
    kept.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    result = prune(name, invoke(command))
    seconds = max(time.monotonic() - start, _cell_seconds(result))
    found = {"command": command, "seconds": round(seconds), "result": rounded(result)}
    kept.write_text(json.dumps(found), "utf-8")
    return found


def _cell_seconds(result: dict[str, Any]) -> float:
    """Seconds that a comparison's cells took, those of earlier runs too; 0 for other results."""
    rows = [r for r in result.get("rows", ()) if "calibration_seconds" in r]
    once = {r["method"]: r["calibration_seconds"] for r in rows}
    return float(sum(r["seconds"] for r in rows) + sum(once.values()))


def invoke(command: str) -> dict[str, Any]:
    """Run a command of wina-calib in this process and return its JSON."""
    from click.testing import CliRunner

    from wina_calib.cli import main as cli

    done = CliRunner().invoke(cli, [*shlex.split(command), "--json"], catch_exceptions=False)
    if done.exit_code:
        raise SystemExit(f"wina-calib {command}\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def prune(name: str, result: dict[str, Any]) -> dict[str, Any]:
    """What the page needs of a result."""
    if name.endswith("calibrate"):
        return {key: result[key] for key in ("sparsity", "anchors", "transform", "budget")}
    if name.endswith("bounds") and "results" in result:
        return {"results": [_site_bounds(one) for one in result["results"]]}
    if name.endswith("diagnose"):
        own = result["importance"]
        kept = ("norm_output", "norm_loss", "magnitude_loss", "product_loss")
        sites = dict.fromkeys(g["site"] for g in own["groups"])
        means = {
            site: {key: _mean([g[key] for g in own["groups"] if g["site"] == site]) for key in kept} for site in sites
        }
        own = {"tokens": own["tokens"], "dropped": len(own["dropped"]), "kl_tokens": own["kl_tokens"]} | {
            "sites": means,
            "measured": own["measured"],
        }
        return result | {"importance": own}
    return result


def _site_bounds(one: dict[str, Any]) -> dict[str, Any]:
    rows = [
        {
            "site": site,
            "cross_share": _mean([abs(s["cross_share"]) for s in one["sites"] if s["site"] == site]),
            "measured": _mean([s["measured"] for s in one["sites"] if s["site"] == site]),
            "theory": _mean([s["theory"] for s in one["sites"] if s["site"] == site]),
            "holds": sum(s["holds"] for s in one["sites"] if s["site"] == site),
            "count": sum(1 for s in one["sites"] if s["site"] == site),
        }
        for site in dict.fromkeys(s["site"] for s in one["sites"])
    ]
    return {key: one[key] for key in ("transform", "sparsity", "tokens")} | {"sites": rows}


def rounded(value: Any) -> Any:
    """Numbers to six digits: what differs further on between machines is rounding."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return value


def page(stored: dict[str, Any]) -> str:
    """The whole page from stored results."""
    parts = [
        "# Results",
        "What sparsity does to two small models, the demo model (5.5 M parameters) and a Llama of 14 M. Small models and "
        "little text: the figures show how methods differ, not what a large model loses. Words are explained in "
        "[glossary.md](glossary.md).",
        *_findings(stored),
        "Made by `make results` on a CPU, in float32, with the built-in text: calibrated on `builtin`, measured on "
        "`builtin:heldout`. Every table has its command above it; `docs/results.json` holds the figures. A run goes on "
        "where it was stopped. Perplexities of one table are of the same text; those of different tables may not be. "
        "`tests/docs/test_results.py` makes a part of it again: numbers are equal within 1 %, or 0.005 where that is more.",
    ]
    sections: list[tuple[str, str, Callable[[dict[str, Any], str], list[str]], Sequence[str]]] = [
        ("Cost of a token", _FLOPS, _flops, [f"flops-{name}" for name in PRESETS]),
        ("Methods side by side", _METHODS, _compare, ["demo-compare", "demo-mild", "ref-compare"]),
        ("Ablation", _ABLATION, _ablation, ["demo-ablation", "demo-amounts"]),
        ("Bounds", _BOUNDS, _bounds, ["bounds", "demo-bounds", "ref-bounds"]),
        ("Checkpoints of what follows", _CHECKPOINTS, _calibrate, ["demo-calibrate", "ref-calibrate"]),
        ("Do norms tell which inputs matter?", _IMPORTANCE, _importance, ["demo-diagnose", "ref-diagnose"]),
        ("Growth of errors through depth", _PROPAGATION, _propagation, ["demo-diagnose", "ref-diagnose"]),
        ("Extremes", _EXTREMES, _extremes, ["demo-diagnose", "ref-diagnose"]),
        ("Dependence on the text", _TEXTS, _texts, ["demo-diagnose", "ref-texts"]),
        ("From one model to another", _TRANSFER, _transfer, ["transfer-demo-to-ref", "transfer-ref-to-demo"]),
    ]
    for title, about, render, names in sections:
        here = [name for name in names if name in stored]
        if here:
            parts += [f"## {title}", about]
        for name in here:
            parts.append(f"```console\n$ wina-calib {stored[name]['command']}\n```")
            parts += render(stored[name]["result"], name)
    total = sum(step["seconds"] for step in stored.values())
    slowest = sorted(stored.items(), key=lambda item: -item[1]["seconds"])[:5]
    parts += [
        "## What it took",
        f"{total / 60:.0f} minutes in all, most steps on two cores each; "
        + ", ".join(f"`{name}` {step['seconds']} s" for name, step in slowest)
        + ".",
    ]
    return "\n\n".join(parts) + "\n"


_FLOPS = (
    "GFLOPs of a token as the WINA paper counts them (one multiply-add is 1; linears and lm_head), from a config alone, "
    "and what it leaves out: the run-time matrices of its transform. `read` is the share of bytes read, both counted in."
)
_METHODS = (
    "Perplexity's rise over the same model at sparsity 0. `sparsity` is achieved, `read` the share of the decoder's bytes "
    "read for a token, run-time matrices included: compare at equal `read`. `docs/compare.md` says what the methods are. "
    "TEAL and WINA with the papers' greedy budgets are left out for their time, as `--methods papers` has them; `ours` on the "
    "demo model at 0.5 is in the ablation, and the second table has `cats` where it reaches."
)
_ABLATION = (
    "One part of the defaults (`ours`) changed at a time, at sparsity 0.5. The papers' greedy budget is left out for its time. "
    "The second table has the amounts of text, from 72 blocks; 'Dependence on the text' below has more of them."
)
_BOUNDS = (
    "Lemma 3.1 and Theorem 3.2 on random networks, beside the paper's own figures: errors grow with the width, so compare "
    "ratios. Then the same on models, each token's top half kept: `cross` is the mean size of what the lemma leaves out, as a "
    "share of it, for want of orthogonal columns; `holds` counts sites where the theorem's bound holds."
)
_CHECKPOINTS = "Calibrated with all defaults, and thresholds fitted as far as 0.9."
_IMPORTANCE = (
    "For mlp_out column norms say next to nothing, elsewhere a good deal; magnitude times norm is the best guess without "
    "gradients at most sites. Rank correlations over the inputs of a site, mean over the layers. Dropping input j for every "
    "token costs `c_j^2 E[x_j^2]` of the output and, by its gradient, some of the loss; for some inputs the KL divergence was "
    "measured with the input really dropped."
)
_PROPAGATION = (
    "Relative error of the hidden states after each layer: where only that layer is sparse, the same at the end of the "
    "model, and where all layers are sparse. Layers hardly matter to each other: their errors add up at the end as independent "
    "ones would, and KL divergences of single layers add up to little more than that of all. Budgets by predicted loss rest on "
    "that."
)
_EXTREMES = (
    "`breaks at` is the first layer after which the hidden states' relative error is above 0.5; `farthest off` the site whose "
    "achieved sparsity is farthest from the asked one."
)
_TEXTS = (
    "Thresholds fitted again, with budget and transform as they are: on code and on prose, tested on both; and on 1 to 256 "
    "blocks of 128 tokens of the calibration text, tested on held-out text. `!` marks what `wina-calib evaluate` warns of: "
    "achieved sparsity off by more than 0.02. The remedy is to calibrate on text like that of use (`--data`)."
)
_TRANSFER = (
    "The budget and thresholds of one model on the other, layers matched by relative depth. `over native` is the perplexity "
    "against that of the model's own calibration; look at `sparsity` beside it: what drops less costs less. On so little text "
    "perplexity is noisy and the KL divergence steadier: by it the model's own calibration is the best at equal sparsity, the "
    "other's budget comes next, and the same sparsity everywhere last. Quantiles of dense scores drop more than asked, as "
    "thresholds fitted in open loop do."
)
_WAYS = {
    "native": "own calibration",
    "uniform": "same sparsity everywhere, own thresholds",
    "budget": "the other's budget, own thresholds",
    "quantile": "the other's budget, thresholds at these quantiles of own dense scores",
    "values": "the other's thresholds as they are",
}


def _findings(stored: dict[str, Any]) -> list[str]:
    """What the figures say in a few lines, read from them; nothing where a step of them is missing."""
    used = ("demo-ablation", "demo-mild", "demo-diagnose", "demo-compare", "flops-llama-3-8b", "transfer-demo-to-ref")
    if any(name not in stored for name in used):
        return []
    parts, mild, papers = (_rises(stored[name]["result"]) for name in ("demo-ablation", "demo-mild", "demo-compare"))
    ours = parts["ours", 0.5]
    depth = stored["demo-diagnose"]["result"]["propagation"]
    extreme = stored["demo-diagnose"]["result"]["extremes"][-1]
    given = stored["transfer-demo-to-ref"]["result"]
    moved = {row["way"]: row["ppl"] / given["dense_ppl"] - 1 for row in given["rows"] if row["sparsity"] == 0.5}
    half = next(row for row in stored["flops-llama-3-8b"]["result"]["rows"] if row["sparsity"] == 0.5)
    lines = [
        f"**How much can be dropped?** A quarter for {pct(mild['ours', 0.25])}, 40 % for {pct(mild['ours', 0.4])}, half for "
        f"{pct(ours)} of perplexity on the demo model; at {extreme['sparsity']:.0%} it is broken "
        f"({pct(extreme['ppl'] / extreme['dense_ppl'] - 1)}).",
        f"**What do the defaults gain?** At half, magnitudes alone with the same sparsity everywhere (TEAL without its search) "
        f"cost {pct(papers['teal-uniform', 0.5])}, norms without a transform (WINA without its own) {pct(papers['wina', 0.5])}.",
        f"**What gains it?** The rotation most: without it {pct(parts['transform-none', 0.5])} instead of {pct(ours)}. Then "
        f"budgets: the same sparsity everywhere gives {pct(parts['budget-uniform', 0.5])}. Norms gain little once inputs are "
        f"rotated: magnitudes alone {pct(parts['score-activation', 0.5])}.",
        f"**Do errors pile up?** No: {depth['layers'][-1]['accumulated']:.2f} at the end with all layers sparse, "
        f"{depth['error_sum']:.2f} if each layer's error were independent of the others'.",
        f"**Does one model's calibration serve another?** Little. On the 14 M model at half: {pct(moved['native'])} with its "
        f"own calibration, {pct(moved['budget'])} with the demo model's budget, {pct(moved['uniform'])} with the same "
        "sparsity everywhere.",
        f"**What do the paper's run-time matrices cost?** {half['runtime_matrix_gflops']:.2f} GFLOPs a token beside "
        f"the {half['gflops']:.2f} that its table counts for Llama-3-8B at half.",
    ]
    return ["## What they say", "\n".join(f"- {line}" for line in lines), "## How they were made"]


def _rises(result: dict[str, Any]) -> dict[tuple[str, float], float]:
    """Rises of perplexity of a comparison, by method and sparsity."""
    return {(row["method"], row["sparsity"]): row["rise"] for row in result["rows"]}


def _flops(result: dict[str, Any], name: str) -> list[str]:
    rows = [
        [
            f"{r['sparsity']:g}",
            f"{r['gflops']:.2f}",
            pct(r["reduction"]),
            f"{r['runtime_matrix_gflops']:.2f}",
            pct(r["read_fraction"]),
        ]
        for r in result["rows"]
    ]
    return [markdown(["sparsity", "GFLOPs", "reduction", "run-time matrices, GFLOPs", "read"], rows)]


def _compare(result: dict[str, Any], name: str) -> list[str]:
    rows = [
        [
            f"`{r['method']}`", result["budgets"][r["method"]], f"{r['sparsity']:g}", f"{r['model_sparsity']:.3f}",
            pct(r["read_fraction_decoder"]), f"{r['ppl']:.2f}", f"{r['rise']:+.1%}", f"{r['kl']:.3f}", pct(r["top1_agreement"]),
        ]
        for r in result["rows"]
    ]  # fmt: skip
    headers = ["method", "budget", "asked", "sparsity", "read", "perplexity", "rise", "KL", "top-1"]
    left = list(dict.fromkeys(f"`{s['method']}`: left out. {s['reason']}" for s in result["skipped"]))
    return [f"Dense perplexity {result['rows'][0]['dense_ppl']:.2f}.", markdown(headers, rows), *left] + (
        [f"![Perplexity, KL divergence and agreement by sparsity and by read fraction](figures/results-{name}.png)"]
        if name.endswith("compare")
        else []
    )


def _ablation(result: dict[str, Any], name: str) -> list[str]:
    about = result["methods"]
    ours = next(r for r in result["rows"] if r["method"] == "ours")
    rows = [
        [
            f"`{r['method']}`", about[r["method"]], f"{r['model_sparsity']:.3f}", pct(r["read_fraction_decoder"]),
            f"{r['ppl']:.2f}", f"{r['rise']:+.1%}", f"{r['kl']:.3f}", f"{r['kl'] / ours['kl']:.2f}",
        ]
        for r in result["rows"]
    ]  # fmt: skip
    headers = ["variant", "what it is", "sparsity", "read", "perplexity", "rise", "KL", "KL over `ours`"]
    left = list(dict.fromkeys(f"`{s['method']}`: left out. {s['reason']}" for s in result["skipped"]))
    return [f"Dense perplexity {ours['dense_ppl']:.2f}.", markdown(headers, rows), *left]


def _bounds(result: dict[str, Any], name: str) -> list[str]:
    if "cells" in result:
        keys = dict.fromkeys((c["theory"], c["sparsity"]) for c in result["cells"])
        rows = []
        for theory, sparsity in keys:
            own = {c["method"]: c for c in result["cells"] if (c["theory"], c["sparsity"]) == (theory, sparsity)}
            wina, teal = own["wina"], own["teal"]
            rows.append(
                [
                    theory,
                    f"{sparsity:g}",
                    f"{wina['mean']:.3f}",
                    f"{teal['mean']:.3f}",
                    f"{wina['mean'] / teal['mean']:.3f}",
                ]
                + [f"{wina['paper'] / teal['paper']:.3f}" if wina["paper"] and teal["paper"] else "-"]
            )
        best = result["optimality"]
        return [
            markdown(["of", "sparsity", "WINA", "TEAL", "ratio", "ratio in the paper"], rows),
            f"WINA's mask is the best of all masks of its size in {pct(best['orthogonal'])} of {best['cases']} small cases "
            f"with orthogonal columns, in {pct(best['random'])} with columns as they come.",
        ]
    rows = [
        [
            one["transform"],
            s["site"],
            f"{s['theory']:.4f}",
            f"{s['measured']:.4f}",
            pct(s["cross_share"]),
            f"{s['holds']} of {s['count']}",
        ]
        for one in result["results"]
        for s in one["sites"]
    ]
    return [markdown(["transform", "site", "lemma 3.1", "measured", "cross", "holds"], rows)]


def _calibrate(result: dict[str, Any], name: str) -> list[str]:
    return [f"Transform `{result['transform']}`, budget `{result['budget']}`."]


def _importance(result: dict[str, Any], name: str) -> list[str]:
    own = result["importance"]
    rows = [
        [site, *(f"{m[key]:+.2f}" for key in ("norm_output", "norm_loss", "magnitude_loss", "product_loss"))]
        for site, m in own["sites"].items()
    ]
    measured = [[site, *(f"{v:+.2f}" for v in m.values())] for site, m in own["measured"].items()]
    return [
        markdown(["site", "norm, output error", "norm, loss", "magnitude, loss", "magnitude x norm, loss"], rows),
        f"{own['dropped']} inputs dropped one by one; correlations with the measured KL divergence:",
        markdown(["site", "norm", "magnitude", "magnitude x norm", "predicted loss"], measured),
    ]


def _propagation(result: dict[str, Any], name: str) -> list[str]:
    own = result["propagation"]
    rows = [
        [str(g["layer"]), *(f"{g[key]:.3f}" for key in ("alone", "alone_end", "accumulated", "alone_kl"))]
        for g in own["layers"]
    ]
    return [
        markdown(["layer", "alone, here", "alone, at the end", "accumulated", "alone, KL"], rows),
        f"At sparsity {own['sparsity']:g}. At the end: accumulated {own['layers'][-1]['accumulated']:.3f}, single layers "
        f"added as independent errors {own['error_sum']:.3f}; KL of all {own['kl']:.3f}, of single layers added "
        f"{own['kl_sum']:.3f}.",
        f"![Growth of errors](figures/results-{name}.png)",
    ]


def _extremes(result: dict[str, Any], name: str) -> list[str]:
    rows = [
        [
            f"{e['sparsity']:g}", f"{e['model_sparsity']:.3f}", f"{e['ppl']:.1f}", f"{e['ppl'] / e['dense_ppl'] - 1:+.0%}",
            f"{e['kl']:.2f}", pct(e["top1_agreement"]), " ".join(f"{v:.2f}" for v in e["errors"]),
            "nowhere" if e["breaks_at"] is None else f"layer {e['breaks_at']}", f"{e['worst_site']} {e['worst_drift']:+.3f}",
        ]
        for e in result["extremes"]
    ]  # fmt: skip
    headers = [
        "asked",
        "sparsity",
        "perplexity",
        "rise",
        "KL",
        "top-1",
        "error after each layer",
        "breaks at",
        "farthest off",
    ]
    return [markdown(headers, rows)]


def _texts(result: dict[str, Any], name: str) -> list[str]:
    rows = [
        [
            r["fitted_on"], f"{r['fit_tokens']:,}", r["tested_on"],
            f"{r['model_sparsity']:.3f}{' !' if r['drifts'] else ''}", f"{r['ppl']:.2f}",
            f"{r['ppl'] / r['dense_ppl'] - 1:+.1%}", f"{r['kl']:.3f}", pct(r["top1_agreement"]),
        ]
        for r in result["texts"]
    ]  # fmt: skip
    headers = ["fitted on", "tokens", "tested on", "sparsity", "perplexity", "rise", "KL", "top-1"]
    return [markdown(headers, rows)]


def _transfer(result: dict[str, Any], name: str) -> list[str]:
    rows = [
        [
            f"{r['sparsity']:g}", _WAYS[r["way"]], f"{r['model_sparsity']:.3f}", f"{r['ppl']:.2f}",
            f"{r['ppl'] / result['dense_ppl'] - 1:+.1%}", f"{r['ppl'] / r['native_ppl'] - 1:+.1%}", f"{r['kl']:.3f}",
            pct(r["top1_agreement"]),
        ]
        for r in result["rows"]
    ]  # fmt: skip
    headers = ["asked", "with", "sparsity", "perplexity", "rise", "over native", "KL", "top-1"]
    alike = "; ".join(
        f"at {b['sparsity']:g} by {b['distance']:.3f}, correlation {b['correlation']:+.2f}" for b in result["budgets"]
    )
    return [markdown(headers, rows), f"Site sparsities of the two budgets differ on average: {alike}."]


def figures(stored: dict[str, Any]) -> None:
    """Draw the page's figures from stored results."""
    import numpy as np

    from wina_calib.common import plots
    from wina_calib.studies.compare.run import draw_comparison
    from wina_calib.studies.compare.table import Comparison, Row

    for model in MODELS:
        step = stored.get(f"{model}-compare")
        if step is not None:
            result = step["result"]
            rows = tuple(Row(**{k: v for k, v in r.items() if k != "rise"}) for r in result["rows"])
            drawn = draw_comparison(
                Comparison(result["model"], result["protocol"], result["methods"], result["budgets"], rows)
            )
            (FIGURES / f"results-{model}-compare.png").write_bytes(drawn)
        step = stored.get(f"{model}-diagnose")
        if step is not None:
            keys = {"alone": "alone, here", "alone_end": "alone, at the end", "accumulated": "accumulated"}
            growth = step["result"]["propagation"]
            values = np.array([[g[key] for key in keys] for g in growth["layers"]])
            title = f"{model}: relative error of hidden states at sparsity {growth['sparsity']:g}"
            (FIGURES / f"results-{model}-diagnose.png").write_bytes(
                plots.lines(values, list(keys.values()), title, "relative error")
            )


def markdown(headers: Sequence[str], rows: Table) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (headers, ["---"] * len(headers), *rows))


def pct(share: float) -> str:
    """`0.1234` -> `12.3 %`."""
    return f"{100 * share:.1f} %"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
