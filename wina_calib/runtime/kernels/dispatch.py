"""The seam between the model and its kernels: one masked product a site, chosen by device, dtype and rows.

`sparse_site` computes `y = (x * [abs(x) * norm > threshold]) @ weight_t + bias`. Which kernel does it:

| weight in memory | device | dtype | rows | kernel |
| --- | --- | --- | --- | --- |
| row-major | any | any | any | reference: masked dense product |
| column-contiguous | CPU | float32, bfloat16, float16 | 1, few | `cpu`: product of the kept columns, in C if it can be |
| column-contiguous | CPU | same | more | `cpu`: masked dense product, see below |
| column-contiguous | CUDA with Triton | same | 1 | `cuda`: product of the kept columns, see below |
| column-contiguous | CUDA with Triton | same | more | `cuda`: mask in one pass in Triton, then the dense product |
| column-contiguous | any other | any | any | reference |

Quantized weights (`quantized_site`, `quantized_rows`): on a CPU `quantized_cpu`, on CUDA `quantized_cuda` from compute
capability 8.0 on, elsewhere the reference's product of dequantized tiles. A compiled step has an operator for them too.

Few: up to 4 rows of 16 bits on a processor without arithmetic for them. More rows on a CPU: in C in bfloat16 where the
processor multiplies pairs of it, in float32 blocks where it has no 16-bit arithmetic, else by torch. One row on CUDA: in
CUDA (`cluster`, `site.cu`) on Hopper and later where the weight's rows are multiples of 16 bytes, else in Triton
(`triton_kernels`). A call that needs gradients takes the reference path, which is differentiable. To
`torch.compile` the kernels are one opaque operator, `wina_calib::sparse_site`: no graph break, no recompile when the
threshold changes, and on CUDA nothing that a CUDA graph cannot capture. Eager calls skip the dispatcher, whose way
through Python costs tens of microseconds.
"""

from __future__ import annotations

import logging
from typing import Literal

import torch
from torch import Tensor

from wina_calib.masks import mask
from wina_calib.quantization.formats import Quantized, QuantizedRows, WeightFormat
from wina_calib.runtime.kernels import codes_by_rows, cpu, cuda, native, quantized_cpu, quantized_cuda, reference
from wina_calib.runtime.kernels.around import Around
from wina_calib.runtime.kernels.dequantized import ManyRows
from wina_calib.runtime.kernels.native import Row

logger = logging.getLogger(__name__)
_said: set[str] = set()

Kernel = Literal["reference", "cpu", "cuda"]

