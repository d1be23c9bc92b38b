"""What a model folder means is what transformers makes of it: class, config, files, names, adapters, asked once."""

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralForCausalLM,
    Qwen2VLConfig,
)

import wina_calib
from wina_calib.checkpoint.side_files import code_files
from wina_calib.errors import CheckpointError, ModelFolderError, UnsupportedModel, UsageError, WinaError
from wina_calib.model.folder import ELSEWHERE, open_folder, remote_code
from wina_calib.model.loading import ask, open_weights
from wina_calib.model.locate import load_tokenizer
from wina_calib.model.source import open_source
from wina_calib.studies.bench.models import open_pair
from wina_calib.studies.flops import flops

OPTIONS = {"budget": "uniform", "samples": 80, "seq_len": 128, "grid": (0.5,), "transform": "none"}
IDS = torch.arange(4, 28).view(2, 12)


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    """A model folder to change."""
    return Path(shutil.copytree(llama, tmp_path / "m"))


@pytest.fixture
def same(text: Path, tmp_path: Path) -> Callable[..., None]:
    """Calibrate a folder; at sparsity 0 it has to be what transformers makes of it."""

    @torch.no_grad()
    def run(folder: Path, **options: Any) -> None:
        wina_calib.calibrate(folder, tmp_path / "out", data=str(text), **(OPTIONS | options))
        right = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
        found = wina_calib.load(tmp_path / "out", sparsity=0)
        torch.testing.assert_close(found(input_ids=IDS).logits, right(input_ids=IDS).logits, atol=2e-4, rtol=2e-4)

    return run


