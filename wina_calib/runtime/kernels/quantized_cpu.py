"""Products with quantized weights on a CPU: one row and a few in C (`quantized.c`), many on tiles of floats.

Inputs are float32, bfloat16 or float16; the last goes through C as float32. One row reads the columns of the inputs that it
keeps, a few rows those that one of them keeps. What an input and a group's scale give is rounded to 16 bits of the largest of 64
inputs, and sums are exact within these: the result is off by about 3e-5 of its norm. Inputs of int8 that are far larger than the
others are rounded apart from them, so that it stays below 2e-4 where these meet small weights.

Without a compiler kept columns are gathered and dequantized by torch, which works and is slow.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from wina_calib.common.memory import empty_in_huge_pages
from wina_calib.masks.mask import mask_inputs
from wina_calib.quantization.formats import Quantized, QuantizedRows
from wina_calib.runtime.kernels import cpu, native
from wina_calib.runtime.kernels.native import Row
from wina_calib.runtime.kernels.native_build import DTYPES, functions

# Rows that C takes at a time, and up to which it does; more are multiplied by dequantized weights.
ROWS_AT_ONCE = 16
MAX_FEW_ROWS = 64
# Dequantized weights at a time, in bytes; and outputs, of which a tile begins at a multiple.
TILE_BYTES = 8 << 20
TILE_OUTPUTS = 128
# Columns that are gathered at a time without C.
GATHERED = 512


def available() -> bool:
    """Whether there is code in C."""
    return native.available(torch.float32)


def sparse_site(
    x: Tensor,
    weight: Quantized,
    norm: Tensor,
    threshold: Tensor,
    dense_rows: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The masked product (rows, out) of x (rows, in) with a quantized weight; the rest as for `dispatch.sparse_site`."""
    if x.shape[0] > MAX_FEW_ROWS:
        return dense_site(_masked(x, norm, threshold, dense_rows), weight, bias)
    if x.shape[0] == 0:
        return x.new_empty(0, weight.out_features)
    if not available():
        return _gathered(_masked(x, norm, threshold, dense_rows), weight, bias)
    if x.dtype not in DTYPES:
        wide = None if bias is None else bias.float()
        return sparse_site(x.float(), weight, norm, threshold, dense_rows, wide).to(x.dtype)
    row = Row(weight, norm.contiguous(), threshold, None if bias is None else bias.contiguous(), x.dtype)
    if x.shape[0] == 1:
        return row(x, everything=dense_rows is not None and bool(dense_rows[0]))
    return few(row, x, dense_rows)


def few(row: Row, x: Tensor, dense_rows: Tensor | None = None) -> Tensor:
    """`row` for up to `MAX_FEW_ROWS` rows x (rows, in), each with its own mask; reads what one of `ROWS_AT_ONCE` keeps.

    Args:
        row: of a quantized weight.
        x: of its dtype.
        dense_rows: (rows,) bool, rows that are kept whole; None where there are none.

    Returns:
        (rows, out), the same for any number of threads.
    """
    if x.dtype is not row.dtype or x.shape[1:] != (row.width,) or not 0 < x.shape[0] <= MAX_FEW_ROWS or not x.is_cpu:
        raise ValueError(
            f"x is {tuple(x.shape)} {x.dtype} on {x.device}; expected up to {MAX_FEW_ROWS} rows of {row.width} {row.dtype}"
        )
    x = x.contiguous()
    y = torch.empty(x.shape[0], row.out, dtype=x.dtype, device="cpu")
    rows = None if dense_rows is None else dense_rows.contiguous()
    threads = native.threads_for(row.width * row.out)
    for first in range(0, x.shape[0], ROWS_AT_ONCE):
        part = slice(first, first + ROWS_AT_ONCE)
        places = (x[part].data_ptr(), None if rows is None else rows[part].data_ptr(), y[part].data_ptr())
        if functions("few")[x.dtype](row.address, *places, len(x[part]), threads):
            raise MemoryError(f"no memory to list the kept inputs of {len(x[part])} rows for {threads} threads")
    return y


