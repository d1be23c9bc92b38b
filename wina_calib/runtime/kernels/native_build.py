"""Compiles, caches and opens the C library."""

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

from wina_calib.common.own_cache import cache_folder, find_kept, keep

logger = logging.getLogger(__name__)
FOLDER = Path(__file__).parent / "sources"
HEADERS = [FOLDER / name for name in ("numbers.h", "vectors.h", "site.h", "attend.h", "lines.h")]
_NAMES = ("site", "quantized", "rows", "few_rows", "many_rows", "attend", "layers", "layout")
SOURCES = [FOLDER / f"{name}.c" for name in _NAMES]
DTYPES = (torch.float32, torch.bfloat16)
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-fopenmp", "-fPIC", "-std=c11", "-ffp-contract=fast", "-fno-math-errno")
# For this processor; the first that the compiler takes.
TARGETS = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ("-mcpu=native",))
SIGNATURES = {
    "site": ([*[ctypes.c_void_p] * 3, *[ctypes.c_int] * 2], ctypes.c_int),
    "turned": ([*[ctypes.c_void_p] * 7, ctypes.c_float, *[ctypes.c_int64] * 3, ctypes.c_int], ctypes.c_int),
    "gated": ([*[ctypes.c_void_p] * 5, *[ctypes.c_int] * 2], ctypes.c_int),
    "layers": (
        [
            *[ctypes.c_void_p] * 2,
            ctypes.c_int64,
            *[ctypes.c_void_p] * 6,
            ctypes.c_float,
            ctypes.c_int64,
            ctypes.c_int,
        ],
        ctypes.c_int,
    ),
    "attend": ([*[ctypes.c_void_p] * 6, *[ctypes.c_int64] * 4, ctypes.c_float, ctypes.c_int], ctypes.c_int),
    "mask": ([*[ctypes.c_void_p] * 5, *[ctypes.c_int64] * 2, ctypes.c_int], None),
    "norm": ([*[ctypes.c_void_p] * 3, ctypes.c_float, *[ctypes.c_int64] * 2, ctypes.c_int], None),
    "few": ([*[ctypes.c_void_p] * 4, ctypes.c_int64, ctypes.c_int], ctypes.c_int),
    "dequantize": ([ctypes.c_void_p, *[ctypes.c_int64] * 2, ctypes.c_void_p, ctypes.c_int], None),
    "by_rows": ([*[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 3, ctypes.c_int], ctypes.c_int),
    "columns": ([*[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 4, ctypes.c_int], None),
    "product": ([*[ctypes.c_void_p] * 7, *[ctypes.c_int64] * 3, ctypes.c_int], ctypes.c_int),
}
COMPILE_SECONDS = 60


@cache
def functions(name: str) -> dict[torch.dtype, Any]:
    """`site`, `mask`, `norm` or `product` for each dtype that has it."""
    opened = library()
    assert opened is not None
    names = {dtype: f"{name}_{str(dtype).removeprefix('torch.')}" for dtype in DTYPES}
    by_dtype = {dtype: getattr(opened, full) for dtype, full in names.items() if hasattr(opened, full)}
    for function in by_dtype.values():
        function.argtypes, function.restype = SIGNATURES[name]
    return by_dtype


@cache
def library() -> ctypes.CDLL | None:
    """The compiled code, from the cache or made now; None, said once, where it cannot be had."""
    if os.environ.get("WINA_CALIB_NATIVE") == "0":
        return None
    if sys.platform.startswith("linux"):
        names = [os.environ.get("CC", ""), *COMPILERS]
        for compiler in dict.fromkeys(filter(None, map(shutil.which, filter(None, names)))):
            opened = _load(cache_folder(), f"site-{_fingerprint(compiler)}", compiler)
            if opened is not None:
                return opened
    logger.info("no C compiler whose code can use torch's threads: sparse products on the CPU use torch's operators")
    return None


def _load(cache: Path | None, name: str, compiler: str) -> ctypes.CDLL | None:
    """The library that is kept under a name, whole and one's own; else it is made, and kept where there is a cache."""
    kept = None if cache is None else find_kept(cache, name, ".so")
    opened = None if kept is None else _open(kept)
    if opened is None:
        with _folder(cache) as folder:
            made = _compile(compiler, folder)
            opened = None if made is None else _open(made)
            if cache is not None and made is not None and opened is not None:
                with contextlib.suppress(OSError):
                    keep(made, cache, name, ".so")
    return opened


def _open(file: Path) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(file))
    except OSError as error:  # not there, damaged, or OpenMP's functions are not in this process
        logger.debug("%s", error)
        return None


@contextlib.contextmanager
def _folder(cache: Path | None) -> Iterator[Path]:
    """A folder to compile in: inside of the cache, from which a file can be moved at once, else wherever one can be."""
    try:
        made = tempfile.mkdtemp(dir=cache)
    except OSError:
        made = tempfile.mkdtemp()
    try:
        yield Path(made)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _compile(compiler: str, folder: Path) -> Path | None:
    """Compile in two steps: linked without OpenMP's library, so that no second one with threads of its own is loaded."""
    parts, made = [folder / f"{source.stem}.o" for source in SOURCES], folder / "site.so"
    for target in TARGETS:
        steps = [
            [compiler, *FLAGS, *target, "-c", str(source), "-o", str(part)]
            for source, part in zip(SOURCES, parts, strict=True)
        ]
        steps.append([compiler, "-shared", *map(str, parts), "-o", str(made)])
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
    code = [file.read_text() for file in (*HEADERS, *SOURCES)]
    given = (code, compiler, stat.st_size, stat.st_mtime_ns, FLAGS, TARGETS, processor)
    return hashlib.sha256(repr(given).encode()).hexdigest()[:16]
