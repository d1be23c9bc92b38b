"""CPU kernels on column-contiguous weights: a product with the kept columns alone, float32 blocks for many rows.

One row is computed in C where that can be compiled (`native`), in float32 and bfloat16. Elsewhere two operators that ship
with torch read only the kept rows of the weight and accumulate in float32: `embedding_bag`, with
the kept inputs as weights of the bag, and `torch.sparse.mm(..., reduce="sum")` of a sparse row. Which is faster depends on
the processor (`bags_pay`, docs/performance-notes.md). Both work in parallel over bags or sparse rows, so the kept inputs are
dealt out to several of them.

Products of several rows on a column-contiguous weight: in bfloat16 in C where the processor multiplies pairs of it
(`native.product`, masked or not). Other 16-bit products go through oneDNN only where the processor has 16-bit arithmetic;
elsewhere torch falls back to a loop that is 20 times slower than the row-major one. There the product is done in float32, a
block of columns at a time, which for 8 rows and more is also faster than the row-major 16-bit product.
"""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from wina_calib.common.devices import has_16_bit_products
from wina_calib.common.memory import empty_in_huge_pages
from wina_calib.masks.mask import mask_inputs
from wina_calib.runtime.kernels import native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Without 16-bit arithmetic a dense product costs as much a row as a sparse one of all columns.
MAX_SPARSE_ROWS = 4
# Partial results are rounded to the weight's dtype. Where they cancel so far, the error of that would show.
MAX_CANCELLATION = 4.0
# Columns that the float32 product converts at a time; bounds its extra memory to in * this * 4 bytes.
FLOAT_BLOCK = 1024