def edit(folder: Path, **values: Any) -> None:
    """Set keys of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_what_was_checked_is_what_transformers_parses(model: Path) -> None:
    opened = open_folder(model)
    edit(model, num_hidden_layers=1 << 40, hidden_size=7)
    assert opened.config.num_hidden_layers == 3


# --- config.json ---------------------------------------------------------------------------------------------------


def test_a_mistral_with_layer_types_is_the_class_that_transformers_makes(tmp_path: Path, same: Callable) -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    tiny.save("mistral", tmp_path / "m", sliding_window=6, shard="1GB")
    edit(tmp_path / "m", layer_types=kinds)
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert not isinstance(made, MistralForCausalLM)
    source = open_source(tmp_path / "m")
    assert type(source.config) is type(made.config)
    assert source.config.layer_types == kinds
    same(tmp_path / "m", transform="stacked")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "wina_calib-ministral"


@pytest.mark.parametrize("versions", [["4.0.0"], ["9.0.0", "4.0.0"], ["4.0.0", "4.9.9", "5.1.0"]])
def test_configuration_files_are_chosen_by_transformers(model: Path, versions: list[str], same: Callable) -> None:
    raw = json.loads((model / "config.json").read_text())
    for i, version in enumerate(versions):
        (model / f"config.{version}.json").write_text(json.dumps(raw | {"rms_norm_eps": 1e-4 * (i + 1)}))
    edit(model, configuration_files=[f"config.{version}.json" for version in versions])
    same(model)
    written = json.loads((model.parent / "out" / "config.json").read_text())
    assert (
        written["rms_norm_eps"]
        == AutoModelForCausalLM.from_pretrained(model).config.rms_norm_eps
        != raw["rms_norm_eps"]
    )
    assert "configuration_files" not in written
    assert not list((model.parent / "out").glob("config.*.json"))


def test_a_configuration_file_outside_of_the_folder_is_not_read(model: Path) -> None:
    shutil.copy(model / "config.json", model.parent / "config.4.json")
    edit(model, configuration_files=["../config.4.json"])
    assert open_source(model).config.rms_norm_eps  # the name is none that transformers takes
    (model / "config.4.0.0.json").symlink_to(model.parent / "config.4.json")
    edit(model, configuration_files=["config.4.0.0.json"])
    with pytest.raises(CheckpointError, match="a link that leaves the folder"):
        open_source(model)


@pytest.mark.parametrize(
    "values",
    [
        {"attn_implementation": "flash_attention_2"},
        {"_attn_implementation": "flash_attention_3"},
        {"attn_implementation": "kernels-community/flash-attn"},
        {"attn_implementation": {"": "sdpa"}},
        {"output_attentions": True, "output_hidden_states": True},
        {"return_dict": False},
        {"torchscript": True},
        {"experts_implementation": "grouped_mm"},
    ],
    ids=str,
)
def test_keys_that_only_concern_how_a_model_is_run_elsewhere(
    model: Path, values: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(model)
    edit(model, **values)
    wina_calib.calibrate(model, tmp_path / "out", data=str(text), **OPTIONS)
    with torch.no_grad():
        found = wina_calib.load(tmp_path / "out", sparsity=0)(input_ids=IDS).logits
        torch.testing.assert_close(found, plain(input_ids=IDS).logits, atol=1e-5, rtol=1e-4)
    assert not set(ELSEWHERE) & json.loads((tmp_path / "out" / "config.json").read_text()).keys()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"hidden_size": None},
            r"config\.json cannot be read .*'hidden_size': TypeError: .* got NoneType .*Correct it, or",
        ),
        ({"layer_types": ["nonsense"] * 2}, r"config\.json cannot be read .*layer_types.* Correct it, or download"),
        ({"auto_map": 5}, r"config\.json cannot be read .* Correct it, or download"),
        ({"hidden_act": "nonsense"}, r"config\.json makes no llama model \('nonsense'\)\. Correct the value"),
        ({"num_attention_heads": -1}, r"config\.json makes no llama model .*negative dimension"),
        ({"pad_token_id": 10**9}, r"config\.json makes no llama model .*Padding_idx"),
        ({"hidden_size": 0}, r"has a width of 0, by config\.json"),
        ({"num_labels": 10**12}, r"num_labels is 1000000000000; at most 65536 is supported"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_value_that_makes_no_model_is_told(model: Path, values: dict[str, Any], said: str) -> None:
    edit(model, **values)
    with pytest.raises(WinaError, match=said):
        open_source(model)


@pytest.mark.parametrize("length", [0, -5])
def test_a_model_that_takes_no_token_is_refused(length: int, model: Path, text: Path, tmp_path: Path) -> None:
    edit(model, max_position_embeddings=length)
    with pytest.raises(ModelFolderError, match=f"max_position_embeddings is {length}; expected at least 1"):
        wina_calib.calibrate(model, tmp_path / "s", data=text, sparsity=0.5)


@pytest.mark.parametrize("values", [{"model_max_length": "x"}, {"auto_map": 5}])
def test_a_tokenizer_that_loads_and_does_not_work_is_refused(values: dict[str, Any], model: Path) -> None:
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    with pytest.raises(ModelFolderError, match="no tokenizer that can be loaded"):
        load_tokenizer(model)


def test_a_name_that_is_no_text_is_told_before_the_work(model: Path, text: Path, tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(model) + b"/\xff.txt")).write_text("x")
    with pytest.raises(UsageError, match=r"holds bytes that are no UTF-8 text\. Rename it"):
        wina_calib.calibrate(model, tmp_path / "s", data=text, sparsity=0.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == [model.name]


@pytest.mark.parametrize("section", [{}, "4bit", [], {"quant_method": None}, {"bits": 4}, 3], ids=repr)
def test_an_odd_quantization_config_is_named(model: Path, section: Any) -> None:
    edit(model, quantization_config=section)
    with pytest.raises(ModelFolderError, match=r"config\.json: quantization_config is .* Remove the key"):
        open_source(model)


@pytest.mark.parametrize("section", [None, {"quant_method": "of-another-world"}], ids=repr)
def test_a_quantization_that_transformers_skips_is_none(model: Path, section: Any, same: Callable) -> None:
    edit(model, quantization_config=section)
    same(model)


@given(st.randoms(use_true_random=False), st.booleans())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_order_of_keys_means_nothing(llama: Path, tmp_path: Path, random: Any, nulls: bool) -> None:
    raw = json.loads((llama / "config.json").read_text())
    raw |= {"quantization_config": None, "pad_token_id": None} if nulls else {}
    keys = list(raw)
    random.shuffle(keys)
    shutil.rmtree(tmp_path / "m", ignore_errors=True)
    folder = Path(shutil.copytree(llama, tmp_path / "m"))
    (folder / "config.json").write_text(json.dumps({key: raw[key] for key in keys}))
    assert open_source(folder).architecture == open_source(llama).architecture


# --- files and names ---------------------------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_files_are_those_that_transformers_takes(llama: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Weights of other values under every name that transformers knows, some of them missing."""
    folder = tmp_path / "m"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copy(llama / "config.json", folder)
    state = AutoModelForCausalLM.from_pretrained(llama).state_dict()
    single, sharded, named = (data.draw(st.booleans()) for _ in range(3))
    for i, (made, name) in enumerate([(single, "model"), (sharded, "model-00001-of-00001"), (named, "chosen")], 1):
        if made:
            save_file(
                {n: torch.full_like(t, i) for n, t in state.items()}, folder / f"{name}.safetensors", {"format": "pt"}
            )
    if data.draw(st.booleans()):
        index = {"metadata": {}, "weight_map": dict.fromkeys(state, "model-00001-of-00001.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if data.draw(st.booleans()):
        edit(folder, transformers_weights=data.draw(st.sampled_from(["chosen.safetensors", "gone.safetensors"])))
    try:
        right = AutoModelForCausalLM.from_pretrained(folder).lm_head.weight[0, 0].item()
    except Exception:
        with pytest.raises(WinaError):
            open_source(folder)
    else:
        source = open_source(folder)
        assert source.load("lm_head.weight")[0, 0].item() == right
        assert "transformers_weights" not in source.raw_config


def test_a_single_file_is_taken_where_an_index_lies_beside_it(model: Path, same: Callable) -> None:
    tiny.make("llama", seed=7).save_pretrained(model.parent / "new", max_shard_size="1GB")
    shutil.copy(model.parent / "new" / "model.safetensors", model)
    same(model)
    shutil.rmtree(model.parent / "out")
    for path in model.glob("model-0*"):
        path.unlink()
    same(model)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "olmo2"])
