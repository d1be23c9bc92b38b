"""Sparse models with quantized weights on a CPU: what C computes for them is what dequantized weights give."""

import copy
import pickle
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache

import wina_calib
from wina_calib.budgets.count import count_cells
from wina_calib.masks.mask import mask_inputs
from wina_calib.model.architecture import describe
from wina_calib.quantization.formats import WeightFormat
from wina_calib.runtime import quantized_group
from wina_calib.runtime.fast_path import layers
from wina_calib.runtime.fast_path.blocks import Short
from wina_calib.runtime.kernels import native, quantized_cpu
from wina_calib.runtime.kernels.layers import Layers
from wina_calib.runtime.load import runtime_state, sparse_sites
from wina_calib.runtime.patches import compile_guards
from wina_calib.runtime.quantized import QuantizedHead
from wina_calib.studies.bench.models import Pair, fit

IDS = torch.randint(4, 300, (1, 40), generator=torch.Generator().manual_seed(1))
PROMPT = 12
FORMATS = [WeightFormat(4, 32), WeightFormat(4, 32, zero_point=False), WeightFormat(8)]
# 16 bits of each input against float32.
LIMIT = 1e-3

needs_compiler = pytest.mark.skipif(not native.available(torch.float32), reason="needs a C compiler")


def sparse(
    form: WeightFormat = FORMATS[0], family: str = "llama", dtype: Any = torch.float32, **changes: Any
) -> PreTrainedModel:
    """A tiny quantized model whose thresholds drop half of the inputs."""
    dense, model = (tiny.make(family, dtype=dtype, **changes) for _ in range(2))
    pair = Pair(family, dense, model, count_cells(describe(dense), "none"), False, None)
    fit(pair, (0.5,), IDS, 1, form)
    return model


@torch.no_grad()
def logits(model: nn.Module, cache: Any = None, *, count: int = 3, call: Any = None) -> Tensor:
    """Of a prompt and tokens after it, each alone."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    call = model if call is None else call
    found = [model(IDS[:, :PROMPT], **tiny.given(cache)).logits]
    found += [call(IDS[:, i : i + 1], **tiny.given(cache)).logits for i in range(PROMPT, PROMPT + count)]
    return torch.cat(found, dim=1)


def reference(model: PreTrainedModel, **given: Any) -> Tensor:
    state = runtime_state(model)
    state.kernels = "reference"
    try:
        return logits(model, **given)
    finally:
        state.kernels = "auto"


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts what is computed in C."""
    seen: dict[str, int] = {}

    def counted(module: Any, name: str) -> None:
        function = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            seen[name] = seen.get(name, 0) + 1
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    counted(Layers, "__call__")
    for name in ("turned", "gated"):
        counted(native, name)
    for name in ("few", "rows_product", "dense_site"):
        counted(quantized_cpu, name)
    return seen


@needs_compiler
@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3"])
def test_tokens_go_through_c(form: WeightFormat, family: str, calls: dict[str, int]) -> None:
    model = sparse(form, family)
    calls.clear()
    found = logits(model)
    assert calls == {"__call__": 3, "few": 12, "rows_product": 4}
    assert distance(found, reference(model)) < LIMIT
    calls.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "plan_for", lambda now: None)
        assert distance(logits(model), found) < LIMIT
        assert calls == {"turned": 9, "gated": 9, "few": 12, "rows_product": 4}
        calls.clear()
        patch.setattr(Short, "_rows", lambda self, x: None)
        assert distance(logits(model), found) < LIMIT
    assert "turned" not in calls


@needs_compiler
def test_bfloat16(calls: dict[str, int]) -> None:
    model = sparse(dtype=torch.bfloat16)
    calls.clear()
    assert distance(logits(model), reference(model)) < 0.1  # a mask that falls the other way shows more
    assert calls["__call__"] == 3


def test_sparsity_0_is_dense_and_a_dense_pass_is_the_same() -> None:
    model = sparse()
    dropped = logits(model)
    wina_calib.set_sparsity(model, 0.0)
    found = logits(model)
    assert distance(found, reference(model)) < LIMIT
    assert distance(found, dropped) > 0.01
    with runtime_state(model).densely():
        assert distance(logits(model), found) < LIMIT
    wina_calib.set_sparsity(model, 0.5)
    assert torch.equal(logits(model), dropped)


