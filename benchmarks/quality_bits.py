"""Perplexity over bits read: a model in 16, 8 and 4 bits at several sparsities, calibrated and measured on given text.

    python benchmarks/quality_bits.py MODEL OUT_DIR --calibration CAL.jsonl --heldout HELD.jsonl --case 4:32:0.4 --case 8::0.5

A case is bits, group size and the sparsity to calibrate for. Each is measured at that sparsity and at those of --at, on
held-out blocks that all cases share; rises are over the original model. Results go to OUT_DIR/quality_bits.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

import wina_calib
from wina_calib.calibration.compute import Compute
from wina_calib.calibration.dense_pass import dense_pass
from wina_calib.calibration.layer_stream import LayerStream
from wina_calib.calibration.likelihood import next_token_nll, perplexity
from wina_calib.checkpoint.format import stored_cells
from wina_calib.checkpoint.reader import open_checkpoint
from wina_calib.common.devices import pick_device, pick_dtype
from wina_calib.corpus.blocks import load_blocks
from wina_calib.model.source import open_source
from wina_calib.runtime.load import sparse_sites
from wina_calib.runtime.modules import model_weighted


def parse(case: str) -> dict[str, Any]:
    """Options of `calibrate` from `bits:group:sparsity`, each but the first may be left out."""
    bits, group, sparsity = (case.split(":") + ["", ""])[:3]
    found: dict[str, Any] = {"bits": 0 if bits == "16" else int(bits), "sparsity": float(sparsity or 0)}
    return found | ({"group_size": int(group)} if group else {})


def base_perplexity(model: str, ids: Tensor, micro_batch: int) -> float:
    """Perplexity of the original model on blocks `ids` (blocks, seq_len)."""
    source, device = open_source(model), pick_device("auto")
    stream = LayerStream(source, ids, Compute(device, pick_dtype("auto", source.dtype, device), micro_batch))
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


def main() -> None:
    """Calibrate and measure every case, and print a table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--case", action="append", required=True, metavar="BITS[:GROUP[:SPARSITY]]")
    parser.add_argument("--at", default="0,0.25,0.4,0.5", help="sparsities to measure at, besides each case's own")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--heldout-blocks", type=int, default=24)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", help="other options of calibrate")
    args = parser.parse_args()
    args.out_dir.mkdir(parents=True, exist_ok=True)
    others = dict(pair.split("=", 1) for pair in args.set)
    tokenizer = open_source(args.model).tokenizer()
    held = load_blocks(
        [args.heldout], tokenizer, samples=args.heldout_blocks, seq_len=args.seq_len, seed=0, min_tokens=2
    ).ids
    base = base_perplexity(args.model, held, 4)
    click.echo(f"{held.numel()} held-out tokens, perplexity {base:.3f}")
    rows: list[dict[str, Any]] = []
    for case in args.case:
        options, folder, start = parse(case) | others, args.out_dir / "checkpoint", time.perf_counter()
        wina_calib.calibrate(
            args.model,
            folder,
            data=args.calibration,
            samples=args.blocks,
            seq_len=args.seq_len,
            grid=(0.25, 0.5),
            overwrite=True,
            **options,
        )
        seconds = time.perf_counter() - start
        opened = open_checkpoint(folder)
        cells = stored_cells(opened.architecture, opened.settings)
        cuda = torch.cuda.is_available()
        model = wina_calib.load(folder, dtype="auto" if cuda else torch.float32, device_map="cuda" if cuda else None)
        for sparsity in sorted({options["sparsity"], *map(float, args.at.split(","))}):
            found, achieved = loaded_perplexity(model, held, sparsity)
            row = {"case": case, "sparsity": sparsity, "achieved": achieved, "bits_read": cells.bits_read_at(achieved)}
            rows.append(row | {"perplexity": found, "rise": found / base - 1, "seconds": seconds} | others)
            line = f"{case} at {sparsity:.0%} ({achieved:.1%}): {row['bits_read']:.2f} bits, {found:.3f}, {found / base - 1:+.1%}"
            click.echo(f"{line}, calibrated in {seconds:.0f} s")
        (args.out_dir / "quality_bits.json").write_text(json.dumps({"base": base, "rows": rows}, indent=1))
        del model
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
