"""A checkpoint with quantized weights in the hands of transformers and peft."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    pipeline,
)

import wina_calib
from wina_calib.checkpoint.dequantized import open_weights
from wina_calib.errors import RuntimeLoadError
from wina_calib.quantization.formats import Quantized, QuantizedRows
from wina_calib.runtime.load import runtime_state

IDS = torch.tensor([[1, 40, 50, 60, 70, 80, 90, 100], [1, 44, 55, 66, 77, 88, 99, 111]])
SMALL: dict[str, Any] = {"samples": 64, "seq_len": 128, "grid": (0.5,), "budget": "uniform", "sparsity": 0.4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, llama: Path, text: Path) -> Path:
    """The tiny Llama in int4, groups of 32, with its best transform."""
    path = tmp_path_factory.mktemp("int4") / "sparse"
    wina_calib.calibrate(llama, path, data=str(text), bits=4, group_size=32, **SMALL)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return wina_calib.load(folder)


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def tied(request: pytest.FixtureRequest, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models whose lm_head is tied to an embedding, plain or scaled, in int8."""
    base = tmp_path_factory.mktemp("tied")
    tiny.save(request.param, base / "base", tie_word_embeddings=True)
    wina_calib.calibrate(base / "base", base / "sparse", transform="none", data=str(text), bits=8, **SMALL)
    return base / "sparse"


@torch.no_grad()
def test_the_model_is_the_dense_one_with_masked_inputs(folder: Path, model: PreTrainedModel) -> None:
    source = open_weights(folder)
    dense = AutoModelForCausalLM.from_config(source.config, dtype=torch.float32).eval()
    dense.load_state_dict({name: source.load(name) for name in dense.state_dict()})
    wina_calib.set_sparsity(model, 0.0)
    torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, atol=1e-4, rtol=1e-4)
    wina_calib.set_sparsity(model, 0.4)
    assert not torch.allclose(model(IDS).logits, dense(IDS).logits, atol=1e-2)


@torch.no_grad()
def test_kernels_and_reference_agree(model: PreTrainedModel) -> None:
    """To rounding, but where a score so near to its threshold is dropped by one alone: at few of 16 tokens."""
    state = runtime_state(model)
    try:
        for sparsity in (0.0, 0.2, 0.4, 0.5):
            wina_calib.set_sparsity(model, sparsity)
            state.kernels = "auto"
            fast = model(IDS).logits
            state.kernels = "reference"
            apart = (model(IDS).logits - fast).abs().amax(-1)
            assert apart.min() < 1e-4
            assert int((apart > 2e-3).sum()) <= (3 if sparsity else 0), (sparsity, apart)
            assert apart.max() < (0.05 if sparsity else 1e-4)
    finally:
        state.kernels = "auto"
        wina_calib.set_sparsity(model, 0.4)


@torch.no_grad()
def test_sparsity_moves_along_the_tables(model: PreTrainedModel, folder: Path) -> None:
    before = model(IDS).logits
    assert wina_calib.set_sparsity(model, 0.25) == pytest.approx(0.25, abs=1e-6)
    assert not torch.equal(model(IDS).logits, before)
    assert torch.equal(wina_calib.load(folder, 0.25)(IDS).logits, model(IDS).logits)
    wina_calib.set_sparsity(model, 0.4)
    assert torch.equal(model(IDS).logits, before)


@torch.no_grad()
def test_inputs_are_dropped_as_asked(model: PreTrainedModel, text: Path) -> None:
    ids = tiny.tokenizer()(text.read_text()[:20_000], return_tensors="pt").input_ids[:, :1024].view(8, 128)
    with runtime_state(model).counting() as counts:
        model(ids)
    seen, dropped = (sum(getattr(count, name) for count in counts.values()) for name in ("seen", "dropped"))
    assert dropped / seen == pytest.approx(0.4, abs=0.05)


@torch.no_grad()
def test_every_way_in_gives_the_same_model(folder: Path, model: PreTrainedModel, tmp_path: Path) -> None:
    expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    for other in (
        AutoModelForCausalLM.from_pretrained(folder),
        pipeline("text-generation", str(folder)).model,
        wina_calib.load(tmp_path),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
    ):
        assert torch.equal(other(IDS).logits, expected)


