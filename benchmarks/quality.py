"""Quality against read fraction for every transform and budget: fills the tables of docs/benchmarks.md.

    python benchmarks/quality.py demo MODEL --calibration CALIBRATION.jsonl --heldout HELDOUT.jsonl
    python benchmarks/quality.py --timing 4096

Every cell is one calibration and its evaluations. Results are kept as JSON, and what is there is not computed again: a run
that was cut goes on where it stopped.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from transformers.utils import logging

import wina_calib
from benchmarks.transform_timing import seconds
from wina_calib.calibration.scale_curves import measured_pairs
from wina_calib.common.devices import pick_device
from wina_calib.common.progress import Silent
from wina_calib.common.text import percent, rise
from wina_calib.studies.evaluate import evaluate_model

SPARSITIES = (0.25, 0.4, 0.5, 0.65)
TRANSFORMS = ("none", "head", "global", "global+head", "stacked", "paper")
BUDGETS = ("uniform", "greedy", "global")
TEAL = "TEAL"
CELLS: dict[str, dict[str, Any]] = {
    TEAL: {"score": "teal", "transform": "none", "budget": "uniform"},
    **{name: {"transform": name, "budget": "uniform"} for name in TRANSFORMS},
    "global+head, global": {"transform": "global+head", "budget": "global"},
    "global+head, greedy": {"transform": "global+head", "budget": "greedy"},
}
CELLS["paper"]["masks"] = "per-projection"
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- results -->\n", "<!-- end of results -->"


class Clock(Silent):
    """Seconds spent in every phase of a calibration."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last, self._name = time.monotonic(), "open"

    def phase(self, name: str, steps: int) -> None:
        """The phase before ends."""
        now = time.monotonic()
        self.seconds[self._name] = self.seconds.get(self._name, 0.0) + now - self._last
        self._last, self._name = now, name


def main() -> None:
    """Run what is asked for and not there yet, and write the page from all that is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="model folders, or demo")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--heldout", default="builtin:heldout")
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=49_152)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--cells", default="*", help="pattern of the cells to run: 'global*'")
    parser.add_argument("--timing", type=int, metavar="WIDTH", help="time a layer's decompositions instead")
    parser.add_argument("--results", type=Path, default=Path(".wina/benchmarks"))
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = pick_device(args.device)
    folder = args.results / device.type
    folder.mkdir(parents=True, exist_ok=True)
    if args.timing:
        found = {"device": described(device), "width": args.timing, **seconds(args.timing, device)}
        keep(folder / f"timing-{args.timing}.json", found)
    for model in args.models:
        for name in fnmatch.filter(CELLS, args.cells):
            file = folder / f"{Path(model).name}, {name}.json"
            if not file.is_file():
                keep(file, one(model, name, args, device))
                click.echo(file)
    write_page(args.results)


def one(model: str, name: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Calibrate one cell, and evaluate at every sparsity."""
    with tempfile.TemporaryDirectory() as folder:
        out, clock = Path(folder) / "out", Clock()
        made = wina_calib.calibrate(
            model, out, grid=SPARSITIES, data=args.calibration, samples=args.samples, seq_len=args.seq_len,
            device=str(device), dtype="float32", progress=clock, **CELLS[name],
        )  # fmt: skip
        clock.phase("end", 0)
        sparse = wina_calib.load(out, dtype="float32", device_map=device)
        rows = []
        for sparsity in SPARSITIES:
            row = evaluate_model(sparse, out, (args.heldout,), sparsity=sparsity, tokens=args.tokens).to_dict()
            rows.append({key: value for key, value in row.items() if key not in ("sites", "data", "warnings")})
    facts = made.settings.provenance
    return {
        "model": Path(model).name,
        "cell": name,
        "rows": rows,
        "seconds": clock.seconds,
        "blocks": facts["blocks"],
        "seq_len": facts["seq_len"],
        "device": described(device),
        "torch": torch.__version__,
        **{key: facts[key] for key in ("prediction", "greedy") if key in facts},
    }


def described(device: torch.device) -> str:
    """What a device is called in the page."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def keep(file: Path, found: dict[str, Any]) -> None:
    """Write a result whole or not at all."""
    temporary = file.with_suffix(".partial")
    temporary.write_text(json.dumps(found, indent=1), "utf-8")
    temporary.replace(file)


def write_page(results: Path) -> None:
    """Put the tables of all results between the page's marks."""
    found = [json.loads(file.read_text("utf-8")) for file in sorted(results.glob("*/*.json"))]
    made = sorted({(r["model"], "CPU" in r["device"], r["device"]) for r in found if "model" in r})
    parts = [
        model_part({r["cell"]: r for r in found if r.get("model") == model and r["device"] == device})
        for model, _, device in made
    ]
    timings = [r for r in found if "width" in r]
    if timings:
        parts.append(timing_part(timings))
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(before + BEGIN + "\n" + "\n".join(parts) + "\n" + END + after, "utf-8")


