"""Quantization of a mask group by the error of its outputs, in the manner of GPTQ (arXiv 2210.17323).

With the Hessian H = X^T X of a site's masked inputs, quantized weights Q are wanted that make tr((W - Q) H (W - Q)^T) small.
Inputs are quantized in falling order of H's diagonal: each one's weights are first moved by what the errors of those before it
call for, w_j + sum_k A_kj (w_k - q_k). With the damped H = R R^T, R upper triangular in this order, A_kj = R_kj / R_jj gives
GPTQ's own updates. Sweeps follow that quantize every input again, the errors of all others given: A_kj = H_kj / H_jj. Each
lowers the same error. Scales and zeros of int4 are chosen for the moved weights, a few inputs together; int8's before all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wina_calib.errors import NumericError
from wina_calib.quantization.formats import LIMIT_8, Quantized, WeightFormat
from wina_calib.quantization.scales import best_row_scales, best_scales, nearest, packed

DAMPING = 0.01  # of the mean of the Hessian's diagonal, added to it
SWEEPS = 2
_BLOCK = 128  # inputs whose weights are moved by all errors outside of them at once
_TOGETHER = 16  # inputs whose scales are chosen together


class HessianSum:
    """Sum of x x^T over rows of inputs.

    Attributes:
        total: (width, width) float32.
        rows: so many were added.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.total = torch.zeros(width, width, dtype=torch.float32, device=device)
        self.rows = 0

    def add(self, x: Tensor) -> None:
        """Add rows x (..., width), masked as the product will see them."""
        rows = x.reshape(-1, x.shape[-1])
        self.rows += rows.shape[0]
        if rows.is_cuda and rows.dtype != torch.float32:
            self.total += torch.mm(rows.t(), rows, out_dtype=torch.float32)  # 16-bit products are exact in float32
        else:
            rows = rows.float()
            self.total.addmm_(rows.t(), rows)


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
        hessian: (in, in), `HessianSum.total`.
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
        """Quantize some inputs one after another: `moved` (n, out) by the errors of all others, `feedback` (n, n) among them."""
        form, weights, errors = self.problem.form, self.problem.weights[few], self.errors[few]
        inner = feedback.clone()
        inner.fill_diagonal_(0)
        if form.bits == 8:
            assert self.problem.row_scales is not None
            for j in range(len(moved)):
                target = torch.addmv(moved[j], errors.t(), inner[:, j])
                codes = (target / self.problem.row_scales).round_().clamp_(-LIMIT_8, LIMIT_8)
                self.codes[few][j] = codes
                torch.addcmul(weights[j], codes, self.problem.row_scales, value=-1, out=errors[j])
            return
        expected = torch.addmm(moved, inner.t(), errors).unflatten(-1, (-1, form.group_size))
        scales, zeros = best_scales(expected, form)
        self.scales[few], self.zeros[few] = scales, zeros
        shape = expected.shape[1:]
        for j in range(len(moved)):
            target = torch.addmv(moved[j], errors.t(), inner[:, j]).view(shape)
            codes = nearest(target, scales[j], zeros[j])
            self.codes[few][j] = codes.view(-1)
            value = (codes - zeros[j]) * scales[j]
            torch.sub(weights[j], value.view(-1), out=errors[j])

    def quantized(self, order: Tensor) -> Quantized:
        """The stored form, inputs in their own order again."""
        form, back = self.problem.form, order.argsort()
        if form.bits == 8:
            assert self.problem.row_scales is not None
            return Quantized(form, self.codes[back].to(torch.int8), self.problem.row_scales)
        codes = self.codes[back].unflatten(-1, (-1, form.group_size))
        return packed(codes, self.scales[back], self.zeros[back], form)
