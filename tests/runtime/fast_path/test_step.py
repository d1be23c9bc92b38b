"""Decoder layers of a compiled step whose norms, activations and sums are computed with their products."""

from typing import Any

import pytest
import tiny
import torch
from compiled_steps import IDS, PROMPT, compiled, count, sparse
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

import wina_calib
from wina_calib.runtime.fast_path import step


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The way of cards, on which operators compute what kernels would."""
    monkeypatch.setattr(step, "DEVICES", ("cpu",))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def steps(model: PreTrainedModel, call: Any) -> Tensor:
    """Logits of tokens after a prompt."""
    cache = StaticCache(config=model.config, max_cache_len=IDS.shape[1])
    model(IDS[:, :PROMPT], **tiny.given(cache))
    found = [call(IDS[:, i : i + 1], **tiny.given(cache)).logits.clone() for i in range(PROMPT, PROMPT + 3)]
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@torch.no_grad()
def test_a_layer_is_four_operators_and_attention(family: str) -> None:
    model = sparse(family)
    layers = model.config.num_hidden_layers
    for sparsity in (0.5, 0.0):
        wina_calib.set_sparsity(model, sparsity)
        expected = steps(model, model)
        call, names = compiled(model)
        torch.testing.assert_close(steps(model, call), expected, atol=2e-3, rtol=2e-3)
        assert count(names, "group_step") == 4 * layers
        assert count(names, "group_product") == 0
        torch._dynamo.reset()


@pytest.mark.parametrize("what", ["hook", "other norm", "gelu"])
@torch.no_grad()
def test_what_has_to_be_seen_goes_the_stock_way(what: str) -> None:
    model = sparse("llama", **({"hidden_act": "gelu_pytorch_tanh"} if what == "gelu" else {}))
    seen = []
    for layer in model.model.layers:
        if what == "hook":
            layer.mlp.up_proj.register_forward_hook(lambda module, given, y: seen.append(1) or y + 1)
        elif what == "other norm":
            layer.input_layernorm = torch.nn.Identity()
    expected = steps(model, model)
    call, names = compiled(model)
    torch.testing.assert_close(steps(model, call), expected, atol=2e-3, rtol=2e-3)
    assert count(names, "group_step") == 0


@torch.no_grad()
def test_other_devices_go_the_stock_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "DEVICES", ("cuda",))
    model = sparse("llama")
    call, names = compiled(model)
    torch.testing.assert_close(steps(model, call), steps(model, model), atol=2e-3, rtol=2e-3)
    assert count(names, "group_step") == 0