def test_a_bare_decoder_is_loaded_where_its_head_is_tied(family: str, tmp_path: Path, same: Callable) -> None:
    tiny.save(family, tmp_path / "m", tie_word_embeddings=True)
    for path in (tmp_path / "m").glob("model*"):
        path.unlink()
    tiny.make(family, tie_word_embeddings=True).model.save_pretrained(tmp_path / "m", max_shard_size="1GB")
    assert not any(name.startswith("model.") for name in load_file(tmp_path / "m" / "model.safetensors"))
    same(tmp_path / "m")


def test_a_bare_decoder_without_its_head_is_refused(model: Path) -> None:
    for path in model.glob("model*"):
        path.unlink()
    tiny.make("llama").model.save_pretrained(model)
    with pytest.raises(ModelFolderError, match=r"1 tensors are missing: lm_head\.weight"):
        open_source(model)


def test_a_tensor_under_two_names_is_refused(model: Path) -> None:
    state = AutoModelForCausalLM.from_pretrained(model).state_dict()
    save_file(state | {"norm.weight": torch.ones(64)}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"holds tensor 'model\.norm\.weight' twice"):
        open_source(model)


def test_names_of_a_legacy_norm_are_those_of_transformers(tmp_path: Path, model: Path) -> None:
    state = AutoModelForCausalLM.from_pretrained(model).state_dict()
    renamed = {name.replace("norm.weight", "norm.gamma"): tensor for name, tensor in state.items()}
    save_file(renamed, model / "model.safetensors", {"format": "pt"})
    info = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True)[1]
    opened = open_folder(model)
    if info["missing_keys"]:
        with pytest.raises(ModelFolderError, match="missing"):
            open_source(model)
    else:
        assert set(open_weights(opened, ask(opened))) == set(state)


# --- adapters and parts -----------------------------------------------------------------------------------------------


def put_adapter(folder: Path, base: str = ".", **changes: Any) -> None:
    """A LoRA adapter on q_proj and down_proj."""
    lora = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8}
    lora |= {"target_modules": ["q_proj", "down_proj"], "base_model_name_or_path": base} | changes
    (folder / "adapter_config.json").write_text(json.dumps(lora))
    torch.manual_seed(3)
    sizes = {"self_attn.q_proj": (64, 64), "mlp.down_proj": (128, 64)}
    tensors = {}
    for i in range(3):
        for name, (width, out) in sizes.items():
            place = f"base_model.model.model.layers.{i}.{name}.lora_"
            tensors |= {f"{place}A.weight": torch.randn(4, width) / 8, f"{place}B.weight": torch.randn(out, 4) / 8}
    save_file(tensors, folder / "adapter_model.safetensors")