def test_many_rows_gradients_and_other_modes() -> None:
    model = sparse()
    wina_calib.set_sparsity(model, 0.0)  # no mask falls the other way
    with torch.no_grad():
        assert distance(model(IDS).logits, logits(model, count=28)) < LIMIT
    model.set_input_embeddings(copy.deepcopy(model.get_input_embeddings()))
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_(True)
    model(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad is not None
    with torch.inference_mode():
        assert distance(model(IDS).logits, model(inputs_embeds=embedded).logits) < LIMIT


def test_copies_and_what_is_replaced(calls: dict[str, int]) -> None:
    model = sparse(family="qwen2")
    found = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for site in sparse_sites(model):
            site.group("shared").scales.mul_(2)
        assert torch.equal(logits(other), found)
        assert distance(logits(model), found) > 0.01
        for site in sparse_sites(model):
            site.group("shared").scales.div_(2)
    layer = model.model.layers[0].self_attn.q_proj
    layer.bias = nn.Parameter(layer.bias.detach() + 1.0)
    assert distance(logits(model), found) > 1e-3
    assert distance(logits(model), reference(model)) < LIMIT


def test_what_is_written_to_a_bias_counts_and_its_gradient_comes() -> None:
    model = sparse(family="qwen2")
    found = logits(model)
    bias = model.model.layers[0].self_attn.k_proj.bias
    with torch.no_grad():
        bias.add_(1.0)
    assert distance(logits(model), found) > 1e-3
    assert distance(logits(model), reference(model)) < LIMIT
    number = model.model.layers[0].self_attn.k_proj.number
    wina_calib.set_sparsity(model, 0.3)
    logits(model)
    assert model.model.layers[0].self_attn.k_proj.number == number  # nothing is made anew
    bias.requires_grad_(True)
    model(IDS).logits.square().sum().backward()
    assert bias.grad is not None and bool(bias.grad.any())


def test_a_step_is_one_operator_a_group_when_compiled() -> None:
    model, graphs = sparse(), []
    expected = logits(model, StaticCache(config=model.config, max_cache_len=40))

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor], **_: object) -> object:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    options = {"guard_filter_fn": compile_guards.needed_ones}
    call = torch.compile(model.__call__, fullgraph=True, backend=backend, options=options)
    cache = StaticCache(config=model.config, max_cache_len=40)
    assert distance(logits(model, cache, call=call), expected) < LIMIT
    names = [str(node.target) for node in graphs[-1].graph.nodes]
    assert sum("group_product" in name for name in names) == len(sparse_sites(model))
    assert sum("quantized_rows" in name for name in names) == 1
    wina_calib.set_sparsity(model, 0.3)
    changed = logits(model, StaticCache(config=model.config, max_cache_len=40))
    cache.reset()
    assert distance(logits(model, cache, call=call), changed) < LIMIT
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_the_head_is_of_rows(calls: dict[str, int]) -> None:
    model = sparse(tie_word_embeddings=True)
    assert isinstance(model.lm_head, QuantizedHead)
    x = torch.randn(1, 2, 64)
    assert distance(model.lm_head(x), x @ model.lm_head.weight.T) < LIMIT


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    model = sparse()
    assert distance(logits(model), reference(model)) < 1e-5


@torch.no_grad()
def test_many_rows_go_to_what_is_made_ready_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a card: rows of a prompt are masked in one kernel, and multiplied by what remembers its own."""
    model = sparse()
    wina_calib.set_sparsity(model, 0.5)
    expected = reference(model)
    monkeypatch.setattr(quantized_group, "_has_many_rows", lambda rows: rows.shape[0] > 1)
    seen = []
    for module in model.modules():
        group = getattr(module, "packed", None)
        if isinstance(group, quantized_group.QuantizedGroup) and group.many is None:
            whole, norm, threshold = group.weight.dequantize(), group.norm, group.threshold

            def mask(x: Tensor, dense: Tensor | None, norm: Tensor = norm, threshold: Tensor = threshold) -> Tensor:
                seen.append("mask")
                return mask_inputs(x, norm, threshold, dense_rows=dense)

            def many(x: Tensor, whole: Tensor = whole) -> Tensor:
                seen.append("product")
                return x @ whole

            monkeypatch.setattr(group, "mask", mask)
            monkeypatch.setattr(group, "many", many)
    assert distance(logits(model), expected) <= LIMIT
    sites = 4 * model.config.num_hidden_layers
    assert (seen.count("mask"), seen.count("product")) == (sites, sites)
    seen.clear()
    wina_calib.set_prefill(model, "dense")
    logits(model)
    assert (seen.count("mask"), seen.count("product")) == (0, sites)
