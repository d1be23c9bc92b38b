"""Products of a few rows with quantized weights whose kept columns are gathered into registers (`quantized.cu`).

For every format and card from compute capability 8.0 on. From Hopper on the blocks that share a sum are a cluster; before, a
second kernel adds up. Weights of 4 bits are rounded to float16 once, which changes outputs by about 1e-4 of their norm; those
of 8 bits are exact.
"""

from __future__ import annotations

import struct
from dataclasses import astuple, dataclass
from functools import cache

import torch
from torch import Tensor

from wina_calib.quantization.formats import Quantized, WeightFormat
from wina_calib.runtime.kernels import codes_card, nvrtc
from wina_calib.runtime.kernels.around import PLAIN, Around
from wina_calib.runtime.kernels.codes_card import FACTORS, WARP, addresses, places, sides

MAX_PASSES = 16
# Outputs of a block that adds up.
COMBINED = 128


@dataclass(frozen=True)
class Shape:
    """A launch shape.

    Attributes:
        vector: bytes of a column that a thread reads at once, 8 or 16; eight threads share a column.
        warps: of a block.
        across: warps side by side, which read the same columns; the others share the block's inputs.
        slices: blocks that share the inputs, at most 8.
        steps: of 16 columns that a warp has in flight.
    """

    vector: int
    warps: int
    across: int
    slices: int
    steps: int

    def columns(self, bits: int) -> int:
        """Outputs of a block."""
        return self.across * 8 * self.vector * 8 // bits

    def inputs(self, width: int) -> int:
        """Inputs of a block, for a weight of `width` inputs."""
        return -(-width // (WARP * self.slices)) * WARP

    def passes(self, width: int) -> int:
        """Inputs of a thread."""
        return -(-self.inputs(width) // (WARP * self.warps // self.across))

    def shared_bytes(self, width: int, bits: int, rows: int, factors: int) -> int:
        """Shared memory of a block, at most."""
        columns = self.columns(bits)
        floats = rows * (columns + self.warps // self.across * (columns + 8) + self.warps)
        return 4 * floats + 2 * self.warps * (self.passes(width) * WARP + 16) * (1 + factors)

    def blocks(self, bits: int) -> int:
        """Blocks that a processor has registers for, which sums and what is in flight take most of."""
        numbers = self.columns(bits) // self.across // 4 + self.steps * self.vector + (8 if bits == 4 else 0)
        threads = 768 if numbers <= 64 else 512
        return max(1, threads // (WARP * self.warps))


# The first is the guess without a measurement.
SHAPES = (
    Shape(16, 8, 1, 8, 2),
    Shape(16, 4, 1, 8, 2),
    Shape(16, 4, 1, 4, 2),
    Shape(16, 8, 1, 4, 2),
    Shape(16, 8, 2, 8, 2),
    Shape(16, 8, 2, 4, 2),
    Shape(16, 4, 2, 8, 2),
    Shape(16, 4, 2, 4, 2),
    Shape(16, 8, 4, 8, 2),
    Shape(16, 8, 1, 8, 1),
    Shape(16, 8, 2, 8, 1),
    Shape(16, 4, 1, 2, 2),
    Shape(8, 8, 1, 8, 2),
    Shape(8, 8, 2, 8, 2),
    Shape(8, 4, 1, 8, 2),
    Shape(8, 8, 1, 4, 2),
    Shape(8, 8, 2, 4, 2),
    Shape(8, 4, 1, 8, 4),
)


@cache
def candidates(width: int, bits: int, rows: int, factors: int, room: int) -> tuple[Shape, ...]:
    """Launch shapes worth timing, best guess first; none for too wide a weight.

    Args:
        width: inputs of the weight.
        bits: of a weight.
        rows: of the input.
        factors: columns of the second factor.
        room: bytes of shared memory that a block may have.
    """
    return tuple(
        s for s in SHAPES if s.passes(width) <= MAX_PASSES and s.shared_bytes(width, bits, rows, factors) <= room
    )


@cache
def rows_at_once(index: int, dtype: torch.dtype, width: int, bits: int) -> int:
    """Rows that a kernel takes at a time; 0 where there is none for so wide a weight."""
    most = FACTORS // sides(dtype)
    while most and not candidates(width, bits, most, most * sides(dtype), codes_card.room(index)):
        most //= 2
    return most


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
    """Enqueue the product of contiguous rows x (rows, in), as many as a kernel takes, with a given launch shape.

    `y` (rows, out) is written where it is given; the rest as for `dispatch.quantized_site` and `step_site`.
    """
    rows, width, out, index = x.shape[0], weight.width, weight.out_features, x.device.index
    if y is None:
        y = torch.empty(rows, out, dtype=x.dtype, device=x.device)
    parts = None
    if not codes_card.overlaps(index):
        parts = torch.empty(shape.slices * rows * out, dtype=torch.float32, device=x.device)
    kernel = index, x.dtype, weight.format, width, out, rows, shape, around.kind
    _site(*kernel, around.epsilon)(
        *addresses(x, norm, threshold, dense_rows),
        *places(weight),
        *addresses(bias, y, parts, around.gain, around.added),
    )
    if parts is not None:
        _combine(*kernel)(*addresses(parts, weight.scales, bias, y, around.added))
    return y


def compiled(index: int, dtype: torch.dtype, form: WeightFormat, width: int, out: int) -> nvrtc.Launch:
    """The first launch shape for one row. Raises OSError or RuntimeError where there is no compiler or it cannot."""
    return _site(index, dtype, form, width, out, 1, SHAPES[0], PLAIN.kind, 0.0)


@cache
def _site(
    index: int,
    dtype: torch.dtype,
    form: WeightFormat,
    width: int,
    out: int,
    rows: int,
    shape: Shape,
    kind: int,
    epsilon: float,
) -> nvrtc.Launch:
    shared = shape.shared_bytes(width, form.bits, rows, rows * sides(dtype))
    grid = (-(-out // shape.columns(form.bits)), shape.slices, 1)
    function = nvrtc.load(site_code(index, dtype, form, shape.inputs(width), rows, shape, kind), "site")
    bits = struct.unpack("i", struct.pack("f", epsilon))[0]
    sizes = width, out, bits
    return nvrtc.Launch(function, grid, shape.warps * WARP, shared, 12, sizes, overlap=codes_card.overlaps(index))


@cache
def _combine(
    index: int, dtype: torch.dtype, form: WeightFormat, width: int, out: int, rows: int, shape: Shape, kind: int
) -> nvrtc.Launch:
    function = nvrtc.load(site_code(index, dtype, form, shape.inputs(width), rows, shape, kind), "combine")
    return nvrtc.Launch(function, (-(-rows * out // COMBINED), 1, 1), COMBINED, 0, 5, (out,), overlap=False)


@cache
def site_code(
    index: int, dtype: torch.dtype, form: WeightFormat, part: int, rows: int, shape: Shape, kind: int
) -> bytes:
    """Machine code for a slice of `part` inputs."""
    names = "VEC", "WARPS", "ACROSS", "CLUSTER", "UNROLL"
    constants = dict(zip(names, astuple(shape), strict=True))
    constants |= {"ROWS": rows, "SLICE": part, "BLOCKS": shape.blocks(form.bits), "INPUT": kind}
    return codes_card.build(index, dtype, form, constants)
