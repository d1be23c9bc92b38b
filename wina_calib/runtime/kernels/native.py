"""The CPU's code in C: products of one row (`site.c`), of many (`rows.c`) and with quantized weights (`quantized.c`),
attention of one token (`attend.c`), weights by input (`layout.c`).

It is compiled once with the compiler that the system has.

Triton does the same for a GPU. The library is kept in `$WINA_CALIB_CACHE` or `~/.cache/wina_calib` under a name that stands
for the source, the compiler and the processor. Where there is no compiler, or its code cannot use torch's threads, `cpu`
does with torch's operators. `WINA_CALIB_NATIVE=0` turns it off.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from wina_calib.quantization.formats import Quantized
from wina_calib.runtime.kernels.native_build import DTYPES, functions, library

# Weights or inputs below which a second thread costs more than it saves.
MIN_SHARED = 1 << 17


def available(dtype: torch.dtype) -> bool:
    """Whether weights of this dtype can be multiplied here. The first question compiles, in two seconds."""
    return dtype in DTYPES and library() is not None


class _Quantized(ctypes.Structure):
    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("output_scales", ctypes.c_void_p),
        ("width", ctypes.c_int64),
        ("out", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("group", ctypes.c_int32),
    )


class _Site(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("threshold", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("width", ctypes.c_int64),
        ("out", ctypes.c_int64),
        ("quantized", ctypes.c_void_p),
    )


def quantized_struct(weight: Quantized) -> _Quantized:
    """What C knows of quantized weights, which must outlive it.

    Raises:
        ValueError: a tensor is not contiguous on the CPU.
    """
    for name, tensor in weight.named().items():
        if not tensor.is_cpu or not tensor.is_contiguous():
            raise ValueError(f"{name} is {tuple(tensor.shape)} on {tensor.device}; expected it contiguous on the CPU")
    four = weight.format.bits == 4
    scales = weight.scales.data_ptr()
    return _Quantized(
        weight.codes.data_ptr(),
        scales if four else None,
        None if weight.zeros is None else weight.zeros.data_ptr(),
        None if four else scales,
        weight.width,
        weight.out_features,
        weight.format.bits,
        weight.format.group_size,
    )


class Row:
    """`(x * [abs(x) * norm > threshold]) @ weight_t + bias` for one row x, with the rest ready: small models have little
    time for each call.

    Args:
        weight: (in, out) contiguous, float32 or bfloat16; or quantized.
        norm: (in,) float32, contiguous.
        threshold: () float32, read at every call; -1 keeps everything.
        bias: (out,) of x's dtype, contiguous, or None.
        dtype: of x, which quantized weights do not tell; float32 or bfloat16.
    """

    def __init__(
        self,
        weight: Tensor | Quantized,
        norm: Tensor,
        threshold: Tensor,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        # The code holds addresses: of these, whose memory stays whatever becomes of the tensors given.
        self.operands = [None if t is None else t.detach() for t in (norm, threshold, bias)]
        at = [None if t is None else t.data_ptr() for t in self.operands]
        self.weight = weight.detach() if isinstance(weight, Tensor) else weight
        if isinstance(weight, Tensor):
            self.dtype = weight.dtype
            self.width, self.out = weight.shape
            self.site = _Site(weight.data_ptr(), *at, self.width, self.out, None)
        else:
            self.dtype = dtype
            self.width, self.out = weight.width, weight.out_features
            self.quantized = quantized_struct(weight)
            self.site = _Site(None, *at, self.width, self.out, ctypes.addressof(self.quantized))
        self.function = functions("site")[self.dtype]
        self.address = ctypes.addressof(self.site)

    def __call__(self, x: Tensor, *, everything: bool = False) -> Tensor:
        """Outputs (..., out) for x (..., in) of one row; `everything` drops nothing. The same for any number of threads."""
        if x.dtype is not self.dtype or x.numel() != self.width or not x.is_cpu:
            raise ValueError(
                f"x is {tuple(x.shape)} {x.dtype} on {x.device}; expected one row of {self.width} {self.dtype}"
            )
        if not x.is_contiguous():
            x = x.contiguous()
        y = torch.empty((*x.shape[:-1], self.out), dtype=self.dtype, device="cpu")
        threads = threads_for(self.width * self.out)
        if self.function(self.address, x.data_ptr(), y.data_ptr(), everything, threads):
            raise MemoryError(f"no memory to list {self.width} kept inputs for {threads} threads")
        return y


def turned(
    row: Row,
    x: Tensor,
    cosine: Tensor,
    sine: Tensor,
    heads: tuple[int, int],
    norms: Sequence[Tensor] = (),
    epsilon: float = 0.0,
) -> Tensor:
    """The masked product of one row for queries, keys and values, of which queries and keys are normed, where there are norms,
    and turned by rotary embedding as Llama's, the first half of a head's numbers with the second.

    Args:
        row: the product.
        x: one row (..., in) of its dtype.
        cosine: (..., size) of that dtype, size numbers in all, contiguous.
        sine: likewise.
        heads: of queries and of keys.
        norms: weights (size,) of the RMSNorms of a query's and of a key's head, contiguous.
        epsilon: of both.

    Returns:
        (..., out), without norms to the bit what torch's operators make of the product in bfloat16.
    """
    x = x.contiguous()
    y = torch.empty((*x.shape[:-1], row.out), dtype=x.dtype, device="cpu")
    threads = threads_for(row.width * row.out)
    places = (t if t is None else t.data_ptr() for t in (x, y, cosine, sine, *(norms or (None, None))))
    if functions("turned")[x.dtype](row.address, *places, epsilon, *heads, cosine.shape[-1], threads):
        raise MemoryError(f"no memory to list {row.width} kept inputs for {threads} threads")
    return y


def gated(first: Row, second: Row, x: Tensor, *, gelu: bool) -> Tensor:
    """A gated MLP of one row: both masked products and the activation between them in one call, rounded as apart.

    Args:
        first: to gate and up, side by side.
        second: from their product.
        x: one row (..., in) of their dtype.
        gelu: the gate goes through GELU's approximation by tanh, else through SiLU.

    Returns:
        (..., out) of `second`.
    """
    x = x.contiguous()
    both = torch.empty(first.out, dtype=x.dtype, device="cpu")
    y = torch.empty((*x.shape[:-1], second.out), dtype=x.dtype, device="cpu")
    threads = threads_for(second.width * second.out)
    places = (t.data_ptr() for t in (x, both, y))
    if functions("gated")[x.dtype](first.address, second.address, *places, gelu, threads):
        raise MemoryError(f"no memory to list the kept inputs of {threads} threads")
    return y


def attend(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    """Attention of one token, float32 or bfloat16.

    Args:
        query: (1, heads, 1, size), contiguous.
        key: (1, key heads, length, size), of contiguous heads' numbers.
        value: as `key`.
        seen: bool (..., length), contiguous: places that are attended to; None is all.
        scale: of the scores.

    Returns:
        (1, 1, heads, size).
    """
    heads, size = query.shape[1], query.shape[3]
    key_heads, length = key.shape[1:3]
    y = torch.empty((1, 1, heads, size), dtype=query.dtype, device="cpu")
    strides = (ctypes.c_int64 * 4)(*key.stride()[1:3], *value.stride()[1:3])
    places = (t if t is None else t.data_ptr() for t in (query, key, value, seen, y))
    threads = threads_for(2 * heads * length * size)
    counts = heads, key_heads, length, size
    if functions("attend")[query.dtype](*places, ctypes.addressof(strides), *counts, scale, threads):
        raise MemoryError(f"no memory for the scores of {length} places")
    return y


def mask_inputs(x: Tensor, norm: Tensor, threshold: Tensor, open_rows: Tensor | None = None) -> Tensor:
    """`mask.mask_inputs` of x, bit for bit, in one pass.

    Args:
        x: (..., in), float32 or bfloat16.
        norm: (in,) float32, contiguous.
        threshold: () float32; -1 keeps everything.
        open_rows: (...) bool, rows that are kept whole; None where there are none.
    """
    x = x.contiguous()
    y = torch.empty_like(x)
    rows = None if open_rows is None else open_rows.contiguous()
    threads = threads_for(x.numel())
    places = (t if t is None else t.data_ptr() for t in (x, norm, threshold, rows, y))
    functions("mask")[x.dtype](*places, x.numel() // x.shape[-1], x.shape[-1], threads)
    return y


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm of x (..., in) by its last dimension, in one pass; torch's to rounding, as squares are summed in another order.

    Args:
        x: float32 or bfloat16.
        weight: (in,) of x's dtype.
        epsilon: added to the mean square.
    """
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty_like(x)
    width = x.shape[-1]
    threads = threads_for(x.numel())
    functions("norm")[x.dtype](
        x.data_ptr(), weight.data_ptr(), y.data_ptr(), epsilon, x.numel() // width, width, threads
    )
    return y


