# Triton reads annotations as its own types, so device functions have none.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"
# ruff: noqa: ANN001, ANN201, ANN202
"""The innermost loop of GPTQ on a card: a few inputs one after another, for one group of outputs a program.

What `gptq` computes in hundreds of small kernels is one here: the error of an input moves the inputs after it for the
same output alone, so that no group waits for another. Imported only when Triton is there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from wina_calib.quantization.formats import LIMIT_8, WeightFormat
from wina_calib.quantization.scales import FIRST_SHARE, LAST_SHARE, SHARES

_OUTPUTS = 64  # of a program at 8 bits


@triton.jit
def _rounded(x):
    """To whole numbers, halves to even; for magnitudes below 4 million."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _nearest(weights, scale, zero, HIGHEST: tl.constexpr):
    """As `scales.nearest`: (n, GROUP) at scales and zeros (n, 1)."""
    return _rounded(tl.minimum(tl.maximum(tl.math.div_rn(weights, scale) + zero, 0.0), HIGHEST))


@triton.jit
def _not_zero(x):
    return tl.where(x == 0.0, 1.0, x)


@triton.jit
def _better(weights, scale, zero, least, best, HIGHEST: tl.constexpr):
    usable = _not_zero(scale)
    error = weights - (_nearest(weights, usable, zero, HIGHEST) - zero) * usable
    found = tl.sum(error * error, 1, keep_dims=True)
    better = (found < least) & (scale != 0.0)
    return tl.where(better, found, least), tl.where(better, scale, best)


