"""Peak memory stays below its bound and near its prediction; running out of it says what to do."""

import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import random_model
import script
import tiny
import torch

import wina_calib
from wina_calib.calibration.fit_layer import MaskedLayer
from wina_calib.calibration.layer_stream import LayerStream
from wina_calib.common.devices import keep_in_memory
from wina_calib.common.memory import Growth
from wina_calib.errors import OutOfMemoryError
from wina_calib.model.source import open_source
from wina_calib.storage.hidden_states import HiddenStates

LIMIT = 2_500_000_000
CGROUPS = Path("/sys/fs/cgroup/memory")
MB = 1_000_000
# Calibrates on fewer tokens than the least that is allowed, as a model of gigabytes takes seconds a token on a small CPU.
CALIBRATE = """
import json, sys, time
import torch
torch.set_num_threads(int(sys.argv[4]))
import wina_calib
from wina_calib.transforms import Statistics
module = sys.modules["wina_calib.calibration.run"]
held_out = sys.modules["wina_calib.calibration.held_out"]
module.MIN_TOKENS = 1
held_out.HELD_OUT_TOKENS = 256

class Listen:
    def __init__(self):
        self.peaks, self.now, self.begun = {}, "start", time.monotonic()
    def __getattr__(self, name):
        return lambda *args: None
    def planned(self, estimate):
        self.predicted = estimate.memory_bytes
    def phase(self, name, steps):
        peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
        self.peaks[self.now] = int(peak.split()[1]) * 1024, round(time.monotonic() - self.begun, 1)
        self.now, self.begun = name, time.monotonic()
        open("/proc/self/clear_refs", "w").write("5")  # the peak of the next phase is its own

heard = Listen()
wina_calib.calibrate(sys.argv[1], sys.argv[2], progress=heard, **json.loads(sys.argv[3]))
heard.phase("end", 0)
peak = max(peak for peak, _ in heard.peaks.values())
print(json.dumps({"peak": peak, "predicted": heard.predicted, "phases": heard.peaks}))
"""


@contextmanager
def limited(limit: int) -> Iterator[list[Any]]:
    """Yields what to call with a process id so that the system holds it to a limit, in a control group or by a watch."""
    group = CGROUPS / f"wina-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(limit))
    except OSError:
        yield [lambda pid: threading.Thread(target=_watch, args=(pid, limit), daemon=True).start()]
        return
    try:
        yield [lambda pid: (group / "cgroup.procs").write_text(str(pid))]
    finally:
        group.rmdir()


def _watch(pid: int, limit: int) -> None:
    """End a process whose resident memory grows above a limit."""
    while True:
        try:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except OSError:
            return
        if pages * os.sysconf("SC_PAGE_SIZE") > limit:
            os.kill(pid, 9)
        time.sleep(0.02)


def calibrate(model: Path, out: Path, *, limit: int = 1 << 62, threads: int = 1, **options: Any) -> dict[str, Any]:
    """Calibrate in a process of its own; its peak resident bytes, the predicted ones, and each phase's peak and seconds."""
    with limited(limit) as (hold,):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(CALIBRATE), str(model), str(out), json.dumps(options), str(threads)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=script.environment({"OMP_NUM_THREADS": str(threads)}),
        )
        hold(process.pid)
        stdout, stderr = process.communicate(timeout=900)
    assert process.returncode == 0, f"exit {process.returncode} {stderr[-3000:]}"
    return json.loads(stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_checkpoint_of_4_gb_in_2_5_gb(tmp_path: Path, text: Path) -> None:
    """Default options, few tokens; the system ends the process above the limit."""
    hidden, inner, layers, tokens = 256, 32768, 80, 132  # as few as a rotation of 64 dimensions takes
    shape = {"hidden": hidden, "inner": inner, "heads": 4, "kv_heads": 1, "vocab": 8192}
    model = random_model.write(tmp_path / "m", layers=layers, **shape)
    assert sum(p.stat().st_size for p in model.iterdir()) > 4_000 * MB
    found = calibrate(
        model,
        tmp_path / "s",
        limit=LIMIT,
        data=str(text),
        samples=2,
        seq_len=tokens // 2,
        micro_batch=1,
        grid=[0.5],
        sparsity=0.5,
    )
    assert found["peak"] < LIMIT, found
    assert found["predicted"] == pytest.approx(found["peak"], rel=0.25), found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({"layers": 2, "hidden": 256, "inner": 512, "heads": 4, "kv_heads": 4, "vocab": 2048}, {}),
        ({"layers": 3, "hidden": 512, "inner": 16384, "heads": 8, "kv_heads": 4, "vocab": 512}, {}),
        (
            {"layers": 2, "hidden": 512, "inner": 1024, "heads": 8, "kv_heads": 4, "vocab": 150_000},
            {"transform": "none"},
        ),
        (
            {"layers": 12, "hidden": 512, "inner": 1024, "heads": 8, "kv_heads": 8, "vocab": 512},
            {"micro_batch": 8},
        ),
        (
            {"layers": 12, "hidden": 512, "inner": 1024, "heads": 8, "kv_heads": 8, "vocab": 512},
            {"samples": 8, "seq_len": 2048},
        ),
    ],
    ids=["tiny", "large layers", "large vocabulary", "many layers", "long blocks"],
)
def test_bound_and_prediction_hold(shape: dict[str, int], options: dict[str, Any], tmp_path: Path, text: Path) -> None:
    """Two layers in float32, two hidden states and 600 MB; prediction within 25 %."""
    model = random_model.write(tmp_path / "m", **shape)
    options = {"samples": 16, "seq_len": 256} | options
    found = calibrate(model, tmp_path / "s", data=str(text), **options)
    layer = open_source(model).architecture.layer_weights
    tokens = options["samples"] * options["seq_len"]
    assert found["peak"] < 2 * 4 * (layer + tokens * shape["hidden"]) + 600 * MB, found
    assert found["predicted"] == pytest.approx(found["peak"], rel=0.25), found


