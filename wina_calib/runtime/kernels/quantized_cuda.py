"""Products with quantized weights on CUDA (`quantized.cu`), for cards of compute capability 8.0 and later.

A few rows are multiplied from their codes, by the columns that one of them keeps; for more the weight is dequantized, some
outputs at a time, for the library's product. From Hopper on the blocks that share a sum are a cluster; before, a second kernel
adds up. Nothing here waits for the device or depends on data, so all may be captured in a CUDA graph. Weights of 4 bits are
rounded to float16 once, which changes outputs by about 1e-4 of their norm; those of 8 bits are exact.

`WINA_CALIB_NATIVE=0` turns it off; then, and where NVRTC or the card cannot do it, the reference serves.
"""

from __future__ import annotations

import ctypes
import logging
import os
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wina_calib.quantization.formats import Quantized, QuantizedRows, WeightFormat
from wina_calib.runtime.kernels import autotune, nvrtc
from wina_calib.runtime.kernels.around import PLAIN, Around
from wina_calib.runtime.kernels.cluster import CAPABILITY as CLUSTERS

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "sources" / "quantized.cu"
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CAPABILITY = (8, 0)
WARP = 32
# Bytes that a thread reads at once, of which columns of codes must be a multiple; codes that offsets of 32 bits reach.
VECTOR_BYTES, WORD_BYTES = 16, 4
MAX_CODES = 1 << 32
# Rows that a kernel takes at a time: columns of the second factor, of which float32 needs two a row.
FACTORS = 8
# Rows up to which products are made from codes.
MAX_FEW_ROWS = 16
# Rows that launch shapes are measured with for more than one.
FEW_ROWS = 4
MAX_PASSES = 16
# Of rows by rows: warps and steps of 64 codes in flight, blocks of a processor, inputs in shared memory.
ROWS_WARPS, ROWS_STEPS, ROWS_BLOCKS, ROWS_BYTES = 8, 8, 1, 96 << 10
ROWS_UNIT, ROWS_TILE = 64, 16
# Of dequantized weights: bytes at a time; outputs, of which a tile begins at a multiple; threads of a block, bytes of each.
TILE_BYTES, TILE_OUTPUTS = 256 << 20, 128
TILE_THREADS, TILE_PART = 256, 8
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


def serves(x: Tensor, weight: Quantized) -> bool:
    """Whether the code can read these: inputs of a float dtype on a card that has it, columns of 16 bytes."""
    codes = weight.codes
    if x.device.type != "cuda" or x.device != codes.device or x.dtype not in TYPES or codes.numel() >= MAX_CODES:
        return False
    if codes.shape[1] % VECTOR_BYTES or codes.data_ptr() % VECTOR_BYTES or not available(x.device.index):
        return False
    if not all(t.is_contiguous() and t.data_ptr() % WORD_BYTES == 0 for t in weight.named().values()):
        return False
    return _rows_at_once(x.device.index, x.dtype, weight.width, weight.format.bits) > 0


def serves_rows(x: Tensor, weight: QuantizedRows) -> bool:
    """Whether the code can read these: up to `MAX_FEW_ROWS` rows, of a width that is a multiple of 64."""
    codes = weight.codes
    if x.device.type != "cuda" or x.device != codes.device or x.dtype not in TYPES:
        return False
    rows, width = x.shape[:-1].numel(), codes.shape[1]
    plain = codes.is_contiguous() and weight.scales.is_contiguous() and codes.data_ptr() % VECTOR_BYTES == 0
    fits = width % ROWS_UNIT == 0 and 2 * _sides(x.dtype) * width <= ROWS_BYTES
    return 0 < rows <= MAX_FEW_ROWS and plain and fits and available(x.device.index)


@cache
def available(index: int) -> bool:
    """Whether the card of this number runs the code. The first question compiles, in a second."""
    if os.environ.get("WINA_CALIB_NATIVE") == "0" or torch.cuda.get_device_capability(index) < CAPABILITY:
        return False
    try:
        with torch.cuda.device(index):
            _site(index, torch.bfloat16, WeightFormat(4), 256, 256, 1, SHAPES[0], PLAIN.kind, 0.0)
    except (OSError, RuntimeError) as error:
        logger.info("no products of codes on this card, dequantized weights are used: %s", error)
        return False
    return True


