"""Out of memory, said so that one knows which option to change, and to what."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wina_calib.errors import OutOfMemoryError

_ALLOCATOR = ("can't allocate memory", "out of memory", "bad allocation", "std::bad_alloc")
_IMPORTED = 400 << 20
_SHORT = 512  # tokens a block from which on fewer blocks are advised before shorter ones


def resident_bytes() -> int:
    """Resident memory of this process; where the system does not say, about what torch and transformers take."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return _IMPORTED


def ran_out(error: BaseException) -> bool:
    """Whether an error is Python's, NumPy's or torch's way to say that memory ran out, on a CPU or an accelerator.

    Importing torch for its class would be slow, so this looks at names and messages.
    """
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _ALLOCATOR))
    )


@contextmanager
def advice(micro_batch: int, shape: tuple[int, ...]) -> Iterator[None]:
    """Turn running out of memory into a message with the option that helps most and its value.

    Args:
        micro_batch: blocks computed together.
        shape: blocks in all, tokens a block.

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