def test_freed_memory_goes_back_once_a_process_has_grown(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = iter([100 * MB, 120 * MB, 140 * MB, 110 * MB, 140 * MB, 150 * MB, 115 * MB])
    given_back = []
    monkeypatch.setattr("wina_calib.common.memory._GROWTH", 32 * MB)
    monkeypatch.setattr("wina_calib.common.memory.resident_bytes", lambda: next(sizes))
    monkeypatch.setattr("wina_calib.common.memory.return_freed_memory", lambda: given_back.append(1))
    growth, seen = Growth(), []
    for _ in range(4):
        growth.check()
        seen.append(len(given_back))
    assert seen == [0, 1, 1, 2]


def test_hidden_states_beyond_two_go_to_files() -> None:
    cpu = torch.device("cpu")
    assert keep_in_memory(cpu, 4, 30 * MB)
    assert not keep_in_memory(cpu, 4, 40 * MB)
    assert keep_in_memory(cpu, 2, 10_000 * MB)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system does not list what is mapped")
def test_files_of_hidden_states_are_memory_mapped(tmp_path: Path) -> None:
    store, value = HiddenStates(tmp_path, torch.device("cpu")), torch.randn(2, 3, 4)
    store[0] = value
    read = store[0]
    (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert str(file) in Path("/proc/self/maps").read_text()
    read += 1  # stays in memory
    assert torch.equal(store[0], value)
    store[0] = read  # the old file may still be in use
    assert torch.equal(read, value + 1)
    assert torch.equal(store[0], value + 1)


@pytest.mark.parametrize("budget", ["uniform", "global"])
def test_files_of_hidden_states_change_nothing(
    budget: str, tmp_path: Path, llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"data": str(text), "samples": 64, "seq_len": 128, "budget": budget, "grid": (0.5,)}
    used = []
    real = LayerStream.store
    monkeypatch.setattr(LayerStream, "store", lambda self: used.append(self.spill is not None) or real(self))
    for name, spare in (("memory", 64 << 20), ("files", -(1 << 40))):
        monkeypatch.setattr("wina_calib.common.devices.SPARE_BYTES", spare)
        used.clear()
        (tmp_path / name).mkdir()
        wina_calib.calibrate(llama, tmp_path / name / "s", **options)
        assert any(used) == (name == "files")
    for path in (tmp_path / "memory" / "s").iterdir():
        assert path.read_bytes() == (tmp_path / "files" / "s" / path.name).read_bytes(), path.name
    # The files of hidden states are gone.
    for name in ("memory", "files"):
        assert [p.name for p in (tmp_path / name).iterdir()] == ["s"]


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"micro_batch": 8}, "--micro-batch 4."),
        ({"micro_batch": 1}, "--samples 32."),
    ],
)
@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you ..."
        ),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("can't start new thread"),
    ],
    ids=["python", "torch", "cuda", "thread"],
)
def test_out_of_memory_names_the_option_and_its_value(
    error: Exception,
    options: dict[str, Any],
    advice: str,
    tmp_path: Path,
    llama: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(MaskedLayer, "run", fail)
    with pytest.raises(OutOfMemoryError, match=advice):
        wina_calib.calibrate(llama, tmp_path / "s", data=str(text), samples=64, seq_len=128, **options)
    assert list(tmp_path.iterdir()) == []


def test_memory_that_really_runs_out(tmp_path: Path, text: Path) -> None:
    tiny.save("llama", tmp_path / "m", intermediate_size=8192)  # 500 MB for each product of the MLP
    # In a process of its own: one that has run other tests holds freed memory that no limit takes away.
    code = """
        import sys
        import wina_calib
        from hostile import memory_limit

        class Listen(wina_calib.common.progress.Silent):
            def planned(self, estimate):
                self.limit = memory_limit(400_000_000)  # enough for threads
                self.limit.__enter__()

        model, out, data = sys.argv[1:]
        wina_calib.calibrate(
            model, out, data=data, samples=64, seq_len=256, micro_batch=64, progress=Listen(),
            sparsity=0.5, grid=(0.25, 0.5, 0.65)
        )
    """
    done = script.run(code, tmp_path / "m", tmp_path / "s", text)
    assert done.returncode == 1, done.stderr
    assert "OutOfMemoryError" in done.stderr and "--micro-batch 32" in done.stderr, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_other_errors_pass_through(tmp_path: Path, llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(MaskedLayer, "run", fail)
    with pytest.raises(RuntimeError, match="something else"):
        wina_calib.calibrate(
            llama, tmp_path / "s", data=str(text), samples=64, seq_len=128, sparsity=0.5, grid=(0.25, 0.5, 0.65)
        )