def sparse_site(
    x: Tensor,
    weight: Quantized,
    norm: Tensor,
    threshold: Tensor,
    dense_rows: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The masked product (rows, out) of up to `MAX_FEW_ROWS` rows x (rows, in), which `serves`; as `dispatch.quantized_site`."""
    if x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return sparse_site(x, weight, norm, threshold, dense_rows, bias)
    y = torch.empty(x.shape[0], weight.out_features, dtype=x.dtype, device=x.device)
    x, step = x.contiguous(), _rows_at_once(x.device.index, x.dtype, weight.width, weight.format.bits)
    for first in range(0, x.shape[0], step):
        part = slice(first, first + step)
        rows = None if dense_rows is None else dense_rows[part].contiguous()
        launch(_shape_for(x[part], weight), x[part], weight, norm, threshold, rows, bias, y[part])
    return y


def step_site(
    x: Tensor, weight: Quantized, norm: Tensor, threshold: Tensor, bias: Tensor | None, around: Around
) -> Tensor | None:
    """The masked product (1, out) of one row with what is around it; None where it is not served.

    `x` is what `around` says: the input, or what it is made of.
    """
    if not serves(x, weight) or x.shape[0] != 1 or not x.is_contiguous() or x.data_ptr() % VECTOR_BYTES:
        return None
    if around.gain is not None and x.nbytes % VECTOR_BYTES:
        return None
    if x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return step_site(x, weight, norm, threshold, bias, around)
    return launch(_shape_for(x, weight), x, weight, norm, threshold, None, bias, around=around)


def dense_site(x: Tensor, weight: Quantized, bias: Tensor | None = None) -> Tensor:
    """The product (rows, out) of x (rows, in), which `serves`: of a few rows from codes, of more on dequantized tiles."""
    if x.shape[0] <= MAX_FEW_ROWS:
        return sparse_site(x, weight, *_keep_all(x.device, weight.width), None, bias)
    if x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return dense_site(x, weight, bias)
    out, width = weight.out_features, weight.width
    step = max(TILE_OUTPUTS, TILE_BYTES // (width * x.dtype.itemsize) // TILE_OUTPUTS * TILE_OUTPUTS)
    room = torch.empty(width * min(step, out), dtype=x.dtype, device=x.device)
    if out <= step:
        whole = dequantized(weight, 0, out, room)
        return torch.mm(x, whole) if bias is None else torch.addmm(bias, x, whole)
    y = torch.empty(x.shape[0], out, dtype=x.dtype, device=x.device)
    for start in range(0, out, step):
        stop = min(start + step, out)
        tile, result = dequantized(weight, start, stop, room), y[:, start:stop]
        if bias is None:
            torch.mm(x, tile, out=result)
        else:
            torch.addmm(bias[start:stop], x, tile, out=result)
    return y


def dequantized(weight: Quantized, start: int, stop: int, room: Tensor) -> Tensor:
    """Weights (in, stop - start) of some outputs: products in float32, rounded to the dtype of `room` once.

    Args:
        weight: quantized, which `serves`.
        start: the first output, a multiple of `TILE_OUTPUTS`.
        stop: the output after the last, a multiple of the group size.
        room: (numbers,) on the current device, contiguous, of which the result is made.
    """
    made = room[: weight.width * (stop - start)].view(weight.width, stop - start)
    known = weight.format, weight.width, weight.out_features
    _dequantize(room.device.index, room.dtype, *known, start, stop)(*_places(weight), made.data_ptr())
    return made


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
    if not _overlaps(index):
        parts = torch.empty(shape.slices * rows * out, dtype=torch.float32, device=x.device)
    kernel = index, x.dtype, weight.format, width, out, rows, shape, around.kind
    _site(*kernel, around.epsilon)(
        *_addresses(x, norm, threshold, dense_rows),
        *_places(weight),
        *_addresses(bias, y, parts, around.gain, around.added),
    )
    if parts is not None:
        _combine(*kernel)(*_addresses(parts, weight.scales, bias, y, around.added))
    return y


def rows_product(x: Tensor, weight: QuantizedRows) -> Tensor:
    """The product (..., vocab) of x (..., hidden) with a matrix quantized by rows, which `serves_rows`."""
    if x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return rows_product(x, weight)
    out, width = weight.codes.shape
    rows = x.reshape(-1, width).contiguous()
    y = torch.empty(rows.shape[0], out, dtype=x.dtype, device=x.device)
    step = min(FACTORS // _sides(x.dtype), ROWS_BYTES // (2 * _sides(x.dtype) * width))
    for first in range(0, rows.shape[0], step):
        part = rows[first : first + step]
        given = (part, weight.codes, weight.scales, y[first : first + step])
        _rows(x.device.index, x.dtype, width, out, part.shape[0])(*(t.data_ptr() for t in given))
    return y.view(*x.shape[:-1], out)


def _sides(dtype: torch.dtype) -> int:
    """Numbers of float16 that stand for an input."""
    return 2 if dtype == torch.float32 else 1


def _addresses(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(0 if t is None else t.data_ptr() for t in tensors)


def _places(weight: Quantized) -> tuple[int, ...]:
    return _addresses(weight.codes, weight.scales, weight.zeros)


@cache
def _keep_all(device: torch.device, width: int) -> tuple[Tensor, Tensor]:
    """Norms and a threshold that drop nothing."""
    return torch.ones(width, device=device), torch.full((), -1.0, device=device)


def _shape_for(x: Tensor, weight: Quantized) -> Shape:
    """The launch shape that is known to be best, or found to be so."""
    index, width, out, form = x.device.index, weight.width, weight.out_features, weight.format
    most = 1 if x.shape[0] == 1 else _rows_at_once(index, x.dtype, width, form.bits)
    rows = min(most, FEW_ROWS)
    shapes = candidates(width, form.bits, most, most * _sides(x.dtype), _room(index))

    def measure() -> Shape | None:
        _prepare(shapes, index, x.dtype, form, width, rows)
        return _fastest(weight, shapes, rows, x.dtype)

    found = autotune.chosen(_key(index, width, out, x.dtype, form, rows), shapes, measure)
    return shapes[0] if found is None else found


@cache
def _key(index: int, width: int, out: int, dtype: torch.dtype, form: WeightFormat, rows: int) -> str:
    kind = "int8" if form.bits == 8 else f"int4 {form.group_size}{' zeros' if form.zero_point else ''}"
    return autotune.key_of(index, f"CUDA {torch.version.cuda} {kind} {rows}", width, out, dtype)


def _fastest(weight: Quantized, shapes: Sequence[Shape], rows: int, dtype: torch.dtype) -> Shape | None:
    """Time each candidate with normal inputs of which 38 % are dropped, on copies of the weight that no cache holds all."""
    device = weight.codes.device
    generator = torch.Generator(device=device).manual_seed(0)
    x = torch.randn(rows, weight.width, generator=generator, device=device).to(dtype)
    norm, threshold = torch.ones(weight.width, device=device), torch.full((), 0.5, device=device)
    copies = [
        Quantized.of(weight.format, {n: t.clone() for n, t in weight.named().items()})
        for _ in range(autotune.copies_of(weight.codes.nbytes))
    ]

    def run(shape: Shape) -> float:
        return autotune.time_on_card([partial(launch, shape, x, w, norm, threshold) for w in (weight, *copies)], device)

    return autotune.fastest(shapes, run)


def _prepare(
    shapes: Sequence[Shape], index: int, dtype: torch.dtype, form: WeightFormat, width: int, rows: int
) -> None:
    """Compile launch shapes side by side. One that does not compile is left to whoever starts it."""

    def compile_one(shape: Shape) -> None:
        with suppress(RuntimeError):
            _site_code(index, dtype, form, shape.inputs(width), rows, shape, PLAIN.kind)

    with ThreadPoolExecutor(min(len(shapes), os.cpu_count() or 1)) as pool:
        list(pool.map(compile_one, shapes))


@cache
def _rows_at_once(index: int, dtype: torch.dtype, width: int, bits: int) -> int:
    """Rows that a kernel takes at a time; 0 where there is none for so wide a weight."""
    most = FACTORS // _sides(dtype)
    while most and not candidates(width, bits, most, most * _sides(dtype), _room(index)):
        most //= 2
    return most


@cache
def _overlaps(index: int) -> bool:
    """Whether blocks form clusters, and kernels may start while the one before drains."""
    return torch.cuda.get_device_capability(index) >= CLUSTERS


@cache
def _room(index: int) -> int:
    """Bytes of shared memory that a block may have."""
    properties: Any = torch.cuda.get_device_properties(index)  # torch names only some of them in its types
    return int(properties.shared_memory_per_block_optin)


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
    shared = shape.shared_bytes(width, form.bits, rows, rows * _sides(dtype))
    grid = (-(-out // shape.columns(form.bits)), shape.slices, 1)
    function = nvrtc.load(_site_code(index, dtype, form, shape.inputs(width), rows, shape, kind), "site")
    bits = struct.unpack("i", struct.pack("f", epsilon))[0]
    sizes = width, out, bits
    return nvrtc.Launch(function, grid, shape.warps * WARP, shared, 12, sizes, overlap=_overlaps(index))


@cache
def _combine(
    index: int, dtype: torch.dtype, form: WeightFormat, width: int, out: int, rows: int, shape: Shape, kind: int
) -> nvrtc.Launch:
    function = nvrtc.load(_site_code(index, dtype, form, shape.inputs(width), rows, shape, kind), "combine")
    return nvrtc.Launch(function, (-(-rows * out // COMBINED), 1, 1), COMBINED, 0, 5, (out,), overlap=False)


@cache
def _site_code(
    index: int, dtype: torch.dtype, form: WeightFormat, part: int, rows: int, shape: Shape, kind: int
) -> bytes:
    names = "VEC", "WARPS", "ACROSS", "CLUSTER", "UNROLL"
    constants = dict(zip(names, astuple(shape), strict=True))
    constants |= {"ROWS": rows, "SLICE": part, "BLOCKS": shape.blocks(form.bits), "INPUT": kind}
    return _build(index, dtype, form, constants)


@cache
def _rows(index: int, dtype: torch.dtype, width: int, out: int, rows: int) -> nvrtc.Launch:
    constants = {"ROWS": rows, "WARPS": ROWS_WARPS, "STEPS": ROWS_STEPS}
    function = nvrtc.load(_build(index, dtype, WeightFormat(8), constants), "rows")
    processors = torch.cuda.get_device_properties(index).multi_processor_count
    blocks = min(-(-out // (ROWS_TILE * ROWS_WARPS)), processors * ROWS_BLOCKS)
    shared = 2 * rows * _sides(dtype) * width + 4 * rows
    threads = ROWS_WARPS * WARP
    return nvrtc.Launch(function, (blocks, 1, 1), threads, shared, 4, (width, out), overlap=_overlaps(index))


@cache
def _dequantize(
    index: int, dtype: torch.dtype, form: WeightFormat, width: int, out: int, start: int, stop: int
) -> nvrtc.Launch:
    parts = (stop - start) * form.bits // (8 * TILE_PART)
    grid = (-(-parts // TILE_THREADS), width, 1)
    function = _dequantizer(index, dtype, form)
    return nvrtc.Launch(function, grid, TILE_THREADS, 0, 4, (out, start, stop), overlap=_overlaps(index))


@cache
def _dequantizer(index: int, dtype: torch.dtype, form: WeightFormat) -> ctypes.c_void_p:
    return nvrtc.load(_build(index, dtype, form, {"ROWS": 1, "WARPS": 1, "TILE": 1}), "dequantize")


def _build(index: int, dtype: torch.dtype, form: WeightFormat, constants: dict[str, int]) -> bytes:
    major, minor = torch.cuda.get_device_capability(index)
    hopper = int(_overlaps(index))
    kind = {"BITS": form.bits, "GROUP": form.group_size, "ZEROS": int(form.bits == 4 and form.zero_point)}
    kind |= {"TYPE": TYPES[dtype], "CLUSTERED": hopper, "OVERLAP": hopper}
    return nvrtc.build(SOURCE, f"sm_{major}{minor}", kind | constants)