_library = torch.library.Library("wina_calib", "FRAGMENT")
_library.define(
    "sparse_site(Tensor x, Tensor weight_t, Tensor norm, Tensor threshold, "
    "Tensor? dense_rows=None, Tensor? bias=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
_library.define(
    "dense_site(Tensor x, Tensor weight_t, Tensor? bias=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
_library.impl("sparse_site", cpu.sparse_site, "CPU")
_library.impl("dense_site", cpu.dense_columns, "CPU")
_library.impl("sparse_site", cuda.sparse_site, "CUDA")


def _shape_of(
    x: Tensor,
    weight_t: Tensor,
    norm: Tensor,
    threshold: Tensor,
    dense_rows: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    return x.new_empty(x.shape[0], weight_t.shape[1])


def _dense_shape_of(x: Tensor, weight_t: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape[0], weight_t.shape[1])


torch.library.register_fake("wina_calib::sparse_site", _shape_of, lib=_library)
torch.library.register_fake("wina_calib::dense_site", _dense_shape_of, lib=_library)


def choose(device: str, dtype: torch.dtype, rows: int, *, column_contiguous: bool) -> Kernel:
    """The kernel for a call, by the table in this module's docstring.

    Args:
        device: device type, such as "cpu" or "cuda".
        dtype: of input and weight.
        rows: rows of the input.
        column_contiguous: whether the columns of the weight are contiguous in memory.
    """
    if not column_contiguous:
        return "reference"
    if device == "cpu" and dtype in cpu.DTYPES:
        return "cpu"
    if device == "cuda" and dtype in cuda.DTYPES and cuda.available():
        return "cuda" if rows <= cuda.MAX_CHOSEN_ROWS else "reference"
    _say_once(device)
    return "reference"


def column_layout_pays(device: str, dtype: torch.dtype, in_features: int, out_features: int, sparsity: float) -> bool:
    """Whether a site's weight should be held column-contiguous: where the sparse kernel beats the row-major product.

    On CUDA dense products take either layout equally well, so it pays wherever the kernel does; so does the CPU's in C.
    Without that, the gather has a fixed cost and must save at least `CPU_MIN_SAVED` weights, and at low sparsity a dense
    product reads faster than the gather skips (`CPU_MIN_SPARSITY`). Measured on 1 and 2 threads, see
    docs/performance-notes.md.
    """
    if choose(device, dtype, 1, column_contiguous=True) == "reference":
        return False
    if device == "cpu" and not native.available(dtype):
        return sparsity >= CPU_MIN_SPARSITY[dtype] and sparsity * in_features * out_features >= CPU_MIN_SAVED
    return sparsity > 0


# Rows of quantized weights on CUDA from which on they are dequantized first.
MAX_ROWS_OF_CODES = quantized_cuda.MAX_FEW_ROWS
# From more rows on the product is dense everywhere.
MAX_GATHERED_ROWS = max(cpu.MAX_SPARSE_ROWS, cuda.MAX_CHOSEN_ROWS)
CPU_MIN_SAVED = 1_500_000
CPU_MIN_SPARSITY = {torch.float32: 0.35, torch.bfloat16: 0.15, torch.float16: 0.4}


def sparse_site(
    x: Tensor,
    weight_t: Tensor,
    norm: Tensor,
    threshold: Tensor,
    dense_rows: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`y = (x * keep) @ weight_t + bias` with `keep = abs(x) * norm > threshold`, reading only kept columns if it can.

    Args:
        x: (rows, in), float32, bfloat16 or float16; any strides.
        weight_t: (in, out) of the same dtype, the transpose of the site's weights stacked along out. Contiguous for
            the sparse kernels; the transposed view of a row-major (out, in) weight works too, dense.
        norm: (in,) float32.
        threshold: () float32 on the same device; -1 keeps everything. Read when the kernel runs.
        dense_rows: (rows,) bool or None, rows that are never masked.
        bias: (out,) of x's dtype or None.

    Returns:
        (rows, out) of x's dtype; never aliases an input.
    """
    needs_gradient = torch.is_grad_enabled() and (x.requires_grad or weight_t.requires_grad)
    columns = weight_t.is_contiguous()
    kernel = "reference" if needs_gradient else choose(x.device.type, x.dtype, x.shape[0], column_contiguous=columns)
    if kernel == "reference":
        if columns and masks_in_one_pass(x):
            return torch.nn.functional.linear(cuda.mask_inputs(x, norm, threshold, dense_rows), weight_t.t(), bias)
        return reference.sparse_site(x, weight_t, norm, threshold, dense_rows, bias)
    if not torch.compiler.is_compiling():
        run = cpu.sparse_site if kernel == "cpu" else cuda.sparse_site
        return run(x, weight_t, norm, threshold, dense_rows, bias)
    y: Tensor = torch.ops.wina_calib.sparse_site(x, weight_t, norm, threshold, dense_rows, bias)
    return y


def row_of(weight_t: Tensor, norm: Tensor, threshold: Tensor, bias: Tensor | None = None) -> Row | None:
    """`sparse_site` of one row with these operands, ready to be called; None where it is not computed in C.

    Of no use with gradients or to a compiler.
    """
    if weight_t.device.type != "cpu" or not weight_t.is_contiguous() or not native.available(weight_t.dtype):
        return None
    return Row(weight_t, norm.contiguous(), threshold, bias)


def mask_inputs(x: Tensor, norm: Tensor, threshold: Tensor, dense_rows: Tensor | None = None) -> Tensor:
    """`mask.mask_inputs` of many rows by `abs(x) * norm`, in one pass where there is a kernel for it.

    Args:
        x: (..., in).
        norm: (in,).
        threshold: (); a negative one keeps everything.
        dense_rows: (...) bool, rows that are never masked, or None.
    """
    flat = None if dense_rows is None else dense_rows.reshape(-1)
    norm, threshold = norm.float().contiguous(), threshold.float()  # as a comparison with float32 scores takes them
    if masks_in_one_pass(x):
        return cuda.mask_inputs(x.reshape(-1, x.shape[-1]), norm, threshold, flat).view(x.shape)
    plain = type(x) is Tensor and x.numel() and not (x.requires_grad and torch.is_grad_enabled())
    if plain and x.is_cpu and native.available(x.dtype):
        return native.mask_inputs(x, norm, threshold, flat)
    return mask.mask_inputs(x, norm, threshold, dense_rows=dense_rows)


def quantized_site(
    x: Tensor,
    weight: Quantized,
    norm: Tensor,
    threshold: Tensor,
    dense_rows: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`y = (x * keep) @ W^T + bias` as `sparse_site`, of quantized weights.

    Args:
        x: (rows, in), any float dtype.
        weight: of a mask group.
        norm: (in,) float32.
        threshold: () float32; -1 keeps everything.
        dense_rows: (rows,) bool or None, rows that are never masked.
        bias: (out,) of x's dtype or None.

    Returns:
        (rows, out) of x's dtype.
    """
    if _quantized_on_cpu(x, weight.codes):
        return quantized_cpu.sparse_site(x, weight, norm, threshold, dense_rows, bias)
    if _traced_on_cuda(x):
        tensors, form = (weight.codes, weight.scales, weight.zeros), weight.format
        out: Tensor = torch.ops.wina_calib.quantized_site(
            x, *tensors, form.bits, form.group_size, norm, threshold, dense_rows, bias
        )
        return out
    if _quantized_on_cuda(x) and quantized_cuda.serves(x, weight):
        if x.shape[0] > quantized_cuda.MAX_FEW_ROWS:
            return quantized_cuda.dense_site(mask_inputs(x, norm, threshold, dense_rows), weight, bias)
        return quantized_cuda.sparse_site(x, weight, norm, threshold, dense_rows, bias)
    y = reference.dense_quantized(mask_inputs(x, norm, threshold, dense_rows), weight)
    return y if bias is None else y + bias


def dense_quantized_site(x: Tensor, weight: Quantized, bias: Tensor | None = None) -> Tensor:
    """`y = x @ W^T + bias` of quantized weights; arguments and result as for `quantized_site`."""
    if _quantized_on_cpu(x, weight.codes):
        return quantized_cpu.dense_site(x, weight, bias)
    if _quantized_on_cuda(x) and quantized_cuda.serves(x, weight):
        return quantized_cuda.dense_site(x, weight, bias)
    y = reference.dense_quantized(x, weight)
    return y if bias is None else y + bias


def quantized_step(
    x: Tensor, weight: Quantized, norm: Tensor, threshold: Tensor, bias: Tensor | None, around: Around
) -> Tensor | None:
    """The product (1, out) of one row with what is around it in one kernel; None where there is none that does it.

    Args:
        x: (1, in), or what `around` makes it of.
        weight: of a mask group.
        norm: (in,) float32.
        threshold: () float32; -1 keeps everything.
        bias: (out,) of x's dtype or None.
        around: what is before and after the product.
    """
    if not _quantized_on_cuda(x):
        return None
    return quantized_cuda.step_site(x, weight, norm, threshold, bias, around)


def quantized_row_of(
    weight: Quantized, norm: Tensor, threshold: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Row | None:
    """`quantized_site` of one row of `dtype` with these operands, ready to be called; None where it is not computed in C."""
    if weight.codes.device.type != "cpu" or not native.available(dtype) or not weight.codes.is_contiguous():
        return None
    return Row(weight, norm.contiguous(), threshold, bias, dtype)


def quantized_many_of(weight: Quantized, bias: Tensor | None, dtype: torch.dtype) -> ManyRows | None:
    """`dense_quantized_site` of many rows of `dtype` with these operands, ready to be called; None where it is not on a card.

    Of no use with gradients or to a compiler.
    """
    if weight.codes.device.type != "cuda":
        return None
    return quantized_cuda.many_rows_of(weight, bias, dtype)


def quantized_rows(x: Tensor, weight: QuantizedRows) -> Tensor:
    """`y = x @ W^T` of a matrix quantized by rows, as lm_head's: x (..., width) gives (..., rows) of x's dtype."""
    if torch.compiler.is_compiling() and x.device.type in ("cpu", "cuda") and not torch.is_grad_enabled():
        y: Tensor = torch.ops.wina_calib.quantized_rows(x, weight.codes, weight.scales)
        return y
    if _quantized_on_cpu(x, weight.codes):
        return quantized_cpu.rows_product(x, weight)
    if _quantized_on_cuda(x) and codes_by_rows.serves(x, weight):
        return codes_by_rows.product(x, weight)
    return reference.dense_rows_product(x, weight)


def _quantized_on_cpu(x: Tensor, codes: Tensor) -> bool:
    """Whether `quantized_cpu` serves a call: not where a gradient or a graph is wanted."""
    if torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
        return False
    return x.device.type == "cpu" and codes.device.type == "cpu" and x.dtype in cpu.DTYPES


def _quantized_on_cuda(x: Tensor) -> bool:
    """Whether `quantized_cuda` may serve a call: not where a gradient or a graph is wanted."""
    return x.device.type == "cuda" and not torch.compiler.is_compiling() and not _wants_gradient(x)


def _traced_on_cuda(x: Tensor) -> bool:
    """Whether a compiler traces a call on CUDA whose operator may serve."""
    return torch.compiler.is_compiling() and x.device.type == "cuda" and not torch.is_grad_enabled()


def _wants_gradient(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


_library.define(
    "quantized_site(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, int bits, int group_size, Tensor norm, "
    "Tensor threshold, Tensor? dense_rows, Tensor? bias) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
_library.define(
    "quantized_rows(Tensor x, Tensor codes, Tensor scales) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)


def _site_operator(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    norm: Tensor,
    threshold: Tensor,
    dense_rows: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    weight = Quantized(WeightFormat(bits, group_size, zeros is not None), codes, scales, zeros)
    return quantized_site(x, weight, norm, threshold, dense_rows, bias)


def _site_shape_of(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[1] * 8 // bits)


def _rows_operator(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    return quantized_rows(x, QuantizedRows(codes, scales))


_library.impl("quantized_site", _site_operator, "CUDA")
_library.impl("quantized_rows", _rows_operator, "CPU")
_library.impl("quantized_rows", _rows_operator, "CUDA")
torch.library.register_fake("wina_calib::quantized_site", _site_shape_of, lib=_library)


def _rows_shape_of(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


torch.library.register_fake("wina_calib::quantized_rows", _rows_shape_of, lib=_library)


def masks_in_one_pass(x: Tensor) -> bool:
    """Whether the mask of many rows x has a kernel. A compiler fuses the reference's passes; a gradient needs them."""
    if x.device.type != "cuda" or torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
        return False
    return x.dtype in cuda.DTYPES and cuda.available()


def dense_site(x: Tensor, weight_t: Tensor, bias: Tensor | None = None) -> Tensor:
    """`y = x @ weight_t + bias` on the storage that `sparse_site` reads, without a slow path: for prefill.

    Arguments and result as for `sparse_site`.
    """
    needs_gradient = torch.is_grad_enabled() and (x.requires_grad or weight_t.requires_grad)
    ours = x.device.type == "cpu" and x.dtype in cpu.DTYPES and weight_t.is_contiguous()
    if needs_gradient or not ours:
        return torch.nn.functional.linear(x, weight_t.t(), bias)
    if not torch.compiler.is_compiling():
        return cpu.dense_columns(x, weight_t, bias)
    y: Tensor = torch.ops.wina_calib.dense_site(x, weight_t, bias)
    return y


def _say_once(device: str) -> None:
    """One log line a device type without a sparse kernel. Not while tracing: logging would break the graph."""
    if torch.compiler.is_compiling() or device in _said:
        return
    _said.add(device)
    reason = "Triton is not installed" if device == "cuda" else f"there is no sparse kernel for device {device!r}"
    logger.warning("%s: masked dense products are used, which are exact but no faster than dense", reason)
