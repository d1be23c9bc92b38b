"""A compiled decode step: one operator a mask group, few checks, changes that take effect, copies with numbers of their own."""

import copy
from pathlib import Path

import pytest
import tiny
import torch
from transformers import StaticCache

import wina_calib
from wina_calib.runtime import group_operator
from wina_calib.runtime.kernels import dispatch
from wina_calib.runtime.load import runtime_state, sparse_sites
from wina_calib.runtime.modules import SparseLinear
from wina_calib.runtime.patches import compile_guards

IDS = torch.randint(4, 300, (1, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def packing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tiny weights be stored column-contiguous, as large ones are."""
    monkeypatch.setattr(dispatch, "CPU_MIN_SAVED", 0)
    torch._dynamo.reset()


class Decoder:
    """Runs a prompt of 8 tokens, then steps, compiled or not."""

    def __init__(self, model: torch.nn.Module, *, compiled: bool) -> None:
        self.model, self.guards, self.graphs = model, [], []
        self.cache = StaticCache(config=model.config, max_cache_len=12)
        options = {
            "guard_filter_fn": compile_guards.needed_ones
        }  # the checks that are left out in generation are not needed
        self.call = model
        if compiled:
            self.call = torch.compile(model.__call__, fullgraph=True, backend=self.backend, options=options)

    def backend(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor], **_: object) -> object:
        self.graphs.append(graph)
        return graph.forward

    @torch.no_grad()
    def logits(self, steps: int = 2) -> torch.Tensor:
        self.cache.reset()
        self.model(IDS[:, :8], **tiny.given(self.cache), use_cache=True)
        found = [
            self.call(input_ids=IDS[:, i : i + 1], **tiny.given(self.cache), use_cache=True).logits
            for i in range(8, 8 + steps)
        ]
        return torch.cat(found)

    def operators(self) -> int:
        """Group products in the newest graph."""
        return sum("group_product" in str(node.target) for node in self.graphs[-1].graph.nodes)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a - b).norm() / b.norm()) < 1e-5


def test_one_operator_a_group_and_changes_take_effect(calibrated: Path) -> None:
    model = wina_calib.load(calibrated)
    plain, compiled = Decoder(model, compiled=False), Decoder(model, compiled=True)
    assert close(compiled.logits(), expected := plain.logits())
    assert compiled.operators() == len(sparse_sites(model))
    names = " ".join(str(node.name) for node in compiled.graphs[0].graph.nodes if node.op == "placeholder")
    assert "q_proj" not in names
    assert "threshold" not in names
    wina_calib.set_sparsity(model, 0.6)
    assert close(found := compiled.logits(), plain.logits())
    assert not close(found, expected)
    assert len(compiled.graphs) == 1


def test_modes_are_seen(calibrated: Path) -> None:
    model = wina_calib.load(calibrated)
    plain, compiled = Decoder(model, compiled=False), Decoder(model, compiled=True)
    state = runtime_state(model)
    sparse = compiled.logits()
    state.dense = True
    assert close(dense := compiled.logits(), plain.logits())
    assert not close(dense, sparse)
    assert compiled.operators() == len(sparse_sites(model))
    state.dense, state.kernels = False, "reference"
    assert close(compiled.logits(), sparse)
    assert compiled.operators() == 0
    state.kernels = "auto"
    with state.densely():
        assert close(compiled.logits(), dense)
    with state.counting() as counts:
        assert close(compiled.logits(1), sparse[:1])
    assert {count.seen for count in counts.values()} >= {9 * 64 * 128}  # eight tokens of the prompt and one


def test_replaced_weights_are_compiled_again(calibrated: Path) -> None:
    model = wina_calib.load(calibrated)
    compiled = Decoder(model, compiled=True)
    compiled.logits()
    first = model.model.layers[0].self_attn.q_proj
    number = first.number
    assert number != group_operator.UNNUMBERED
    first.weight = torch.nn.Parameter(first.weight.detach() * 2)
    runtime_state(model).stale = True
    assert close(compiled.logits(), Decoder(model, compiled=False).logits())
    assert first.number != number


def test_a_copy_has_numbers_of_its_own(calibrated: Path) -> None:
    model = wina_calib.load(calibrated)
    expected = Decoder(model, compiled=True).logits()
    twin = copy.deepcopy(model)
    wina_calib.set_sparsity(twin, 0.0)
    torch._dynamo.reset()
    other = Decoder(twin, compiled=True).logits()
    assert not close(other, expected)
    assert close(other, Decoder(twin, compiled=False).logits())
    numbers = [{m.number for m in each.modules() if isinstance(m, SparseLinear)} for each in (model, twin)]
    assert not numbers[0] & numbers[1]
    torch._dynamo.reset()
    assert close(Decoder(model, compiled=True).logits(), expected)


def test_projections_of_one_group_share_a_product(calibrated: Path) -> None:
    model = wina_calib.load(calibrated)
    Decoder(model, compiled=False).logits()
    attention = model.model.layers[0].self_attn
    x = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(1))
    y = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(2))

    def alone(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        attention.q_proj(y)
        return attention.k_proj(x), attention.v_proj(x), attention.q_proj(y)

    with torch.no_grad():
        found = torch.compile(alone, fullgraph=True, backend="eager")(x, y)
        assert all(close(a, b) for a, b in zip(found, alone(x, y), strict=True))


class Doubled(torch.nn.Module):
    """Stands for an adapter around a projection."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.inner(x)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj", "model.layers.0.input_layernorm", "lm_head"])
