"""Resident memory kept low, and running out of it said so that one knows which option to change, and to what."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from wina_calib.errors import OutOfMemoryError

_ALLOCATOR = ("can't allocate memory", "out of memory", "bad allocation", "std::bad_alloc", "can't start new thread")
_IMPORTED = 400 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_NEVER = 2**31 - 1
OWN_PAGES = 4 << 20  # bytes from which on a tensor gets pages of its own
_HUGE_PAGE = 2 << 20
_MOVED = 1 << 20  # bytes from which on a tensor is worth a huge page that it does not fill
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25
_PART = 8 << 20  # bytes that are moved at a time
_GROWTH = 256 << 20
_SHORT = 512  # tokens a block from which on fewer blocks are advised before shorter ones


def resident_bytes() -> int:
    """Resident memory of this process; where the system does not say, about what torch and transformers take."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return _IMPORTED


def available_bytes() -> int:
    """Memory that new work may take without swapping, within the limit of a container; 0 where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 0
    with contextlib.suppress(OSError, ValueError):  # no such group, or no limit
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, limit - used)
    return free


def return_freed_memory() -> None:
    """Give the pages of freed tensors back to the system, and keep those freed from here on until this is called again.

    By itself glibc gives a large tensor pages of its own and takes them away with it: a calibration then spends a quarter of
    its time on getting pages.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library, another system
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _NEVER)
        libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)
        libc.malloc_trim(0)


def advise_huge_pages(first: int, size: int, *, filled: bool = False) -> None:
    """Ask for huge pages for memory by its address and bytes. Advice only: failure is ignored.

    `filled` memory has pages already, which are joined at once where the system does that (Linux from 6.1 on).
    """
    start = -(-first // _HUGE_PAGE) * _HUGE_PAGE
    whole = (first + size - start) // _HUGE_PAGE * _HUGE_PAGE
    _advise(start, whole, _MADV_HUGEPAGE)
    if filled:
        _advise(start, whole, _MADV_COLLAPSE)


def _advise(start: int, size: int, advice: int) -> None:
    """`madvise` for whole pages; failure is ignored."""
    if size > 0 and sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None)
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        libc.madvise(start, size, advice)


def empty_in_huge_pages(shape: tuple[int, ...], dtype: torch.dtype, *, tight: bool = False) -> Tensor:
    """A tensor on the CPU whose memory is new, so that the system can give huge pages for it; a small one is any tensor.

    What torch allocates may be memory that was freed before, whose pages are there already and stay small. `tight` is for
    smaller tensors too, with small pages where the last huge one would stay empty by more than a quarter.
    """
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size < (_MOVED if tight else OWN_PAGES) or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device="cpu")
    try:
        memory = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # no memory, which torch says in its own words
        return torch.empty(shape, dtype=dtype, device="cpu")
    start = -torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr() % _HUGE_PAGE
    pages = -(-size // _HUGE_PAGE) - int(tight and 0 < size % _HUGE_PAGE < 3 * _HUGE_PAGE // 4)
    with contextlib.suppress(OSError, ValueError):  # a system without huge pages, or none that is filled
        memory.madvise(mmap.MADV_HUGEPAGE, start, pages * _HUGE_PAGE)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=start).view(shape)


def moved_to_huge_pages(tensor: Tensor) -> Tensor:
    """A tensor on the CPU with its numbers in memory of its own, in huge pages.

    What transformers loads lies in the pages of the file, which stay small. They are given back at once, as the file still has
    them: moving all tensors, a part after another, takes no more memory than a part. Other memory is its owner's.
    """
    size = tensor.nbytes
    if not tensor.is_cpu or size < _MOVED or not tensor.is_contiguous() or not hasattr(mmap, "MADV_HUGEPAGE"):
        return tensor
    made = empty_in_huge_pages(tuple(tensor.shape), tensor.dtype, tight=True)
    first, page = tensor.data_ptr(), mmap.PAGESIZE
    of_a_file = _is_of_a_file(first, size)
    given = -(-first // page) * page  # up to here
    count = _PART // tensor.itemsize
    for old, new in zip(tensor.view(-1).split(count), made.view(-1).split(count), strict=True):
        new.copy_(old)
        stop = (old.data_ptr() + old.nbytes) // page * page
        if of_a_file:
            _advise(given, stop - given, mmap.MADV_DONTNEED)
        given = max(given, stop)
    return made


def _is_of_a_file(first: int, size: int) -> bool:
    """Whether memory is a file that was mapped, as the system tells it: only then are its numbers found there again."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            place, _, _, _, inode = line.split()[:5]
            low, high = (int(address, 16) for address in place.split("-"))
            if low <= first and first + size <= high:
                return inode != "0"
    return False


class Growth:
    """Gives freed memory back whenever the process has grown by `_GROWTH` bytes."""

    def __init__(self) -> None:
        self._before = resident_bytes()

    def check(self) -> None:
        """Look at the process, and give back if it has grown; some 20 us where it has not."""
        if resident_bytes() - self._before > _GROWTH:
            return_freed_memory()
            self._before = resident_bytes()


def ran_out(error: BaseException) -> bool:
    """Whether an error is Python's, NumPy's or torch's way to say that memory ran out, on a CPU or an accelerator.

    Importing torch for its class would be slow, so this looks at names and messages.
    """
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _ALLOCATOR))
    )


@contextlib.contextmanager
def advice(micro_batch: int, shape: tuple[int, ...]) -> Iterator[None]:
    """Turn running out of memory into a message with the option that helps most and its value.

    `shape` is the number of blocks, and the tokens a block; `micro_batch` blocks are computed together.

    Raises:
        OutOfMemoryError: memory ran out inside the context.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        raise OutOfMemoryError(f"out of memory. {_remedy(micro_batch, *shape)}") from error


def _remedy(micro_batch: int, samples: int, seq_len: int) -> str:
    if micro_batch > 1:
        return f"Blocks were computed {micro_batch} at a time: give --micro-batch {micro_batch // 2}."
    if seq_len > _SHORT:
        return f"Blocks have {seq_len} tokens: give --seq-len {seq_len // 2}."
    if samples > 1:
        return f"{samples} blocks are used: give --samples {samples // 2}."
    return "Give --dtype bfloat16, or a machine with more memory."
