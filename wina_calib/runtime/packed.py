"""The projections of one mask group as one: weights side by side, one mask, one product.

A call looks up a handful of attributes and no modules: on small models and short prompts the time goes there, and a
compiled step checks every attribute that it met before it runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from wina_calib.runtime import group_operator
from wina_calib.runtime.forward_pass import Pass
from wina_calib.runtime.kernels import cpu, cuda, dispatch, native
from wina_calib.runtime.kernels.around import Around

# On CUDA, from this many rows on the outputs of each projection are contiguous: what reads them takes longer than the
# one product for all saves.
SEPARATE_ROWS = 1024


class ProductGroup(ABC):
    """The projections of one mask group as one, of plain or quantized weights."""

    sizes: tuple[int, ...]  # outputs of each projection
    width: int  # inputs
    dtype: torch.dtype  # of inputs
    bias: Tensor | None  # (sum of outs,)
    norm: Tensor  # (in,) float32
    threshold: Tensor  # () float32
    rotation: Tensor | None  # run-time matrix (in, in)
    row: native.Row | None  # the product of one row in C, ready to be called
    number: int  # by which a compiled step finds it, see `group_operator`

    @property
    def out_features(self) -> int:
        """Outputs of all projections."""
        return sum(self.sizes)

    def serves(self, x: Tensor, now: Pass) -> bool:
        """Whether in this pass this computes the product of x."""
        return now.served and x.dtype == self.dtype

    def masks_row(self, x: Tensor) -> bool:
        """Whether x (..., in) is one row on a CPU and has no run-time matrix."""
        plain = self.rotation is None and type(x) is Tensor and x.is_cpu
        return plain and x.dtype is self.dtype and x.numel() == self.width

    def part(self, position: int, x: Tensor, now: Pass) -> Tensor:
        """Output (..., out) of one projection for x (..., in).

        The first that is asked for x computes all; the others take theirs, the last one clears up.
        """
        if len(self.sizes) == 1:
            return self.product(x, now)
        if position == 0 or now.x is not x or now.group is not self:
            now.x, now.group, now.out = x, self, self.parts(x, now)
        out: Tensor = now.out[position]
        if position == len(self.sizes) - 1:
            now.x = now.group = now.out = None
        return out

    def parts(self, x: Tensor, now: Pass) -> tuple[Tensor, ...]:
        """Outputs (..., out) of each projection for x (..., in)."""
        shares: tuple[Tensor, ...] = self.product(x, now).split_with_sizes(self.sizes, dim=-1)
        return shares

    def product(self, x: Tensor, now: Pass) -> Tensor:
        """Outputs (..., sum of outs) of all projections for x (..., in)."""
        if self.rotation is not None:
            x = x @ self.rotation.to(x.dtype)
        if self.row is not None and x.numel() == self.row.width and is_plain(x, now):
            return self.row(x, everything=now.dense)
        dense = None if now.dense else rows_for(now.dense_rows, x)
        out = self.products(x, dense, everything=now.dense)
        return out.view(*x.shape[:-1], out.shape[-1])

    def whole(self, x: Tensor, *, dense: bool) -> Tensor:
        """Outputs (..., sum of outs) for one row x (..., in), masked or dense."""
        if self.rotation is not None:
            x = x @ self.rotation.to(x.dtype)
        out = self.products(x, None, everything=dense) if self.row is None else self.row(x, everything=dense)
        return out.view(*x.shape[:-1], out.shape[-1])

    @abstractmethod
    def products(self, x: Tensor, dense: Tensor | None, *, everything: bool) -> Tensor:
        """Outputs (rows, sum of outs) for x (..., in): of `everything`, or masked but for the `dense` rows (...) bool."""


class PackedGroup(ProductGroup):
    """Weights of one mask group in one storage; the modules hold views of it.

    Where `columns`, `weight_t` (in, sum of outs) is contiguous, for the sparse kernels, and it has a number; else `weight` is,
    its transpose, for dense products of masked inputs.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], *, columns: bool) -> None:
        self.sizes, self.width = tuple(w.shape[0] for w in weights), weights[0].shape[1]
        self.columns = columns
        self.weight_t = cpu.column_storage([w.detach() for w in weights]) if columns else _rows(weights).t()
        self.weight = self.weight_t.t()
        self.dtype = self.weight.dtype
        self.bias = joined(biases, self.sizes, weights[0])
        self.number = group_operator.UNNUMBERED
        self.row: native.Row | None = None
        self._given: tuple[object, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        """Without what holds addresses; `attach` makes it again."""
        return self.__dict__ | {"row": None}

    def __setstate__(self, values: dict[str, Any]) -> None:
        """A copy holds other tensors, so the number is not its own."""
        self.__dict__.update(values, number=group_operator.UNNUMBERED, _given=())

    def attach(self, owner: int, norm: Tensor, threshold: Tensor, rotation: Tensor | None) -> None:
        """Take what else the product needs, and look at the threshold; `owner` is the number of the model's state."""
        given = (norm, threshold, rotation)
        same = self._given[:1] == (owner,) and all(a is b for a, b in zip(given, self._given[1:], strict=True))
        if self.columns and not same:
            self.number, self._given = group_operator.new_number(self, owner), (owner, *given)
        self.norm, self.threshold = norm, threshold
        self.rotation = None if rotation is None else rotation.to(self.dtype)
        self.kernel = cuda.mask_of(norm, threshold, self.dtype)
        self.row = dispatch.row_of(self.weight_t, norm, threshold, self.bias)
        self.zero = torch.zeros((), dtype=self.dtype, device=norm.device)
        self._limit_now()

    def parts_of(self, storage: Tensor) -> tuple[Tensor, ...]:
        """The parts of weight (sum of outs, in) or bias (sum of outs,) that belong to each projection."""
        parts: tuple[Tensor, ...] = storage.split(self.sizes)
        return parts

    def is_short(self, now: Pass) -> bool:
        """Whether in this pass one row of which nothing but the result is wanted may go through C."""
        return now.short

    def parts(self, x: Tensor, now: Pass) -> tuple[Tensor, ...]:
        """Outputs (..., out) of each projection for x (..., in)."""
        if self.kernel is None or x.numel() < SEPARATE_ROWS * x.shape[-1] or torch.compiler.is_compiling():
            return super().parts(x, now)
        dense = None if now.dense else rows_for(now.dense_rows, x)
        x = self.product_input(x if self.rotation is None else x @ self.rotation, dense, everything=now.dense)
        biases = (None,) * len(self.sizes) if self.bias is None else self.parts_of(self.bias)
        return tuple(linear(x, w, b) for w, b in zip(self.parts_of(self.weight), biases, strict=True))

    def products(self, x: Tensor, dense: Tensor | None, *, everything: bool) -> Tensor:
        """Outputs (rows, sum of outs) for x (..., in): of `everything`, or masked but for the `dense` rows (...) bool."""
        if not self.columns or (self.kernel is not None and x.numel() != x.shape[-1]):
            return linear(self.product_input(x, dense, everything=everything), self.weight, self.bias)
        rows = x.reshape(-1, x.shape[-1])
        if everything:
            return dispatch.dense_site(rows, self.weight_t, self.bias)
        if len(rows) > dispatch.MAX_GATHERED_ROWS:
            return dispatch.dense_site(self.mask_inputs(x, dense).view(rows.shape), self.weight_t, self.bias)
        flat = None if dense is None else dense.reshape(-1)
        return dispatch.sparse_site(rows, self.weight_t, self.norm, self.threshold, flat, self.bias)

    def step(self, x: Tensor, around: Around, *, dense: bool) -> Tensor:
        """Outputs (..., sum of outs) of one row with what is around them; x (..., in) or what `around` makes it of."""
        return around.result(x, partial(self.whole, dense=dense))

    def product_input(self, x: Tensor, dense: Tensor | None, *, everything: bool) -> Tensor:
        """The input x (..., in) of a dense product: as it is, or with its dropped values at zero."""
        if everything:
            return x
        kernel = self.kernel
        if kernel is None or torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
            return self.mask_inputs(x, dense)
        if x.numel() == 0 or x.device.index != torch.cuda.current_device():
            return self.mask_inputs(x, dense)
        return kernel(x, dense)

    def mask_inputs(self, x: Tensor, dense: Tensor | None) -> Tensor:
        """`mask.mask_inputs` of x (..., in), bit for bit, in fewer passes over it."""
        if not torch.compiler.is_compiling():
            if self._version != version_of(self.threshold):
                self._limit_now()
            if self.open:
                return x
            if x.is_cpu and not (x.requires_grad and torch.is_grad_enabled()):
                return self._mask_vectorised(x, dense)
        dropped = x.abs() <= self.limit
        if dense is not None:
            dropped &= dense.logical_not().unsqueeze(-1)
        return torch.where(dropped, self.zero, x)

    def _mask_vectorised(self, x: Tensor, dense: Tensor | None) -> Tensor:
        """`mask_inputs` in C, or by operators that torch has vector code for on a CPU; the last keeps a NaN."""
        if self.row is not None and type(x) is Tensor and x.dtype == self.dtype and x.numel():
            return native.mask_inputs(x, self.norm, self.threshold, dense)
        score = (x * self.norm).abs_()
        if dense is not None:
            score += torch.where(dense, torch.inf, 0.0).unsqueeze(-1)
        masked: Tensor = torch.ops.aten.threshold_backward(x, score, self.cut)
        return masked.to(x.dtype)

    def _limit_now(self) -> None:
        """Compute the limit again, in place, for the threshold as it is; a compiled step sees it too."""
        limit = magnitude_limit(self.norm, self.threshold)
        known = getattr(self, "limit", None)
        if known is not None and known.device == limit.device:
            known.copy_(limit)
        else:
            self.limit = limit
        self._version = version_of(self.threshold)
        # Asking a GPU would make the host wait for it.
        self.cut = torch.nan if limit.is_cuda else float(self.threshold)
        self.open = self.cut < 0


def joined(biases: Sequence[Tensor | None], sizes: Sequence[int], like: Tensor) -> Tensor | None:
    """Biases (sum of outs,) side by side, zeros as `like` where a projection has none; None where none has one."""
    if all(b is None for b in biases):
        return None
    both = zip(biases, sizes, strict=True)
    return torch.cat([like.new_zeros(n) if b is None else b.detach() for b, n in both])


def _rows(weights: Sequence[Tensor]) -> Tensor:
    """The weights (out_i, in) below each other; a single one as it is."""
    if len(weights) == 1:
        return weights[0].detach().contiguous()
    return torch.cat([w.detach() for w in weights])


def is_plain(x: Tensor, now: Pass) -> bool:
    """Whether nothing but the product of x's one row is wanted: no gradient, no graph, no row that is never masked."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or (x.requires_grad and torch.is_grad_enabled()):
        return False
    return now.dense or now.dense_rows is None


def version_of(tensor: Tensor) -> int:
    """A number that changes with every write to a tensor, -1 where torch does not count."""
    return -1 if tensor.is_inference() else tensor._version


def magnitude_limit(norm: Tensor, threshold: Tensor) -> Tensor:
    """Per input the largest magnitude that is dropped: `abs(x) * norm <= threshold` just where `abs(x) <= limit`.

    The product is rounded to float32, so the quotient alone is off by a step here and there; it is moved until both
    sides agree.

    Args:
        norm: (in,) float32, not negative.
        threshold: () float32; a negative one drops nothing.

    Returns:
        (in,) float32.
    """
    largest = torch.finfo(torch.float32).max
    limit = (threshold / norm).nan_to_num(nan=largest, posinf=largest)
    up, down = torch.full_like(norm, torch.inf), torch.full_like(norm, -torch.inf)
    for _ in range(2):
        limit = torch.where(limit * norm > threshold, torch.nextafter(limit, down), limit)
    for _ in range(2):
        above = torch.nextafter(limit, up)
        limit = torch.where((above * norm <= threshold) & above.isfinite(), above, limit)
    return limit


def rows_for(rows: Tensor | None, x: Tensor) -> Tensor | None:
    """The pass's dense rows (batch, seq) in the leading shape of x (..., in); None where they are not x's."""
    if rows is None:
        return None
    if rows.device != x.device:  # where layers are spread over several
        rows = rows.to(x.device)
    if rows.shape == x.shape[:-1]:
        return rows
    return rows.reshape(x.shape[:-1]) if rows.numel() == x.shape[:-1].numel() else None
