"""Perplexity over bits read: a model in 16, 8 and 4 bits at several sparsities, calibrated and measured on given text.

    python benchmarks/quality_bits.py MODEL OUT_DIR --calibration CAL.jsonl --heldout HELD.jsonl --group-size 32 --device cuda

A case is bits, group size and the sparsity to calibrate for, `4:32:0.4`; without --case there are three: 16 and 8 bits for
50 %, 4 bits for 40 %. Transform and budget are as `calibrate` makes them, once for 4 bits and once for the others. Each case is
measured at its own sparsity and at those of --at, on held-out blocks that all share; rises are over the original model. Results
go to OUT_DIR/quality_bits.json as they come, a row each; --draw draws them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

import wina_calib
from wina_calib.calibration import phases
from wina_calib.calibration.compute import Compute
from wina_calib.calibration.dense_pass import dense_pass
from wina_calib.calibration.job import Begun, Job
from wina_calib.calibration.layer_stream import LayerStream
from wina_calib.calibration.likelihood import next_token_nll, perplexity
from wina_calib.calibration.options import make_options
from wina_calib.calibration.quantize_sites import check_format, weight_format
from wina_calib.calibration.run import prepare
from wina_calib.checkpoint.format import stored_cells
from wina_calib.checkpoint.reader import open_checkpoint
from wina_calib.common.devices import pick_device, pick_dtype
from wina_calib.common.distributed import ALONE
from wina_calib.common.progress import SILENT
from wina_calib.corpus.blocks import Blocks, load_blocks
from wina_calib.model.source import open_source
from wina_calib.runtime.load import sparse_sites
from wina_calib.runtime.modules import model_weighted


def parse(case: str) -> dict[str, Any]:
    """Options of `calibrate` from `bits:group:sparsity`, each but the first may be left out."""
    bits, group, sparsity = (case.split(":") + ["", ""])[:3]
    found: dict[str, Any] = {"bits": 0 if bits == "16" else int(bits), "sparsity": float(sparsity or 0)}
    return found | ({"group_size": int(group)} if group else {})


def base_perplexity(model: str, ids: Tensor, device: torch.device) -> float:
    """Perplexity of the original model on blocks `ids` (blocks, seq_len)."""
    source = open_source(model)
    stream = LayerStream(source, ids, Compute(device, pick_dtype("auto", source.dtype, device), 4))
    return perplexity(float(next_token_nll(stream, dense_pass(stream)).double().mean()))


@torch.no_grad()
def loaded_perplexity(model: Any, ids: Tensor, sparsity: float) -> tuple[float, float]:
    """Perplexity of a loaded checkpoint at a sparsity, and the sparsity that it came to."""
    wina_calib.set_sparsity(model, sparsity)
    sites, total = sparse_sites(model), 0.0
    with sites[0].state.counting() as counts:
        for block in ids.to(model.device):
            logits = model(block[None, :-1], use_cache=False).logits[0]
            total += float(torch.nn.functional.cross_entropy(logits.float(), block[1:], reduction="sum"))
    found = model_weighted(sites, [counts[s.layer, s.site.name].sparsity for s in sites]) if sparsity else 0.0
    return perplexity(total / (ids.numel() - len(ids))), found


def begin(args: argparse.Namespace, options: dict[str, Any], folder: Path) -> tuple[Job, Blocks, Begun, float]:
    """What all cases share, the text of calibrate's own measurement, and the seconds that it took."""
    start = time.perf_counter()
    job, base = prepare(args.model, folder / "none", make_options(options), SILENT, ALONE)
    return job, base, phases.begin(job, folder / "dense", 0.0), time.perf_counter() - start


def finish(job: Job, base: Blocks, begun: Begun, own: dict[str, Any], folder: Path) -> tuple[Path, float]:
    """The checkpoint of a case, and the seconds that it took beyond what all cases share."""
    start, chosen = time.perf_counter(), replace(job.options, **own)
    form = weight_format(chosen)
    if form is not None:
        check_format(job.source.architecture, form)
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
        (folder / "checkpoint").mkdir()
    target = folder / ("dense" if form is None else "checkpoint")
    phases.finish(replace(job, options=chosen), target, base, begun)
    return target, time.perf_counter() - start


