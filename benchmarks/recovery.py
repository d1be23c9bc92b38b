"""What a recovery gives back: rise of perplexity over the original dense model, before and after, on other text.

python benchmarks/recovery.py MODEL --data TEXT.jsonl --heldout OTHER.jsonl --folder WORK [--bits 4 --group-size 32] [--lr 1e-4]

A checkpoint is calibrated first, or that of --sparse is taken. The table ends with one line for the run, and all figures are in
WORK/result.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import click

import wina_calib
from wina_calib.commands.recover import table
from wina_calib.common.progress import Silent

SPARSITIES = (0.4, 0.5, 0.65)
QUANTIZED = (0.25, 0.4, 0.5)
PASSED = (
    "tokens",
    "lr",
    "batch",
    "seq_len",
    "hidden",
    "bits",
    "group_size",
    "max_time",
    "micro_batch",
    "train",
)


class Printed(Silent):
    """Says what a recovery notes, and now and then a step."""

    def __init__(self) -> None:
        self.done = 0

    def note(self, text: str) -> None:
        click.echo(f"  {text}")

    def phase(self, name: str, steps: int) -> None:
        click.echo(f"  {name}: {steps} steps")
        self.done = 0

    def step(self, note: str) -> None:
        self.done += 1
        if self.done % 50 == 0:
            click.echo(f"  {self.done}: {note}")


def rises(folder: Path, sparsities: tuple[float, ...], given: argparse.Namespace, dense: float) -> dict[str, Any]:
    """Rise over the perplexity `dense` and achieved sparsity, by sparsity."""
    found = {
        s: wina_calib.evaluate(folder, data=given.heldout, sparsity=s, tokens=given.heldout_tokens) for s in sparsities
    }
    return {f"{s:g}": {"rise": e.sparse_ppl / dense - 1, "achieved": e.model_sparsity} for s, e in found.items()}


def prepared(given: argparse.Namespace, sparsities: tuple[float, ...]) -> tuple[Path, dict[str, Any]]:
    """A calibrated checkpoint, and what it is before: made once in a folder."""
    sparse: Path = given.sparse or given.folder / "sparse"
    facts = sparse.with_suffix(".json")
    if not (sparse / "config.json").exists():
        start = time.monotonic()
        grid = tuple(sorted({*SPARSITIES, *QUANTIZED, *sparsities}))
        text = {"data": given.data, "samples": given.samples, "seq_len": given.seq_len or 1024}
        wina_calib.calibrate(given.model, sparse, sparsity=0.5, grid=grid, overwrite=True, **text)
        click.echo(f"calibrated in {time.monotonic() - start:.1f} s")
    known = json.loads(facts.read_text()) if facts.exists() else {}
    if "dense" not in known:
        zero = wina_calib.evaluate(sparse, data=given.heldout, sparsity=0.0, tokens=given.heldout_tokens)
        known = {"dense": zero.dense_ppl, "before": {}}
    missing = tuple(s for s in sparsities if f"{s:g}" not in known["before"])
    if missing:
        known["before"] |= rises(sparse, missing, given, known["dense"])
        facts.write_text(json.dumps(known))
    return sparse, known


def numbers(text: str) -> tuple[Any, ...]:
    return tuple(json.loads(f"[{text}]"))


def main() -> None:
    """Calibrate, recover, measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--more-data", action="append", default=[], help="mixed in evenly when recovering")
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--sparse", type=Path, help="a calibrated checkpoint, made there if it is not")
    parser.add_argument("--only-calibrate", action="store_true")
    parser.add_argument("--heldout-tokens", type=int, default=49_152)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sparsities", type=numbers)
    parser.add_argument("--turns", type=numbers, default=())
    parser.add_argument("--tasks", action="append", default=[])
    for name in PASSED:
        kind = float if name in ("lr", "hidden", "max_time") else str if name == "train" else int
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    sparsities = given.sparsities or (QUANTIZED if given.bits else SPARSITIES)
    sparse, known = prepared(given, tuple(sorted({*sparsities, *SPARSITIES})))
    if given.only_calibrate:
        return
    options = {name: value for name in PASSED if (value := getattr(given, name)) is not None}
    options |= {"sparsities": sparsities, "turns": given.turns, "tasks": tuple(given.tasks)}
    options["data"] = (given.data, *given.more_data)
    start = time.monotonic()
    found = wina_calib.recover(
        sparse,
        given.folder / "recovered",
        base=given.model,
        overwrite=True,
        restart=True,
        progress=Printed(),
        **options,
    )
    whole = time.monotonic() - start
    click.echo(table(found))
    after = rises(given.folder / "recovered", sparsities, given, known["dense"])
    out = {"model": Path(given.model).name, "options": options, "seconds": whole, **known, "after": after}
    (given.folder / "result.json").write_text(json.dumps(out | {"recovery": found.to_dict()}))
    each = [f"{s} {known['before'][s]['rise']:.1%} -> {a['rise']:.1%} ({a['achieved']:.3f})" for s, a in after.items()]
    kept = [", ".join(f"{kl:.3f}" for kl in losses) for losses in (found.trained.held_out[0], found.trained.kept)]
    step = found.trained.seconds / max(1, found.trained.steps)
    click.echo(
        f"RESULT {given.folder.name}: {', '.join(each)}; divergence {kept[0]} -> {kept[1]}, step {found.trained.best} kept; "
        f"{step:.3f} s a step, {whole:.0f} s in all"
    )


if __name__ == "__main__":
    main()
