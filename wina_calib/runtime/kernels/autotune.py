"""Launch shapes of the CUDA kernels: candidates, a bounded search, and a cache on disk."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from wina_calib.common.atomic import write_file
from wina_calib.common.own_cache import cache_folder, read_own
from wina_calib.errors import OutputError

logger = logging.getLogger(__name__)

# Raised when a kernel changes so that remembered shapes are measured again.
KERNEL_VERSION = 5
REPEATS = 9
# A search that has taken this long stops with the best so far. Compiling a candidate takes about half a second.
BUDGET_SECONDS = 15.0
# Read to evict the weights from the cache between measurements, and to let the host get ahead of the device.
FLUSH_BYTES = 256 << 20
FLUSHES = 3
MOST_COPIES = 8  # of a weight, run one after the other in a measurement
MAX_BYTES = 4 << 20  # of the file that remembers
NUMBERS = (4, 5)  # of a launch shape


@dataclass(frozen=True)
class Config:
    """A launch shape of Triton's kernels: inputs a program compacts, rows and columns it reads at a time, its warps."""

    slice: int
    block_k: int
    block_n: int
    warps: int


# For 16-bit weights, measured on an H200 with the shapes of 7B and 8B models; the first is the guess without a search.
# Programs of one warp suit weights with few outputs; with many outputs larger blocks do as well and are fewer.
NARROW_16_BIT = (
    Config(256, 32, 64, 1),
    Config(64, 8, 128, 1),
    Config(64, 8, 64, 1),
    Config(128, 8, 256, 1),
    Config(128, 8, 128, 1),
    Config(128, 8, 64, 1),
    Config(128, 16, 128, 1),
    Config(256, 16, 64, 1),
    Config(256, 16, 128, 1),
    Config(64, 8, 512, 2),
    Config(128, 16, 64, 2),
    Config(256, 16, 64, 2),
    Config(512, 32, 128, 2),
    Config(128, 8, 1024, 4),
    Config(256, 32, 128, 2),
    Config(256, 64, 64, 2),
)
WIDE_16_BIT = (
    Config(256, 8, 1024, 4),
    Config(512, 16, 512, 4),
    Config(256, 8, 512, 2),
    Config(128, 4, 256, 1),
    Config(256, 4, 128, 1),
    Config(128, 2, 256, 1),
    Config(256, 4, 256, 1),
    Config(256, 4, 1024, 2),
    Config(128, 4, 128, 1),
    Config(512, 16, 256, 2),
    Config(512, 16, 1024, 8),
    Config(128, 8, 256, 1),
    Config(256, 8, 256, 1),
    Config(256, 16, 512, 4),
)
WIDE_OUTPUTS = 16384
SMALLEST = Config(64, 8, 64, 1)