def test_a_replaced_module_is_compiled_again(calibrated: Path, name: str) -> None:
    model = wina_calib.load(calibrated)
    compiled = Decoder(model, compiled=True)
    compiled.logits()
    model.set_submodule(name, Doubled(model.get_submodule(name)))
    assert close(compiled.logits(), Decoder(model, compiled=False).logits())
    assert len(compiled.graphs) == 2


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # peft asks transformers by an old name
@pytest.mark.parametrize("change", ["off", "another", "merged"])
def test_a_changed_adapter_is_compiled_again(calibrated: Path, change: str) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(wina_calib.load(calibrated), config).eval()
    inner = adapted.get_base_model()
    compiled, plain = Decoder(inner, compiled=True), Decoder(inner, compiled=False)
    before = compiled.logits()
    assert close(before, plain.logits())
    if change == "off":
        adapted.base_model.disable_adapter_layers()
    elif change == "another":
        adapted.add_adapter("another", config)
        adapted.set_adapter("another")
    else:
        adapted.merge_adapter()
    assert close(found := compiled.logits(), plain.logits())
    assert not close(found, before)


def test_a_resized_vocabulary_is_compiled_again(calibrated: Path) -> None:
    model = wina_calib.load(calibrated)
    compiled = Decoder(model, compiled=True)
    rows = compiled.logits().shape[-1]
    model.resize_token_embeddings(rows + 8, mean_resizing=False)
    assert compiled.logits().shape[-1] == rows + 8
    assert len(compiled.graphs) == 2


def test_inputs_of_another_dtype_are_not_served(calibrated: Path) -> None:
    model = wina_calib.load(calibrated)
    Decoder(model, compiled=False).logits()
    projection = model.model.layers[0].mlp.down_proj
    x = torch.randn(1, 1, projection.in_features, dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = torch.compile(projection, fullgraph=True, backend="eager")(x)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, projection(x))


def test_few_checks_a_layer(calibrated: Path) -> None:
    model = wina_calib.load(calibrated)
    seen: list[tuple[str, bool]] = []

    def note(guards: list[object]) -> list[bool]:
        kept = compile_guards.needed_ones(guards)
        seen.extend((g.name, k) for g, k in zip(guards, kept, strict=True) if "['layers']" in g.name)
        return kept

    run = Decoder(model, compiled=False)
    run.call = torch.compile(model.__call__, fullgraph=True, backend="eager", options={"guard_filter_fn": note})
    run.logits()
    kept = sum(k for _, k in seen)
    assert 0 < kept <= 60 * len(model.model.layers)
    assert kept < len(seen) / 2


@pytest.mark.slow
def test_generate_compiles_on_a_cpu_where_it_is_asked_to(calibrated: Path) -> None:
    model = wina_calib.load(calibrated)
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(IDS, **options)
    assert not hasattr(model, "_compiled_call")
    found = model.generate(IDS, **options, compile_config=compile_guards.compile_config())
    assert torch.equal(found, expected)
    assert hasattr(model, "_compiled_call")
