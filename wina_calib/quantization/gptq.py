"""Quantization of a mask group by the error of its outputs, in the manner of GPTQ (arXiv 2210.17323).

With the Hessian H = X^T X of a site's inputs, quantized weights Q are wanted that make tr((W - Q) H (W - Q)^T) small.
Inputs are quantized in falling order of H's diagonal: each one's weights are first moved by what the errors of those before it
call for, w_j + sum_k A_kj (w_k - q_k). With the damped H = R R^T, R upper triangular in this order, A_kj = R_kj / R_jj gives
GPTQ's own updates. Sweeps follow that quantize every input again, the errors of all others given: A_kj = H_kj / H_jj. Each
lowers the same error. Scales and zeros of int4 are chosen for the moved weights, a few inputs together; int8's before all.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from wina_calib.errors import NumericError
from wina_calib.quantization.formats import LIMIT_8, Quantized, WeightFormat
from wina_calib.quantization.scales import best_row_scales, best_scales, nearest, packed

DAMPING = 0.01  # of the mean of the Hessian's diagonal, added to it
RIDGE = 0.1  # the same, of `aimed`
SWEEPS = 1
_BLOCK = 128  # inputs whose weights are moved by all errors outside of them at once
_TOGETHER = 16  # inputs whose scales are chosen together
_UNIT_BITS = 42  # the largest sum of the first rows in units; 2 million times as much can be added
_ROWS = 1024  # of a sum that are converted together
# Of some inputs: weights, weights moved by the errors of all others, errors, and codes, each (n, out); the last two are written.
Few = tuple[Tensor, Tensor, Tensor, Tensor]


class InputSums:
    """Sums over rows of a site's inputs x, and of what they lack, e: H = sum of x x^T and C = sum of e x^T.

    Weights W are wanted that make of x what they made of x + e: see `aimed`. Sums are whole numbers of a unit: the same in
    whatever order parts are added.

    Attributes:
        width: of the inputs.
        parts: (2, width, width) int64, of H and of C.
        unit: what 1 stands for; None before the first part.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.width = width
        self.parts = torch.zeros(2, width, width, dtype=torch.int64, device=device)
        self.unit: float | None = None

    def add(self, x: Tensor, lacking: Tensor | None = None, agreed: Callable[[float], float] = float) -> None:
        """Add rows.

        Args:
            x: (..., width), as the product will see them.
            lacking: e, of the same shape; None where nothing lacks.
            agreed: called once, with the unit that the first rows suggest; gives that of all who add.
        """
        rows = x.reshape(-1, x.shape[-1])
        squares = _products(rows, rows)
        if self.unit is None:
            largest = float(squares.diagonal().max())
            self.unit = agreed(2.0 ** (math.frexp(largest)[1] - _UNIT_BITS) if 0 < largest < math.inf else 1.0)
        _add(self.parts[0], squares, self.unit)
        if lacking is not None:
            _add(self.parts[1], _products(lacking.reshape(rows.shape).to(rows.dtype), rows), self.unit)

    @property
    def hessian(self) -> Tensor:
        """H (width, width), float32."""
        return self._sum(0)

    @property
    def lacking(self) -> Tensor:
        """C (width, width), float32."""
        return self._sum(1)

    def _sum(self, which: int) -> Tensor:
        found = torch.empty(self.parts.shape[1:], dtype=torch.float32, device=self.parts.device)
        for into, own in zip(found.split(_ROWS), self.parts[which].split(_ROWS), strict=True):
            into.copy_(own.double() * (self.unit or 0.0))
        return found


def _products(left: Tensor, right: Tensor) -> Tensor:
    """left^T right of rows (n, width), float32."""
    if left.is_cuda and left.dtype != torch.float32:
        # Products of 16-bit numbers are exact in float32.
        return torch.mm(left.t(), right, out_dtype=torch.float32)
    return left.float().t() @ right.float()


