"""Checkpoints with run-time matrices: they load wherever wina_calib is imported, and nowhere else."""

import json
import pickle
from pathlib import Path

import pytest
import script
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, pipeline

import wina_calib
from wina_calib.model.architecture import describe
from wina_calib.runtime import model_types

IDS = torch.arange(4, 28).view(2, 12)


@pytest.fixture(scope="module", params=["stacked", "paper"])
def rotated(request: pytest.FixtureRequest, llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, calibrated with run-time matrices."""
    folder = tmp_path_factory.mktemp("runtime") / request.param
    tiny.calibrate(llama, folder, text, transform=request.param, samples=80)
    return folder


@torch.no_grad()
def test_every_way_of_loading_computes_the_base_model_at_sparsity_zero(rotated: Path, llama: Path) -> None:
    expected = AutoModelForCausalLM.from_pretrained(llama)(IDS).logits
    plain = AutoModelForCausalLM.from_pretrained(rotated)
    through_pipeline = pipeline("text-generation", str(rotated)).model
    for model in (wina_calib.load(rotated), plain, through_pipeline):
        assert not torch.allclose(model(IDS).logits, expected, atol=1e-3)  # sparse as it comes
        wina_calib.set_sparsity(model, 0.0)
        torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_saving_again_keeps_matrices_and_type(rotated: Path, tmp_path: Path) -> None:
    model = wina_calib.load(rotated)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "wina_calib-llama"
    assert config["architectures"] == ["WinaLlamaForCausalLM"]
    assert torch.equal(wina_calib.load(tmp_path)(IDS).logits, model(IDS).logits)


@torch.no_grad()
def test_models_and_configs_can_be_pickled(rotated: Path) -> None:
    model = wina_calib.load(rotated)
    copy = pickle.loads(pickle.dumps(model))
    assert type(copy) is type(model)
    assert torch.equal(copy(IDS).logits, model(IDS).logits)


def test_tokenizer_and_config_load_by_the_auto_classes(rotated: Path) -> None:
    assert AutoTokenizer.from_pretrained(rotated)("a text")["input_ids"]
    config = AutoConfig.from_pretrained(rotated)
    assert config.model_type == "wina_calib-llama"
    assert config.hidden_size == 64


def test_without_wina_calib_loading_fails_and_names_it(rotated: Path) -> None:
    unknown = ["model type `wina_calib-llama`", "does not recognize this architecture"]
    other = ["`wina_calib-llama`", "norm.weight", "size"]
    expected = {"AutoModelForCausalLM": unknown, "AutoModel": unknown, "LlamaForCausalLM": other, "LlamaModel": other}
    for loader, said in script.plain_errors(rotated, *expected).items():
        assert not [message for message in expected[loader] if message not in said], (loader, said)


@torch.no_grad()
def test_the_base_models_own_class_loads_it_once_wina_calib_is_imported(rotated: Path) -> None:
    direct = LlamaForCausalLM.from_pretrained(rotated)
    assert describe(direct).final_norm.module == "model.norm"
    assert torch.equal(direct(IDS).logits, wina_calib.load(rotated)(IDS).logits)


def test_every_causal_model_type_is_known_but_no_class_is_made_for_it() -> None:
    made = model_types.runtime_classes.cache_info().currsize
    for base in ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text", "olmo2"):
        assert f"wina_calib-{base}" in model_types.CONFIG_MAPPING
    assert model_types.runtime_classes.cache_info().currsize == made


def test_a_class_is_found_by_its_name() -> None:
    assert model_types.WinaLlamaForCausalLM is model_types.runtime_classes("wina_calib-llama")[1]
    assert model_types.WinaGemma3TextConfig is model_types.runtime_classes("wina_calib-gemma3_text")[0]
    with pytest.raises(AttributeError, match="WinaNothing"):
        _ = model_types.WinaNothing


def test_an_unknown_name_in_a_config_is_not_taken_for_a_class(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "wina_calib-nothing"}')
    with pytest.raises(ValueError, match="wina_calib-nothing"):
        AutoConfig.from_pretrained(tmp_path)
