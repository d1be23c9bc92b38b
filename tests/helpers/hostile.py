"""What every hostile input is held to: our errors only, within seconds, in little memory."""

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from wina_calib.errors import WinaError

MAX_SECONDS = 5.0
MAX_BYTES = 500_000_000

# Values that a reader may trust by mistake.
ODD = [
    None,
    True,
    False,
    -1,
    0,
    1,
    3,
    2**31,
    2**62,
    2**63,
    2**64,
    10**400,
    -0.0,
    1.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "\0",
    "F32",
    "BF16",
    "F8_E4M3",
    "é\U0001f600",
    "../x.safetensors",
    "/dev/zero",
    "b.safetensors",
    "x" * 5000,
    [],
    {},
    [0, 0],
    [0, 2**63],
    [2**40] * 3,
    [0, 2**62],
    [[[[]]]],
    {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
    {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]},
]


@contextmanager
def memory_limit(extra: int) -> Iterator[None]:
    """The system refuses the process more than `extra` bytes above what it has: Python's memory and torch's alike."""
    old = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + extra, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


def only_our_errors(action: Callable[[], object], *, extra: int = MAX_BYTES) -> bool:
    """Run `action`; True when it was refused. Any error but ours (MemoryError too) or a long run fails the test."""
    start = time.perf_counter()
    try:
        with memory_limit(extra):
            action()
        refused = False
    except WinaError as error:
        refused = True
        assert 0 < len(str(error).encode()) < 20_000
        assert "no memory" not in str(error)
        assert "allocate" not in str(error)
    assert time.perf_counter() - start < MAX_SECONDS
    return refused
