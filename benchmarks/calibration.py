"""How long a calibration's phases take, against a plain forward pass of the same streamed model over the same tokens.

    python benchmarks/calibration.py --shape llama-3-8b --layers 8 --samples 128 --seq-len 2048 --folder /tmp/bench [--bits 4]

Works on a CPU and on a GPU. The weights are random and the tokens too; the model is written to --folder first. Prints a
table as it goes and, last, one JSON object, which --out holds as far as it is known, from the first figure on. With --bits
it is only how much longer a whole calibration takes that quantizes too.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))

import click
import numpy as np
import random_model
import torch

from benchmarks.transform_timing import seconds as decomposition_seconds
from wina_calib.calibration import phases
from wina_calib.calibration.compute import Compute
from wina_calib.calibration.dense_pass import dense_pass
from wina_calib.calibration.fit_thresholds import fit_thresholds
from wina_calib.calibration.job import Job
from wina_calib.calibration.options import CalibrateOptions
from wina_calib.common.devices import default_micro_batch, pick_device, pick_dtype
from wina_calib.corpus.blocks import Blocks, fingerprint
from wina_calib.model.architecture import SITES
from wina_calib.model.source import open_source
from wina_calib.transforms import Statistics, plan

SHAPES = {
    "llama-3-8b": {"hidden": 4096, "inner": 14336, "heads": 32, "kv_heads": 8, "vocab": 128256},
    "tinyllama-1.1b": {"hidden": 2048, "inner": 5632, "heads": 32, "kv_heads": 4, "vocab": 32000},
    "small": {"hidden": 768, "inner": 2048, "heads": 12, "kv_heads": 12, "vocab": 16000},
    "14m": {"hidden": 384, "inner": 1024, "heads": 6, "kv_heads": 6, "vocab": 4096},
}


class Clock:
    """Seconds of every phase of a calibration; `ended` hears when one is over."""

    def __init__(self, device: torch.device, ended: Callable[[], None] = lambda: None) -> None:
        self.seconds: dict[str, float] = {}
        self.ended = ended
        self._device = device
        self._phase: str | None = None

    def planned(self, estimate: Any) -> None:
        """Keep nothing."""

    def phase(self, name: str, steps: int) -> None:
        """Close one phase, begin the next."""
        now = self.now()
        if self._phase is not None:
            self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + now - self._since
            click.echo(f"  of it {self._phase:34s} {self.seconds[self._phase]:9.2f} s")
            self.ended()
        self._phase, self._since = name, now

    def step(self, note: str) -> None:
        """Keep nothing."""

    def note(self, text: str) -> None:
        """Keep nothing."""

    def now(self) -> float:
        """Seconds, after all work that was sent to the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def timed(clock: Clock, work: Callable[[], Any]) -> float:
    """Seconds that some work takes; what it returns is freed."""
    start = clock.now()
    work()
    return clock.now() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--model", type=Path, help="measure this model instead of a random one")
    parser.add_argument(
        "--choice", action="store_true", help="only a plain pass, and transform and budget as by default"
    )
    parser.add_argument("--bits", type=int, default=0, help="only whole calibrations, without and with so many bits")
    parser.add_argument("--decompositions", type=int, default=0, help="also time the transforms' at this width")
    parser.add_argument("--out", type=Path, help="file for the JSON object")
    args = parser.parse_args()

    device = pick_device(args.device)
    clock, found = Clock(device), dict[str, float]()
    model, out = args.model or args.folder / "model", args.folder / "out"
    if not model.is_dir():
        found["write the model"] = timed(
            clock, lambda: random_model.write(model, layers=args.layers, **SHAPES[args.shape])
        )
    source = open_source(str(model))
    arch = source.architecture
    ids = torch.randint(4, arch.vocab_size, (args.samples, args.seq_len), generator=torch.Generator().manual_seed(0))
    dtype = pick_dtype("auto", source.dtype, device)
    compute = Compute(device, dtype, default_micro_batch(device, args.seq_len, arch.width), spill=args.folder)

    def job(transform: str, anchors: tuple[float, ...], budget: str, bits: int = 0) -> Job:
        options = CalibrateOptions(sparsity=anchors[-1], grid=anchors, transform=transform, budget=budget, bits=bits)
        text = Blocks(ids, ("random",), len(ids), fingerprint(ids))
        return Job(source, options, plan(transform, arch), text, compute, clock)

    def fit(anchors: tuple[float, ...]) -> None:
        one = job("none", anchors, "uniform")
        rows = np.array([[[anchor] * len(SITES)] * len(arch.layers) for anchor in anchors])
        fit_thresholds(one.stream(source, ids, states=one.fit_states), one.rule, one.options, rows)

    def plain() -> None:
        dense_pass(job("none", (0.5,), "uniform").stream(source, ids)).clear()

    def statistics() -> None:
        kept = Statistics(arch, "global", tokens=ids.numel() - len(ids))
        dense_pass(job("none", (0.5,), "uniform").stream(source, ids), kept).clear()

    facts: dict[str, Any] = {
        "shape": str(args.model or args.shape),
        "layers": args.layers,
        "tokens": ids.numel(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "dtype": str(dtype),
        "torch": torch.__version__,
        "seconds": found,
        "phases": clock.seconds,
    }

    def keep() -> None:
        if device.type == "cuda":
            facts["peak_gpu_bytes"] = torch.cuda.max_memory_allocated(device)
        if args.out is not None:
            args.out.write_text(json.dumps(facts))

    clock.ended = keep

    def measure(name: str, work: Callable[[], Any], times: int = 1) -> None:
        found[name] = min(timed(clock, work) for _ in range(times))
        click.echo(f"{name:40s} {found[name]:9.2f} s")
        keep()

    def choice() -> None:
        one = job(plan("auto", arch).name, (0.5,), "global")
        phases.begin(one, out, 0.0)

    def whole(bits: int = 0) -> None:
        for folder in (out, out.with_name("dense")):
            shutil.rmtree(folder, ignore_errors=True)
        out.mkdir(parents=True)
        base = Blocks(ids[: max(1, 16384 // args.seq_len)], ("random",), 1, "")
        phases.run(job("global", (0.5,), "global", bits), out, base)

    timed(clock, lambda: dense_pass(job("none", (0.5,), "uniform").stream(source, ids[:2])).clear())
    if args.bits:
        for bits in (0, args.bits):
            measure(f"whole, {bits or 16} bits", lambda bits=bits: whole(bits))
        click.echo(
            f"with {args.bits} bits {found[f'whole, {args.bits} bits'] / found['whole, 16 bits']:.2f} times as long"
        )
        click.echo(json.dumps(facts))
        return
    measure("plain", plain, 1 if args.choice else 2)
    if not args.choice:
        measure("with statistics", statistics)
        measure("fit, 1 sparsity", lambda: fit((0.5,)))
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    measure("transform and budget" if args.choice else "whole", choice if args.choice else whole)
    clock.phase("", 0)

    plain_s = found["plain"]
    ratios = {
        "transform and global budget": sum(
            seconds
            for name, seconds in clock.seconds.items()
            if name.startswith(("collect layer inputs", "rotate weights: ", "find where to drop: "))
        )
        / plain_s,
    }
    if not args.choice:
        measure("fit, 3 sparsities", lambda: fit((0.25, 0.5, 0.65)))
        further = found["fit, 3 sparsities"] - found["fit, 1 sparsity"]
        ratios |= {
            "statistics": (found["with statistics"] - plain_s) / plain_s,
            "fit at one sparsity": found["fit, 1 sparsity"] / plain_s,
            "each further sparsity": further / 2 / plain_s,
        }
    if args.decompositions:
        parts = decomposition_seconds(args.decompositions, device, steps=3)
        found |= {f"{name} at {args.decompositions}": value for name, value in parts.items()}
        for name, value in parts.items():
            click.echo(f"{name:40s} {value:9.2f} s, {args.decompositions} wide")
    for name, value in ratios.items():
        click.echo(f"{name:40s} {value:9.2f} plain passes")
    facts["ratios"] = ratios
    keep()
    click.echo(json.dumps(facts))


if __name__ == "__main__":
    main()
