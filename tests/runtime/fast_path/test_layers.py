"""Decoder layers of a sparse model: one token goes through all in one call, with the same result, and nothing else does."""

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from step_cases import IDS, PROMPT, close, filled, passes_of_another_kind, sparse, step
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import wina_calib
from wina_calib.model.architecture import describe
from wina_calib.quantization.formats import WeightFormat
from wina_calib.runtime.fast_path import layers, past
from wina_calib.runtime.fast_path.blocks import Short
from wina_calib.runtime.fast_path.layers import ShortLayer
from wina_calib.runtime.kernels import native
from wina_calib.runtime.kernels.layers import Layers
from wina_calib.runtime.load import runtime_state

pytestmark = pytest.mark.skipif(not native.available(torch.float32), reason="needs a C compiler")

# Gemma, Gemma 2 and OLMo norm what a block gives.
SERVED = {"llama": 1, "qwen2": 1, "qwen3": 1, "phi3": 1, "mistral": 1, "gemma2": 0, "gemma3": 0, "olmo2": 0}


@pytest.fixture
def model() -> PreTrainedModel:
    return sparse()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Places of the cache in each call: all, or where the decoder's own code was left out, those that are filled."""
    seen: list[int] = []
    plain = Layers.__call__

    def call(self: Layers, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        seen.append(args[5])
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Layers, "__call__", call)
    return seen


def layer_by_layer(run: Any, *, stock: bool = False) -> Any:
    """What a function gives where every layer computes itself, by blocks in a few calls or by the stock ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "_begin", lambda *args: None)
        if stock:
            patch.setattr(Short, "_rows", lambda self, x: None)
        return run()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_gives_what_its_stock_layers_give(family: str, calls: list[int]) -> None:
    model = sparse(family)
    found = step(model, count=4)
    assert calls == [PROMPT + 1 + i for i in range(4)] * SERVED[family]
    assert torch.equal(found, layer_by_layer(lambda: step(model, count=4)))
    assert close(found, layer_by_layer(lambda: step(model, count=4), stock=True))


@pytest.mark.parametrize("form", [WeightFormat(4, 32), WeightFormat(8)], ids=str)
@pytest.mark.parametrize("sparsity", [0.5, 0.0])
def test_quantized_weights(form: WeightFormat, sparsity: float, calls: list[int]) -> None:
    """Also where nothing is dropped, up to the norms' last bits."""
    model = sparse("qwen3", form)
    wina_calib.set_sparsity(model, sparsity)
    found = step(model, count=4)
    assert len(calls) == 4
    assert close(found, layer_by_layer(lambda: step(model, count=4)), 1e-3)


@pytest.mark.parametrize("form", [None, WeightFormat(4, 32)], ids=str)
def test_bfloat16(form: WeightFormat | None, calls: list[int]) -> None:
    model = sparse("llama", form, torch.bfloat16)
    found = step(model, count=3)
    assert len(calls) == 3
    assert torch.equal(found, layer_by_layer(lambda: step(model, count=3)))


@pytest.mark.parametrize(
    "changes",
    [{"num_key_value_heads": 4}, {"num_key_value_heads": 1, "head_dim": 24}, {"hidden_act": "gelu_pytorch_tanh"}],
)
def test_other_forms_of_llama(changes: dict[str, Any], calls: list[int]) -> None:
    model = sparse(**changes)
    found = step(model, count=3)
    assert len(calls) == 3
    assert close(found, layer_by_layer(lambda: step(model, count=3), stock=True))


@pytest.mark.parametrize("kind", ["static", "sliding", "sliding and static"])
def test_every_cache(kind: str, calls: list[int]) -> None:
    model = sparse("mistral", sliding_window=6 if "sliding" in kind else None)

    def run() -> Tensor:
        cache = StaticCache(config=model.config, max_cache_len=40) if "static" in kind else None
        return step(model, filled(model, cache=cache), count=5)

    found = run()
    assert calls == ([40, *range(PROMPT + 2, PROMPT + 6)] if kind == "static" else [])
    assert close(found, layer_by_layer(run, stock=True))


