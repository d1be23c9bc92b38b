"""Whether several processes, each with a GPU of its own, make the checkpoint that one makes, also after one of them has died.

    python benchmarks/distributed_check.py --folder /tmp/check --out check.json

Writes a Llama of random weights to --folder and calibrates it: by one process, by one again (so that what differs from run to
run is not taken for a difference between processes), by several under torchrun, and by several of which the last is killed,
once while the budget is chosen and once while thresholds are fitted, each time to go on by the same command. Prints seconds,
the memory of each GPU and every difference; --out is written after each run. Exit status 0 if all checkpoints are equal to the
byte and a killed process has ended all with an error. `--device cpu` does the same on CPUs.
"""

import argparse
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))

import click
import random_model
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
KILLED_IN = ("choose budget", "fit thresholds")


class Run:
    """A calibration in processes of its own: what it says, and when."""

    def __init__(self, folder: Path, processes: int, arguments: list[str], threads: int) -> None:
        folder.mkdir(exist_ok=True)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        self.start, self.said, self.memory = time.monotonic(), list[str](), dict[str, int]()
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._process = subprocess.Popen(
            [sys.executable, *(launcher if processes > 1 else []), "-m", "wina_calib", *arguments],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        for work in (self._read, self._watch):
            threading.Thread(target=work, daemon=True).start()

    def wait(self, limit: float, *, for_text: str | None = None) -> bool:
        """Wait for a text or the end; whether the text was said. Ends everything after `limit` seconds."""
        while True:
            try:
                line = self._lines.get(timeout=max(0.1, limit - (time.monotonic() - self.start)))
            except queue.Empty:
                os.killpg(self._process.pid, signal.SIGKILL)  # torchrun and all that it has started
                raise SystemExit(f"hangs for {limit:.0f} s; last lines:\n" + "\n".join(self.said[-20:])) from None
            if line is None:
                self.status = self._process.wait()
                self.seconds = round(time.monotonic() - self.start, 2)
                return False
            if for_text is not None and for_text in line:
                return True

    def phases(self) -> dict[str, float]:
        """When each phase began, in seconds of its own clock, without the imports."""
        begun = (line[1:].split(" s] ", 1) for line in self.said if line.startswith("[") and " s] " in line)
        return {name.strip(): float(seconds) for seconds, name in begun}

    def kill(self, rank: int) -> bool:
        """Kill one of the processes that torchrun has started; whether it was there."""
        for place in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == self._process.pid and f"RANK={rank}" in (place / "environ").read_text().split("\0"):
                    os.kill(int(place.name), signal.SIGKILL)
                    return True
            except OSError:  # it has ended, or is another user's
                continue
        return False

    def errors(self) -> list[str]:
        """What the calibration itself says of its end."""
        return [line for line in self.said if line.startswith(("Error:", "Stopped;"))]

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.said.append(line.rstrip())
            self._lines.put(line)
        self._lines.put(None)

    def _watch(self) -> None:
        command = ["nvidia-smi", "--query-gpu=index,memory.used", "--format=csv,noheader,nounits"]
        while shutil.which(command[0]) and self._process.poll() is None:
            found = subprocess.run(command, capture_output=True, text=True).stdout
            for gpu, used in (line.split(",") for line in found.splitlines() if "," in line):
                self.memory[gpu] = max(self.memory.get(gpu, 0), int(used))
            time.sleep(0.2)


def differences(found: Path, expected: Path) -> list[str]:
    """What differs between two checkpoints."""
    names = {path.name for folder in (found, expected) for path in folder.iterdir()}
    out = []
    for name in sorted(names):
        here, there = found / name, expected / name
        if not (here.exists() and there.exists()):
            out.append(f"{name} is in one only")
        elif here.read_bytes() != there.read_bytes():
            out += tensor_differences(here, there) if name.endswith(".safetensors") else [f"{name} differs"]
    return out


def tensor_differences(found: Path, expected: Path) -> list[str]:
    """Tensors of two files that are not equal, with the largest absolute difference."""
    ours, theirs = load_file(found), load_file(expected)
    out = [f"{found.name}: {name} is in one only" for name in sorted(ours.keys() ^ theirs.keys())]
    for name in sorted(ours.keys() & theirs.keys()):
        a, b = ours[name], theirs[name]
        if a.dtype != b.dtype or a.shape != b.shape:
            out.append(f"{found.name}: {name} has another form")
        elif not a.equal(b):
            off = (a.double() - b.double()).abs()
            most, scale = float(off.max()), float(b.double().abs().max())
            out.append(
                f"{found.name}: {name} off by {most:.3g} of {scale:.3g} in {int((off > 0).sum())} of {a.numel()}"
            )
    return out or [f"{found.name} differs in its bytes alone"]


def main() -> None:
    """Run all and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--limit", type=float, default=240.0, help="seconds of one run")
    args = parser.parse_args()

    folder = args.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    heads = max(2, args.hidden // 64)
    shape = {"hidden": args.hidden, "inner": args.hidden * 11 // 4, "heads": heads, "kv_heads": heads // 2}
    model = random_model.write(folder / "model", layers=args.layers, vocab=args.vocab, **shape)
    arguments = ["calibrate", str(model), "-o", "out", "--device", args.device, "--samples", str(args.samples)]
    arguments += ["--seq-len", str(args.seq_len), "--micro-batch", str(args.micro_batch)]
    facts: dict[str, Any] = {"shape": shape | {"layers": args.layers, "vocab": args.vocab}, "command": arguments}
    facts["runs"], fine = {}, []

    def keep(name: str, run: Run, *, compare: bool = True, **more: Any) -> None:
        """Note one finished run, and what differs between its checkpoint and the first one."""
        found = {"status": run.status, "seconds": run.seconds, "phases": run.phases(), "gpu_mb": run.memory, **more}
        if compare and run.status == 0:
            found["differences"] = differences(folder / name / "out", folder / "one" / "out")
        if run.status:
            found["errors"], found["said"] = run.errors(), run.said[-20:]
        fine.append(not found.get("differences") and (run.status == 0) == compare)
        facts["runs"][name if compare else f"{name}, killed in {more['killed_in']}"] = found
        args.out.write_text(json.dumps(facts | {"fine": all(fine)}, indent=1))
        click.echo(f"{name:14s} status {run.status:4d} {run.seconds:8.2f} s  GPU MB {run.memory}")
        for line in found.get("differences", [])[:20] + found.get("errors", []):
            click.echo(f"    {line}")

    def go(name: str, processes: int) -> Run:
        return Run(folder / name, processes, arguments, args.threads)

    for name, processes in (("one", 1), ("one again", 1), ("several", args.processes)):
        run = go(name, processes)
        run.wait(args.limit)
        keep(name, run)
        if run.status:
            raise SystemExit("\n".join(run.said[-40:]))
    begun = [*run.phases().items(), ("end", run.phases()["fit thresholds"] + 2.0)]
    for killed_in in KILLED_IN:
        at = [name for name, _ in begun].index(killed_in)
        run = go("stopped", args.processes)
        if not run.wait(args.limit, for_text=f"] {killed_in}"):
            raise SystemExit(f"never came to {killed_in!r}:\n" + "\n".join(run.said[-40:]))
        time.sleep((begun[at + 1][1] - begun[at][1]) / 2)
        there, moment = run.kill(args.processes - 1), time.monotonic()
        run.wait(args.limit)
        keep("stopped", run, compare=False, killed_in=killed_in, killed=there, ended_after=time.monotonic() - moment)
        fine.append(there and len(run.errors()) == 1)
    run = go("stopped", args.processes)
    run.wait(args.limit)
    keep("stopped", run, went_on=[line for line in run.said if "going on" in line])
    click.echo("all equal" if all(fine) else "NOT as it should be: see the differences and errors above")
    sys.exit(0 if all(fine) else 1)


if __name__ == "__main__":
    main()