def _scaled(config: Config, itemsize: int) -> Config:
    """The same bytes a step for elements of another size."""
    return Config(config.slice, config.block_k, max(32, config.block_n * 2 // itemsize), config.warps)


def candidates(width: int, out: int, itemsize: int) -> list[Config]:
    """Launch shapes worth timing for a weight (in `width`, out `out`), best guess first, at most 16."""
    shapes = [_scaled(config, itemsize) for config in (WIDE_16_BIT if out >= WIDE_OUTPUTS else NARROW_16_BIT)]
    fitting = [c for c in shapes if c.block_n <= max(SMALLEST.block_n, out) and c.slice <= max(SMALLEST.slice, width)]
    return list(dict.fromkeys(fitting)) or [SMALLEST]


# A frozen dataclass of whole numbers.
AnyShape = TypeVar("AnyShape")


def chosen(key: str, shapes: Sequence[AnyShape], measure: Callable[[], AnyShape | None]) -> AnyShape | None:
    """The launch shape that is remembered for `key`, else the one that `measure` finds, which is remembered.

    The first of `shapes` where nothing can be measured: in a capture, without memory, with `WINA_CALIB_AUTOTUNE=0`.
    None where `measure` finds none that runs. Want of memory and of a shape that runs is met once in a process, since it
    costs far more than a product; no file remembers it.
    """
    known = recall(key)
    if known == NONE_RUNS:
        return None
    for shape in shapes:  # what a file says counts where it is one of these
        if known is not None and tuple(vars(shape).values()) == known:
            return shape
    if torch.cuda.is_current_stream_capturing() or os.environ.get("WINA_CALIB_AUTOTUNE") == "0":
        return shapes[0]
    try:
        best = measure()
    except torch.OutOfMemoryError:
        remember(key, shapes[0], later=False)
        return shapes[0]
    if best is None:
        _known[key] = NONE_RUNS
    else:
        remember(key, best)
    return best


def fastest(
    shapes: Sequence[AnyShape], run: Callable[[AnyShape], float], budget: float = BUDGET_SECONDS
) -> AnyShape | None:
    """The candidate with the least `run` time in the time allowed, or None if none runs.

    A candidate that cannot run (too few registers, an older compiler) is skipped.
    """
    start = time.monotonic()
    times: dict[AnyShape, float] = {}
    for shape in shapes:
        try:
            times[shape] = run(shape)
        except Exception as error:  # compilers raise what they like; the next candidate may do
            logger.debug("launch shape %s failed: %s", shape, error)
        if time.monotonic() - start > budget:
            break
    return min(times, key=lambda shape: times[shape], default=None)


def copies_of(nbytes: int) -> int:
    """How many copies of a weight of so many bytes are run besides it, so that no cache holds them all."""
    return min(MOST_COPIES, FLUSH_BYTES // nbytes)


def time_on_card(calls: Sequence[Callable[[], object]], device: torch.device) -> float:
    """Median milliseconds of calls one after the other, whose weights no cache holds when the first begins."""
    flush = torch.ones(FLUSH_BYTES // 4, device=device)
    calls[0]()
    events = []
    for _ in range(REPEATS):
        for _ in range(FLUSHES):
            flush.sum()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for call in calls:
            call()
        last.record()
        events.append((first, last))
    torch.cuda.synchronize(device)
    return float(statistics.median(first.elapsed_time(last) for first, last in events))


def cache_file() -> Path | None:
    """Where launch shapes are remembered for later processes; None where there is no cache of one's own."""
    folder = cache_folder()
    return None if folder is None else folder / "kernels.json"


def key_of(index: int, compiler: str, width: int, out: int, dtype: torch.dtype) -> str:
    """What a measurement holds for: card, compiler and its version, weight."""
    device = torch.cuda.get_device_name(index)
    return f"{KERNEL_VERSION}|{device}|{compiler}|{str(dtype)[6:]}|{width}x{out}"


NONE_RUNS = ()  # what is known of a weight for which no launch shape runs
_known: dict[str, tuple[int, ...]] = {}
_loaded: set[Path] = set()


def recall(key: str) -> tuple[int, ...] | None:
    """The numbers of the remembered launch shape, from memory or, once, from disk."""
    found = _known.get(key)
    if found is not None:
        return found
    file = cache_file()
    if file is not None and file not in _loaded:
        _loaded.add(file)
        for name, values in _read(file).items():
            _known.setdefault(name, values)
    return _known.get(key)


def remember(key: str, shape: Any, *, later: bool = True) -> None:
    """Keep a launch shape for this process and, where the cache can be written, for `later` ones."""
    _known[key] = astuple(shape)
    if not later:
        return
    file = cache_file()
    if file is not None:
        with contextlib.suppress(OutputError):
            write_file(file, json.dumps(_read(file) | {key: _known[key]}, indent=0).encode())


def _read(file: Path) -> dict[str, tuple[int, ...]]:
    """The cache on disk; a damaged one, or one that others could have written, counts as empty."""
    try:
        content = json.loads(read_own(file, MAX_BYTES) or b"{}")
        entries = {str(name): tuple(int(v) for v in values) for name, values in content.items()}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return {}
    return {name: values for name, values in entries.items() if len(values) in NUMBERS and min(values) > 0}