def test_a_full_cache_is_left_to_transformers(model: PreTrainedModel, calls: list[int]) -> None:
    cache = filled(model, cache=StaticCache(config=model.config, max_cache_len=PROMPT + 1))
    step(model, cache)
    with pytest.raises((IndexError, RuntimeError)):
        step(model, cache)
    assert len(calls) == 1


def tensors(cache: Any) -> Iterator[Tensor]:
    for layer in cache.layers:
        yield from (layer.keys, layer.values)


def test_a_cache_shows_what_it_would(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through growing, cropping, reordering, copies, and another sequence in the same memory."""
    monkeypatch.setattr(past, "SPARE", 2)

    def run() -> list[Tensor]:
        cache = filled(model)
        step(model, cache, count=6)
        early = next(tensors(cache))
        value = early.clone()
        found = []
        for change in ("nothing", "crop", "reorder", "deepcopy", "copy"):
            other = cache
            if change == "crop":
                cache.crop(-3)
            elif change == "reorder":
                cache.reorder_cache(torch.tensor([0]))
            elif change == "deepcopy":
                other = copy.deepcopy(cache)
            elif change == "copy":
                other = DynamicCache(config=model.config)
                other.layers = [copy.copy(layer) for layer in cache.layers]
            at = other.get_seq_length()
            found += [step(model, other, count=3, start=at), *(t.clone() for t in tensors(other))]
            found += [t.clone() for t in tensors(cache)]
        assert torch.equal(early, value)
        return found

    for a, b in zip(run(), layer_by_layer(run), strict=True):
        assert torch.equal(a, b)


def test_a_count_of_places_that_is_replaced_counts(model: PreTrainedModel, calls: list[int]) -> None:
    cache = filled(model, cache=StaticCache(config=model.config, max_cache_len=40))
    step(model, cache)
    for layer in cache.layers:
        layer.cumulative_length = layer.cumulative_length.clone()
    step(model, cache, start=PROMPT + 1)
    assert int(cache.get_seq_length()) == PROMPT + 2
    assert calls == [40, PROMPT + 2]


def test_two_caches_go_by_turns(model: PreTrainedModel, calls: list[int]) -> None:
    first, second = filled(model), filled(model, 6)
    found = [step(model, first), step(model, second, start=6), step(model, first, start=PROMPT + 1)]
    assert calls == [PROMPT + 1, 7, PROMPT + 2]
    assert torch.equal(torch.cat([found[0], found[2]], 1), layer_by_layer(lambda: step(model, count=2)))
    assert torch.equal(found[1], layer_by_layer(lambda: step(model, filled(model, 6), start=6)))


def test_padding_is_not_seen(model: PreTrainedModel, calls: list[int]) -> None:
    mask = torch.ones(1, PROMPT + 1, dtype=torch.long)
    mask[:, :5] = 0
    found = step(model, attention_mask=mask)
    assert calls == [PROMPT + 1]
    assert close(found, layer_by_layer(lambda: step(model, attention_mask=mask), stock=True))
    assert not close(found, step(model))


@pytest.mark.parametrize("kind", ["float", "a head each"])
def test_masks_of_other_kinds_are_torchs(kind: str, model: PreTrainedModel, calls: list[int]) -> None:
    mask = torch.rand(1, 4 if kind == "a head each" else 1, 1, PROMPT + 1) < 0.6
    mask[..., -1] = True
    given = torch.where(mask, 0.0, torch.finfo(torch.float32).min) if kind == "float" else mask
    found = step(model, attention_mask=given)
    assert not calls
    assert close(found, layer_by_layer(lambda: step(model, attention_mask=given), stock=True))


def test_long_contexts_of_shared_key_heads_are_torchs(
    model: PreTrainedModel, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "MAX_LENGTH", PROMPT + 1)
    found = step(model, count=3)
    assert calls == [PROMPT + 1]
    assert close(found, layer_by_layer(lambda: step(model, count=3), stock=True))


def test_what_else_a_pass_may_be(model: PreTrainedModel, calls: list[int]) -> None:
    for kind in passes_of_another_kind(model):
        assert not calls, kind
    step(model.train())
    model.eval().model.layers[2].self_attn.train()
    step(model)
    model.eval().set_attn_implementation("eager")
    step(model)
    model.set_attn_implementation("wina_sdpa")
    assert not calls
    step(model)
    assert len(calls) == 1


def test_inference_mode(model: PreTrainedModel, calls: list[int]) -> None:
    expected = step(model, count=3)
    with torch.inference_mode():
        cache = filled(model)
        found = torch.cat([model(IDS[:, i : i + 1], **tiny.given(cache)).logits for i in range(PROMPT, PROMPT + 2)], 1)
    found = torch.cat([found, step(model, cache, start=PROMPT + 2)], 1)
    assert len(calls) == 6
    assert torch.equal(found, expected)


@pytest.mark.parametrize("path", ["layers.1", "layers.0.self_attn", "layers.2.mlp.act_fn", "layers.1.input_layernorm"])
def test_hooks_see_every_call(path: str, model: PreTrainedModel, calls: list[int]) -> None:
    seen = []
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        handle = getattr(model.model.get_submodule(path), register)(lambda *args: seen.append(args[1]))
        step(model)
        handle.remove()
    assert len(seen) == 4  # a prompt and a token each
    assert not calls
    step(model)
    assert len(calls) == 1


def test_hidden_states_can_be_had_on_the_way(model: PreTrainedModel) -> None:
    cache = filled(model)
    with torch.no_grad():
        out = model(IDS[:, PROMPT : PROMPT + 1], **tiny.given(cache), output_hidden_states=True)
    assert len(out.hidden_states) == 4
    assert close(out.logits, layer_by_layer(lambda: step(model), stock=True))


class Twice(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * self.inner(*args, **kwargs)


@pytest.mark.parametrize("path", ["self_attn.v_proj", "mlp.down_proj", "mlp.act_fn", "input_layernorm"])
def test_replaced_parts_are_called(path: str, model: PreTrainedModel, calls: list[int]) -> None:
    """As adapters do; when they are gone it goes on as before."""
    before, layer = step(model), model.model.layers[1]
    plain = layer.get_submodule(path)
    layer.set_submodule(path, Twice(plain))
    calls.clear()
    found = step(model)
    assert not calls
    assert not close(found, before)
    assert close(found, layer_by_layer(lambda: step(model), stock=True))
    layer.set_submodule(path, plain)
    assert torch.equal(step(model), before)
    assert len(calls) == 1


@pytest.mark.parametrize("what", ["weight", "norm", "norm object", "epsilon", "scaling", "threshold"])
def test_what_is_changed_later_counts(what: str, model: PreTrainedModel, calls: list[int]) -> None:
    before, layer = step(model), model.model.layers[1]
    with torch.no_grad():
        if what == "weight":
            layer.mlp.down_proj.weight.mul_(1.5)
        elif what == "norm":
            layer.input_layernorm.weight.mul_(1.5)
        elif what == "norm object":
            layer.input_layernorm.weight = nn.Parameter(1.5 * layer.input_layernorm.weight)
        elif what == "epsilon":
            layer.post_attention_layernorm.variance_epsilon = 1.0
        elif what == "scaling":
            layer.self_attn.scaling *= 2
        else:
            wina_calib.set_sparsity(model, 0.3)
    found = step(model)
    assert len(calls) == 2
    assert not close(found, before)
    assert close(found, layer_by_layer(lambda: step(model), stock=True))


def test_casts_count(model: PreTrainedModel, calls: list[int]) -> None:
    step(model)
    model.to(torch.bfloat16)
    found = step(model)
    assert len(calls) == 2
    assert torch.equal(found, layer_by_layer(lambda: step(model)))


@pytest.mark.parametrize("between", ["another tensor", "in place"])
def test_a_decoder_that_changes_what_lies_between_layers(
    between: str, model: PreTrainedModel, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that are given something else than was counted on compute themselves, on a cache without what was too early."""
    plain = ShortLayer.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        y = plain(self, *args, **kwargs)
        if self is not model.model.layers[1]:
            return y
        return y * 1.1 if between == "another tensor" else y.mul_(1.1)

    monkeypatch.setattr(ShortLayer, "__call__", call)
    for kind in ("dynamic", "static"):

        def run(kind: str = kind) -> Any:
            cache = StaticCache(config=model.config, max_cache_len=40) if kind == "static" else None
            cache = filled(model, cache=cache)
            return step(model, cache, count=3), [t.clone() for t in tensors(cache)]

        calls.clear()
        found, kept = run()
        assert len(calls) == 3
        expected, others = layer_by_layer(run)
        assert torch.equal(found, expected)
        assert all(torch.equal(a, b) for a, b in zip(kept, others, strict=True))


def test_a_decoder_that_leaves_a_layer_out(
    model: PreTrainedModel, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layer after it gets what was counted on for another one."""
    plain = ShortLayer.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return args[0] if self is model.model.layers[1] else plain(self, *args, **kwargs)

    cache, other = filled(model), filled(model)
    monkeypatch.setattr(ShortLayer, "__call__", call)
    assert torch.equal(step(model, cache), layer_by_layer(lambda: step(model, other)))
    assert len(calls) == 1
    assert all(torch.equal(a, b) for a, b in zip(tensors(cache), tensors(other), strict=True))


def test_fewer_layers_leave_the_others_caches(model: PreTrainedModel, calls: list[int]) -> None:
    cache = filled(model)
    model.config.num_hidden_layers = 2
    found = step(model, cache)
    assert [layer.keys.shape[2] for layer in cache.layers] == [PROMPT + 1, PROMPT + 1, PROMPT]
    assert len(calls) == 1
    expected = filled(model)
    assert torch.equal(found, layer_by_layer(lambda: step(model, expected)))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent(copied: Any, model: PreTrainedModel, calls: list[int]) -> None:
    expected = step(model)
    other = copied(model)
    wina_calib.set_sparsity(model, 0.0)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.zero_()
    calls.clear()
    assert torch.equal(step(other), expected)
    assert len(calls) == 1


def test_copies_made_while_layers_are_checkpointed(model: PreTrainedModel, calls: list[int]) -> None:
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    model.train()(IDS, use_cache=False).logits.sum().backward()
    layer = pickle.loads(pickle.dumps(model.model.layers[0]))
    assert type(layer) is type(model.model.layers[0])
    step(copy.deepcopy(model).eval())
    assert len(calls) == 1


def test_run_time_matrices_and_masks_of_one_projection_each(
    text: Path, llama: Path, tmp_path: Path, calls: list[int]
) -> None:
    model = sparse()
    for layer in model.model.layers:
        layer.wina.attn_in.register_buffer("rotation", torch.linalg.qr(torch.randn(64, 64))[0])
    runtime_state(model).stale = True
    step(model)
    options: dict[str, Any] = {"transform": "none", "budget": "uniform", "samples": 80, "seq_len": 128, "grid": (0.5,)}
    wina_calib.calibrate(llama, tmp_path / "sparse", masks="per-projection", data=str(text), **options)
    model = wina_calib.load(tmp_path / "sparse", 0.5)
    calls.clear()
    step(model)
    assert not calls


def test_the_first_steps_are_watched(model: PreTrainedModel, calls: list[int]) -> None:
    from wina_calib.runtime.watch import STEPS, Watch

    runtime_state(model).watch = Watch()
    step(model, count=STEPS + 2)
    assert len(calls) == 2


def test_generation_is_the_same(model: PreTrainedModel, calls: list[int]) -> None:
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 3}
    options["attention_mask"] = torch.ones_like(IDS)
    tokens = model.generate(IDS, **options)
    assert len(calls) == 5
    assert torch.equal(layer_by_layer(lambda: model.generate(IDS, **options)), tokens)
    assert torch.equal(model.generate(IDS, **options, cache_implementation="static"), tokens)


def test_without_a_compiler_layers_are_stock(monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    expected = step(sparse(), count=2)
    calls.clear()
    monkeypatch.setattr(native, "library", lambda: None)
    assert close(step(sparse(), count=2), expected)
    assert not calls


def test_the_form_is_tested_and_not_the_name() -> None:
    class Other(LlamaDecoderLayer):
        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().forward(hidden_states, *args, **kwargs) * 0.5

    class NoMask(LlamaDecoderLayer):
        def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
            return super().forward(hidden_states, None, **kwargs)

    model = sparse()
    described = describe(tiny.make("llama")).layers[0]
    layer = model.model.layers[0]
    for kind, known in ((Other, False), (NoMask, False), (LlamaDecoderLayer, True)):
        layer.__class__ = kind
        layers.shorten(layer, described)
        assert isinstance(layer, ShortLayer) is known