def sparse_site(
    x: Tensor,
    weight_t: Tensor,
    norm: Tensor,
    threshold: Tensor,
    dense_rows: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The site product on a contiguous (in, out) weight; arguments as for `dispatch.sparse_site`."""
    if x.shape[0] > max_sparse_rows(x.dtype):
        return several_rows(x, weight_t, norm, threshold, dense_rows, bias)
    if native.available(x.dtype) and x.shape[0] > 0:
        product = native.Row(weight_t, norm.contiguous(), threshold, None if bias is None else bias.contiguous())
        open_rows = [False] * x.shape[0] if dense_rows is None else dense_rows.tolist()
        made = [product(row, everything=dense) for row, dense in zip(x.split(1), open_rows, strict=True)]
        return made[0] if len(made) == 1 else torch.cat(made)
    limits = [threshold.item()] * x.shape[0]
    if dense_rows is not None:
        limits = [-1.0 if dense else limit for dense, limit in zip(dense_rows.tolist(), limits, strict=True)]
    pairs = zip(x.unbind(), limits, strict=True)
    rows = [gather_row(row, weight_t, kept_inputs(row, norm, limit)) for row, limit in pairs]
    y = rows[0] if len(rows) == 1 else torch.cat(rows) if rows else x.new_empty(0, weight_t.shape[1])
    return y if bias is None else y + bias


def several_rows(
    x: Tensor,
    weight_t: Tensor,
    norm: Tensor,
    threshold: Tensor,
    dense_rows: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`sparse_site` of rows that are multiplied together, so that the weights are read once."""
    if x.shape[0] > 1 and native.has_product(x.dtype):
        return native.product(x, weight_t, bias, norm.contiguous(), threshold, dense_rows)
    if x.shape[0] > 0 and native.available(x.dtype):
        return dense_columns(native.mask_inputs(x, norm.contiguous(), threshold, dense_rows), weight_t, bias)
    return dense_columns(mask_inputs(x, norm, threshold, dense_rows=dense_rows), weight_t, bias)


def kept_inputs(x: Tensor, norm: Tensor, limit: float) -> Tensor:
    """Indices of x (in,) that `mask.keep_mask` keeps and that are not zero, as (n,) int64.

    `hardshrink` is the comparison and the absolute value in one pass. Between products of megabytes each pass finds
    its code gone from the caches, so that their number counts more than their size.
    """
    return F.hardshrink(x * norm, limit).nonzero().view(-1)


def max_sparse_rows(dtype: torch.dtype) -> int:
    """Rows up to which each gathers its own columns; a dense product of more reads the weight fewer times."""
    dense_is_fast = dtype == torch.float32 or native.has_product(dtype) or has_16_bit_products(dtype)
    return 1 if dense_is_fast else MAX_SPARSE_ROWS


def gather_row(x: Tensor, weight_t: Tensor, kept: Tensor) -> Tensor:
    """Product of one row x (in,) with the rows `kept` (n,) int64 of weight_t (in, out). Returns (1, out)."""
    threads = torch.get_num_threads()
    values = x.take(kept)
    if threads == 1:
        return _shares(values, kept, weight_t, 1)
    parts = _shares(values, kept, weight_t, 2 * threads)
    y = parts.sum(0, keepdim=True, dtype=torch.float32)
    if x.dtype == torch.float32:
        return y
    if parts.norm().item() > MAX_CANCELLATION * y.norm().item():
        return _shares(values, kept, weight_t, 1)
    return y.to(x.dtype)


def _shares(values: Tensor, kept: Tensor, weight_t: Tensor, parts: int) -> Tensor:
    """Products (parts, out) of consecutive shares of the kept inputs; their sum is the whole product."""
    count = kept.numel()
    bounds = [count * part // parts for part in range(parts + 1)]
    if bags_pay(values.dtype):
        starts = torch.frombuffer(array("q", bounds[:-1]), dtype=torch.int64)
        return torch.embedding_bag(weight_t, kept, starts, mode=0, per_sample_weights=values)[0]
    _warn_no_more()
    ends = torch.frombuffer(array("q", bounds), dtype=torch.int64)
    shares = torch.sparse_csr_tensor(ends, kept, values, (parts, weight_t.shape[0]), check_invariants=False)
    product: Tensor = torch.sparse.mm(shares, weight_t, reduce="sum")
    return product


@cache
def bags_pay(dtype: torch.dtype) -> bool:
    """Whether `embedding_bag` beats the sparse product: in 16 bits where torch has 512-bit vectors for it."""
    return dtype != torch.float32 and torch.backends.cpu.get_cpu_capability() == "AVX512"


@cache
def _warn_no_more() -> None:
    """Use up torch's one warning a process that sparse CSR tensors are in beta state."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.empty(0, dtype=torch.int64), torch.empty(0), (1, 1))


def dense_columns(x: Tensor, weight_t: Tensor, bias: Tensor | None = None) -> Tensor:
    """Dense product of x (rows, in) with a column-contiguous weight_t (in, out), fast on it in every dtype."""
    alone = x.shape[0] == 1 and native.available(x.dtype)
    if x.shape[0] > 1 and native.has_product(x.dtype):
        return native.product(x, weight_t, bias)
    if not alone and (x.dtype == torch.float32 or has_16_bit_products(x.dtype)):
        return F.linear(x, weight_t.t(), bias)
    if x.shape[0] <= max_sparse_rows(x.dtype):
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
    """The weights (out_i, in) side by side in one new contiguous (in, sum of out_i) tensor."""
    stored = empty_columns(
        sum(weight.shape[0] for weight in weights), weights[0].shape[1], weights[0].dtype, weights[0].device
    )
    end = 0
    for weight in weights:
        start, end = end, end + weight.shape[0]
        fill_columns(stored[:, start:end], weight)
    return stored


def empty_columns(out: int, width: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """A new contiguous (width, out) tensor for weights by input.

    On Linux it lies in huge pages where the system gives them: gathering rows at random costs a page walk each with
    small ones.
    """
    if torch.device(device).type == "cpu":
        return empty_in_huge_pages((width, out), dtype)
    return torch.empty(width, out, dtype=dtype, device=device)


def fill_columns(columns: Tensor, weight: Tensor) -> None:
    """Copy the transpose of a weight (out, in) to `columns` (in, out), of which the last dimension is contiguous."""
    plain = weight.is_cpu and columns.is_cpu and weight.dtype is columns.dtype and weight.dtype in DTYPES
    if plain and weight.stride(1) == 1 and native.available(torch.float32):
        native.turn(weight, columns)
    else:
        columns.copy_(weight.t())
