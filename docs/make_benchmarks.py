"""Perplexity against read fraction for every transform and budget; prints docs/benchmarks.md's tables and saves JSON.

python docs/make_benchmarks.py --model demo --calibration CALIBRATION.jsonl --heldout HELDOUT.jsonl -o results.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers.utils import logging

import wina_calib
from wina_calib.evaluate import evaluate_model
from wina_calib.placement import pick_device
from wina_calib.text import percent, rise

METHODS: dict[str, dict[str, Any]] = {
    "TEAL, uniform": {"score": "teal", "transform": "none", "budget": "uniform"},
    "TEAL, greedy": {"score": "teal", "transform": "none", "budget": "greedy", "masks": "per-projection"},
    "norms only, uniform": {"transform": "none", "budget": "uniform"},
    "norms only, global": {"transform": "none", "budget": "global"},
    "paper, uniform": {"transform": "paper", "masks": "per-projection", "budget": "uniform"},
    "stacked, uniform": {"transform": "stacked", "budget": "uniform"},
    "head, uniform": {"transform": "head", "budget": "uniform"},
    "global, uniform": {"transform": "global", "budget": "uniform"},
    "global+head, uniform": {"transform": "global+head", "budget": "uniform"},
    "global+head, greedy": {"transform": "global+head", "budget": "greedy"},
    "global+head, global": {"transform": "global+head", "budget": "global"},
}
SPARSITIES = (0.25, 0.4, 0.5, 0.65)


def main() -> None:
    """Run what is asked for and print a table a model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--heldout", default="builtin:heldout")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks.json"))
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    found = []
    for model in args.model:
        for name in args.methods:
            try:
                found += one(model, name, args)
            except wina_calib.WinaError as error:
                print(f"{model}, {name}: {error}", flush=True)  # noqa: T201
            args.output.write_text(json.dumps(found, indent=1))
        print(table(model, found), flush=True)  # noqa: T201


def one(model: str, name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Calibrate with one method and evaluate at every sparsity."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        out = Path(folder) / "out"
        wina_calib.calibrate(
            model, out, grid=SPARSITIES, data=args.calibration, samples=args.samples, seq_len=args.seq_len,
            device=args.device, dtype=args.dtype, **METHODS[name],
        )  # fmt: skip
        seconds = time.monotonic() - start
        sparse = wina_calib.load(out, dtype=args.dtype, device_map=pick_device(args.device))
        rows = []
        for sparsity in SPARSITIES:
            quality = evaluate_model(sparse, out, (args.heldout,), sparsity=sparsity, tokens=args.tokens).to_dict()
            del quality["sites"]
            rows.append({"model": Path(model).name, "method": name, "seconds": seconds, **quality})
        return rows


def table(model: str, found: list[dict[str, Any]]) -> str:
    """Markdown: one row a method, one column a sparsity."""
    rows = [r for r in found if r["model"] == Path(model).name]
    if not rows:
        return f"{model}: nothing"
    lines = [
        f"`{Path(model).name}`, dense perplexity {rows[0]['dense_ppl']:.3f}; each cell: rise of perplexity "
        "[real model sparsity, read fraction of the decoder]",
        "",
        "| method | " + " | ".join(f"asked {s}" for s in SPARSITIES) + " | seconds |",
        "| --- |" + " --- |" * (len(SPARSITIES) + 1),
    ]
    for name in dict.fromkeys(r["method"] for r in rows):
        own = [r for r in rows if r["method"] == name]
        cells = [
            f"{rise(r['sparse_ppl'], r['dense_ppl'])} [{r['model_sparsity']:.3f}, {percent(r['read_fraction_decoder'], 0)}]"
            for r in own
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {own[0]['seconds']:.0f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