@triton.jit
def few_int4(
    WEIGHTS, MOVED, ERRORS, FEEDBACK, CODES, SCALES, ZEROS, N, OUT, GROUPS, row, column,
    FEW: tl.constexpr, GROUP: tl.constexpr, HIGHEST: tl.constexpr, FREE: tl.constexpr, MIDDLE: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """WEIGHTS, MOVED, ERRORS, CODES (N, OUT); FEEDBACK (N, N) of strides row, column; SCALES, ZEROS (N, GROUPS)."""
    group = tl.program_id(0)
    rows, across = tl.arange(0, FEW), tl.arange(0, GROUP)
    real = rows < N
    at = rows[:, None] * OUT + (group * GROUP + across)[None, :]
    here = real[:, None] & (across[None, :] < GROUP)
    moved = tl.load(MOVED + at, mask=here, other=0.0)
    weights = tl.load(WEIGHTS + at, mask=here, other=0.0)
    errors = tl.load(ERRORS + at, mask=here, other=0.0)
    expected = moved
    for k in range(FEW):
        error = tl.sum(tl.where(rows[:, None] == k, errors, 0.0), 0)
        by = tl.load(FEEDBACK + k * row + rows * column, mask=real & (rows * 0 + k < N), other=0.0)
        expected += tl.where(rows != k, by, 0.0)[:, None] * error[None, :]

    # Scales and zeros, as `scales.best_scales`.
    low, high = tl.min(expected, 1, keep_dims=True), tl.max(expected, 1, keep_dims=True)
    if FREE:
        low, high = tl.minimum(low, 0.0), tl.maximum(high, 0.0)
        span = high - low
        zero = _rounded(tl.math.div_rn(low * (-HIGHEST), _not_zero(span)))
    else:
        span = tl.where(high >= -low, high, low)
        zero = tl.full((FEW, 1), MIDDLE, tl.float32)
    least = tl.full((FEW, 1), float("inf"), tl.float32)
    best = span
    for share in range(SHARES):
        covered = span * (FIRST + (LAST - FIRST) * share / (SHARES - 1))
        if FREE:
            least, best = _better(expected, covered / HIGHEST, zero, least, best, HIGHEST)
        else:
            least, best = _better(expected, covered / -MIDDLE, zero, least, best, HIGHEST)
            least, best = _better(expected, covered / (HIGHEST - MIDDLE), zero, least, best, HIGHEST)
    codes = _nearest(expected, _not_zero(best), zero, HIGHEST) - zero
    fitted = tl.math.div_rn(
        tl.sum(codes * expected, 1, keep_dims=True), _not_zero(tl.sum(codes * codes, 1, keep_dims=True))
    )
    least, best = _better(expected, fitted, zero, least, best, HIGHEST)
    scale = tl.minimum(tl.maximum(best, -65504.0), 65504.0).to(tl.float16).to(tl.float32)
    scale = _not_zero(scale)

    codes = tl.zeros((FEW, GROUP), tl.float32)
    for j in range(FEW):
        by = tl.load(FEEDBACK + rows * row + j * column, mask=real & (rows * 0 + j < N), other=0.0)
        mine = (rows == j)[:, None]
        by = tl.where(rows != j, by, 0.0)[:, None]
        target = tl.sum(tl.where(mine, moved, 0.0) + by * errors, 0, keep_dims=True)
        own = tl.sum(tl.where(mine, scale, 0.0), 0, keep_dims=True)
        own_zero = tl.sum(tl.where(mine, zero, 0.0), 0, keep_dims=True)
        own = tl.where(own == 0.0, 1.0, own)
        code = _nearest(target, own, own_zero, HIGHEST)
        error = tl.sum(tl.where(mine, weights, 0.0), 0, keep_dims=True) - (code - own_zero) * own
        codes = tl.where(mine, code, codes)
        errors = tl.where(mine, error, errors)
    tl.store(CODES + at, codes, mask=here)
    tl.store(ERRORS + at, errors, mask=here)
    of_group = rows[:, None] * GROUPS + group + tl.zeros((1, 1), tl.int32)
    tl.store(SCALES + of_group, scale, mask=real[:, None])
    tl.store(ZEROS + of_group, zero, mask=real[:, None])


@triton.jit
def few_int8(
    WEIGHTS, MOVED, ERRORS, FEEDBACK, CODES, SCALES, N, OUT, row, column,
    FEW: tl.constexpr, BLOCK: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """The same with scales SCALES (OUT,) that are given."""
    rows, outs = tl.arange(0, FEW), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = rows < N
    at = rows[:, None] * OUT + outs[None, :]
    here = real[:, None] & (outs < OUT)[None, :]
    moved = tl.load(MOVED + at, mask=here, other=0.0)
    weights = tl.load(WEIGHTS + at, mask=here, other=0.0)
    errors = tl.load(ERRORS + at, mask=here, other=0.0)
    scale = tl.load(SCALES + outs, mask=outs < OUT, other=1.0)[None, :]
    codes = tl.zeros((FEW, BLOCK), tl.float32)
    for j in range(FEW):
        by = tl.load(FEEDBACK + rows * row + j * column, mask=real & (rows * 0 + j < N), other=0.0)
        mine = (rows == j)[:, None]
        target = tl.sum(tl.where(mine, moved, 0.0) + tl.where(rows != j, by, 0.0)[:, None] * errors, 0, keep_dims=True)
        code = _rounded(tl.minimum(tl.maximum(tl.math.div_rn(target, scale), -LIMIT), LIMIT))
        error = tl.sum(tl.where(mine, weights, 0.0), 0, keep_dims=True) - code * scale
        codes = tl.where(mine, code, codes)
        errors = tl.where(mine, error, errors)
    tl.store(CODES + at, codes, mask=here)
    tl.store(ERRORS + at, errors, mask=here)


def quantize_int4(
    form: WeightFormat, few: tuple[Tensor, Tensor, Tensor, Tensor], scales: Tensor, zeros: Tensor, feedback: Tensor
) -> None:
    """Quantize some inputs at 3 or 4 bits, in place.

    Args:
        form: the format.
        few: weights, weights moved by the errors of all other inputs, errors and codes, each (n, out), the last two written.
        scales: (n, groups, 1), written, as are `zeros`.
        zeros: the same.
        feedback: (n, n) among these inputs, whose diagonal is left out.
    """
    weights, moved, errors, codes = few
    groups = scales.shape[1]
    with torch.cuda.device_of(moved):
        few_int4[(groups,)](
            weights, moved, errors, feedback, codes, scales, zeros, len(moved), moved.shape[1], groups, *feedback.stride(),
            FEW=max(2, triton.next_power_of_2(len(moved))), GROUP=form.group_size, HIGHEST=form.highest_code,
            FREE=form.zero_point, MIDDLE=form.symmetric_zero, FIRST=FIRST_SHARE, LAST=LAST_SHARE, SHARES=SHARES,
        )  # fmt: skip


def quantize_int8(few: tuple[Tensor, Tensor, Tensor, Tensor], row_scales: Tensor, feedback: Tensor) -> None:
    """The same at 8 bits, with the scales `row_scales` (out,)."""
    weights, moved, errors, codes = few
    out = moved.shape[1]
    with torch.cuda.device_of(moved):
        few_int8[(triton.cdiv(out, _OUTPUTS),)](
            weights, moved, errors, feedback, codes, row_scales, len(moved), out, *feedback.stride(),
            FEW=max(2, triton.next_power_of_2(len(moved))), BLOCK=_OUTPUTS, LIMIT=float(LIMIT_8),
        )  # fmt: skip
