"""A decoder of a sparse model: tokens after the first go through it without its own code, with the same result."""

import copy
from typing import Any

import pytest
import tiny
import torch
from step_cases import IDS, PROMPT, close, filled, passes_of_another_kind, sparse, step
from torch import Tensor
from transformers import DynamicCache, GraniteConfig, PreTrainedModel, StaticCache
from transformers.models.llama.modeling_llama import LlamaModel

from wina_calib.quantization.formats import WeightFormat
from wina_calib.runtime.fast_path import decoder
from wina_calib.runtime.fast_path.layers import ShortLayer
from wina_calib.runtime.kernels import native
from wina_calib.runtime.load import runtime_state

pytestmark = pytest.mark.skipif(not native.available(torch.float32), reason="needs a C compiler")
# Gemma, Gemma 2 and OLMo norm what a block gives.
SERVED = {"llama", "qwen2", "qwen3", "phi3", "mistral"}


@pytest.fixture
def model() -> PreTrainedModel:
    return sparse()


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers a decoder has asked of its first one on."""
    seen: list[int] = []
    plain = ShortLayer.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(ShortLayer, "__call__", call)
    return seen


def by_itself(run: Any) -> Any:
    """What a function gives where the decoder computes every token by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder._Token, "compute", lambda self, now: None)
        return run()


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_every_family_gives_what_its_decoder_gives(family: str, kind: str, stock: list[int]) -> None:
    model = sparse(family)

    def run() -> tuple[Tensor, Any]:
        cache = StaticCache(config=model.config, max_cache_len=40) if kind == "static" else None
        cache = filled(model, cache=cache)
        stock.clear()
        return step(model, cache, count=5), cache

    found, cache = run()
    asked = len(stock)
    expected, other = by_itself(run)
    assert torch.equal(found, expected)
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(cache.layers, other.layers, strict=True))
    if family in SERVED:
        assert asked == len(model.model.layers)  # of the first token


@pytest.mark.parametrize("form", [None, WeightFormat(4, 32), WeightFormat(8)], ids=str)
def test_bfloat16_and_quantized_weights(form: WeightFormat | None, stock: list[int]) -> None:
    model = sparse("qwen2", form, torch.bfloat16)
    cache = filled(model)
    stock.clear()
    found = step(model, cache, count=3)
    assert len(stock) == 3
    assert torch.equal(found, by_itself(lambda: step(model, count=3)))


def test_generation_goes_without_it(model: PreTrainedModel, stock: list[int]) -> None:
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 3}
    options["attention_mask"] = torch.ones_like(IDS)
    stock.clear()
    tokens = model.generate(IDS, **options)
    assert len(stock) == 6  # of the prompt and the first token
    assert torch.equal(by_itself(lambda: model.generate(IDS, **options)), tokens)
    assert torch.equal(model.generate(IDS, **options, cache_implementation="static"), tokens)


def test_masks_that_hide_something_are_the_decoders(model: PreTrainedModel, stock: list[int]) -> None:
    mask = torch.ones(1, PROMPT + 1, dtype=torch.long)
    step(model)
    cache = filled(model)
    stock.clear()
    found = step(model, cache, attention_mask=mask)
    assert not stock
    mask[:, :5] = 0
    cache = filled(model)
    stock.clear()
    hidden = step(model, cache, attention_mask=mask)
    assert len(stock) == 3
    assert not close(found, hidden)
    cache = filled(model)
    stock.clear()
    step(model, cache, attention_mask=torch.ones(1, PROMPT + 4, dtype=torch.long))  # it is cut by the decoder
    assert len(stock) == 3


@pytest.mark.parametrize("window", [PROMPT + 2, 400])
def test_windows_are_the_decoders(window: int, stock: list[int]) -> None:
    """Also before they hide a place, which they would do later."""
    model = sparse("mistral", sliding_window=window)

    def run() -> Tensor:
        cache = filled(model, cache=DynamicCache())
        stock.clear()
        return step(model, cache, count=5)

    found = run()
    assert len(stock) == 15
    assert torch.equal(found, by_itself(run))


def test_places_that_are_given(model: PreTrainedModel, stock: list[int]) -> None:
    step(model)
    for place in (PROMPT, 30):
        cache = filled(model)
        given = {"position_ids": torch.tensor([[place]])}
        stock.clear()
        found = step(model, cache, **given)
        assert not stock
        assert torch.equal(found, by_itself(lambda given=given: step(model, **given)))


