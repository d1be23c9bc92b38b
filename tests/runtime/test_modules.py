"""The loaded model: one computation a mask group, storage, prefill, first tokens, counting, casting, copying."""

import copy
import io
from pathlib import Path

import pytest
import tiny
import torch
from torch.nn.functional import linear, scaled_dot_product_attention

import wina_calib
from wina_calib.checkpoint.reader import read_settings
from wina_calib.errors import UsageError
from wina_calib.masks.mask import mask_inputs
from wina_calib.runtime.fast_path import attention
from wina_calib.runtime.first_tokens import Rows
from wina_calib.runtime.kernels import dispatch
from wina_calib.runtime.load import runtime_state, sparse_sites
from wina_calib.runtime.modules import SparseLinear

IDS = torch.randint(4, 300, (2, 20), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def packing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tiny weights be stored column-contiguous, as large ones are."""
    monkeypatch.setattr(dispatch, "CPU_MIN_SAVED", 0)


def logits(model: torch.nn.Module, ids: torch.Tensor = IDS, **kwargs: object) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **kwargs).logits


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_the_product_is_the_masked_product(calibrated: Path) -> None:
    model = wina_calib.load(calibrated)
    seen = {}
    attention = model.model.layers[1].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(attention, name).register_forward_hook(
            lambda m, args, out, name=name: seen.update({name: (args[0], out)})
        )
    logits(model)
    group = model.model.layers[1].wina.attn_in.shared
    rows = torch.zeros(2, 20, dtype=torch.bool)
    rows[:, 0] = True
    for name, (x, out) in seen.items():
        masked = mask_inputs(x, group.norm, group.threshold, "wina", rows)
        assert torch.equal(out, linear(masked, getattr(attention, name).weight))
        assert 0.3 < float((masked == 0).float().mean()) < 0.7


@pytest.mark.usefixtures("packing")
def test_packed_weights_give_the_same_model(calibrated: Path) -> None:
    fast, slow = wina_calib.load(calibrated), wina_calib.load(calibrated)
    runtime_state(slow).kernels = "reference"
    assert error(logits(fast), logits(slow)) < 1e-5
    weight = fast.model.layers[0].self_attn.k_proj.weight
    assert weight.stride(0) == 1
    assert weight.shape == (32, 64)
    site = fast.model.layers[0].wina.attn_in
    storage = site._packed["shared"].weight_t.untyped_storage().data_ptr()
    assert {m.weight.untyped_storage().data_ptr() for m in site.linears} == {storage}
    kwargs = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 3}
    assert torch.equal(fast.generate(IDS, **kwargs), slow.generate(IDS, **kwargs))


@pytest.mark.usefixtures("packing")
@pytest.mark.parametrize("family", ["qwen2", "phi3", "llama"])
def test_packed_families_with_biases_and_fused_projections(family: str, tmp_path: Path, text: Path) -> None:
    extra = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    tiny.save(family, tmp_path / "m", **extra)
    for masks in ("shared", "per-projection"):
        out = tmp_path / masks
        tiny.calibrate(tmp_path / "m", out, text, masks=masks, transform="none", grid=(0.5,))
        fast, slow = wina_calib.load(out), wina_calib.load(out)
        runtime_state(slow).kernels = "reference"
        assert error(logits(fast), logits(slow)) < 1e-5
        assert fast.model.layers[0].mlp.down_proj.weight.stride(0) == 1


@pytest.mark.usefixtures("packing")
def test_saved_moved_and_cast_after_packing(calibrated: Path, tmp_path: Path) -> None:
    model = wina_calib.load(calibrated)
    before = logits(model)
    model.save_pretrained(tmp_path / "again")
    again = wina_calib.load(tmp_path / "again")
    assert error(logits(again), before) < 1e-6
    assert all(t.is_contiguous() for t in model.state_dict().values())
    model.to("cpu")
    assert error(logits(model), before) < 1e-6
    model.to(torch.bfloat16)
    assert error(logits(model).float(), before) < 0.2
    assert model.model.layers[0].wina.attn_in.shared.norm.dtype == torch.float32
    assert model.model.layers[0].self_attn.q_proj.weight.stride(0) == 1


@pytest.mark.usefixtures("packing")
def test_storage_follows_the_sparsity_on_a_cpu(calibrated: Path) -> None:
    model, dense = wina_calib.load(calibrated), wina_calib.load(calibrated, 0.0)
    logits(model)
    weight = model.model.layers[0].self_attn.q_proj
    assert weight.weight.stride(0) == 1
    wina_calib.set_sparsity(model, 0.0)
    assert torch.equal(logits(model), logits(dense))
    assert weight.weight.is_contiguous()


@pytest.mark.usefixtures("packing")
def test_copies_have_their_own_state(calibrated: Path) -> None:
    model = wina_calib.load(calibrated)
    expected = logits(model)
    twin = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (twin, loaded):
        assert error(logits(other), expected) < 1e-6
        wina_calib.set_sparsity(other, 0.0)
        runtime_state(other).prefill = "dense"
        assert not torch.equal(logits(other), expected)
    assert torch.equal(logits(model), expected)


def test_first_token_is_dense_and_padding_is_skipped(calibrated: Path) -> None:
    model = wina_calib.load(calibrated)
    seen: list[torch.Tensor] = []
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
        lambda m, args: seen.append(runtime_state(model).now().dense_rows)
    )
    mask = torch.ones_like(IDS)
    mask[1, :6] = 0
    logits(model, attention_mask=mask)
    assert seen[-1].nonzero().tolist() == [[0, 0], [1, 6]]
    out = model(IDS, use_cache=True)
    model(IDS[:, :3], **tiny.given(tiny.cache_of(out)))
    assert seen[-1] is None


def test_dense_prefill(calibrated: Path) -> None:
    sparse, dense = wina_calib.load(calibrated, prefill="dense"), wina_calib.load(calibrated, 0.0)
    assert torch.equal(logits(sparse), logits(dense))
    kwargs = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 3}
    assert not torch.equal(sparse.generate(IDS, **kwargs), dense.generate(IDS, **kwargs))
    with pytest.raises(UsageError, match="prefill"):
        wina_calib.set_prefill(sparse, "never")


@pytest.mark.parametrize("prefill", ["sparse", "dense"])
def test_counting_is_honest(calibrated: Path, prefill: str) -> None:
    model = wina_calib.load(calibrated, 0.65, prefill=prefill)
    with runtime_state(model).counting() as counts:
        logits(model)
    assert len(counts) == 12
    for count in counts.values():
        if prefill == "dense":
            assert count.sparsity == 0.0
        else:
            assert 0.5 < count.sparsity < 0.75


def test_a_projection_called_alone_is_right(calibrated: Path) -> None:
    model = wina_calib.load(calibrated)
    logits(model)
    attention = model.model.layers[0].self_attn
    x, y = torch.randn(1, 1, 64), torch.randn(1, 1, 64)
    expected = {n: getattr(attention, n)(x) for n in ("k_proj", "v_proj")}
    attention.q_proj(y)
    assert torch.equal(attention.k_proj(x), expected["k_proj"])
    assert torch.equal(attention.v_proj(x), expected["v_proj"])


def test_set_sparsity_is_met_by_name_and_refused_out_of_range(calibrated: Path) -> None:
    model = wina_calib.load(calibrated)
    assert wina_calib.set_sparsity(model, 0.37) == pytest.approx(0.37, abs=1e-6)
    assert len(sparse_sites(model)) == 12
    for bad in (-0.1, 1.0, float("nan"), "x", None, True):
        with pytest.raises(UsageError, match="sparsity"):
            wina_calib.set_sparsity(model, bad)
    with pytest.raises(UsageError, match="no sparse sites"):
        wina_calib.set_sparsity(torch.nn.Linear(2, 2), 0.5)


@pytest.mark.parametrize(("sparsity", "inside"), [(0.0, True), (0.25, True), (0.65, True), (0.1, True), (0.97, False)])
def test_a_sparsity_that_was_not_fitted_is_warned_of(
    sparsity: float, inside: bool, calibrated: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = wina_calib.load(calibrated, sparsity)
    assert wina_calib.set_sparsity(model, sparsity) == pytest.approx(sparsity, abs=1e-6)
    said = [record.message for record in caplog.records if "thresholds were fitted" in record.message]
    assert len(said) == (0 if inside else 2)
    assert inside or f"sparsity {sparsity:g} lies above 0.65" in said[0]


def test_thresholds_rise_with_sparsity(calibrated: Path) -> None:
    model = wina_calib.load(calibrated)
    last = None
    for sparsity in (0.0, 0.1, 0.25, 0.3, 0.5, 0.6, 0.65, 0.8, 0.95):
        wina_calib.set_sparsity(model, sparsity)
        now = [float(s.shared.threshold) for s in sparse_sites(model)]
        assert last is None or all(a < b for a, b in zip(last, now, strict=True))
        last = now


@pytest.mark.usefixtures("packing")
def test_compiled_without_graph_breaks_or_recompiles(calibrated: Path) -> None:
    model = wina_calib.load(calibrated)
    expected = logits(model, use_cache=False)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert error(logits(compiled, use_cache=False), expected) < 1e-5
    wina_calib.set_sparsity(model, 0.6)
    with torch._dynamo.config.patch(error_on_recompile=True):
        changed = logits(compiled, use_cache=False)
    assert error(changed, logits(model, use_cache=False)) < 1e-5
    assert error(changed, expected) > 1e-3


def test_modules_are_linear_layers(calibrated: Path) -> None:
    model = wina_calib.load(calibrated)
    modules = [m for m in model.modules() if isinstance(m, SparseLinear)]
    assert len(modules) == 21
    assert all(isinstance(m, torch.nn.Linear) for m in modules)


def test_a_saved_model_says_what_it_runs(calibrated: Path, tmp_path: Path) -> None:
    model = wina_calib.load(calibrated, 0.3, prefill="dense")
    model.save_pretrained(tmp_path / "again")
    settings = read_settings(tmp_path / "again")
    assert (settings.sparsity, settings.prefill) == (0.3, "dense")


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("wrap", [False, True])
def test_first_token_with_prepared_masks(dtype: torch.dtype, wrap: bool) -> None:
    """A static cache comes with masks (batch, 1, rows, keys), one for each attention type in some models."""
    allowed = torch.ones(2, 1, 5, 9).tril().bool()
    allowed[1, :, :, :2] = False
    mask = allowed if dtype == torch.bool else torch.where(allowed, 0.0, float("-inf"))
    kwargs = {"attention_mask": {"full_attention": mask} if wrap else mask}
    rows = Rows((torch.ones(2, 5, dtype=torch.long),), kwargs)
    assert rows.first().nonzero().tolist() == [[0, 0], [1, 2]]


@pytest.mark.usefixtures("packing")
def test_first_token_in_generation_with_a_static_cache(calibrated: Path) -> None:
    model = wina_calib.load(calibrated)
    mask = torch.ones_like(IDS)
    mask[1, :6] = 0
    kwargs = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 3}
    static = model.generate(IDS, cache_implementation="static", disable_compile=True, **kwargs)
    assert torch.equal(static, model.generate(IDS, **kwargs))


@pytest.mark.usefixtures("packing")
def test_biases_are_not_stale_copies(tmp_path: Path, text: Path) -> None:
    tiny.save("qwen2", tmp_path / "m")
    tiny.calibrate(tmp_path / "m", tmp_path / "s", text, transform="none", grid=(0.5,))
    model = wina_calib.load(tmp_path / "s")
    before = logits(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.bias.add_(1.0)
    after = logits(model)
    assert error(after, before) > 1e-2
    runtime_state(model).kernels = "reference"
    assert error(after, logits(model)) < 1e-5


@pytest.mark.usefixtures("packing")
def test_an_optimizer_made_before_the_first_pass_trains_the_weights(calibrated: Path) -> None:
    model = wina_calib.load(calibrated)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.model.layers[1].self_attn.q_proj.weight.clone()
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert not torch.equal(model.model.layers[1].self_attn.q_proj.weight, before)


@pytest.mark.usefixtures("packing")
def test_biases_can_be_trained_alone(tmp_path: Path, text: Path) -> None:
    tiny.save("qwen2", tmp_path / "m")
    tiny.calibrate(tmp_path / "m", tmp_path / "s", text, transform="none", grid=(0.5,))
    model = wina_calib.load(tmp_path / "s").requires_grad_(False)
    biases = [p.requires_grad_() for name, p in model.named_parameters() if name.endswith("_proj.bias")]
    model(IDS, labels=IDS).loss.backward()
    assert len(biases) == 9
    assert all(bias.grad is not None for bias in biases)


@pytest.mark.usefixtures("packing")
def test_inference_mode_leaves_a_model_that_can_be_trained(calibrated: Path) -> None:
    model = wina_calib.load(calibrated)
    with torch.inference_mode():
        model(IDS)
    model.train()(IDS, labels=IDS).loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None


@pytest.mark.usefixtures("packing")
def test_weights_that_were_replaced_without_notice(calibrated: Path) -> None:
    model = wina_calib.load(calibrated)
    before = logits(model)
    values = {n: 1.5 * v if n.endswith("up_proj.weight") else v for n, v in model.state_dict().items()}
    model.load_state_dict(values, assign=True)
    assigned = logits(model)
    model.model.layers[0].self_attn.v_proj.weight.data = 2 * model.model.layers[0].self_attn.v_proj.weight.data
    after = logits(model)
    runtime_state(model).kernels = "reference"
    assert error(after, logits(model)) < 1e-5
    assert min(error(assigned, before), error(after, assigned)) > 1e-3


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # peft asks transformers by an old name
@pytest.mark.parametrize("safe", [False, True])
def test_a_merged_adapter_counts(calibrated: Path, safe: bool) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(wina_calib.load(calibrated), config).eval()
    logits(adapted)
    merged = adapted.merge_and_unload(safe_merge=safe)
    found = logits(merged)
    assert error(found, logits(wina_calib.load(calibrated))) > 1e-3
    runtime_state(merged).kernels = "reference"
    assert error(found, logits(merged)) < 1e-5


def test_a_model_that_names_our_attention_runs_anywhere(calibrated: Path) -> None:
    """As one does that was pickled where there is a GPU."""
    model = wina_calib.load(calibrated)
    expected = logits(model)
    model.config._attn_implementation = attention.NAME
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("key_heads", [1, 2, 8])
def test_attention_of_one_token_is_torchs(dtype: torch.dtype, key_heads: int) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, rows, 16).to(dtype) for heads, rows in ((8, 1), *[(key_heads, 30)] * 2))
    module = torch.nn.Module()
    module.num_key_value_groups = 8 // key_heads
    seen = torch.rand(2, 1, 1, 30) < 0.7
    added = torch.where(seen, 0.0, -torch.inf).to(dtype)
    assert attention.packs(query, key, seen) == (key_heads < 8)
    assert not attention.packs(query.repeat(1, 1, 2, 1), key, None)
    assert not attention.packs(query, key, seen.repeat(1, 8, 1, 1))
    for mask, scale in ((None, None), (seen, 0.3), (added, None)):
        found, _ = attention.attention_forward(module, query, key, value, mask, scaling=scale)
        heads = [t.double().repeat_interleave(8 // key_heads, 1) for t in (key, value)]
        wide = mask.double() if mask is added else mask
        expected = scaled_dot_product_attention(query.double(), *heads, attn_mask=wide, scale=scale)
        assert found.shape == (2, 1, 8, 16)
        assert error(found.double(), expected.transpose(1, 2)) < (1e-2 if dtype == torch.bfloat16 else 1e-6)
