"""The product of one row with weights of 4 bits whose kept columns stream through shared memory (`streamed.cu`).

What is on its way takes no registers, so that a processor has tens of kilobytes in flight. For cards with clusters, Hopper and
later. Scales are multiplied into the inputs, which are rounded to float16 once with them and change outputs by about 1e-4 of
their norm; codes are exact.
"""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from wina_calib.quantization.formats import Quantized, WeightFormat
from wina_calib.runtime.kernels import codes_card, nvrtc
from wina_calib.runtime.kernels.around import PLAIN, Around
from wina_calib.runtime.kernels.codes_card import SOURCES, VECTOR_BYTES, WARP, addresses, places

SOURCE = SOURCES / "streamed.cu"
DTYPES = (torch.bfloat16, torch.float16)
# Bytes of a column that a warp multiplies; those between two columns in shared memory; columns of a step.
OWN_BYTES, APART, STEP = 128, 32, 16
# Groups of which rows of scales must be a multiple, so that they are copied by 16 bytes and zeros by 4.
GROUPS_AT_ONCE = 8
# Inputs of a thread.
MAX_PASSES = 16
# Shared memory of a block that the system takes.
RESERVED = 1024
# Clusters of more blocks than these need to be asked for.
PLAIN_CLUSTER = 8


@dataclass(frozen=True)
class Shape:
    """A launch shape.

    Attributes:
        across: warps of a team, side by side, 256 outputs each: 1, 2, 4 or 8.
        teams: which take the columns of a block in turn.
        slices: blocks of a cluster, which share the inputs, at most 16.
        stages: steps of 16 columns that a team has room for.
        blocks: that a processor shall have room for.
    """

    across: int
    teams: int
    slices: int
    stages: int
    blocks: int

    def inputs(self, width: int) -> int:
        """Inputs of a block, for a weight of `width` inputs."""
        return -(-width // (8 * self.slices)) * 8

    @property
    def threads(self) -> int:
        """Of a block."""
        return self.across * self.teams * WARP

    def columns(self) -> int:
        """Outputs of a block."""
        return self.across * OWN_BYTES * 2

    def shared_bytes(self, width: int, form: WeightFormat) -> int:
        """Shared memory of a block."""
        warps, groups = self.across * self.teams, self.columns() // form.group_size
        column = self.across * OWN_BYTES + APART + 2 * groups + (max(4, groups // 2) if form.zero_point else 0)
        inputs = -(-self.inputs(width) // STEP) * STEP
        sums = -(-self.columns() // self.slices) * self.slices
        return self.teams * self.stages * STEP * column + 4 * (-(-sums // 4) * 4 + 3 * warps) + 6 * inputs


# Best of 32 on an H200 for the weights of an 8B model; what is not measured is gathered (`quantized_cuda`).
SHAPES = (
    Shape(2, 2, 16, 3, 4),
    Shape(1, 4, 16, 4, 4),
    Shape(2, 3, 16, 4, 2),
    Shape(1, 8, 5, 3, 2),
    Shape(2, 4, 8, 4, 2),
    Shape(1, 6, 8, 4, 2),
    Shape(1, 4, 8, 4, 3),
    Shape(4, 4, 4, 3, 1),
    Shape(4, 3, 4, 4, 1),
    Shape(2, 4, 4, 3, 2),
    Shape(4, 2, 8, 3, 2),
)


def serves(dtype: torch.dtype, weight: Quantized, index: int) -> bool:
    """Whether the code can read a weight: 4 bits, on a card with clusters, rows of scales and zeros as copies want them."""
    if dtype not in DTYPES or weight.format.bits != 4 or not codes_card.overlaps(index):
        return False
    aligned = weight.scales.data_ptr() % VECTOR_BYTES == 0
    return aligned and weight.out_features % (GROUPS_AT_ONCE * weight.format.group_size) == 0


@cache
def candidates(width: int, form: WeightFormat, room: int) -> tuple[Shape, ...]:
    """Launch shapes worth timing; none for too wide a weight."""
    return tuple(
        s
        for s in SHAPES
        if -(-s.inputs(width) // s.threads) <= MAX_PASSES
        and (s.shared_bytes(width, form) + RESERVED) * s.blocks <= room + RESERVED
    )


def launch(
    shape: Shape,
    x: Tensor,
    weight: Quantized,
    norm: Tensor,
    threshold: Tensor,
    dense_rows: Tensor | None = None,
    bias: Tensor | None = None,
    y: Tensor | None = None,
    around: Around = PLAIN,
) -> Tensor:
    """Enqueue the product of one row with a given launch shape; as `quantized_cuda.launch`."""
    width, out = weight.width, weight.out_features
    if y is None:
        y = torch.empty(1, out, dtype=x.dtype, device=x.device)
    run = _site(x.device.index, x.dtype, weight.format, width, out, shape, around.kind, around.epsilon)
    run(
        *addresses(x, norm, threshold, dense_rows),
        *places(weight),
        *addresses(bias, y, around.gain, around.added),
    )
    return y


@cache
def _site(
    index: int,
    dtype: torch.dtype,
    form: WeightFormat,
    width: int,
    out: int,
    shape: Shape,
    kind: int,
    epsilon: float,
) -> nvrtc.Launch:
    function = _function(index, dtype, form, shape.inputs(width), shape, kind)
    grid = (-(-out // shape.columns()), shape.slices, 1)
    bits = struct.unpack("i", struct.pack("f", epsilon))[0]
    return nvrtc.Launch(function, grid, shape.threads, shape.shared_bytes(width, form), 11, (width, out, bits))


@cache
def _function(
    index: int, dtype: torch.dtype, form: WeightFormat, part: int, shape: Shape, kind: int
) -> ctypes.c_void_p:
    function = nvrtc.load(site_code(index, dtype, form, part, shape, kind), "streamed")
    if shape.slices > PLAIN_CLUSTER:
        nvrtc.allow_large_clusters(function)
    return function


@cache
def site_code(index: int, dtype: torch.dtype, form: WeightFormat, part: int, shape: Shape, kind: int) -> bytes:
    """Machine code for a slice of `part` inputs."""
    return codes_card.build(index, dtype, form, constants(shape, part, kind), SOURCE)


def constants(shape: Shape, part: int, kind: int) -> dict[str, int]:
    """What the code is compiled with besides card, dtype and format."""
    named = {"ACROSS": shape.across, "TEAMS": shape.teams, "CLUSTER": shape.slices, "STAGES": shape.stages}
    return named | {"BLOCKS": shape.blocks, "SLICE": part, "INPUT": kind}
