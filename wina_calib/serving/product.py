"""The product of one linear layer of a server: few rows by the kernels that skip columns, many densely.

It is one opaque operator to the compiler, as it asks for what belongs to a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wina_calib.quantization.formats import Quantized, WeightFormat
from wina_calib.runtime.kernels import cpu, dispatch
from wina_calib.serving.rows import open_rows_now

NAME, QUANTIZED_NAME = "wina_linear", "wina_quantized_linear"


def policy_of(*, first: bool, prompts: bool, sparse_rows: int | None, dtype: torch.dtype) -> Tensor:
    """What all layers' operators are told, as a tensor: a compiled step that vLLM keeps on disk must not have it in its code.

    Args:
        first: first tokens are dense.
        prompts: requests of which more than one token is computed are dense.
        sparse_rows: rows up to which each reads its own columns; None is what was measured for the processor.
        dtype: of the inputs.

    Returns:
        (3,) int64.
    """
    rows = cpu.max_sparse_rows(dtype) if sparse_rows is None else sparse_rows
    return torch.tensor([int(first), int(prompts), rows])


def linear(x: Tensor, weight: Tensor, norm: Tensor, threshold: Tensor, policy: Tensor, bias: Tensor | None) -> Tensor:
    """Masked product (rows, out) of the step's inputs x (rows, in).

    Args:
        x: float32, bfloat16 or float16.
        weight: (out, in), the transpose of a contiguous tensor.
        norm: (in,) float32.
        threshold: () float32.
        policy: as of `policy_of`.
        bias: (out,) or None.
    """
    first, prompts, sparse_rows = policy.tolist()
    rows = open_rows_now(x.shape[0], first=bool(first), prompts=bool(prompts))
    return product(x, weight.t(), norm, threshold, rows, bias, sparse_rows)


def product(
    x: Tensor,
    weight_t: Tensor,
    norm: Tensor,
    threshold: Tensor,
    open_rows: Tensor | None,
    bias: Tensor | None,
    sparse_rows: int,
) -> Tensor:
    """The product with some rows never masked: arguments as for `dispatch.sparse_site`, and how many rows are few."""
    count = x.shape[0]
    if count > sparse_rows or not count:
        return cpu.several_rows(x, weight_t, norm, threshold, open_rows, bias)
    if count == 1:
        return cpu.sparse_site(x, weight_t, norm, threshold, open_rows, bias)
    opened = [None] * count if open_rows is None else list(open_rows.split(1))
    return torch.cat(
        [cpu.sparse_site(r, weight_t, norm, threshold, o, bias) for r, o in zip(x.split(1), opened, strict=True)]
    )


def shape_of(x: Tensor, weight: Tensor, norm: Tensor, threshold: Tensor, policy: Tensor, bias: Tensor | None) -> Tensor:
    """A tensor like the result, for the compiler."""
    return x.new_empty(x.shape[0], weight.shape[0])


def quantized_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    norm: Tensor,
    threshold: Tensor,
    policy: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """As `linear`, of quantized weights, whose tensors are as in `formats`; the kernel knows how many rows are few."""
    first, prompts, _ = policy.tolist()
    rows = open_rows_now(x.shape[0], first=bool(first), prompts=bool(prompts))
    return dispatch.quantized_site(x, weight_of(codes, scales, zeros), norm, threshold, rows, bias)


def weight_of(codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Quantized:
    """Quantized weights, whose format their tensors tell."""
    if codes.dtype == torch.int8:
        return Quantized(WeightFormat(8), codes, scales)
    group = 2 * codes.shape[1] // scales.shape[1]
    return Quantized(WeightFormat(4, group, zeros is not None), codes, scales, zeros)


def quantized_shape_of(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    norm: Tensor,
    threshold: Tensor,
    policy: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """A tensor like the result, for the compiler."""
    return x.new_empty(x.shape[0], codes.shape[1] * (1 if codes.dtype == torch.int8 else 2))
