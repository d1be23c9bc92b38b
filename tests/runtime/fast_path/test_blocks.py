"""Blocks of a sparse model: one token takes the short way, with the same result, and nothing else does."""

import copy
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from step_cases import IDS, PROMPT, close, filled, passes_of_another_kind, sparse, step
from torch import Tensor, nn
from transformers import PreTrainedModel, StaticCache
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

import wina_calib
from wina_calib.model.architecture import describe
from wina_calib.runtime.fast_path import blocks, layers
from wina_calib.runtime.fast_path.blocks import Short, ShortAttention, ShortMLP
from wina_calib.runtime.kernels import native
from wina_calib.runtime.load import runtime_state

pytestmark = pytest.mark.skipif(not native.available(torch.float32), reason="needs a C compiler")

# Of three layers: blocks of a known form. Gemma and OLMo norm queries in another way; Gemma 2 caps scores.
ATTENTION = {"llama": 3, "qwen2": 3, "qwen3": 3, "phi3": 3, "mistral": 3, "gemma2": 0, "gemma3": 0, "olmo2": 0}
STEP = {"turned": 3, "attend": 3, "gated": 3}


@pytest.fixture(autouse=True)
def layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are not one call, which leaves nothing to their blocks."""
    monkeypatch.setattr(layers, "_begin", lambda *args: None)


@pytest.fixture
def model() -> PreTrainedModel:
    return sparse()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts what is computed in C."""
    seen: Counter[str] = Counter()

    def counted(name: str) -> None:
        function = getattr(native, name)

        def call(*args: Any, **kwargs: Any) -> Tensor:
            seen[name] += 1
            found: Tensor = function(*args, **kwargs)
            return found

        monkeypatch.setattr(native, name, call)

    for name in STEP:
        counted(name)
    return seen


def stock_way(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """The same by the stock blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Short, "_rows", lambda self, x: None)
        return step(model, *args, **kwargs)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_gives_what_its_stock_blocks_give(family: str, calls: Counter[str]) -> None:
    model = sparse(family)
    found = step(model, count=4)
    assert calls == {k: 4 * v for k, v in STEP.items() if k == "gated" or ATTENTION[family]}
    assert close(found, stock_way(model, count=4))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": 24},
        {"attention_bias": True, "mlp_bias": True},
        {"hidden_act": "gelu_pytorch_tanh"},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
    ],
)
def test_other_forms_of_llama(changes: dict[str, Any], calls: Counter[str]) -> None:
    model = sparse(**changes)
    found = step(model, count=3)
    assert calls == {k: 3 * v for k, v in STEP.items()}
    assert close(found, stock_way(model, count=3))


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu"])
def test_other_activations_are_left_alone(act: str, calls: Counter[str]) -> None:
    step(sparse(hidden_act=act))
    assert calls == {"turned": 3, "attend": 3}


def test_a_part_of_each_head_that_is_turned(calls: Counter[str]) -> None:
    """The block is of Llama's form but for the size of what it is given."""
    model = sparse("phi3", partial_rotary_factor=0.5)
    found = step(model)
    assert calls == {"gated": 3}
    assert close(found, stock_way(model))


@pytest.mark.parametrize("kind", ["static", "sliding", "sliding and static"])
def test_every_cache(kind: str, calls: Counter[str]) -> None:
    model = sparse("mistral", sliding_window=6 if "sliding" in kind else None)

    def cache() -> Any:
        return filled(model, cache=StaticCache(config=model.config, max_cache_len=40) if "static" in kind else None)

    found = step(model, cache(), count=5)
    assert calls["turned"] == 15
    assert close(found, stock_way(model, cache(), count=5))


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma2"])
def test_blocks_in_bfloat16(family: str, calls: Counter[str]) -> None:
    """One by one: in a model a rounding turns a mask, and more with every layer."""
    model = sparse(family, dtype=torch.bfloat16)
    layer = model.model.layers[1]
    cache = filled(model)
    x, size = torch.randn(1, 1, 64).bfloat16(), layer.self_attn.head_dim
    turns = tuple(torch.randn(2, 1, 1, size).bfloat16())
    with torch.no_grad():
        found, expected = [], []
        for results, way in ((found, Short._rows), (expected, lambda self, x: None)):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Short, "_rows", way)
                results.append(layer.mlp(x))
                kwargs = tiny.given(copy.deepcopy(cache)) | {"attention_mask": None}
                results.append(layer.self_attn(hidden_states=x, position_embeddings=turns, **kwargs)[0])
    assert calls == (dict.fromkeys(STEP, 1) if ATTENTION[family] else {"gated": 1})
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).float().norm() / b.float().norm()) < 0.1