def test_an_adapter_beside_the_weights_is_merged(model: Path, same: Callable) -> None:
    pytest.importorskip("peft")
    plain = open_source(model).load_layer(0)
    put_adapter(model)
    source = open_source(model)
    (note,) = source.notes
    assert "the adapter beside it merged into 6 weights" in note
    changed = {n for n, t in source.load_layer(0).items() if not torch.equal(t, plain[n])}
    assert changed == {"self_attn.q_proj.weight", "mlp.down_proj.weight"}
    same(model)
    assert not (model.parent / "out" / "adapter_config.json").exists()
    with pytest.raises(WinaError, match="weights by reference need a model that is calibrated as it lies"):
        wina_calib.calibrate(model, model.parent / "out2", weights="reference", **OPTIONS)


@pytest.mark.parametrize("ends", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_an_adapter_of_one_end_of_a_tied_model_leaves_the_other(
    ends: list[str], tmp_path: Path, same: Callable
) -> None:
    peft = pytest.importorskip("peft")
    folder = tmp_path / "m"
    tiny.make("llama", tie_word_embeddings=True).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=ends)
    with warnings.catch_warnings(action="ignore"):  # peft tells of ties
        adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora)
        for weight in filter(lambda weight: weight.requires_grad, adapted.parameters()):
            torch.nn.init.normal_(weight, std=0.1)
        adapted.save_pretrained(tmp_path / "a")
        for file in (tmp_path / "a").glob("adapter*"):
            shutil.copy(file, folder)
        same(folder)


@pytest.mark.parametrize("changes", [{"peft_type": "NEW"}, {"target_modules": ["nope"]}, {"r": "4"}])
def test_an_adapter_that_does_not_fit_is_named(changes: dict[str, Any], model: Path) -> None:
    pytest.importorskip("peft")
    put_adapter(model, **changes)
    with pytest.raises(
        UnsupportedModel, match=r"adapter_config\.json\) beside the model, .* move adapter_config\.json away"
    ):
        open_source(model)


def test_without_peft_an_adapter_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_adapter(model)
    monkeypatch.setattr("wina_calib.model.dense_copy._has_peft", lambda: False)
    with pytest.raises(UnsupportedModel, match=r"holds an adapter .*pip install peft"):
        open_source(model)


def test_a_pickled_adapter_is_refused(model: Path) -> None:
    put_adapter(model)
    (model / "adapter_model.safetensors").rename(model / "adapter_model.bin")
    with pytest.raises(UnsupportedModel, match=r"pickled in adapter_model\.bin"):
        open_source(model)


@pytest.mark.parametrize("base", ["some/base", ".", None, 3])
def test_an_adapter_alone_is_named_with_its_base(tmp_path: Path, base: Any) -> None:
    put_adapter(tmp_path, base)
    named = " of some/base" if base == "some/base" else ""
    with pytest.raises(ModelFolderError, match=rf"is an adapter{named}, without the model that it changes"):
        open_source(tmp_path)


@torch.no_grad()
def test_the_language_model_of_a_model_of_pictures_is_calibrated(tmp_path: Path, text: Path) -> None:
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    words = {k: v for k, v in tiny.make("gemma3").config.to_diff_dict().items() if k not in ("architectures", "dtype")}
    config = Gemma3Config(text_config=words, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    whole = Gemma3ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path / "m", max_shard_size="60KB")
    tiny.tokenizer().save_pretrained(tmp_path / "m")
    source = open_source(tmp_path / "m")
    (note,) = source.notes
    assert "Gemma3ForCausalLM" in note
    assert "left out" in note
    wina_calib.calibrate(tmp_path / "m", tmp_path / "out", data=str(text), **(OPTIONS | {"transform": "head"}))
    found = wina_calib.load(tmp_path / "out", sparsity=0)
    assert type(found).__name__ == "Gemma3ForCausalLM"
    torch.testing.assert_close(found(input_ids=IDS).logits, whole(input_ids=IDS).logits, atol=2e-4, rtol=2e-4)
    dense = open_pair(str(tmp_path / "m"), device=torch.device("cpu"), dtype=None).dense
    assert torch.equal(dense(input_ids=IDS).logits, whole(input_ids=IDS).logits)
    assert flops(str(tmp_path / "m")).dense_gflops == flops(str(tmp_path / "out")).dense_gflops


