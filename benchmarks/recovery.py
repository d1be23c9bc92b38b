"""What a recovery gives back: rise of perplexity over the original dense model, before and after, on other text.

python benchmarks/recovery.py MODEL --data TEXT.jsonl --heldout OTHER.jsonl --folder WORK [--tokens 2500000] [--bits 4]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import click

import wina_calib
from wina_calib.recovery.run import recover

SPARSITIES = (0.4, 0.5, 0.65)
QUANTIZED = (0.25, 0.4, 0.5)


def rises(folder: Path, sparsities: tuple[float, ...], heldout: str, tokens: int, dense: float) -> dict[str, float]:
    """Rise over the perplexity `dense`, by sparsity."""
    found = {s: wina_calib.evaluate(folder, data=heldout, sparsity=s, tokens=tokens) for s in sparsities}
    for s, e in found.items():
        click.echo(
            f"  {folder.name} at {s:.0%}: {e.sparse_ppl / dense - 1:+.1%} (achieved {e.model_sparsity:.3f})", flush=True
        )
    return {f"{s:g}": e.sparse_ppl / dense - 1 for s, e in found.items()}


def main() -> None:
    """Calibrate, recover, quantize what was recovered, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=2_500_000)
    parser.add_argument("--heldout-tokens", type=int, default=49_152)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--bits", type=int, default=0)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.0)
    given = parser.parse_args()
    text = {"data": given.data, "samples": given.samples, "seq_len": given.seq_len}
    grid = tuple(sorted({*SPARSITIES, *QUANTIZED}))
    sparse, recovered = given.folder / "sparse", given.folder / "recovered"
    out: dict[str, Any] = {"model": Path(given.model).name}

    def timed(name: str, work: Any) -> Any:
        start = time.monotonic()
        made = work()
        out[name + "_seconds"] = round(time.monotonic() - start, 1)
        click.echo(f"{name}: {out[name + '_seconds']} s")
        return made

    timed(
        "calibrate", lambda: wina_calib.calibrate(given.model, sparse, sparsity=0.5, grid=grid, overwrite=True, **text)
    )
    dense = wina_calib.evaluate(sparse, data=given.heldout, sparsity=0.0, tokens=given.heldout_tokens).dense_ppl
    out["dense"] = dense
    out["before"] = rises(sparse, SPARSITIES, given.heldout, given.heldout_tokens, dense)
    options = {"data": given.data, "tokens": given.tokens, "lr": given.lr, "base": given.model, "overwrite": True}
    found = timed("recover", lambda: recover(sparse, recovered, sparsities=SPARSITIES, restart=True, **options))
    out["training"] = found.to_dict()
    out["after"] = rises(recovered, SPARSITIES, given.heldout, given.heldout_tokens, dense)
    if given.bits:
        quantized = given.folder / f"int{given.bits}"
        more = {"bits": given.bits, "group_size": given.group_size, "sparsities": QUANTIZED}
        timed("recover_quantized", lambda: recover(sparse, quantized, restart=True, **options | more))
        out["quantized"] = rises(quantized, QUANTIZED, given.heldout, given.heldout_tokens, dense)
    click.echo(json.dumps(out))


if __name__ == "__main__":
    main()
