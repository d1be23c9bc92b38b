"""The CPU product in C (`site.c`), compiled once with the compiler that the system has, as Triton does for a GPU.

The library is kept in `$WINA_CALIB_CACHE` or `~/.cache/wina_calib` under a name that stands for the source, the compiler
and the processor. Where there is no compiler, or its code cannot use torch's threads, `cpu` does with torch's operators.
`WINA_CALIB_NATIVE=0` turns it off.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wina_calib.runtime.kernels.autotune import cache_file

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("site.c")
DTYPES = (torch.float32, torch.bfloat16)
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-fopenmp", "-fPIC", "-std=c11")
# For this processor; the first that the compiler takes.
TARGETS = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ("-mcpu=native",))
COMPILE_SECONDS = 60
# Weights below which a second thread costs more than it saves.
MIN_SHARED = 1 << 17
_POINTERS = [ctypes.c_void_p] * 2
_ARGUMENTS: list[Any] = [
    ctypes.c_void_p,
    *_POINTERS,
    ctypes.c_float,
    *_POINTERS,
    *[ctypes.c_int64] * 2,
    *_POINTERS,
    ctypes.c_int,
]


def available(dtype: torch.dtype) -> bool:
    """Whether `site_row` can be called for weights of this dtype. The first question compiles, in half a second."""
    return dtype in DTYPES and _library() is not None


def site_row(x: Tensor, weight_t: Tensor, norm: Tensor, limit: float, bias: Tensor | None = None) -> Tensor:
    """`(x * [abs(x) * norm > limit]) @ weight_t + bias` for one row x (in,), reading only kept rows of weight_t.

    Args:
        x: (in,), float32 or bfloat16.
        weight_t: (in, out) contiguous, of the same dtype.
        norm: (in,) float32.
        limit: -1 keeps everything.
        bias: (out,) of the same dtype or None.

    Returns:
        (1, out), the same bits for any number of threads.
    """
    width, out = weight_t.shape
    threads = torch.get_num_threads() if width * out >= MIN_SHARED else 1
    y = x.new_empty(1, out)
    index = torch.empty(threads * width, dtype=torch.int64)
    value = torch.empty(threads * width, dtype=torch.float32)
    x, norm = x.contiguous(), norm.contiguous()
    bias = None if bias is None else bias.contiguous()
    _functions()[x.dtype](
        x.data_ptr(),
        weight_t.data_ptr(),
        norm.data_ptr(),
        limit,
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        width,
        out,
        index.data_ptr(),
        value.data_ptr(),
        threads,
    )
    return y


@cache
def _functions() -> dict[torch.dtype, ctypes._NamedFuncPointer]:
    library = _library()
    assert library is not None
    found = {torch.float32: library.site_float32, torch.bfloat16: library.site_bfloat16}
    for function in found.values():
        function.argtypes = _ARGUMENTS
        function.restype = None
    return found


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled code, from the cache or made now; None, said once, where it cannot be had."""
    if os.environ.get("WINA_CALIB_NATIVE") == "0":
        return None
    if sys.platform.startswith("linux"):
        names = [os.environ.get("CC", ""), *COMPILERS]
        for compiler in dict.fromkeys(filter(None, map(shutil.which, filter(None, names)))):
            found = _load(cache_file().with_name(f"site-{_fingerprint(compiler)}.so"), compiler)
            if found is not None:
                return found
    logger.info("no C compiler whose code can use torch's threads: sparse products on the CPU use torch's operators")
    return None


def _load(file: Path, compiler: str) -> ctypes.CDLL | None:
    """The library in `file`, which is made if need be and kept if it can be."""
    found = _open(file)
    if found is None:
        with _folder(file.parent) as folder:
            made = _compile(compiler, folder)
            found = None if made is None else _open(made)
            if made is not None and found is not None:
                with contextlib.suppress(OSError):
                    made.replace(file)
    return found


def _open(file: Path) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(file))
    except OSError as error:  # not there, damaged, or OpenMP's functions are not in this process
        logger.debug("%s", error)
        return None


@contextlib.contextmanager
def _folder(cache_folder: Path) -> Iterator[Path]:
    """A folder to compile in: inside of the cache, from which a file can be moved at once, else wherever one can be."""
    try:
        cache_folder.mkdir(parents=True, exist_ok=True)
        made = tempfile.mkdtemp(dir=cache_folder)
    except OSError:
        made = tempfile.mkdtemp()
    try:
        yield Path(made)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _compile(compiler: str, folder: Path) -> Path | None:
    """Compile in two steps: linked without OpenMP's library, so that no second one with threads of its own is loaded."""
    part, made = folder / "site.o", folder / "site.so"
    for target in TARGETS:
        steps = (
            [compiler, *FLAGS, *target, "-c", str(SOURCE), "-o", str(part)],
            [compiler, "-shared", str(part), "-o", str(made)],
        )
        if all(_runs(step) for step in steps):
            return made
    return None


def _runs(command: list[str]) -> bool:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        logger.debug("%s: %s", command[0], error)
        return False
    if done.returncode:
        logger.debug("%s: %s", " ".join(command), done.stderr[:500])
    return done.returncode == 0


def _fingerprint(compiler: str) -> str:
    """What the compiled code depends on. A home folder may be shared by machines with other processors."""
    processor = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        kinds = ("model name", "flags", "Features", "CPU part")
        processor += sorted({line for line in lines if line.startswith(kinds)})
    stat = Path(compiler).stat()
    given = (SOURCE.read_text(), compiler, stat.st_size, stat.st_mtime_ns, FLAGS, TARGETS, processor)
    return hashlib.sha256(repr(given).encode()).hexdigest()[:16]