@pytest.mark.parametrize("kind", ["float", "a head each", "not contiguous"])
def test_masks_of_other_kinds_are_torchs(kind: str, model: PreTrainedModel, calls: Counter[str]) -> None:
    mask = torch.rand(1, 1, 1, PROMPT + 1) < 0.6
    mask[..., -1] = True
    if kind == "float":
        given = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    elif kind == "a head each":
        given = (torch.rand(1, 4, 1, PROMPT + 1) < 0.6) | mask
    else:
        given = mask.expand(2, -1, -1, -1).transpose(0, 3).contiguous().transpose(0, 3)[:1]
    found = step(model, attention_mask=given)
    assert calls == {"turned": 3, "gated": 3}
    assert close(found, stock_way(model, attention_mask=given))


def test_a_token_that_sees_nothing(model: PreTrainedModel, calls: Counter[str]) -> None:
    mask = torch.zeros(1, PROMPT + 1, dtype=torch.long)
    found = step(model, attention_mask=mask)
    assert calls == STEP
    assert close(found, stock_way(model, attention_mask=mask))


def test_padding_is_not_seen(model: PreTrainedModel, calls: Counter[str]) -> None:
    mask = torch.ones(1, PROMPT + 1, dtype=torch.long)
    mask[:, :5] = 0
    found = step(model, attention_mask=mask)
    assert calls == STEP
    assert close(found, stock_way(model, attention_mask=mask))
    assert not close(found, step(model))