def dense_site(x: Tensor, weight: Quantized, bias: Tensor | None = None) -> Tensor:
    """The dense product (rows, out) of x (rows, in) with a quantized weight, plus bias (out,).

    Few rows are multiplied as sparse ones are; for more the weight is dequantized to x's dtype, some outputs at a time.
    """
    if x.shape[0] <= MAX_FEW_ROWS:
        return sparse_site(x, weight, torch.ones(x.shape[1]), torch.full((), -1.0), None, bias)
    y = x.new_empty(x.shape[0], weight.out_features)
    step = max(TILE_OUTPUTS, TILE_BYTES // (x.shape[1] * x.dtype.itemsize) // TILE_OUTPUTS * TILE_OUTPUTS)
    # New memory costs more to map, page by page, than its tile to fill.
    room = empty_in_huge_pages((x.shape[1] * min(step, weight.out_features),), x.dtype)
    for start in range(0, weight.out_features, step):
        stop = min(start + step, weight.out_features)
        tile = dequantized(weight, start, stop, x.dtype, room)
        y[:, start:stop] = cpu.dense_columns(x, tile, None if bias is None else bias[start:stop])
    return y


def dequantized(weight: Quantized, start: int, stop: int, dtype: torch.dtype, room: Tensor | None = None) -> Tensor:
    """Weights (in, stop - start) of some outputs: products in float32, rounded to `dtype` once.

    Args:
        weight: quantized.
        start: the first output, a multiple of `TILE_OUTPUTS`.
        stop: the output after the last, a multiple of the group size.
        dtype: of the result.
        room: (numbers,) of that dtype, contiguous, of which the result is made where it is not None.
    """
    if not available():
        return weight.outputs(start, stop).dequantize(dtype)
    if dtype not in DTYPES:
        return dequantized(weight, start, stop, torch.float32).to(dtype)
    shape = weight.width, stop - start
    made = torch.empty(shape, dtype=dtype, device="cpu") if room is None else room[: shape[0] * shape[1]].view(shape)
    known = native.quantized_struct(weight)
    threads = native.threads_for(made.numel())
    functions("dequantize")[dtype](ctypes.addressof(known), start, stop, made.data_ptr(), threads)
    return made


def rows_product(x: Tensor, weight: QuantizedRows) -> Tensor:
    """Dense product (..., vocab) of x (..., hidden) with a matrix quantized by rows, as lm_head's.

    Up to `MAX_FEW_ROWS` rows are rounded to 16 bits of the largest of each 256 numbers.
    """
    rows = x.reshape(-1, x.shape[-1])
    out, width = weight.codes.shape
    if not available() or rows.shape[0] > MAX_FEW_ROWS:
        y = x.new_empty(rows.shape[0], out)
        step = max(TILE_OUTPUTS, TILE_BYTES // (width * x.dtype.itemsize))
        for start in range(0, out, step):
            part = QuantizedRows(weight.codes[start : start + step], weight.scales[start : start + step])
            y[:, start : start + step] = torch.nn.functional.linear(rows, part.dequantize(x.dtype))
        return y.view(*x.shape[:-1], out)
    if x.dtype not in DTYPES:
        return rows_product(x.float(), weight).to(x.dtype)
    if not weight.codes.is_contiguous() or not weight.codes.is_cpu or rows.shape[1] != width:
        raise ValueError(
            f"codes are {tuple(weight.codes.shape)} on {weight.codes.device}; "
            f"expected {rows.shape[1]} contiguous columns on the CPU"
        )
    rows, scales = rows.contiguous(), weight.scales.contiguous()  # held until the call is over
    y = torch.empty(rows.shape[0], out, dtype=x.dtype, device="cpu")
    places = (t.data_ptr() for t in (weight.codes, scales, rows, y))
    counts = rows.shape[0], width, out
    if functions("by_rows")[x.dtype](*places, *counts, native.threads_for(width * out)):
        raise MemoryError(f"no memory to round {rows.shape[0]} rows")
    return y.view(*x.shape[:-1], out)


def _masked(x: Tensor, norm: Tensor, threshold: Tensor, dense_rows: Tensor | None) -> Tensor:
    if native.available(x.dtype):
        return native.mask_inputs(x, norm.contiguous(), threshold, dense_rows)
    return mask_inputs(x, norm, threshold, dense_rows=dense_rows)


def _gathered(masked: Tensor, weight: Quantized, bias: Tensor | None) -> Tensor:
    """The product of masked rows x (rows, in), from the columns of inputs that are not zero in all."""
    kept = (masked != 0).any(0).nonzero().view(-1)
    y = torch.zeros(masked.shape[0], weight.out_features)
    for part in kept.split(GATHERED):
        named = {n: t if n == "scales" and weight.format.bits == 8 else t[part] for n, t in weight.named().items()}
        y += masked[:, part].float() @ Quantized.of(weight.format, named).dequantize()
    return (y if bias is None else y + bias).to(masked.dtype)
