"""Weights that are rounded in the forward pass: what they become, and where their gradients go."""

import pytest
import tiny
import torch

from wina_calib.model.architecture import describe
from wina_calib.quantization.formats import WeightFormat
from wina_calib.quantization.scales import quantize_nearest
from wina_calib.recovery import straight_through as module
from wina_calib.recovery.straight_through import rounded, straight_through

IDS = torch.randint(4, 300, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("together", [1, 5000, 1 << 25])
def test_rounding_many_together_is_rounding_each(bits: int, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOGETHER", together)
    torch.manual_seed(0)
    weights = [torch.randn(out, width) for out, width in ((64, 16), (32, 48), (96, 16), (32, 16))]
    form = WeightFormat(bits, 32)
    for weight, near in zip(weights, rounded(weights, form), strict=True):
        assert torch.equal(near, quantize_nearest(weight.t(), form).whole(torch.float32))


def test_gradients_at_rounded_weights_are_the_weights_own() -> None:
    model = tiny.make("llama")
    weight = model.model.layers[0].mlp.up_proj.weight
    own = weight.detach().clone()
    with straight_through(model, describe(model), WeightFormat(4, 32)):
        assert not torch.equal(weight, own)
        model(IDS).logits.square().mean().backward()
    assert torch.equal(weight, own)
    assert float(weight.grad.abs().sum()) > 0


def test_weights_come_back_after_an_error() -> None:
    model = tiny.make("llama")
    own = model.model.layers[1].self_attn.q_proj.weight.detach().clone()
    with pytest.raises(ZeroDivisionError), straight_through(model, describe(model), WeightFormat(8)):
        _ = 1 / 0
    assert torch.equal(model.model.layers[1].self_attn.q_proj.weight, own)