def _add(sums: Tensor, products: Tensor, unit: float) -> None:
    if not bool(products.isfinite().all()):
        raise NumericError("sums of squared inputs are NaN or infinite. Try --dtype float32.")
    for own, part in zip(sums.split(_ROWS), products.split(_ROWS), strict=True):
        own += (part.double() / unit).round_().long()


def aimed(weight_t: Tensor, hessian: Tensor, lacking: Tensor, *, ridge: float = RIDGE) -> Tensor:
    """Weights that make of a site's inputs, as nearly as can be, what `weight_t` made of the inputs they should be.

    The least of the squared error plus `ridge` times the mean of H's diagonal times the squared change of the weights, in the
    manner of GPTAQ (arXiv 2504.02692).

    Args:
        weight_t: (in, out).
        hessian: H (in, in) of `InputSums`.
        lacking: C (in, in) of the same.
        ridge: above 0.

    Returns:
        (in, out) float32.
    """
    weights = weight_t.float()
    if not bool(lacking.any()):
        return weights
    damped = hessian.clone()
    damped.diagonal().add_(ridge * float(hessian.diagonal().double().mean()))
    return weights + torch.cholesky_solve(lacking.t() @ weights, torch.linalg.cholesky(damped))


@dataclass(frozen=True)
class _Problem:
    """Weights (in, out) with inputs in the order of quantization, and the damped Hessian (in, in) in that order."""

    weights: Tensor
    hessian: Tensor
    form: WeightFormat
    row_scales: Tensor | None


def quantize(
    weight_t: Tensor, hessian: Tensor, form: WeightFormat, *, damping: float = DAMPING, sweeps: int = SWEEPS
) -> Quantized:
    """Quantize the weights of a mask group.

    Args:
        weight_t: (in, out), the projections side by side.
        hessian: H (in, in) of `InputSums`.
        form: the format.
        damping: share of the diagonal's mean that is added to the diagonal, above 0.
        sweeps: passes after the first.

    Raises:
        NumericError: weights or Hessian are NaN or infinite.
    """
    if not bool(weight_t.isfinite().all()) or not bool(hessian.isfinite().all()):
        raise NumericError("weights or sums of squared inputs are NaN or infinite. Try --dtype float32.")
    diagonal = hessian.diagonal()
    order = diagonal.argsort(descending=True, stable=True)
    mean = float(diagonal.double().mean()) or 1.0
    ordered, feedback = _damped(hessian[order][:, order].float(), damping * mean)
    weights = weight_t.float()[order]
    row_scales = best_row_scales(weights) if form.bits == 8 else None
    problem = _Problem(weights, ordered, form, row_scales)
    state = _State(problem)
    state.sweep(feedback, first=True)
    if sweeps:
        feedback = ordered / ordered.diagonal()
        for _ in range(sweeps):
            state.sweep(feedback, first=False)
    return state.quantized(order)


def output_error(weight_t: Tensor, quantized: Quantized, hessian: Tensor) -> float:
    """Relative error of the outputs: sqrt(tr(E H E^T) / tr(W H W^T))."""
    weights = weight_t.float()
    error = weights - quantized.dequantize()

    def energy(values: Tensor) -> float:
        return float(((hessian.float() @ values) * values).sum(dtype=torch.float64))

    whole = energy(weights)
    return (max(0.0, energy(error)) / whole) ** 0.5 if whole > 0 else 0.0


