"""The projections of one mask group whose weights are quantized, as one: one mask, one product."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from wina_calib.common.memory import advise_huge_pages
from wina_calib.quantization.formats import Quantized
from wina_calib.runtime import group_operator
from wina_calib.runtime.forward_pass import Pass
from wina_calib.runtime.kernels import cuda, dispatch
from wina_calib.runtime.kernels.around import Around
from wina_calib.runtime.packed import ProductGroup, joined


class QuantizedGroup(ProductGroup):
    """The product of all projections of a mask group. It refers to the group's tensors, which are its state's own.

    `mask` is the kernel that masks the many rows of a prompt, `many` the dense product of many rows on a card, ready to be
    called; None where there is none.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weight: Quantized,
        biases: Sequence[Tensor | None],
        norm: Tensor,
        threshold: Tensor,
        rotation: Tensor | None,
        dtype: torch.dtype,
        owner: int,
    ) -> None:
        self.sizes, self.weight, self.norm, self.threshold = tuple(sizes), weight, norm, threshold
        self.rotation, self.dtype, self._owner = rotation, dtype, owner
        cast = [None if b is None else b.to(dtype) for b in biases]
        self.width, self.bias = weight.width, joined(cast, self.sizes, norm.new_empty(0, dtype=dtype))
        self._nothing = torch.full_like(threshold, -1.0)  # a threshold that drops nothing
        self.mask = cuda.mask_of(norm, threshold, dtype)
        self.many = dispatch.quantized_many_of(weight, self.bias, dtype)
        self.row = dispatch.quantized_row_of(weight, norm, threshold, self.bias, dtype)
        if (
            self.row is not None
        ):  # columns are read here and there, and with small pages each costs a walk through tables
            for tensor in weight.named().values():
                advise_huge_pages(tensor.data_ptr(), tensor.nbytes, filled=True)
        self.number = group_operator.new_number(self, owner)
        self._given = _identity(weight, biases, norm, threshold, rotation, dtype, owner)

    def __getstate__(self) -> dict[str, Any]:
        """Without what holds addresses; a copy is not made of what its model then holds, and is replaced."""
        return self.__dict__ | {"row": None, "many": None, "number": group_operator.UNNUMBERED, "_given": ()}

    def is_made_of(self, *given: Any) -> bool:
        """Whether these are what it was made of: all arguments but the sizes, in order."""
        return self._given == _identity(*given)

    def is_now_of(self, biases: Sequence[Tensor | None]) -> None:
        """Take it that it was made of these biases, which are views of its own."""
        given = self.weight, biases, self.norm, self.threshold, self.rotation, self.dtype, self._owner
        self._given = _identity(*given)

    def is_short(self, now: Pass) -> bool:
        """Whether in this pass one row of which nothing but the result is wanted may go through C, also where nothing is
        dropped: there is no stock module whose last bits it would have to give.
        """
        return now.served and not now.dense and now.dense_rows is None

    def products(self, x: Tensor, dense: Tensor | None, *, everything: bool) -> Tensor:
        """Outputs (rows, sum of outs) for x (..., in): of `everything`, or masked but for the `dense` rows (...) bool."""
        rows, flat = x.reshape(-1, x.shape[-1]), None if dense is None else dense.reshape(-1)
        if self.many is not None and _has_many_rows(rows):
            if everything:
                return self.many(rows)
            if self.mask is not None:
                return self.many(self.mask(rows, flat))
        if everything:
            return dispatch.dense_quantized_site(rows, self.weight, self.bias)
        return dispatch.quantized_site(rows, self.weight, self.norm, self.threshold, flat, self.bias)

    def step(self, x: Tensor, around: Around, *, dense: bool) -> Tensor:
        """Outputs (..., sum of outs) of one row with what is around them; x (..., in) or what `around` makes it of."""
        threshold = self._nothing if dense else self.threshold
        y: Tensor | None = None
        if self.rotation is None:
            y = dispatch.quantized_step(x.reshape(1, -1), self.weight, self.norm, threshold, self.bias, around)
        if y is None:
            return around.result(x, partial(self.whole, dense=dense))
        return y.view(*x.shape[:-1], y.shape[-1])


def _has_many_rows(rows: Tensor) -> bool:
    """Whether what is made ready on a card for many rows serves these (rows, in)."""
    many = rows.shape[0] > dispatch.MAX_ROWS_OF_CODES and dispatch.masks_in_one_pass(rows)
    return many and rows.device.index == torch.cuda.current_device()


def _identity(
    weight: Quantized,
    biases: Sequence[Tensor | None],
    norm: Tensor,
    threshold: Tensor,
    rotation: Tensor | None,
    dtype: torch.dtype,
    owner: int,
) -> tuple[object, ...]:
    """What tells whether a group still is made of these: where tensors lie, the dtype, the model."""
    tensors = (*weight.named().values(), *biases, norm, threshold, rotation)
    return (tuple(None if t is None else (t.device, t.data_ptr()) for t in tensors), dtype, owner)