@torch.no_grad()
def test_casting_leaves_codes_and_scales_alone(folder: Path) -> None:
    model = wina_calib.load(folder)
    exact = model(IDS).logits
    group = model.model.layers[0].wina.mlp_in.shared
    before = group.codes.clone(), group.scales.clone(), group.norm.clone()
    model.to(torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(before, (group.codes, group.scales, group.norm), strict=True))
    assert model.model.layers[0].mlp.up_proj.weight.dtype == model.lm_head.weight.dtype == torch.bfloat16
    assert model(IDS).logits.dtype == torch.bfloat16
    assert (model(IDS).logits.float() - exact).norm() < 0.1 * exact.norm()
    loaded = wina_calib.load(folder, dtype=torch.bfloat16)
    assert loaded.model.layers[0].wina.mlp_in.shared.scales.dtype == torch.float16
    assert loaded(IDS).logits.dtype == torch.bfloat16


@torch.no_grad()
def test_generation_with_a_cache_is_that_without(model: PreTrainedModel) -> None:
    options = {"max_new_tokens": 8, "pad_token_id": 3, "eos_token_id": None, "do_sample": False}
    with_cache, without = (model.generate(IDS[:1], use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(with_cache, without)


@torch.no_grad()
def test_a_tied_lm_head_reads_the_rows_of_the_embedding(tied: Path, tmp_path: Path) -> None:
    source = open_weights(tied)
    assert source.architecture.tied
    model = wina_calib.load(tied, 0.0)
    assert "lm_head.codes" not in model.state_dict()
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert torch.equal(embed.weight, head.weight)
    dense = AutoModelForCausalLM.from_config(source.config, dtype=torch.float32).eval()
    dense.load_state_dict({name: source.load(name) for name in source.shards if ".wina." not in name}, strict=False)
    torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path)
    for other in (wina_calib.load(tmp_path), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(IDS).logits, model(IDS).logits)


def test_a_weight_can_be_read_and_not_written(model: PreTrainedModel) -> None:
    module = model.model.layers[0].mlp.up_proj
    assert (module.weight.shape, module.weight.device.type) == ((128, 64), "cpu")
    assert type(module.weight + 1) is torch.Tensor
    for change in (
        lambda: module.weight.data.add_(1),
        lambda: module.weight.__iadd__(1),
        lambda: setattr(module.weight, "data", torch.zeros(128, 64)),
        lambda: module.weight.copy_(torch.zeros(128, 64)),
        lambda: module.weight.__setitem__(0, 0.0),
    ):
        with pytest.raises(RuntimeLoadError, match="these weights are quantized and cannot be changed"):
            change()


@torch.no_grad()
def test_it_is_cast_as_any_model(model: PreTrainedModel) -> None:
    expected = model(IDS).logits
    assert model.half().dtype == torch.float16
    logits = model.float()(IDS).logits
    assert logits.dtype == torch.float32
    assert float((logits - expected).norm() / expected.norm()) < 0.1


@pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.*:FutureWarning"
)  # peft and the trainer ask by an old name
def test_the_trainer_refuses_it_without_an_adapter(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = wina_calib.load(folder)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="purely quantized models. Please attach trainable adapters"):
        Trainer(model, arguments)
    Trainer(peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"])), arguments)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # peft asks transformers by an old name
def test_an_adapter_trains_and_is_not_merged(folder: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(wina_calib.load(folder), config)
    model(IDS, labels=IDS).loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora_" in name]
    assert gradients
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients)
    with pytest.raises(RuntimeLoadError, match="quantized and cannot be changed"):
        model.merge_and_unload()


def test_loading_dequantizes_no_matrix(tied: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks every module for its weight, to fill what is missing: lm_head alone would be ten times its bytes."""
    made: list[tuple[int, ...]] = []
    plain = QuantizedRows.dequantize

    def dequantize(self: QuantizedRows, *args: Any, **kwargs: Any) -> torch.Tensor:
        made.append(tuple(self.codes.shape))
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(QuantizedRows, "dequantize", dequantize)
    monkeypatch.setattr(Quantized, "whole", lambda self, dtype: made.append(tuple(self.codes.shape)))
    scaled = "Scaled" in type(wina_calib.load(tied).get_input_embeddings()).__name__  # it has a scale that is filled
    wina_calib.load(folder)
    assert len(made) == scaled