def model_part(cells: dict[str, dict[str, Any]]) -> str:
    """The tables of one model on one device: transforms where some were run, and budgets."""
    first = next(iter(cells.values()))
    transforms = [[name, *map(quality, cells[name]["rows"])] for name in (TEAL, *TRANSFORMS) if name in cells]
    dense = first["rows"][0]["dense_ppl"]
    heads = ["", *(f"asked {s}" for s in SPARSITIES)]
    lines = [
        f"## `{first['model']}`, {first['device']}",
        "",
        f"Calibrated on {first['blocks']} blocks of {first['seq_len']} tokens, measured on {first['rows'][0]['tokens']} held-out "
        f"tokens, dense perplexity {dense:.3f}. Computed in float32, torch {first['torch']}. Cells are the rise of perplexity "
        "over dense; in brackets the real model sparsity and the read fraction.",
        "",
    ]
    if len(transforms) > 1:
        lines += ["Transforms, uniform budget.", "", table(heads, transforms), ""]
    gap = " The last column is the share of TEAL's rise that is gone at 0.65." if TEAL in cells else ""
    lines += [f"Budgets, transform `global+head`.{gap}", ""]
    rows, work = [], []
    for budget in BUDGETS:
        cell = cells.get("global+head" if budget == "uniform" else f"global+head, {budget}")
        if cell is None:
            continue
        rows.append([budget, *map(quality, cell["rows"])])
        if TEAL in cells:
            rows[-1].append(percent(1 - excess(cell["rows"][-1]) / excess(cells[TEAL]["rows"][-1]), 0))
        took = sum(seconds for name, seconds in cell["seconds"].items() if name.startswith("find where to drop: "))
        work.append([budget, *cost(cell), f"{took:.0f}"])
    lines.append(table([*heads, "gap closed"] if TEAL in cells else heads, rows))
    lines += ["", "What choosing the budget takes, in forward passes over all calibration tokens.", ""]
    lines.append(table(["", "passes", "layer passes, and the papers' algorithm's for as many steps", "seconds"], work))
    if "global+head, global" in cells:
        lines += [
            "",
            "Predicted and measured, `global` budget, nats a token.",
            "",
            predictions(cells["global+head, global"]),
        ]
    return "\n".join(lines) + "\n"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *rows))


def quality(row: dict[str, Any]) -> str:
    """One evaluation in a table."""
    return (
        f"{rise(row['sparse_ppl'], row['dense_ppl'])} [{row['model_sparsity']:.3f}, {percent(row['read_fraction'], 0)}]"
    )


def excess(row: dict[str, Any]) -> float:
    """Rise of perplexity, relative."""
    return float(row["sparse_ppl"] / row["dense_ppl"] - 1)


def cost(cell: dict[str, Any]) -> list[str]:
    """Forward passes of the choice, and a search's layer passes."""
    if "greedy" in cell:
        found, layers = cell["greedy"], cell["greedy"]["layers"]
        share = cell["greedy"]["tokens"] / (cell["blocks"] * cell["seq_len"])
        ratio = found["reference"] / found["passes"]
        return [
            f"{found['passes'] / layers * share:.1f}",
            f"{found['passes']:.0f}, {found['reference']:.0f} ({ratio:.1f} times)",
        ]
    return [f"{cell['prediction']['passes']:.1f}" if "prediction" in cell else "0", "-"]


def predictions(cell: dict[str, Any]) -> str:
    """Predicted and measured rises of the loss and KL divergence."""
    facts, rows = cell["prediction"], {row["sparsity"]: row for row in cell["rows"]}
    predicted = dict(zip(facts["anchors"], measured_pairs(facts)[:, 1].tolist(), strict=True))
    lines = []
    for i, sparsity in enumerate(facts["anchors"]):
        row = rows[sparsity]
        measured = torch.tensor(row["sparse_ppl"] / row["dense_ppl"]).log().item()
        values = predicted[sparsity], measured, facts["predicted_kl"][i], row["kl"]
        lines.append([f"{sparsity}", *(f"{value:.4f}" for value in values)])
    return table(["sparsity", "loss predicted", "loss measured", "KL predicted", "KL measured"], lines)


def timing_part(timings: list[dict[str, Any]]) -> str:
    """Seconds of a layer's decompositions."""
    parts = ("gram", "eigh", "svd", "step")
    rows = [[r["device"], str(r["width"]), *(f"{r[part]:.2f}" for part in parts)] for r in timings]
    return (
        "## Seconds of a layer's decompositions\n\nRandom weights (width, width) and (3.5 width, width), float64. `paper` and "
        "`stacked` pay Gram matrix and eigen-decomposition for every site; the SVD is what they would pay without; `global` "
        "pays one eigen-decomposition and its descent steps for the whole model.\n\n"
        + table(["device", "width", "Gram", "eigen-decomposition", "SVD of the square weight", "descent step"], rows)
        + "\n"
    )


if __name__ == "__main__":
    main()
