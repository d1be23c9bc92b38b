"""The product of one linear layer of a server: few rows by the kernels that skip columns, many densely.

It is one opaque operator to the compiler, as it asks for what belongs to a step; an eager step calls it without the dispatcher.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wina_calib.quantization.formats import Quantized, WeightFormat
from wina_calib.runtime.kernels import cpu, dispatch, native, quantized_cpu
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


class Prepared:
    """A masked product of one layer with all ready that is the same in every step: after megabytes of weights the code of each
    call is gone from the caches, so that calls take several times as long as they seem to.

    Args:
        weight: (out, in), the transpose of a contiguous tensor; or quantized.
        norm: (in,) float32, contiguous.
        threshold: () float32.
        policy: as of `policy_of`.
    """

    def __init__(self, weight: Tensor | Quantized, norm: Tensor, threshold: Tensor, policy: Tensor) -> None:
        first, prompts, self.sparse_rows = policy.tolist()
        self.first, self.prompts = bool(first), bool(prompts)
        self.weight = weight.detach().t() if isinstance(weight, Tensor) else weight
        self.mask, self.policy = (norm.detach(), threshold.detach()), policy.detach()
        self.several: native.Product | None = None
        if isinstance(self.weight, Tensor) and native.has_product(self.weight.dtype):
            self.several = native.Product(self.weight, *self.mask)
        self.rows: dict[torch.dtype, tuple[Tensor | None, native.Row]] = {}

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product (rows, out) of the step's inputs x (rows, in), plus bias (out,)."""
        count = x.shape[0]
        opened = self.open_rows(count)
        if self.several is not None and count > max(1, self.sparse_rows):
            return self.several(x, bias, opened)
        if isinstance(self.weight, Quantized):
            if not native.available(x.dtype) or not 0 < count <= quantized_cpu.MAX_FEW_ROWS:
                return dispatch.quantized_site(x, self.weight, *self.mask, opened, bias)
            if count > 1:
                return quantized_cpu.few(self._row(x.dtype, bias), x, opened)
        elif count != 1 or self.sparse_rows < 1 or not native.available(x.dtype):
            return product(x, self.weight, *self.mask, opened, bias, self.sparse_rows)
        return self._row(x.dtype, bias)(x, everything=opened is not None and bool(opened[0]))

    def open_rows(self, count: int) -> Tensor | None:
        """Rows (count,) of this step that are not masked."""
        return open_rows_now(count, first=self.first, prompts=self.prompts)

    def _row(self, dtype: torch.dtype, bias: Tensor | None) -> native.Row:
        known = self.rows.get(dtype)
        if known is None or known[0] is not bias:
            row = native.Row(self.weight, *self.mask, None if bias is None else bias.contiguous(), dtype)
            known = self.rows[dtype] = bias, row
        return known[1]


def prepare(weights: Sequence[Tensor | None], mask: Sequence[Tensor]) -> Prepared:
    """A product of the operands of `linear` or `quantized_linear`, made at the first step and kept with the weights.

    Args:
        weights: `weight`; or `codes`, `scales` and `zeros`.
        mask: norm, threshold and policy.
    """
    held, others = weights[0], tuple(t.data_ptr() for t in mask)  # of memory that is held
    known: tuple[tuple[int, ...], Prepared] | None = getattr(held, "wina_prepared", None)
    if known is None or known[0] != others:
        assert held is not None
        known = others, Prepared(held if len(weights) == 1 else weight_of(*weights), *mask)
        held.wina_prepared = known  # type: ignore[attr-defined]
    return known[1]


def linear(x: Tensor, weight: Tensor, norm: Tensor, threshold: Tensor, policy: Tensor, bias: Tensor | None) -> Tensor:
    """Masked product (rows, out) of the step's inputs x (rows, in), as an operator of a compiled step.

    Args:
        x: float32, bfloat16 or float16.
        weight: (out, in), the transpose of a contiguous tensor.
        norm: (in,) float32.
        threshold: () float32.
        policy: as of `policy_of`.
        bias: (out,) or None.
    """
    return prepare((weight,), (norm, threshold, policy))(x, bias)


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
    return prepare((codes, scales, zeros), (norm, threshold, policy))(x, bias)


def weight_of(codes: Tensor | None, scales: Tensor | None, zeros: Tensor | None) -> Quantized:
    """Quantized weights, whose format their tensors tell."""
    assert codes is not None
    assert scales is not None
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