def measure(folder: Path, held: Tensor, sparsities: list[float], device: torch.device) -> list[dict[str, Any]]:
    """Figures of a checkpoint at some sparsities."""
    opened = open_checkpoint(folder)
    cells = stored_cells(opened.architecture, opened.settings)
    cuda = device.type == "cuda"
    model = wina_calib.load(folder, dtype="auto" if cuda else torch.float32, device_map=str(device) if cuda else None)
    rows = []
    for sparsity in sparsities:
        found, achieved = loaded_perplexity(model, held, sparsity)
        bits_read = cells.bits_read_at(achieved)
        rows.append({"sparsity": sparsity, "achieved": achieved, "bits_read": bits_read, "perplexity": found})
    return rows


def main() -> None:
    """Calibrate and measure every case, and print a table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--case", action="append", metavar="BITS[:GROUP[:SPARSITY]]")
    parser.add_argument("--group-size", type=int, default=64, help="of the case of 4 bits that is there without --case")
    parser.add_argument("--at", default="0,0.25,0.4,0.5", help="sparsities to measure at, besides each case's own")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--heldout-blocks", type=int, default=24)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", help="other options of calibrate")
    parser.add_argument("--draw", type=Path, metavar="FILE.png", help="also draw rise over bits read")
    args = parser.parse_args()
    args.out_dir.mkdir(parents=True, exist_ok=True)
    cases = args.case or ["16::0.5", "8::0.5", f"4:{args.group_size}:0.4"]
    cases.sort(key=lambda case: case.startswith("16"))  # last, as it is written where the transformed weights lie
    at = sorted({float(text) for text in args.at.split(",")} | {parse(case)["sparsity"] for case in cases})
    others = dict(pair.split("=", 1) for pair in args.set)
    device, tokenizer = pick_device(args.device), open_source(args.model).tokenizer()
    held = load_blocks(
        [args.heldout], tokenizer, samples=args.heldout_blocks, seq_len=args.seq_len, seed=0, min_tokens=2
    ).ids
    base_ppl = base_perplexity(args.model, held, device)
    click.echo(f"{held.numel()} held-out tokens, perplexity {base_ppl:.3f}")
    shared = {"data": args.calibration, "samples": args.blocks, "seq_len": args.seq_len, "device": args.device}
    grid = tuple(s for s in at if s)
    rows: list[dict[str, Any]] = []
    facts = {"base": base_ppl, "tokens": held.numel()}
    for bits in (0, 4):  # weights that are quantized in groups have a rotation of their own
        own = [case for case in cases if (parse(case)["bits"] == 4) == (bits == 4)]
        if not own:
            continue
        options = shared | {"grid": grid} | (parse(own[0]) if bits else {}) | {"sparsity": grid[-1]} | others
        shutil.rmtree(args.out_dir / "dense", ignore_errors=True)
        job, base, begun, took = begin(args, options, args.out_dir)
        click.echo(f"transform and budget: {took:.0f} s")
        facts["blocks"] = len(job.blocks.ids)
        for case in own:
            folder, seconds = finish(job, base, begun, parse(case), args.out_dir)
            for row in measure(folder, held, at, device):
                row |= {"case": case, "rise": row["perplexity"] / base_ppl - 1, "seconds": seconds} | others
                rows.append(row)
                line = f"{case} at {row['sparsity']:.0%} ({row['achieved']:.1%}): {row['bits_read']:.2f} bits"
                click.echo(f"{line}, {row['perplexity']:.3f}, {row['rise']:+.2%}; fitted in {seconds:.0f} s")
            (args.out_dir / "quality_bits.json").write_text(json.dumps(facts | {"rows": rows}, indent=1))
            shutil.rmtree(folder)
    if args.draw is not None:
        args.draw.write_bytes(draw(rows, args.model))


def draw(rows: list[dict[str, Any]], title: str) -> bytes:
    """Rise over bits read, a line a case, as a PNG."""
    from wina_calib.common.plots import over_bits

    cases = dict.fromkeys(row["case"] for row in rows)
    lines = {
        f"{case.partition(':')[0]} bits": [(r["bits_read"], r["rise"]) for r in rows if r["case"] == case]
        for case in cases
    }
    return over_bits(lines, title)


if __name__ == "__main__":
    main()
