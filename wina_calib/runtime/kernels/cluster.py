"""The product of one row in CUDA (`site.cu`), for cards whose blocks form clusters: Hopper and later.

Nothing here waits for the device or depends on data, so the product may be captured in a CUDA graph.
`WINA_CALIB_NATIVE=0` turns it off; then, and where NVRTC or the card cannot do it, Triton's kernels serve.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from wina_calib.runtime.kernels import autotune, nvrtc

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "sources" / "site.cu"
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CAPABILITY = (9, 0)
# Bytes that a thread reads at once, which rows of a weight must be a multiple of.
VECTOR_BYTES = 16
WARP = 32
# Inputs that a thread keeps in registers until they are listed.
MAX_PASSES = 16


@dataclass(frozen=True)
class Shape:
    """A launch shape.

    Attributes:
        lanes: threads that share a row, 16 bytes each: 8, 16 or 32.
        warps: of a block.
        cluster: blocks that share the inputs, at most 8.
        unroll: rows that a thread has in flight.
    """

    lanes: int
    warps: int
    cluster: int
    unroll: int

    def columns(self, itemsize: int) -> int:
        """Outputs of a cluster."""
        return self.lanes * VECTOR_BYTES // itemsize

    def slice(self, width: int) -> int:
        """Inputs of a block, for a weight of `width` inputs."""
        return -(-width // (WARP * self.cluster)) * WARP

    def passes(self, width: int) -> int:
        """Inputs of a thread."""
        return -(-self.slice(width) // (WARP * self.warps))

    def shared_bytes(self, width: int, itemsize: int) -> int:
        """Shared memory of a block."""
        floats = self.columns(itemsize) * (self.warps + 1) + self.slice(width)
        return 4 * floats + 2 * self.passes(width) * self.warps * WARP


# Best of some 90 shapes on an H200 for the weights of 7B and 8B models; the first is the guess without a measurement.
NARROW = (
    Shape(16, 8, 8, 4),
    Shape(8, 8, 8, 4),
    Shape(8, 8, 4, 4),
    Shape(16, 16, 4, 4),
    Shape(8, 4, 8, 4),
    Shape(16, 8, 4, 4),
    Shape(16, 4, 8, 4),
    Shape(32, 8, 4, 8),
    Shape(32, 16, 4, 4),
    Shape(32, 16, 8, 4),
)
WIDE = (
    Shape(32, 8, 4, 8),
    Shape(32, 8, 2, 8),
    Shape(32, 8, 4, 4),
    Shape(32, 4, 8, 4),
    Shape(16, 8, 2, 4),
    Shape(32, 16, 2, 4),
    Shape(16, 4, 4, 4),
    Shape(16, 8, 4, 4),
)


@cache
def candidates(width: int, out: int, itemsize: int) -> tuple[Shape, ...]:
    """Launch shapes worth timing for a weight (in `width`, out `out`), best guess first; none for too wide a weight."""
    shapes = WIDE if out * itemsize >= 2 * autotune.WIDE_OUTPUTS else NARROW
    return tuple(s for s in shapes if s.passes(width) <= MAX_PASSES)


def serves(x: Tensor, weight_t: Tensor) -> bool:
    """Whether the code can read these: one row of the weight's dtype, rows of the weight at 16 bytes, a card that has it."""
    return (
        x.shape[0] == 1
        and x.dtype == weight_t.dtype
        and weight_t.shape[1] * weight_t.element_size() % VECTOR_BYTES == 0
        and weight_t.data_ptr() % VECTOR_BYTES == 0
        and bool(candidates(weight_t.shape[0], weight_t.shape[1], weight_t.element_size()))
        and available(x.device.index)
    )


@cache
def available(index: int) -> bool:
    """Whether the card of this number, the current one, runs the code. The first question compiles, in half a second."""
    if os.environ.get("WINA_CALIB_NATIVE") == "0" or torch.cuda.get_device_capability(index) < CAPABILITY:
        return False
    try:
        _launch(index, torch.bfloat16, 256, 256, NARROW[0])
    except (OSError, RuntimeError) as error:
        logger.info("no product in CUDA on this card, Triton's is used: %s", error)
        return False
    return True


def launch(
    shape: Shape,
    x: Tensor,
    weight_t: Tensor,
    norm: Tensor,
    threshold: Tensor,
    dense_rows: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Enqueue the product with a given launch shape on the current device and stream; as `dispatch.sparse_site`."""
    width, out = weight_t.shape
    y = torch.empty(1, out, dtype=x.dtype, device=x.device)
    x = x if x.stride(1) == 1 else x.contiguous()
    given = (x, norm, threshold, dense_rows, weight_t, bias, y)
    _launch(x.device.index, x.dtype, width, out, shape)(*(0 if t is None else t.data_ptr() for t in given))
    return y


def prepare(shapes: Sequence[Shape], index: int, dtype: torch.dtype, width: int) -> None:
    """Compile launch shapes side by side. One that does not compile is left to whoever starts it."""

    def compile_one(shape: Shape) -> None:
        with suppress(RuntimeError):
            _code(_architecture(index), dtype, shape.slice(width), shape)

    with ThreadPoolExecutor(min(len(shapes), os.cpu_count() or 1)) as pool:
        list(pool.map(compile_one, shapes))


@cache
def key_of(index: int, width: int, out: int, dtype: torch.dtype) -> str:
    """What a measurement holds for."""
    return autotune.key_of(index, f"CUDA {torch.version.cuda}", width, out, dtype)


@cache
def _launch(index: int, dtype: torch.dtype, width: int, out: int, shape: Shape) -> nvrtc.Launch:
    itemsize = dtype.itemsize
    grid = (-(-out // shape.columns(itemsize)), shape.cluster, 1)
    function = _function(index, dtype, shape.slice(width), shape)
    return nvrtc.Launch(function, grid, shape.warps * WARP, shape.shared_bytes(width, itemsize), 7, (width, out))


@cache
def _function(index: int, dtype: torch.dtype, part: int, shape: Shape) -> ctypes.c_void_p:
    return nvrtc.load(_code(_architecture(index), dtype, part, shape), "site")


@cache
def _code(architecture: str, dtype: torch.dtype, part: int, shape: Shape) -> bytes:
    constants = dict(zip(("LANES", "WARPS", "CLUSTER", "UNROLL"), astuple(shape), strict=True))
    return nvrtc.build(SOURCE, architecture, constants | {"TYPE": TYPES[dtype], "SLICE": part})


def _architecture(index: int) -> str:
    return "sm_{}{}".format(*torch.cuda.get_device_capability(index))
