"""Scales and zeros of groups of weights, searched by the error that they make, and the nearest codes to given ones."""

from __future__ import annotations

import torch
from torch import Tensor

from wina_calib.quantization.formats import LIMIT_8, Quantized, WeightFormat, pack_codes, pack_zeros

# Shares of the groups' whole range that a scale may cover: large weights are cut off where the others gain more by it.
FIRST_SHARE, LAST_SHARE, SHARES = 0.75, 1.05, 8
_SHARES = tuple(FIRST_SHARE + (LAST_SHARE - FIRST_SHARE) * i / (SHARES - 1) for i in range(SHARES))
_ROW_SHARES = tuple(0.8 + 0.2 * i / 7 for i in range(8))


def best_scales(weights: Tensor, form: WeightFormat) -> tuple[Tensor, Tensor]:
    """Scale and zero of each group with the least squared error.

    Args:
        weights: (..., group_size) float32.
        form: whether zeros are free.

    Returns:
        scales (..., 1), float32 with the values of float16, never 0; zeros (..., 1) float32 of 0 to the highest code.
    """
    highest = form.highest_code
    if form.zero_point:
        low, high = weights.amin(-1, keepdim=True).clamp_max_(0), weights.amax(-1, keepdim=True).clamp_min_(0)
        span = high - low
        zero = (low * (-highest) / _not_zero(span)).round_()
        candidates = [(span * (share / highest), zero) for share in _SHARES]
    else:
        largest = weights.gather(-1, weights.abs().argmax(-1, keepdim=True))
        zero = torch.full_like(largest, form.symmetric_zero)
        ends = (-form.symmetric_zero, highest - form.symmetric_zero)  # the largest may lie at either end of the codes
        candidates = [(largest * (share / end), zero) for end in ends for share in _SHARES]
    best, least = candidates[0][0], torch.full_like(zero, torch.inf)
    for scale, _ in candidates:
        least, best = _better(weights, scale, zero, highest, least, best)
    codes = nearest(weights, _not_zero(best), zero, highest).sub_(zero)
    fitted = (codes * weights).sum(-1, keepdim=True) / _not_zero(codes.square().sum(-1, keepdim=True))
    least, best = _better(weights, fitted, zero, highest, least, best)
    largest_half = torch.finfo(torch.float16).max
    return _not_zero(best.clamp(-largest_half, largest_half).half().float()), zero


def nearest(weights: Tensor, scales: Tensor, zeros: Tensor, highest: int) -> Tensor:
    """Codes 0 to `highest`, float32, nearest to weights (..., group_size) at scales and zeros (..., 1)."""
    return (weights / scales).add_(zeros).round_().clamp_(0, highest)


def quantize_nearest(weight_t: Tensor, form: WeightFormat) -> Quantized:
    """Round weights (in, out) to the nearest codes: no input makes up for another's error."""
    weights = weight_t.float()
    if form.bits == 8:
        scales = best_row_scales(weights)
        return Quantized(form, to_int8(weights, scales), scales)
    groups = weights.unflatten(-1, (-1, form.group_size))
    scales, zeros = best_scales(groups, form)
    return packed(nearest(groups, scales, zeros, form.highest_code), scales, zeros, form)


def packed(codes: Tensor, scales: Tensor, zeros: Tensor, form: WeightFormat) -> Quantized:
    """Stored form of codes (in, groups, group_size), scales and zeros (in, groups, 1), float32."""
    stored = pack_zeros(zeros.squeeze(-1).to(torch.uint8)) if form.zero_point else None
    return Quantized(form, pack_codes(codes.to(torch.uint8), form.group_size), scales.squeeze(-1).half(), stored)


def best_row_scales(weights: Tensor) -> Tensor:
    """Scale of each output of weights (in, out) at 8 bits with the least squared error, (out,) float32, never 0."""
    largest = _not_zero(weights.abs().amax(0)) / LIMIT_8
    best, least = largest, torch.full_like(largest, torch.inf)
    for share in _ROW_SHARES:
        scale = largest * share
        error = torch.addcmul(weights, (weights / scale).round_().clamp_(-LIMIT_8, LIMIT_8), scale, value=-1)
        found = error.square_().sum(0)
        better = found < least
        least, best = torch.where(better, found, least), torch.where(better, scale, best)
    return best


def to_int8(weights: Tensor, scales: Tensor) -> Tensor:
    """Codes int8 of weights (..., out) at scales (out,)."""
    return (weights / scales).round_().clamp_(-LIMIT_8, LIMIT_8).to(torch.int8)


def _better(
    weights: Tensor, scale: Tensor, zero: Tensor, highest: int, least: Tensor, best: Tensor
) -> tuple[Tensor, Tensor]:
    """The lesser error and its scale, of the best so far and one more; a scale of 0 is none."""
    usable = _not_zero(scale)
    error = torch.addcmul(weights, nearest(weights, usable, zero, highest).sub_(zero), usable, value=-1)
    found = error.square_().sum(-1, keepdim=True)
    better = (found < least) & (scale != 0)
    return torch.where(better, found, least), torch.where(better, scale, best)


def _not_zero(values: Tensor) -> Tensor:
    return torch.where(values == 0, 1.0, values)