def test_the_language_model_of_a_model_that_is_no_causal_one_is_calibrated(tmp_path: Path, text: Path) -> None:
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    words = tiny.make("qwen2").config
    torch.manual_seed(0)
    whole = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=words, image_token_index=0))
    whole.eval().save_pretrained(tmp_path / "m")
    tiny.tokenizer().save_pretrained(tmp_path / "m")
    wina_calib.calibrate(tmp_path / "m", tmp_path / "out", data=str(text), **OPTIONS)
    found = wina_calib.load(tmp_path / "out", sparsity=0)
    assert type(found).__name__ == "Qwen2ForCausalLM"
    torch.testing.assert_close(found(input_ids=IDS).logits, whole(input_ids=IDS).logits, atol=2e-4, rtol=2e-4)


def test_a_model_of_more_than_text_that_is_refused_says_what_its_text_model_is(tmp_path: Path) -> None:
    text = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    Qwen2VLConfig(text_config=text).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"model of more than text, with a text model of type 'qwen2_vl_text'"):
        open_source(tmp_path)


# --- lm_head, tokenizer, code --------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", ["none", "global"])
def test_a_tied_model_whose_files_hold_another_head_is_untied_as_by_transformers(
    tmp_path: Path, same: Callable[..., None], transform: str
) -> None:
    tiny.save("llama", tmp_path / "m", tie_word_embeddings=True, shard="1GB")
    state = {name: tensor.clone() for name, tensor in tiny.make("llama", tie_word_embeddings=True).state_dict().items()}
    save_file(
        state | {"lm_head.weight": 2 * state["lm_head.weight"]}, tmp_path / "m" / "model.safetensors", {"format": "pt"}
    )
    assert not open_source(tmp_path / "m").architecture.tied
    same(tmp_path / "m", transform=transform)
    save_file(state, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    assert open_source(tmp_path / "m").architecture.tied


def test_a_tokenizer_of_code_is_asked_to_be_trusted(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "letters.py").write_text("raise RuntimeError('it ran')\n")
    config = {"auto_map": {"AutoTokenizer": ["letters.Letters", None]}, "tokenizer_class": "Letters"}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(
        ModelFolderError, match=r"a tokenizer of Python code, of which nothing has run\. .*--trust-remote-code"
    ):
        open_source(model).tokenizer()


def test_code_that_fails_is_named(model: Path) -> None:
    edit(model, auto_map={"AutoModelForCausalLM": "gone.Own"})
    with remote_code(True), pytest.raises(ModelFolderError, match=r"its own Python code makes no model \(.*gone\.py"):
        open_source(model)
    assert open_source(model).architecture


def test_code_that_is_named_comes_along_with_all_that_it_imports(model: Path, text: Path, tmp_path: Path) -> None:
    for name, lines in {"letters": "from .tables import T", "tables": "from .more import M", "more": "M = 1"}.items():
        (model / f"{name}.py").write_text(f"{lines}\n")
    (model / "unused.py").write_text("import sys\n")
    path = model / "tokenizer_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": [None, "letters.Letters"]}})
    )
    edit(model, auto_map={"AutoModelForCausalLM": "unused.Own", "AutoTokenizer": ["other/repo--far.Far", None]})
    assert code_files(open_folder(model)) == {"letters.py", "tables.py", "more.py"}
    wina_calib.calibrate(model, tmp_path / "out", data=str(text), **OPTIONS)
    assert {p.name for p in (tmp_path / "out").glob("*.py")} == {"letters.py", "tables.py", "more.py"}
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["auto_map"] == {"AutoTokenizer": ["other/repo--far.Far", None]}
    with remote_code(True):
        assert "unused.py" in code_files(open_folder(model))
