"""CPU kernels on column-contiguous weights: `embedding_bag` over the kept columns, float32 blocks for many rows.

`embedding_bag` with `per_sample_weights` is a sparse matrix-vector product that ships with torch. It accumulates in
float32 and rounds once. A bag is one block of outputs, so that bags are independent, threads share the work, and no
partial sums are rounded to 16 bits.

Dense 16-bit products on a column-contiguous weight go through oneDNN only where the processor has 16-bit arithmetic;
elsewhere torch falls back to a loop that is 20 times slower than the row-major one. There the product is done in
float32, a block of columns at a time, which for 8 rows and more is also faster than the row-major 16-bit product.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from wina_calib.runtime.kernels import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Each row gathers its own columns: with more rows than this a dense product reads the weight fewer times.
MAX_SPARSE_ROWS = 4
# A bag narrower than this spends its time on indices.
MIN_BAG_WIDTH = 128
# Columns that the float32 product converts at a time; bounds its extra memory to in * this * 4 bytes.
FLOAT_BLOCK = 1024
HUGE_PAGE = 2 << 20
MADV_HUGEPAGE = 14


@cache
def column_chunks(width: int, threads: int) -> int:
    """Number of equal blocks that `width` outputs are split in: a divisor of `width`, twice the threads if possible.

    Returns 1 where no divisor serves; the kept columns are then split instead.
    """
    usable = [c for c in range(1, 4 * threads + 1) if width % c == 0 and width // c >= MIN_BAG_WIDTH]
    return min(usable, key=lambda c: (c < threads, abs(c - 2 * threads)), default=1)


def sparse_site(
    x: Tensor,
    weight_t: Tensor,
    norm: Tensor,
    threshold: Tensor,
    dense_rows: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The site product on a contiguous (in, out) weight; arguments as for `kernels.sparse_site`."""
    if x.shape[0] > MAX_SPARSE_ROWS:
        return dense_columns(reference.mask_input(x, norm, threshold, dense_rows), weight_t, bias)
    keep = reference.keep_mask(x, norm, threshold, dense_rows)
    rows = [gather_row(x[r], weight_t, keep[r].nonzero().squeeze(1)) for r in range(x.shape[0])]
    y = rows[0] if len(rows) == 1 else torch.cat(rows) if rows else x.new_empty(0, weight_t.shape[1])
    return y if bias is None else y + bias


def gather_row(x: Tensor, weight_t: Tensor, kept: Tensor) -> Tensor:
    """Product of one row x (in,) with the rows `kept` (n,) int64 of weight_t (in, out). Returns (1, out)."""
    width, out = weight_t.shape
    threads = torch.get_num_threads()
    chunks = column_chunks(out, threads)
    # Without enough column blocks for the threads, the kept list is split and the parts added in float32.
    parts = 1 if chunks >= threads else 2 * threads
    count = kept.numel()
    table = weight_t.view(width * chunks, out // chunks)
    index = (kept * chunks + torch.arange(chunks)[:, None]).view(-1)
    starts = torch.arange(chunks)[:, None] * count + torch.arange(parts) * (count // parts)
    values = x.index_select(0, kept).repeat(chunks)
    bags = torch.embedding_bag(table, index, starts.view(-1), False, 0, False, values)[0]
    if parts > 1:
        bags = bags.view(chunks, parts, -1).sum(1, dtype=torch.float32).to(x.dtype)
    return bags.view(1, out)


@cache
def has_16_bit_products(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies matrices of this 16-bit dtype on this processor."""
    check = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }.get(dtype)
    return check is not None and bool(getattr(torch.ops.mkldnn, check, bool)())


def dense_columns(x: Tensor, weight_t: Tensor, bias: Tensor | None = None) -> Tensor:
    """Dense product of x (rows, in) with a column-contiguous weight_t (in, out), fast on it in every dtype."""
    if x.dtype == torch.float32 or has_16_bit_products(x.dtype):
        return F.linear(x, weight_t.t(), bias)
    if x.shape[0] <= MAX_SPARSE_ROWS:
        everything = torch.full((), -1.0)
        return sparse_site(x, weight_t, torch.ones(x.shape[1]), everything, None, bias)
    wide = x.float()
    y = x.new_empty(x.shape[0], weight_t.shape[1])
    for start in range(0, weight_t.shape[1], FLOAT_BLOCK):
        block = slice(start, start + FLOAT_BLOCK)
        part = torch.mm(wide, weight_t[:, block].float())
        y[:, block] = part if bias is None else part + bias[block]
    return y


def column_storage(weights: Sequence[Tensor]) -> Tensor:
    """The weights (out_i, in) side by side in one new contiguous (in, sum of out_i) tensor.

    On Linux it lies in huge pages where the system gives them: gathering rows at random costs a page walk each with
    small ones, and huge ones made the product 5 to 10 % faster.
    """
    width = weights[0].shape[1]
    out = sum(weight.shape[0] for weight in weights)
    stored = torch.empty(width, out, dtype=weights[0].dtype, device=weights[0].device)
    _advise_huge_pages(stored)
    end = 0
    for weight in weights:
        start, end = end, end + weight.shape[0]
        stored[:, start:end] = weight.t()
    return stored


def _advise_huge_pages(tensor: Tensor) -> None:
    """Ask for huge pages before the memory is first touched. Advice only: any failure is ignored."""
    if tensor.device.type != "cpu" or not sys.platform.startswith("linux"):
        return
    first = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    size = (tensor.data_ptr() + tensor.nbytes - first) // HUGE_PAGE * HUGE_PAGE
    if size > 0:
        libc = ctypes.CDLL(None)
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        libc.madvise(first, size, MADV_HUGEPAGE)