def test_long_contexts_are_torchs(model: PreTrainedModel, calls: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where several query heads share a key head."""
    monkeypatch.setattr("wina_calib.runtime.fast_path.attention.MAX_LENGTH_IN_C", 13)
    found = step(model, count=3)
    assert calls == {"turned": 9, "attend": 3, "gated": 9}
    assert close(found, stock_way(model, count=3))


def test_what_else_a_pass_may_be(model: PreTrainedModel, calls: Counter[str]) -> None:
    for kind in passes_of_another_kind(model):
        assert not calls, kind
    step(model.train())
    assert calls == {"gated": 3}  # dropout of attention weights
    step(model.eval())
    assert calls == {**STEP, "gated": 6}


def test_nothing_dropped_is_the_dense_model_to_the_bit(model: PreTrainedModel) -> None:
    wina_calib.set_sparsity(model, 0.0)
    assert torch.equal(step(model, count=3), stock_way(model, count=3))


@pytest.mark.parametrize("name", ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "act_fn"])
def test_hooks_see_every_call(name: str, model: PreTrainedModel, calls: Counter[str]) -> None:
    layer = model.model.layers[1]
    block, missed = (layer.mlp, {"gated"}) if hasattr(layer.mlp, name) else (layer.self_attn, {"turned", "attend"})
    seen = []
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        handle = getattr(getattr(block, name), register)(lambda *args: seen.append(args[1]))
        step(model)
        handle.remove()
    assert len(seen) == 4  # a prompt and a token each
    assert calls == {k: 2 * v - 2 * (k in missed) for k, v in STEP.items()}


def test_global_hooks_see_every_call(model: PreTrainedModel, calls: Counter[str]) -> None:
    handle = nn.modules.module.register_module_forward_pre_hook(lambda *args: None)
    step(model)
    handle.remove()
    assert not calls


def test_replaced_projections_are_called(model: PreTrainedModel, calls: Counter[str]) -> None:
    """As adapters do."""

    class Twice(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.inner(x)

    before = step(model)
    attn, mlp = model.model.layers[0].self_attn, model.model.layers[2].mlp
    attn.v_proj, mlp.up_proj = Twice(attn.v_proj), Twice(mlp.up_proj)
    calls.clear()
    found = step(model)
    assert calls == dict.fromkeys(STEP, 2)
    assert not close(found, before)
    assert close(found, stock_way(model))


def test_weights_that_are_loaded_later_count(model: PreTrainedModel, calls: Counter[str]) -> None:
    before = step(model)
    with torch.no_grad():
        for name in ("down_proj", "gate_proj"):
            model.model.layers[0].mlp.get_submodule(name).weight.mul_(1.5)
    found = step(model)
    assert not close(found, before)
    assert close(found, stock_way(model))


def test_run_time_matrices_are_multiplied(calls: Counter[str]) -> None:
    model = sparse()
    for layer in model.model.layers:
        for name, width in (("attn_in", 64), ("mlp_out", 128)):
            layer.wina.get_submodule(name).register_buffer("rotation", torch.linalg.qr(torch.randn(width, width))[0])
    runtime_state(model).stale = True
    found = step(model)
    assert not calls
    assert close(found, stock_way(model))


def test_masks_of_one_projection_each(text: Path, llama: Path, tmp_path: Path, calls: Counter[str]) -> None:
    options: dict[str, Any] = {"transform": "none", "budget": "uniform", "samples": 80, "seq_len": 128, "grid": (0.5,)}
    wina_calib.calibrate(llama, tmp_path / "sparse", masks="per-projection", data=str(text), **options)
    model = wina_calib.load(tmp_path / "sparse", 0.5)
    calls.clear()
    found = step(model)
    assert not calls
    assert close(found, stock_way(model))


@pytest.mark.parametrize("changed", ["activation", "norm", "epsilon", "class", "argument"])
def test_parts_that_are_changed_count(changed: str, calls: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = sparse("qwen3")
    kwargs: dict[str, Any] = {}
    missed = {"turned", "attend"}
    for layer in model.model.layers:
        if changed == "activation":
            layer.mlp.act_fn, missed = nn.ReLU(), {"gated"}
        elif changed == "norm":
            layer.self_attn.q_norm = nn.Identity()
        elif changed == "epsilon":
            layer.self_attn.q_norm.variance_epsilon = 1.0
    if changed == "class":
        stock = Qwen3Attention.forward
        monkeypatch.setattr(Qwen3Attention, "forward", lambda *a, **k: (stock(*a, **k)[0] * 2, None))
    elif changed == "argument":
        kwargs["something"] = torch.ones(3)
    found = step(model, **kwargs)
    assert calls == {k: v for k, v in STEP.items() if k not in missed}
    assert close(found, stock_way(model, **kwargs))


@pytest.mark.parametrize("changed", ["cosine", "down"])
def test_other_dtypes_are_left_to_torch(changed: str, model: PreTrainedModel) -> None:
    """Which refuses them."""
    cache = filled(model)
    if changed == "down":
        model.model.layers[0].mlp.down_proj.to(torch.bfloat16)
    else:
        model.model.rotary_emb.register_forward_hook(lambda *args: tuple(t.double() for t in args[2]))
    with torch.no_grad(), pytest.raises(RuntimeError, match="dtype"):
        model(IDS[:, :1], **tiny.given(cache))


def test_other_devices_are_left_to_torch(model: PreTrainedModel, calls: Counter[str]) -> None:
    expected = step(model)
    with torch.no_grad(), pytest.raises((RuntimeError, ValueError), match="meta|device"):
        model.model.layers[0].mlp(torch.empty(1, 1, 64, device="meta"))
    with torch.device("meta"):
        model.model.layers[0].mlp(torch.empty(1, 1, 64, device="cpu"))
    assert torch.equal(step(model), expected)


def test_other_attention_is_respected(model: PreTrainedModel, calls: Counter[str]) -> None:
    expected = step(model)
    model.set_attn_implementation("eager")
    calls.clear()
    assert close(step(model), expected)
    assert calls == {"gated": 3}


def test_attention_weights_can_be_had(model: PreTrainedModel, calls: Counter[str]) -> None:
    model.set_attn_implementation("eager")
    cache = filled(model)
    with torch.no_grad():
        out = model(IDS[:, :1], **tiny.given(cache), output_attentions=True, output_hidden_states=True)
    assert [a.shape for a in out.attentions] == [(1, 4, 1, PROMPT + 1)] * 3
    assert len(out.hidden_states) == 4


def test_hidden_states_can_be_had_on_the_way(model: PreTrainedModel, calls: Counter[str]) -> None:
    cache = filled(model)
    with torch.no_grad():
        out = model(IDS[:, PROMPT : PROMPT + 1], **tiny.given(cache), output_hidden_states=True)
    assert calls == STEP
    assert close(out.logits, stock_way(model))
    assert len(out.hidden_states) == 4


def test_blocks_stay_what_they_were(model: PreTrainedModel) -> None:
    stock = tiny.make("llama")
    assert [n for n, _ in stock.named_modules()] == [n for n, _ in model.named_modules() if ".wina" not in n]
    for path, module in stock.named_modules():
        if isinstance(module, LlamaAttention | LlamaMLP):
            ours = model.get_submodule(path)
            assert isinstance(ours, type(module))
            assert isinstance(ours, Short)
            assert type(ours).__name__ == type(module).__name__


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_short_and_independent(copied: Any, model: PreTrainedModel, calls: Counter[str]) -> None:
    expected = step(model)
    other = copied(model)
    kinds = [type(m) for m in model.modules() if isinstance(m, Short)]
    assert [type(m) for m in other.modules() if isinstance(m, Short)] == kinds
    wina_calib.set_sparsity(model, 0.0)
    calls.clear()
    assert torch.equal(step(other), expected)
    assert calls == STEP


def test_generation_goes_the_short_way(model: PreTrainedModel, calls: Counter[str]) -> None:
    mask = torch.ones_like(IDS)
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 3}
    tokens = model.generate(IDS, attention_mask=mask, **options)
    assert calls == {k: 5 * v for k, v in STEP.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Short, "_rows", lambda self, x: None)
        assert torch.equal(model.generate(IDS, attention_mask=mask, **options), tokens)


def test_without_a_compiler_blocks_are_stock(monkeypatch: pytest.MonkeyPatch, calls: Counter[str]) -> None:
    model = sparse()
    expected = step(model)
    monkeypatch.setattr(native, "library", lambda: None)
    calls.clear()
    model = sparse()
    assert close(step(model), expected)
    assert not calls


def test_the_form_is_tested_and_not_the_name() -> None:
    model = tiny.make("llama")
    layer = describe(model).layers[0]

    class OtherMLP(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))

    class OtherAttention(LlamaAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            y, weights = super().forward(*args, **kwargs)
            return y * 1.01, weights

    block = model.model.layers[0]
    block.mlp.__class__, block.self_attn.__class__ = OtherMLP, OtherAttention
    blocks.shorten(block, layer)
    assert type(block.mlp) is OtherMLP
    assert type(block.self_attn) is OtherAttention
    block.mlp.__class__, block.self_attn.__class__ = LlamaMLP, LlamaAttention
    blocks.shorten(block, layer)
    assert isinstance(block.mlp, ShortMLP)
    assert isinstance(block.self_attn, ShortAttention)
