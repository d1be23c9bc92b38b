"""The innermost loop of GPTQ in Triton, on a GPU or, with TRITON_INTERPRET=1, on the CPU, against the one in torch."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

from wina_calib.quantization import gptq
from wina_calib.quantization.formats import WeightFormat
from wina_calib.quantization.gptq import InputSums, output_error, quantize

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
FORMATS = [WeightFormat(bits, size, zero_point=z) for bits in (3, 4) for size in (32, 64) for z in (True, False)]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        find_spec("triton") is None or not (INTERPRET or torch.cuda.is_available()),
        reason="needs Triton and a GPU or TRITON_INTERPRET=1",
    ),
]


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).to("cpu" if INTERPRET else "cuda")


@pytest.mark.parametrize("form", [*FORMATS, WeightFormat(8)], ids=str)
@pytest.mark.parametrize("count", [1, 5, 16])
@pytest.mark.parametrize("turned", [False, True])
def test_it_computes_what_torch_does(form: WeightFormat, count: int, turned: bool) -> None:
    from wina_calib.quantization import gptq_card

    torch.manual_seed(0)
    weights, errors = drawn(count, 192), 0.1 * drawn(count, 192)
    weights[0, :40] = 0
    moved, feedback = weights + 0.1 * drawn(count, 192), 0.3 * drawn(count + 3, count + 9)[:count, :count]
    if turned:  # as a decomposition on a card lies
        feedback = feedback.t()
    made = []
    for code in (gptq, gptq_card):
        few = weights.clone(), moved.clone(), errors.clone(), torch.zeros_like(weights)
        scales = torch.ones(count, 1 if form.bits == 8 else 192 // form.group_size, 1, device=weights.device)
        zeros = torch.zeros_like(scales)
        if form.bits == 8:
            code.quantize_int8(few, weights.abs().amax(0).clamp_min(0.1) / 127, feedback)
        else:
            code.quantize_int4(form, few, scales, zeros, feedback)
        made.append((*few[2:], scales, zeros))
    for wanted, found in zip(*made, strict=True):
        near = (wanted - found).abs() <= 1e-5 * wanted.abs().clamp_min(1)
        assert near.float().mean() > 0.98  # two codes can be as near


@pytest.mark.parametrize("form", [WeightFormat(4, 64), WeightFormat(8)], ids=str)
def test_weights_are_as_good_as_on_a_cpu(form: WeightFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    from wina_calib.quantization import gptq_card

    torch.manual_seed(0)
    x, weights = torch.randn(2000, 192) @ (torch.eye(192) + torch.randn(192, 192) / 14), torch.randn(192, 128)
    sums = InputSums(192, torch.device("cpu"))
    sums.add(x)
    device = drawn(1).device
    for sweeps in (0, 1):
        here = quantize(weights, sums.hessian, form, sweeps=sweeps)
        with monkeypatch.context() as patch:
            patch.setattr(gptq, "_code", lambda _: gptq_card)
            there = quantize(weights.to(device), sums.hessian.to(device), form, sweeps=sweeps)
        wanted = output_error(weights, here, sums.hessian)
        assert output_error(weights, there.to(torch.device("cpu")), sums.hessian) == pytest.approx(wanted, rel=2e-3)