def has_product(dtype: torch.dtype) -> bool:
    """Whether `Product` can be had: in bfloat16 where the processor multiplies pairs of it, and no matrices."""
    return available(dtype) and dtype in functions("product")


class Product:
    """`Row` for many rows of inputs: a masked product with the rest ready.

    Each row is the same to the bit for any number of threads, and whichever rows are beside it: up to 32 in all, or more, which
    are summed in another order. Inputs that are zero are skipped as dropped ones are.

    Args:
        weight_t: (in, out) contiguous, bfloat16.
        norm: (in,) float32 of the mask, contiguous; None drops nothing.
        threshold: () float32, read at every call; None only where `norm` is.
    """

    def __init__(self, weight_t: Tensor, norm: Tensor | None = None, threshold: Tensor | None = None) -> None:
        if weight_t.dtype not in functions("product") or not weight_t.is_cpu:
            raise ValueError(f"weight is {weight_t.dtype} on {weight_t.device}; expected bfloat16 on the CPU")
        # The code holds addresses, as `Row`'s.
        self.operands = [None if t is None else t.detach() for t in (norm, threshold, weight_t)]
        self.mask_at = [None if t is None else t.data_ptr() for t in (norm, threshold)]
        self.weight_at, (self.width, self.out), self.dtype = weight_t.data_ptr(), weight_t.shape, weight_t.dtype
        self.function = functions("product")[self.dtype]

    def __call__(self, x: Tensor, bias: Tensor | None = None, open_rows: Tensor | None = None) -> Tensor:
        """Outputs (rows, out).

        Args:
            x: (rows, in) of the weight's dtype.
            bias: (out,) of that dtype, or None.
            open_rows: (rows,) bool, rows that are kept whole; None where there are none.
        """
        rows, width = x.shape
        if x.dtype is not self.dtype or width != self.width:
            raise ValueError(f"x is {tuple(x.shape)} {x.dtype}; expected rows of {self.width} {self.dtype}")
        x = x.contiguous()
        y = torch.empty(rows, self.out, dtype=self.dtype, device="cpu")
        opened, added = (None if t is None else t.contiguous() for t in (open_rows, bias))
        opened_at, added_at = (t if t is None else t.data_ptr() for t in (opened, added))
        sizes = rows, width, self.out, threads_for(width * self.out)
        if self.function(x.data_ptr(), *self.mask_at, opened_at, self.weight_at, added_at, y.data_ptr(), *sizes):
            raise MemoryError(f"no memory for the sums of {rows} rows")
        return y


def product(
    x: Tensor,
    weight_t: Tensor,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    threshold: Tensor | None = None,
    open_rows: Tensor | None = None,
) -> Tensor:
    """`Product` made for one call."""
    return Product(weight_t, norm, threshold)(x, bias, open_rows)


def turn(weight: Tensor, columns: Tensor) -> None:
    """Copy the transpose of a weight, with all threads: one alone takes less than half of the time that torch does.

    Args:
        weight: (out, in) of 16 or 32 bits a number; the last dimension contiguous, the first of any stride.
        columns: (in, out) of its dtype to be filled; the last dimension contiguous, the first of any stride.
    """
    (out, width), kind = weight.shape, torch.float32 if weight.itemsize == 4 else torch.bfloat16
    places, strides = (weight.data_ptr(), columns.data_ptr()), (weight.stride(0), columns.stride(0))
    functions("columns")[kind](*places, out, width, *strides, threads_for(out * width))


def threads_for(numbers: int) -> int:
    """Threads that share work on so many numbers."""
    return torch.get_num_threads() if numbers >= MIN_SHARED else 1
