"""Quantizers: less error than rounding, the same bytes each time, and inputs that never occur."""

import pytest
import torch

from wina_calib.errors import NumericError
from wina_calib.quantization.formats import WeightFormat
from wina_calib.quantization.gptq import InputSums, aimed, output_error, quantize
from wina_calib.quantization.scales import best_scales, nearest, quantize_nearest

FORMATS = [
    WeightFormat(3, 32),
    WeightFormat(4, 32),
    WeightFormat(4, 64),
    WeightFormat(4, 64, zero_point=False),
    WeightFormat(8),
]


def problem(width: int = 200, out: int = 128, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (in, out) and the Hessian of correlated inputs of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) / width**0.5
    x = (
        torch.randn(1000, width, generator=generator)
        @ (mixing + torch.eye(width))
        * torch.rand(width, generator=generator)
    )
    hessian = InputSums(width, torch.device("cpu"))
    hessian.add(x)
    return torch.randn(width, out, generator=generator), hessian.hessian


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_each_step_lowers_the_error_of_outputs(form: WeightFormat) -> None:
    weights, hessian = problem()
    rounded = output_error(weights, quantize_nearest(weights, form), hessian)
    once, twice, often = (output_error(weights, quantize(weights, hessian, form, sweeps=n), hessian) for n in (0, 1, 3))
    assert once < 0.75 * rounded
    assert once > twice > often


def test_each_bit_halves_the_error_of_outputs() -> None:
    weights, hessian = problem()
    three, four = (
        output_error(weights, quantize(weights, hessian, WeightFormat(bits, 32)), hessian) for bits in (3, 4)
    )
    assert 1.8 < three / four < 2.5
    assert output_error(weights, quantize(weights, hessian, WeightFormat(8)), hessian) < four / 8


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_weights_that_the_format_holds_stay(form: WeightFormat) -> None:
    weights, hessian = problem()
    held = quantize_nearest(weights, form).dequantize()
    if form.bits == 8:  # its scales are searched, so the largest code need not be 127 again
        assert (quantize(held, hessian, form).dequantize() - held).abs().max() < 0.01 * held.abs().max()
    else:
        assert output_error(held, quantize(held, hessian, form), hessian) < 0.01


def test_the_first_pass_is_gptq_as_published() -> None:
    """Column by column with the inverse Hessian, the scales given: the same codes as by our triangular form."""
    weights, hessian = problem(width=24, out=32)
    form = WeightFormat(8)
    ours = quantize(weights, hessian, form, sweeps=0)
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(24, dtype=torch.float64)
    order = hessian.diagonal().argsort(descending=True)
    inverse = torch.linalg.inv(damped[order][:, order])
    factor = torch.linalg.cholesky(inverse, upper=True)
    left = weights.double()[order]
    codes = torch.empty_like(left)
    for j in range(24):
        codes[j] = (left[j] / ours.scales).round().clamp(-127, 127)
        error = (left[j] - codes[j] * ours.scales) / factor[j, j]
        left[j:] -= factor[j, j:, None] * error
    assert torch.equal(ours.codes[order].double(), codes)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_inputs_that_never_occur_are_rounded(form: WeightFormat) -> None:
    weights, hessian = problem()
    dead = slice(50, 60)
    hessian[dead], hessian[:, dead] = 0, 0
    made = quantize(weights, hessian, form)
    if form.bits != 8:
        assert torch.equal(made.dequantize()[dead], quantize_nearest(weights, form).dequantize()[dead])
    nothing = quantize(weights, torch.zeros_like(hessian), form)
    assert torch.equal(nothing.dequantize(), quantize_nearest(weights, form).dequantize())


def test_the_same_bytes_each_time_and_memory_is_left_alone() -> None:
    weights, hessian = problem()
    before = weights.clone(), hessian.clone()
    made, again = (quantize(weights, hessian, WeightFormat(4, 64)) for _ in range(2))
    assert torch.equal(made.codes, again.codes)
    assert torch.equal(made.scales, again.scales)
    assert torch.equal(weights, before[0])
    assert torch.equal(hessian, before[1])


