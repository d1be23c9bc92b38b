"""Quantization of a mask group by the error of its outputs, in the manner of GPTQ (arXiv 2210.17323).

With the Hessian H = X^T X of a site's masked inputs, quantized weights Q are wanted that make tr((W - Q) H (W - Q)^T) small.
Inputs are quantized in falling order of H's diagonal: each one's weights are first moved by what the errors of those before it
call for, w_j + sum_k A_kj (w_k - q_k). With the damped H = R R^T, R upper triangular in this order, A_kj = R_kj / R_jj gives
GPTQ's own updates. Sweeps follow that quantize every input again, the errors of all others given: A_kj = H_kj / H_jj. Each
lowers the same error. Scales and zeros of int4 are chosen for the moved weights, a few inputs together; int8's before all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from wina_calib.errors import NumericError
from wina_calib.quantization.formats import LIMIT_8, Quantized, WeightFormat
from wina_calib.quantization.scales import best_row_scales, best_scales, nearest, packed

DAMPING = 0.01  # of the mean of the Hessian's diagonal, added to it
SWEEPS = 1
_BLOCK = 128  # inputs whose weights are moved by all errors outside of them at once
_TOGETHER = 16  # inputs whose scales are chosen together
_UNIT_BITS = 42  # the largest sum of the first rows in units; 2 million times as much can be added
_ROWS = 1024  # of a sum that are converted together


class HessianSum:
    """Sum of x x^T over rows of inputs, in whole numbers of a unit: the same in whatever order parts are added.

    Attributes:
        parts: (width, width) int64.
        unit: what 1 stands for; None before the first part.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.parts = torch.zeros(width, width, dtype=torch.int64, device=device)
        self.unit: float | None = None

    def add(self, x: Tensor, agreed: Callable[[float], float] = float) -> None:
        """Add rows x (..., width), masked as the product will see them.

        Args:
            x: the rows.
            agreed: called once, with the unit that the first rows suggest; gives that of all who add.
        """
        rows = x.reshape(-1, x.shape[-1])
        if rows.is_cuda and rows.dtype != torch.float32:
            # Products of 16-bit numbers are exact in float32.
            products = torch.mm(rows.t(), rows, out_dtype=torch.float32)
        else:
            products = rows.float().t() @ rows.float()
        if self.unit is None:
            largest = float(products.diagonal().max())
            self.unit = agreed(2.0 ** (math.frexp(largest)[1] - _UNIT_BITS) if 0 < largest < math.inf else 1.0)
        if not bool(products.isfinite().all()):
            raise NumericError("sums of squared inputs are NaN or infinite. Try --dtype float32.")
        for own, part in zip(self.parts.split(_ROWS), products.split(_ROWS), strict=True):
            own += (part.double() / self.unit).round_().long()

    @property
    def total(self) -> Tensor:
        """The sum (width, width), float32."""
        found = torch.empty(self.parts.shape, dtype=torch.float32, device=self.parts.device)
        for into, own in zip(found.split(_ROWS), self.parts.split(_ROWS), strict=True):
            into.copy_(own.double() * (self.unit or 0.0))
        return found


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
                self._quantize(few, others, feedback[few, few].clone().fill_diagonal_(0))

    def _quantize(self, few: slice, moved: Tensor, feedback: Tensor) -> None:
        """Quantize some inputs: `moved` (n, out) by the errors of all others, `feedback` (n, n) among themselves."""
        form = self.problem.form
        if form.bits == 8:
            assert self.problem.row_scales is not None
            run = _recorded(_quantize_int8, None, moved)
            made = run(self.problem.weights[few], moved, self.errors[few], feedback, self.problem.row_scales)
        else:
            run = _recorded(_quantize_int4, form, moved)
            made = run(self.problem.weights[few], moved, self.errors[few], feedback)
            self.scales[few], self.zeros[few] = made[2], made[3]
        self.codes[few], self.errors[few] = made[0], made[1]

    def quantized(self, order: Tensor) -> Quantized:
        """The stored form, inputs in their own order again."""
        form, back = self.problem.form, order.argsort()
        if form.bits == 8:
            assert self.problem.row_scales is not None
            return Quantized(form, self.codes[back].to(torch.int8), self.problem.row_scales)
        codes = self.codes[back].unflatten(-1, (-1, form.group_size))
        return packed(codes, self.scales[back], self.zeros[back], form)


def _quantize_int4(
    form: WeightFormat, weights: Tensor, moved: Tensor, errors: Tensor, feedback: Tensor
) -> tuple[Tensor, ...]:
    """Quantize some inputs one after another.

    Args:
        form: the format.
        weights: (n, out).
        moved: (n, out), weights moved by the errors of all other inputs.
        errors: (n, out) as they were before.
        feedback: (n, n) among these inputs, its diagonal zero.

    Returns:
        codes and errors (n, out), scales and zeros (n, groups, 1).
    """
    expected = torch.addmm(moved, feedback.t(), errors).unflatten(-1, (-1, form.group_size))
    scales, zeros = best_scales(expected, form)
    codes, errors = torch.empty_like(expected), errors.clone()
    for j in range(len(moved)):
        target = torch.addmv(moved[j], errors.t(), feedback[:, j]).view(expected.shape[1:])
        codes[j] = nearest(target, scales[j], zeros[j], form.highest_code)
        value = (codes[j] - zeros[j]) * scales[j]
        torch.sub(weights[j], value.view(-1), out=errors[j])
    return codes.flatten(1), errors, scales, zeros


def _quantize_int8(
    _: None, weights: Tensor, moved: Tensor, errors: Tensor, feedback: Tensor, row_scales: Tensor
) -> tuple[Tensor, ...]:
    """The same at 8 bits, with the scales `row_scales` (out,): codes and errors (n, out)."""
    codes, errors = torch.empty_like(moved), errors.clone()
    for j in range(len(moved)):
        target = torch.addmv(moved[j], errors.t(), feedback[:, j])
        codes[j] = (target / row_scales).round_().clamp_(-LIMIT_8, LIMIT_8)
        torch.addcmul(weights[j], codes[j], row_scales, value=-1, out=errors[j])
    return codes, errors


def _recorded(
    function: Callable[..., tuple[Tensor, ...]], form: Any, moved: Tensor
) -> Callable[..., tuple[Tensor, ...]]:
    """The function of a format, on CUDA as a graph: its hundreds of small kernels take longer to start than to run."""
    if not moved.is_cuda:
        return partial(function, form)
    return _graph(function, form, tuple(moved.shape), moved.device)


@lru_cache(maxsize=32)
def _graph(
    function: Callable[..., tuple[Tensor, ...]], form: Any, shape: tuple[int, ...], device: torch.device
) -> _Graph:
    return _Graph(partial(function, form))


class _Graph:
    """A function of tensors of fixed shapes, recorded when it is first called. Results are overwritten by the next call."""

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        self._function = function
        self._arguments: tuple[Tensor, ...] = ()

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        with torch.cuda.device(arguments[0].device):
            if not self._arguments:
                self._record(tuple(a.clone() for a in arguments))
            for own, given in zip(self._arguments, arguments, strict=True):
                own.copy_(given)
            self._graph.replay()
        return self._results

    def _record(self, arguments: tuple[Tensor, ...]) -> None:
        aside, here = torch.cuda.Stream(), torch.cuda.current_stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):  # what is made at first use must not be recorded
            self._function(*arguments)
        here.wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        # The next layer comes to the card in another thread meanwhile, for which memory may have to be had.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._results = self._function(*arguments)
        self._arguments = arguments
