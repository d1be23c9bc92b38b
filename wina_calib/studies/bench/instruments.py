"""Clocks, memory and the roof of a device."""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from wina_calib import version
from wina_calib.runtime.kernels import native

ROOF_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
ROOF_REPEATS = 9
ONEDNN_REPEATS = 3
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def synchronize(device: torch.device) -> None:
    """Wait for what was started on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Wall time of a call until the device has finished it."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second of a large copy on the device, bytes read and written counted; the median of several."""
    count = ROOF_BYTES.get(device.type, 256 << 20)
    source = torch.ones(count // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * count / statistics.median(seconds(lambda: target.copy_(source), device) for _ in range(ROOF_REPEATS))


@contextlib.contextmanager
def onednn(enabled: bool) -> Iterator[None]:
    """Let torch use oneDNN for the length of the context, or its own products."""
    before = torch.backends.mkldnn.set_flags(enabled)[0]
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(before)


def onednn_pays(run: Callable[[], object], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a dense run on a CPU is faster with oneDNN than without: for one row of 16 bits it may read far slower."""
    if device.type != "cpu" or dtype == torch.float32 or not torch.backends.mkldnn.enabled:
        return True
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(ONEDNN_REPEATS + 1):
        for enabled, taken in times.items():
            with onednn(enabled):
                taken.append(seconds(run, device))
    return statistics.median(times[True][1:]) <= statistics.median(times[False][1:])


class PeakMemory:
    """What runs add, at their peak, to the memory in use when they start. Zero where the system does not say."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch for the length of the context."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            yield
            torch.cuda.synchronize(self.device)
            self.bytes = max(self.bytes, torch.cuda.max_memory_allocated(self.device) - before)
            return
        before = _resident("VmRSS") if _reset_peak() else 0
        yield
        if before:
            self.bytes = max(self.bytes, _resident("VmHWM") - before)


def _reset_peak() -> bool:
    """Let Linux count the peak of this process's resident memory from now on."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _resident(key: str) -> int:
    """A memory figure of this process in bytes; 0 where it is not known."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:")), 0)


def versions(device: torch.device) -> dict[str, str]:
    """Versions that a figure depends on."""
    known = version.versions()
    if device.type == "cpu":
        known["sparse product"] = "C" if native.available(torch.float32) else "torch operators"
    if device.type == "cuda":
        with contextlib.suppress(ImportError):
            import triton

            known["triton"] = str(triton.__version__)
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            known["driver"] = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split("\n")[0]
    return known