def test_a_hessian_is_the_sum_of_all_rows() -> None:
    x = torch.randn(3, 5, 7)
    hessian = InputSums(7, torch.device("cpu"))
    hessian.add(x[:2].bfloat16())
    hessian.add(x[2])
    rows = torch.cat([x[:2].bfloat16().float().flatten(0, 1), x[2]])
    assert torch.allclose(hessian.hessian, rows.t() @ rows, atol=1e-4)
    again = InputSums(7, torch.device("cpu"))
    again.add(x[2], agreed=lambda _: hessian.unit)
    again.add(x[:2].bfloat16())
    assert torch.equal(again.parts, hessian.parts)  # in any order, which other processes may have
    with pytest.raises(NumericError, match="NaN or infinite"):
        again.add(x * torch.inf)


def test_a_hessian_that_float32_cannot_decompose() -> None:
    weights, _ = problem(width=64, out=32)
    x = torch.randn(4, 64) * torch.logspace(-4, 6, 64)
    made = quantize(weights, x.t() @ x, WeightFormat(4, 32), damping=1e-9)
    assert made.scales.isfinite().all()


@pytest.mark.parametrize("zero_point", [True, False])
def test_scales_are_near_the_best_of_a_fine_grid(zero_point: bool) -> None:
    weights = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    form = WeightFormat(4, 64, zero_point=zero_point)
    scales, zeros = best_scales(weights, form)

    def error(scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        return ((nearest(weights, scale, zero, 15) - zero) * scale - weights).square().sum(-1, keepdim=True)

    largest = weights.abs().amax(-1, keepdim=True)
    grid = [sign * largest / 7.5 * share for share in torch.linspace(0.5, 1.2, 60).tolist() for sign in (1, -1)]
    offsets = range(16) if zero_point else (8,)
    best = torch.stack([error(s, torch.full_like(s, z)) for s in grid for z in offsets]).amin(0)
    assert error(scales, zeros).sum() < 1.02 * best.sum()
    assert torch.equal(scales, scales.half().float())


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_weights_of_any_size_give_finite_ones(form: WeightFormat, size: float) -> None:
    made = quantize_nearest(torch.randn(4, 64) * size, form)
    assert made.dequantize().isfinite().all()
    if size == 0:
        assert not made.dequantize().any()


def test_numbers_that_are_none_are_refused() -> None:
    weights, hessian = problem(width=8, out=32)
    with pytest.raises(NumericError, match="NaN or infinite"):
        quantize(weights, hessian * torch.nan, WeightFormat(4, 32))
    weights[3, 3] = torch.inf
    with pytest.raises(NumericError, match="NaN or infinite"):
        quantize(weights, hessian, WeightFormat(4, 32))


def test_aimed_weights_make_of_inputs_what_the_whole_ones_should_have_given() -> None:
    """What is lacking goes with what is there, so weights can make up for it; unless little is allowed to change."""
    generator = torch.Generator().manual_seed(0)
    there = torch.randn(4000, 16, generator=generator)
    lacking = 0.3 * there @ torch.randn(16, 16, generator=generator) + 0.1 * torch.randn(4000, 16, generator=generator)
    weights = torch.randn(16, 8, generator=generator)
    wanted = (there + lacking) @ weights
    sums = InputSums(16, torch.device("cpu"))
    for rows, missing in zip(there.split(1000), lacking.split(1000), strict=True):
        sums.add(rows, missing)
    best = torch.linalg.lstsq(there, wanted).solution
    found = aimed(weights, sums.hessian, sums.lacking, ridge=1e-6)
    assert torch.allclose(found, best, atol=1e-3)
    off = [
        float((there @ aimed(weights, sums.hessian, sums.lacking, ridge=r) - wanted).norm()) for r in (0.1, 1.0, 1e4)
    ]
    assert (
        float((there @ best - wanted).norm())
        < off[0]
        < off[1]
        < off[2]
        < 1.001 * float((there @ weights - wanted).norm())
    )
    nothing = InputSums(16, torch.device("cpu"))
    nothing.add(there, torch.zeros_like(there))
    assert torch.equal(aimed(weights, nothing.hessian, nothing.lacking), weights)
