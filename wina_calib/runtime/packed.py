"""The projections of one mask group as one: weights side by side, one mask, one product.

A call looks up a handful of attributes and no modules: on small models and short prompts the time goes there, and a
compiled step checks every attribute that it met before it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from wina_calib.runtime import group_operator
from wina_calib.runtime.kernels import dispatch, native
from wina_calib.runtime.state import RuntimeState

# On CUDA, from this many rows on the outputs of each projection are contiguous: what reads them takes longer than the
# one product for all saves.
SEPARATE_ROWS = 1024


class PackedGroup:
    """Weights of one mask group in one storage; the modules hold views of it.

    Attributes:
        state: of the model.
        sizes: outputs of each projection.
        columns: whether `weight_t` (in, sum of outs) is contiguous, for the sparse kernels; else `weight` is, its
            transpose, for dense products of masked inputs.
        bias: (sum of outs,) or None.
        norm: (in,) float32, the group's.
        threshold: () float32, the group's.
        rotation: run-time matrix (in, in) or None.
        number: by which a compiled step finds it, see `group_operator`; only of a column-contiguous one.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], *, columns: bool) -> None:
        self.sizes = tuple(w.shape[0] for w in weights)
        self.columns = columns
        self.weight_t = dispatch.column_storage([w.detach() for w in weights]) if columns else _rows(weights).t()
        self.weight = self.weight_t.t()
        self.dtype = self.weight.dtype
        self.bias: Tensor | None = None
        if any(b is not None for b in biases):
            both = zip(biases, self.sizes, strict=True)
            self.bias = torch.cat([weights[0].new_zeros(size) if b is None else b.detach() for b, size in both])
        self.number = group_operator.UNNUMBERED
        self.row: dispatch.Row | None = None
        self._given: tuple[object, ...] = ()
        self._seen: Tensor | None = None
        self._parts: tuple[Tensor, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        """Without what holds addresses; `attach` makes it again."""
        return self.__dict__ | {"row": None}

    def __setstate__(self, values: dict[str, Any]) -> None:
        """A copy holds other tensors, so the number is not its own."""
        self.__dict__.update(values, number=group_operator.UNNUMBERED, _given=())

    @property
    def out_features(self) -> int:
        """Outputs of all projections."""
        return int(self.weight_t.shape[1])

    def attach(self, state: RuntimeState, norm: Tensor, threshold: Tensor, rotation: Tensor | None) -> None:
        """Take what else the product needs, and look at the threshold."""
        given = (state, norm, threshold, rotation)
        if self.columns and (not self._given or any(a is not b for a, b in zip(given, self._given, strict=True))):
            self.number, self._given = group_operator.new_number(self, state.number), given
        self.state, self.norm, self.threshold = state, norm, threshold
        self.rotation = None if rotation is None else rotation.to(self.dtype)
        self.kernel = dispatch.mask_of(norm, threshold, self.dtype)
        self.row = dispatch.row_of(self.weight_t, norm, threshold, self.bias)
        self.zero = torch.zeros((), dtype=self.dtype, device=norm.device)
        self._limit_now()

    def parts_of(self, storage: Tensor) -> tuple[Tensor, ...]:
        """The parts of weight (sum of outs, in) or bias (sum of outs,) that belong to each projection."""
        parts: tuple[Tensor, ...] = storage.split(self.sizes)
        return parts

    def serves(self, x: Tensor) -> bool:
        """Whether the model's state lets this compute the product of x."""
        state = self.state
        return state.kernels == "auto" and state.counts is None and x.dtype == self.dtype

    def masks_row(self, x: Tensor) -> bool:
        """Whether x (..., in) is one row on a CPU, of which nothing but the masked product is wanted."""
        state = self.state
        if not state.drops or state.counts is not None or state.dense_rows is not None or self.rotation is not None:
            return False
        return type(x) is Tensor and x.is_cpu and x.dtype is self.dtype and x.numel() == self.weight_t.shape[0]

    def part(self, position: int, x: Tensor) -> Tensor:
        """Output (..., out) of one projection for x (..., in).

        The first that is asked for x computes all; the others take theirs, the last one clears up.
        """
        if len(self.sizes) == 1:
            return self.product(x)
        if position == 0 or self._seen is not x:
            self._seen, self._parts = x, self.parts(x)
        out = self._parts[position]
        if position == len(self.sizes) - 1:
            self._seen, self._parts = None, ()
        return out

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """Outputs (..., out) of each projection for x (..., in)."""
        if self.kernel is None or x.numel() < SEPARATE_ROWS * x.shape[-1] or torch.compiler.is_compiling():
            shares: tuple[Tensor, ...] = self.product(x).split_with_sizes(self.sizes, dim=-1)
            return shares
        x = self.masked(x if self.rotation is None else x @ self.rotation)
        biases = (None,) * len(self.sizes) if self.bias is None else self.parts_of(self.bias)
        return tuple(linear(x, w, b) for w, b in zip(self.parts_of(self.weight), biases, strict=True))

    def product(self, x: Tensor) -> Tensor:
        """Outputs (..., sum of outs) of all projections for x (..., in)."""
        if self.rotation is not None:
            x = x @ self.rotation
        if self.row is not None and x.numel() == self.row.width and self._is_plain(x):
            return self.row(x, everything=self.state.all_dense)
        if not self.columns or (self.kernel is not None and x.numel() != x.shape[-1]):
            return linear(self.masked(x), self.weight, self.bias)
        rows = x.reshape(-1, x.shape[-1])
        if self.state.all_dense:
            out = dispatch.dense_site(rows, self.weight_t, self.bias)
        elif rows.shape[0] > dispatch.MAX_GATHERED_ROWS:
            out = dispatch.dense_site(self.mask(x).view(rows.shape), self.weight_t, self.bias)
        else:
            dense = rows_for(self.state.dense_rows, x)
            flat = None if dense is None else dense.reshape(-1)
            out = dispatch.sparse_site(rows, self.weight_t, self.norm, self.threshold, flat, self.bias)
        return out.view(*x.shape[:-1], out.shape[-1])

    def whole(self, x: Tensor, *, dense: bool) -> Tensor:
        """Outputs (..., sum of outs) for one row x (..., in), masked or dense, whatever the state says."""
        if self.row is not None and self.rotation is None:
            return self.row(x, everything=dense)
        row = x.reshape(1, -1)
        if self.rotation is not None:
            row = row @ self.rotation
        if self.row is not None:
            out = self.row(row, everything=dense)
        elif dense:
            out = dispatch.dense_site(row, self.weight_t, self.bias)
        else:
            out = dispatch.sparse_site(row, self.weight_t, self.norm, self.threshold, None, self.bias)
        return out.view(*x.shape[:-1], out.shape[-1])

    def _is_plain(self, x: Tensor) -> bool:
        """Whether nothing but the product of x's one row is wanted: no gradient, no graph, no row that is never masked."""
        if torch.compiler.is_compiling() or type(x) is not Tensor or (x.requires_grad and torch.is_grad_enabled()):
            return False
        return self.state.all_dense or self.state.dense_rows is None

    def masked(self, x: Tensor) -> Tensor:
        """The input x (..., in) of a dense product: as it is, or with its dropped values at zero."""
        if self.state.all_dense:
            return x
        kernel = self.kernel
        if kernel is None or torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
            return self.mask(x)
        if x.numel() == 0 or x.device.index != torch.cuda.current_device():
            return self.mask(x)
        return kernel(x, rows_for(self.state.dense_rows, x))

    def mask(self, x: Tensor) -> Tensor:
        """`mask.mask_input` of x (..., in), bit for bit, in fewer passes."""
        if not torch.compiler.is_compiling():
            if self._version != _version(self.threshold):
                self._limit_now()
            if self.open:
                return x
            if x.is_cpu and not (x.requires_grad and torch.is_grad_enabled()):
                return self._mask_vectorised(x)
        dropped = x.abs() <= self.limit
        dense = rows_for(self.state.dense_rows, x)
        if dense is not None:
            dropped &= dense.logical_not().unsqueeze(-1)
        return torch.where(dropped, self.zero, x)

    def _mask_vectorised(self, x: Tensor) -> Tensor:
        """`mask` in C, or by operators that torch has vector code for on a CPU; the last keeps a NaN."""
        dense = rows_for(self.state.dense_rows, x)
        if self.row is not None and type(x) is Tensor and x.dtype == self.dtype and x.numel():
            return native.mask(x, self.norm, self.threshold, dense)
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
        self._version = _version(self.threshold)
        # Asking a GPU would make the host wait for it.
        self.cut = torch.nan if limit.is_cuda else float(self.threshold)
        self.open = self.cut < 0


def _rows(weights: Sequence[Tensor]) -> Tensor:
    """The weights (out_i, in) below each other; a single one as it is."""
    if len(weights) == 1:
        return weights[0].detach().contiguous()
    return torch.cat([w.detach() for w in weights])


def _version(tensor: Tensor) -> int:
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
