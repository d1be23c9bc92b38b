"""Attention of one token of a compiled step as one operator, on a CPU, where torch's operators compute it."""

from typing import Any

import pytest
import tiny
import torch
from compiled_steps import IDS, PROMPT, compiled, count, sparse
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from wina_calib.runtime.fast_path import step, token_attention
from wina_calib.runtime.fast_path.norms import Norm


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The way of cards, on which operators compute what kernels would."""
    monkeypatch.setattr(step, "DEVICES", ("cpu",))
    monkeypatch.setattr(token_attention, "_serves", lambda *given: True)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def decoded(model: PreTrainedModel, call: Any, mask: Tensor | None = None) -> tuple[Tensor, StaticCache]:
    """Logits of three tokens after a prompt, and the cache that they leave."""
    cache = StaticCache(config=model.config, max_cache_len=IDS.shape[1])
    model(IDS[:, :PROMPT], **tiny.given(cache), **({} if mask is None else {"attention_mask": mask[:, :PROMPT]}))
    found = []
    for i in range(PROMPT, PROMPT + 3):
        given = tiny.given(cache) | ({} if mask is None else {"attention_mask": mask})
        found.append(call(IDS[:, i : i + 1], **given).logits.clone())
    return torch.cat(found, dim=1), cache


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_a_step_has_one_operator_between_two_products(family: str, padded: bool) -> None:
    model = sparse(family)
    mask = torch.ones_like(IDS)
    mask[:, :3] = 0
    given = mask if padded else None
    expected, cache = decoded(model, model, given)
    call, names = compiled(model)
    found, own = decoded(model, call, given)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)
    assert count(names, "attend_token") == model.config.num_hidden_layers
    assert count(names, "index_copy") == count(names, "scaled_dot_product") == 0
    for layer, other in zip(cache.layers, own.layers, strict=True):
        assert layer.cumulative_length == other.cumulative_length == PROMPT + 3
        torch.testing.assert_close(layer.keys, other.keys, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(layer.values, other.values, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("what", ["hook", "attention"])
@torch.no_grad()
def test_what_has_to_be_seen_goes_the_stock_way(what: str) -> None:
    model = sparse("qwen3")
    seen = []
    for layer in model.model.layers:
        if what == "hook":
            layer.self_attn.q_norm.register_forward_hook(lambda module, given, y: seen.append(1) or 2 * y)
    if what == "attention":
        model.config._attn_implementation = "eager"
    expected, _ = decoded(model, model)
    call, names = compiled(model)
    torch.testing.assert_close(decoded(model, call)[0], expected, atol=2e-3, rtol=2e-3)
    assert count(names, "attend_token") == 0
    assert isinstance(model.model.layers[0].self_attn.q_norm, Norm)


@pytest.mark.parametrize("normed", [False, True])
def test_a_token_by_operators(normed: bool) -> None:
    torch.manual_seed(0)
    heads, groups, size, length = 6, 2, 32, 12
    given = torch.randn(1, 1, (heads + 2 * groups) * size)
    angle = torch.randn(size // 2).repeat(2)
    gains = (torch.rand(size), torch.rand(size)) if normed else (None, None)
    keys, values = torch.randn(2, 1, groups, length, size)
    before, mask = (keys.clone(), values.clone()), torch.rand(1, 1, 1, length) < 0.5
    place = torch.tensor(7)
    rest = (angle.cos(), angle.sin(), *gains, keys, values, place, mask, 1e-6, 0.2)
    y = torch.ops.wina_calib.attend_token(given, *rest)
    query, key, value = given.view(-1, size).split((heads, groups, groups))
    if normed:
        query, key = (
            torch.nn.functional.rms_norm(t, (size,), g, 1e-6) for t, g in zip((query, key), gains, strict=True)
        )
    turn = [t * angle.cos() + torch.cat([-t[:, size // 2 :], t[:, : size // 2]], 1) * angle.sin() for t in (query, key)]
    for now, old, new in ((keys, before[0], turn[1]), (values, before[1], value)):
        torch.testing.assert_close(now[0, :, 7], new)
        assert torch.equal(now[:, :, :7], old[:, :, :7])
        assert torch.equal(now[:, :, 8:], old[:, :, 8:])
    for h in range(heads):
        seen = [p for p in range(7) if mask[0, 0, 0, p]] + [7]
        own = h // (heads // groups)
        share = torch.softmax(keys[0, own, seen] @ turn[0][h] * 0.2, 0)
        torch.testing.assert_close(y.view(heads, size)[h], share @ values[0, own, seen], atol=1e-5, rtol=1e-4)
