"""Launch shapes of the CUDA kernels: candidates, a bounded search, and a cache on disk."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

# Raised when a kernel changes so that remembered shapes are measured again.
KERNEL_VERSION = 1
REPEATS = 9
# A search that has taken this long stops with the best so far. Compiling a candidate takes about half a second.
BUDGET_SECONDS = 15.0


@dataclass(frozen=True)
class Config:
    """A launch shape: inputs a program compacts, rows and columns of the weight it reads at a time, its warps."""

    slice: int
    block_k: int
    block_n: int
    warps: int


# For 16-bit weights, best first over the shapes of 7B and 8B models on an H200; see docs/performance.md.
SHAPES_16_BIT = (
    Config(128, 4, 256, 1),
    Config(64, 8, 256, 1),
    Config(128, 8, 128, 1),
    Config(64, 8, 128, 1),
    Config(256, 16, 128, 2),
    Config(256, 16, 512, 4),
    Config(256, 8, 128, 1),
    Config(256, 16, 64, 1),
)


def _scaled(config: Config, itemsize: int) -> Config:
    """The same bytes a step for elements of another size."""
    return Config(config.slice, config.block_k, max(32, config.block_n * 2 // itemsize), config.warps)


def default_config(width: int, out: int, itemsize: int) -> Config:
    """The launch shape used without a measurement."""
    return candidates(width, out, itemsize)[0]


def candidates(width: int, out: int, itemsize: int) -> list[Config]:
    """Launch shapes worth timing for a weight (in `width`, out `out`), best guess first, at most 8."""
    shapes = [_scaled(config, itemsize) for config in SHAPES_16_BIT]
    fitting = [c for c in shapes if c.block_n <= max(64, out) and c.slice <= max(64, width)]
    return fitting or [Config(64, 8, 64, 1)]


def rows_config(itemsize: int) -> Config:
    """The launch shape for 2 to 8 rows."""
    return Config(256, 32, 128, 4) if itemsize == 2 else Config(256, 16, 64, 4)


def fastest(shapes: list[Config], run: Callable[[Config], float], budget: float = BUDGET_SECONDS) -> Config:
    """The candidate with the least `run` time, in the time allowed; at least the first is tried.

    A candidate that cannot run (too few registers, an older compiler) is skipped.
    """
    start = time.monotonic()
    best, least = shapes[0], float("inf")
    for shape in shapes:
        try:
            taken = run(shape)
        except Exception as error:  # compilers raise what they like; the next candidate may do
            logger.debug("launch shape %s failed: %s", shape, error)
            continue
        if taken < least:
            best, least = shape, taken
        if time.monotonic() - start > budget:
            break
    return best


def cache_file() -> Path:
    """Where launch shapes are remembered: `$WINA_CALIB_CACHE`, else `~/.cache/wina_calib`."""
    folder = os.environ.get("WINA_CALIB_CACHE")
    return (Path(folder) if folder else Path.home() / ".cache" / "wina_calib") / "kernels.json"


def key_of(device: str, width: int, out: int, dtype: torch.dtype) -> str:
    """What a measurement holds for."""
    import triton

    return f"{KERNEL_VERSION}|{device}|triton {triton.__version__}|{str(dtype)[6:]}|{width}x{out}"


_known: dict[str, Config] = {}
_loaded: set[Path] = set()


def recall(key: str) -> Config | None:
    """The remembered launch shape, from memory or, once, from disk."""
    found = _known.get(key)
    if found is not None:
        return found
    file = cache_file()
    if file not in _loaded:
        _loaded.add(file)
        for name, config in _read(file).items():
            _known.setdefault(name, config)
    return _known.get(key)


def remember(key: str, config: Config) -> None:
    """Keep a launch shape for this process and, where the cache can be written, for later ones."""
    _known[key] = config
    file = cache_file()
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        content = {name: astuple(c) for name, c in (_read(file) | {key: config}).items()}
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as temporary:
            json.dump(content, temporary, indent=0)
        Path(temporary.name).replace(file)


def _read(file: Path) -> dict[str, Config]:
    """The cache on disk; a damaged one counts as empty."""
    try:
        content = json.loads(file.read_text())
        entries = {str(name): tuple(int(v) for v in values) for name, values in content.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
    return {name: Config(*values) for name, values in entries.items() if len(values) == 4 and min(values) > 0}
