"""Products with quantized weights on CUDA, for cards of compute capability 8.0 and later: which code serves.

In 4 bits one row's kept columns stream through shared memory (`streamed`, Hopper and later); those of a few rows, and all else,
are gathered into registers (`gathered`); for many rows the weight is dequantized for the library's product (`dequantized`).
Nothing here waits for the device or depends on data, so all may be captured in a CUDA graph.

`WINA_CALIB_NATIVE=0` turns it off; then, and where NVRTC or the card cannot do it, the reference serves.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial

import torch
from torch import Tensor

from wina_calib.quantization.formats import Quantized, WeightFormat
from wina_calib.runtime.kernels import autotune, codes_card, dequantized, gathered, streamed
from wina_calib.runtime.kernels.around import PLAIN, Around
from wina_calib.runtime.kernels.codes_card import TYPES, VECTOR_BYTES, sides

logger = logging.getLogger(__name__)

CAPABILITY = (8, 0)
# Bytes at which scales and zeros lie; codes that offsets of 32 bits reach.
WORD_BYTES = 4
MAX_CODES = 1 << 32
# Rows up to which products are made from codes.
MAX_FEW_ROWS = 16
# Rows that launch shapes are measured with for more than one.
FEW_ROWS = 4
# Relative distance of a launch shape's products from those of dequantized weights: far above what rounding does.
MOST_APART = 0.02

Shape = gathered.Shape | streamed.Shape


def serves(x: Tensor, weight: Quantized) -> bool:
    """Whether the code can read these: inputs of a float dtype on a card that has it, columns of 16 bytes."""
    codes = weight.codes
    if x.device.type != "cuda" or x.device != codes.device or x.dtype not in TYPES or codes.numel() >= MAX_CODES:
        return False
    if codes.shape[1] % VECTOR_BYTES or codes.data_ptr() % VECTOR_BYTES or not available(x.device.index):
        return False
    if not all(t.is_contiguous() and t.data_ptr() % WORD_BYTES == 0 for t in weight.named().values()):
        return False
    return gathered.rows_at_once(x.device.index, x.dtype, weight.width, weight.format.bits) > 0


@cache
def available(index: int) -> bool:
    """Whether the card of this number runs the code. The first question compiles, in a second."""
    if os.environ.get("WINA_CALIB_NATIVE") == "0" or torch.cuda.get_device_capability(index) < CAPABILITY:
        return False
    try:
        with torch.cuda.device(index):
            gathered.compiled(index, torch.bfloat16, WeightFormat(4), 256, 256)
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
    x, step = x.contiguous(), gathered.rows_at_once(x.device.index, x.dtype, weight.width, weight.format.bits)
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
    return dequantized.product(x, weight, bias)


def many_rows_of(weight: Quantized, bias: Tensor | None, dtype: torch.dtype) -> dequantized.ManyRows | None:
    """`dense_site` of many rows with these operands on the current device, ready to be called; None where it does not serve."""
    like = torch.empty(0, weight.width, dtype=dtype, device=weight.codes.device)
    return dequantized.ManyRows(weight, bias) if serves(like, weight) else None


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
    if isinstance(shape, streamed.Shape):
        return streamed.launch(shape, x, weight, norm, threshold, dense_rows, bias, y, around)
    return gathered.launch(shape, x, weight, norm, threshold, dense_rows, bias, y, around)


@cache
def _keep_all(device: torch.device, width: int) -> tuple[Tensor, Tensor]:
    """Norms and a threshold that drop nothing."""
    return torch.ones(width, device=device), torch.full((), -1.0, device=device)


def _shape_for(x: Tensor, weight: Quantized) -> Shape:
    """The launch shape that is known to be best, or found to be so."""
    index, width, out, form = x.device.index, weight.width, weight.out_features, weight.format
    most = 1 if x.shape[0] == 1 else gathered.rows_at_once(index, x.dtype, width, form.bits)
    rows = min(most, FEW_ROWS)
    room = codes_card.room(index)
    shapes: tuple[Shape, ...] = gathered.candidates(width, form.bits, most, most * sides(x.dtype), room)
    streams = x.shape[0] == 1 and streamed.serves(x.dtype, weight, index)
    if streams:  # the first is the guess where nothing can be measured
        shapes = (*shapes[:1], *streamed.candidates(width, form, room))

    def measure() -> Shape | None:
        _prepare(shapes, index, x.dtype, form, width, rows)
        return _fastest(weight, shapes, rows, x.dtype)

    found = autotune.chosen(_key(index, width, out, x.dtype, form, rows, streams), shapes, measure)
    return shapes[0] if found is None else found


@cache
def _key(index: int, width: int, out: int, dtype: torch.dtype, form: WeightFormat, rows: int, streams: bool) -> str:
    kind = "int8" if form.bits == 8 else f"int4 {form.group_size}{' zeros' if form.zero_point else ''}"
    kind += " streamed" if streams else ""
    return autotune.key_of(index, f"CUDA {torch.version.cuda} {kind} {rows}", width, out, dtype)


def _fastest(weight: Quantized, shapes: Sequence[Shape], rows: int, dtype: torch.dtype) -> Shape | None:
    """Time each candidate with normal inputs of which 38 % are dropped, on copies of the weight that no cache holds all.

    One that does not give what dequantized weights give is left out.
    """
    device = weight.codes.device
    generator = torch.Generator(device=device).manual_seed(0)
    x = torch.randn(rows, weight.width, generator=generator, device=device).to(dtype)
    norm, threshold = torch.ones(weight.width, device=device), torch.full((), 0.5, device=device)
    copies = [
        Quantized.of(weight.format, {n: t.clone() for n, t in weight.named().items()})
        for _ in range(autotune.copies_of(weight.codes.nbytes))
    ]

    expected = dequantized.product(torch.where(x.float().abs() > threshold, x, 0), weight).float()

    def run(shape: Shape) -> float:
        check_close(launch(shape, x, weight, norm, threshold), expected)
        return autotune.time_on_card([partial(launch, shape, x, w, norm, threshold) for w in (weight, *copies)], device)

    return autotune.fastest(shapes, run)


def check_close(y: Tensor, expected: Tensor) -> None:
    """Raise ArithmeticError where a product is further from the expected one than rounding can explain."""
    apart = float((y.float() - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float32).tiny))
    if not apart <= MOST_APART:
        raise ArithmeticError(f"the product is {apart:.2g} off")


def _prepare(
    shapes: Sequence[Shape], index: int, dtype: torch.dtype, form: WeightFormat, width: int, rows: int
) -> None:
    """Compile launch shapes side by side. One that does not compile is left to whoever starts it."""

    def compile_one(shape: Shape) -> None:
        with suppress(RuntimeError):
            if isinstance(shape, streamed.Shape):
                streamed.site_code(index, dtype, form, shape.inputs(width), shape, PLAIN.kind)
            else:
                gathered.site_code(index, dtype, form, shape.inputs(width), rows, shape, PLAIN.kind)

    with ThreadPoolExecutor(min(len(shapes), os.cpu_count() or 1)) as pool:
        list(pool.map(compile_one, shapes))