def test_what_else_a_pass_may_be(model: PreTrainedModel, stock: list[int]) -> None:
    step(model)
    for kind in passes_of_another_kind(model):
        assert stock, kind
        stock.clear()
    cache = filled(model)
    with torch.no_grad():
        out = model(IDS[:, PROMPT : PROMPT + 1], **tiny.given(cache), output_hidden_states=True)
        assert len(out.hidden_states) == 4
        out = model(IDS[:, PROMPT : PROMPT + 1], **tiny.given(cache), return_dict=False)
    assert type(out) is tuple


@pytest.mark.parametrize("path", ["embed_tokens", "rotary_emb", "norm", "layers.1"])
def test_hooks_see_every_call(path: str, model: PreTrainedModel) -> None:
    step(model)
    for count in (1, 3):
        seen: list[Any] = []
        handle = model.model.get_submodule(path).register_forward_hook(lambda *args, seen=seen: seen.append(args[1]))
        step(model, count=count)
        handle.remove()
        assert len(seen) == 1 + count  # of the prompt, too


def test_hooks_that_were_there_before(model: PreTrainedModel) -> None:
    seen: list[Any] = []
    model.model.embed_tokens.register_forward_hook(lambda *args: seen.append(args[1]))
    step(model, count=3)
    assert len(seen) == 4


@pytest.mark.parametrize("what", ["norm", "norm object", "epsilon", "norm module", "config", "rotary"])
def test_what_is_changed_later_counts(what: str, model: PreTrainedModel) -> None:
    before, norm = step(model), model.model.norm
    with torch.no_grad():
        if what == "norm":
            norm.weight.mul_(torch.linspace(0.5, 2, 64))
        elif what == "norm object":
            norm.weight = torch.nn.Parameter(torch.linspace(0.5, 2, 64) * norm.weight)
        elif what == "epsilon":
            norm.variance_epsilon = 10.0
        elif what == "norm module":
            model.model.norm = torch.nn.LayerNorm(64)
        elif what == "config":
            model.config.num_hidden_layers = 2
        else:
            model.model.rotary_emb.inv_freq.mul_(3)
    found = step(model)
    assert not close(found, before)
    assert close(found, by_itself(lambda: step(model)))


def test_a_decoder_that_does_more_is_left_alone(
    model: PreTrainedModel, stock: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = step(model)
    plain = LlamaModel.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = plain(self, *args, **kwargs)
        out.last_hidden_state = out.last_hidden_state * 1.5
        return out

    monkeypatch.setattr(LlamaModel, "forward", forward)
    for _ in range(2):  # known, and not
        assert close(step(model, count=1), 1.5 * expected)
        runtime_state(model).plan = None


def test_layers_that_are_changed_in_their_list_count(model: PreTrainedModel) -> None:
    before = step(model, count=3)
    layers = model.model.layers
    layers[1], layers[2] = layers[2], layers[1]
    found = step(model, count=3)
    assert not close(found, before)
    assert close(found, by_itself(lambda: step(model, count=3)))


def test_a_tuple_that_is_asked_for_is_given(model: PreTrainedModel) -> None:
    step(model, count=3)
    with torch.no_grad():
        out = model.model(input_ids=IDS[:, PROMPT : PROMPT + 1], **tiny.given(filled(model)), return_dict=False)
    assert type(out) is tuple


def test_a_decoder_whose_class_is_changed_later_computes_every_token(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    step(model, count=3)
    plain, seen = LlamaModel.forward, []

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", forward)
    step(model, count=3)
    assert len(seen) == 4  # of the prompt, too


def test_an_embedding_that_is_scaled_is_not_taken_for_plain_by_a_token_of_zeros(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(tiny._CONFIGS, "granite", (GraniteConfig, {"embedding_multiplier": 12.0}))
    model = sparse("granite")
    with torch.no_grad():
        model.model.embed_tokens.weight[IDS[0, PROMPT]] = 0
    assert close(step(model, count=3), by_itself(lambda: step(model, count=3)))


def test_copies_are_independent(model: PreTrainedModel, stock: list[int]) -> None:
    expected = step(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        model.model.norm.weight.zero_()
    assert torch.equal(step(other), expected)
    cache = filled(other)
    stock.clear()
    assert torch.equal(step(other, cache), expected)
    assert not stock