def _damped(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The damped Hessian, and A (in, in) of the module's text for the first pass, strictly upper triangular.

    Where rounding has left the Hessian without a decomposition, it is damped ten times as much.
    """
    hessian.diagonal().add_(damping)
    lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if int(failed):
        return _damped(hessian, 10 * damping)
    upper: Tensor = lower.flip(0, 1)
    return hessian, (upper / upper.diagonal()).triu_(1)


class _State:
    """Codes, scales, zeros and errors W - Q of all inputs in the order of quantization."""

    def __init__(self, problem: _Problem) -> None:
        self.problem = problem
        self.errors = torch.zeros_like(problem.weights)
        self.codes = torch.zeros_like(problem.weights)
        groups = 1 if problem.form.bits == 8 else problem.weights.shape[1] // problem.form.group_size
        self.scales = problem.weights.new_ones(len(problem.weights), groups, 1)
        self.zeros = torch.zeros_like(self.scales)

    def sweep(self, feedback: Tensor, *, first: bool) -> None:
        """Quantize every input, its weights moved by the others' errors times `feedback` (in, in)."""
        width, errors = len(self.errors), self.errors
        for start in range(0, width, _BLOCK):
            block = slice(start, min(start + _BLOCK, width))
            moved = self.problem.weights[block] + feedback[:start, block].t() @ errors[:start]
            if not first:
                moved += feedback[block.stop :, block].t() @ errors[block.stop :]
            for low in range(start, block.stop, _TOGETHER):
                few = slice(low, min(low + _TOGETHER, block.stop))
                others = moved[low - start : few.stop - start] + feedback[start:low, few].t() @ errors[start:low]
                if not first:
                    others += feedback[few.stop : block.stop, few].t() @ errors[few.stop : block.stop]
                self._quantize(few, others, feedback[few, few])

    def _quantize(self, few: slice, moved: Tensor, feedback: Tensor) -> None:
        """Quantize some inputs: `moved` (n, out) by the errors of all others, `feedback` (n, n) among themselves."""
        form, rows = self.problem.form, (self.problem.weights[few], moved, self.errors[few], self.codes[few])
        code = _code(moved.device.type)
        if form.bits == 8:
            code.quantize_int8(rows, self.problem.row_scales, feedback)
        else:
            code.quantize_int4(form, rows, self.scales[few], self.zeros[few], feedback)

    def quantized(self, order: Tensor) -> Quantized:
        """The stored form, inputs in their own order again."""
        form, back = self.problem.form, order.argsort()
        if form.bits == 8:
            assert self.problem.row_scales is not None
            return Quantized(form, self.codes[back].to(torch.int8), self.problem.row_scales)
        codes = self.codes[back].unflatten(-1, (-1, form.group_size))
        return packed(codes, self.scales[back], self.zeros[back], form)


@cache
def _code(device: str) -> Any:
    """The module whose `quantize_int4` and `quantize_int8` compute on a kind of device."""
    on_card = device == "cuda" and find_spec("triton") is not None
    return import_module("wina_calib.quantization.gptq_card") if on_card else sys.modules[__name__]


def quantize_int4(form: WeightFormat, few: Few, scales: Tensor, zeros: Tensor, feedback: Tensor) -> None:
    """Quantize some inputs at 3 or 4 bits one after another.

    Args:
        form: the format.
        few: of these inputs; errors are those before, and become their new ones.
        scales: (n, groups, 1), written.
        zeros: (n, groups, 1), written.
        feedback: (n, n) among these inputs, whose diagonal is left out.
    """
    weights, moved, errors, codes = few
    feedback = feedback.clone().fill_diagonal_(0)
    expected = torch.addmm(moved, feedback.t(), errors).unflatten(-1, (-1, form.group_size))
    scales[:], zeros[:] = best_scales(expected, form)
    for j in range(len(moved)):
        target = torch.addmv(moved[j], errors.t(), feedback[:, j]).view(expected.shape[1:])
        code = nearest(target, scales[j], zeros[j], form.highest_code)
        codes[j] = code.view(-1)
        torch.sub(weights[j], ((code - zeros[j]) * scales[j]).view(-1), out=errors[j])


def quantize_int8(few: Few, row_scales: Tensor, feedback: Tensor) -> None:
    """The same at 8 bits, with the scales `row_scales` (out,)."""
    weights, moved, errors, codes = few
    feedback = feedback.clone().fill_diagonal_(0)
    for j in range(len(moved)):
        target = torch.addmv(moved[j], errors.t(), feedback[:, j])
        codes[j] = (target / row_scales).round_().clamp_(-LIMIT_8, LIMIT_8)
        torch.addcmul(weights[j], codes[j], row_scales, value=-1, out=errors[j])
