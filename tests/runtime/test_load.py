"""A calibrated checkpoint in the hands of transformers, peft and accelerate."""

import copy
import json
import pickle
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import script
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TextIteratorStreamer, pipeline

import wina_calib
from wina_calib.checkpoint.format import WINA_FILE
from wina_calib.errors import CheckpointError, ModelFolderError, RuntimeLoadError, UsageError
from wina_calib.runtime.load import sparse_sites

IDS = torch.tensor([[1, 40, 50, 60, 70, 80, 90, 100], [1, 44, 55, 66, 77, 88, 99, 111]])
GENERATE = {"max_new_tokens": 8, "pad_token_id": 3, "eos_token_id": None, "do_sample": False}


@pytest.fixture(scope="module")
def model(calibrated: Path) -> PreTrainedModel:
    return wina_calib.load(calibrated)


@pytest.fixture(autouse=True)
def _no_gradients(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.set_grad_enabled("train" in request.node.name):
        yield


def same(left: PreTrainedModel, right: PreTrainedModel) -> None:
    """Both models compute the same, bit for bit, and sparsely."""
    logits = left(IDS).logits
    assert torch.equal(logits, right(IDS).logits)
    wina_calib.set_sparsity(left, 0.0)
    assert not torch.equal(logits, left(IDS).logits)
    wina_calib.set_sparsity(left, 0.5)


# --- ways in ---------------------------------------------------------------------------------------------------------


def test_auto_class_and_load_give_the_same_model(model: PreTrainedModel, calibrated: Path) -> None:
    same(AutoModelForCausalLM.from_pretrained(calibrated), model)
    same(wina_calib.load(str(calibrated)), model)


def test_sparsity_can_be_chosen_while_loading(model: PreTrainedModel, calibrated: Path) -> None:
    loaded = wina_calib.load(calibrated, sparsity=0.25)
    assert not torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert wina_calib.set_sparsity(loaded, 0.5) == pytest.approx(0.5, abs=1e-6)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_sparsity_zero_is_the_base_model_bit_for_bit(calibrated: Path, llama: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(llama)
    assert torch.equal(wina_calib.load(calibrated, 0.0)(IDS).logits, base(IDS).logits)


def test_subfolder(model: PreTrainedModel, calibrated: Path) -> None:
    same(wina_calib.load(calibrated.parent, subfolder=calibrated.name), model)


def test_a_missing_subfolder_is_named(calibrated: Path) -> None:
    with pytest.raises(ModelFolderError, match="no folder 'elsewhere'"):
        wina_calib.load(calibrated, subfolder="elsewhere")
    with pytest.raises(ModelFolderError, match=r"'\.\./other'"):
        wina_calib.load(calibrated, subfolder="../other")


def test_local_files_only_takes_a_folder(model: PreTrainedModel, calibrated: Path) -> None:
    same(wina_calib.load(calibrated, local_files_only=True), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "bfloat16"])
def test_dtype_changes_weights_and_leaves_the_calibration_exact(calibrated: Path, dtype: torch.dtype | str) -> None:
    loaded = wina_calib.load(calibrated, dtype=dtype)
    assert loaded.dtype == (getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    assert {b.dtype for n, b in loaded.named_buffers() if ".wina." in n} == {torch.float32}
    assert loaded(IDS).logits.dtype == loaded.dtype


def test_device_map_auto(model: PreTrainedModel, calibrated: Path) -> None:
    same(wina_calib.load(calibrated, device_map="auto"), model)


def test_pipeline(calibrated: Path) -> None:
    generator = pipeline("text-generation", str(calibrated))
    assert sparse_sites(generator.model)
    assert generator("a short text", **GENERATE)[0]["generated_text"].startswith("a short text")


def test_a_model_that_is_not_calibrated_is_refused(llama: Path) -> None:
    with pytest.raises(CheckpointError, match="not calibrated"):
        wina_calib.load(llama)
    with pytest.raises(UsageError, match="no sparse sites"):
        wina_calib.set_sparsity(AutoModelForCausalLM.from_pretrained(llama), 0.5)


# --- generation ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def greedy(model: PreTrainedModel) -> torch.Tensor:
    return model.generate(IDS[:1], **GENERATE)


def test_static_cache_generates_the_same(model: PreTrainedModel, greedy: torch.Tensor) -> None:
    assert torch.equal(model.generate(IDS[:1], cache_implementation="static", **GENERATE), greedy)


def test_cached_and_uncached_decoding_agree(model: PreTrainedModel, greedy: torch.Tensor) -> None:
    assert torch.equal(model.generate(IDS[:1], use_cache=False, **GENERATE), greedy)


def test_assisted_decoding_generates_the_same(model: PreTrainedModel, greedy: torch.Tensor, llama: Path) -> None:
    dense = AutoModelForCausalLM.from_pretrained(llama)
    assert torch.equal(model.generate(IDS[:1], assistant_model=dense, **GENERATE), greedy)
    expected = dense.generate(IDS[:1], **GENERATE)
    assert torch.equal(dense.generate(IDS[:1], assistant_model=model, **GENERATE), expected)
    assert torch.equal(model.generate(IDS[:1], prompt_lookup_num_tokens=2, **GENERATE), greedy)


def test_streaming_gives_the_same_text(model: PreTrainedModel, greedy: torch.Tensor, calibrated: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(calibrated)
    streamer = TextIteratorStreamer(tokenizer)
    model.generate(IDS[:1], streamer=streamer, **GENERATE)
    assert "".join(streamer).rstrip("\ufffd") == tokenizer.decode(greedy[0]).rstrip("\ufffd")


def test_sampling_is_reproducible(model: PreTrainedModel) -> None:
    drawn = []
    for _ in range(2):
        torch.manual_seed(1)
        drawn.append(model.generate(IDS, **GENERATE | {"do_sample": True}))
    assert torch.equal(*drawn)
    assert drawn[0].shape == (2, 16)


def test_beams_with_a_cache_find_what_beams_without_one_find(model: PreTrainedModel) -> None:
    options = GENERATE | {"num_beams": 3, "return_dict_in_generate": True, "output_scores": True}
    cached = model.generate(IDS, **options)
    plain = model.generate(IDS, use_cache=False, **options)
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(cached.sequences_scores, plain.sequences_scores)


# --- saving, copying, casting ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", ["50KB", "5GB"])
def test_save_and_load_are_bit_equal(model: PreTrainedModel, tmp_path: Path, shard: str) -> None:
    model.save_pretrained(tmp_path, max_shard_size=shard)
    loaded = wina_calib.load(tmp_path)
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert loaded.config.quantization_config.to_dict() == model.config.quantization_config.to_dict()
    same(loaded, model)


def test_casting_there_and_back_keeps_the_calibration(model: PreTrainedModel, calibrated: Path) -> None:
    cast = wina_calib.load(calibrated).to(torch.bfloat16)
    assert cast(IDS).logits.dtype == torch.bfloat16
    cast.to(torch.float32)
    expected = {n: b for n, b in model.named_buffers() if ".wina." in n}
    assert all(torch.equal(b, expected[n]) for n, b in cast.named_buffers() if ".wina." in n)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_independent(calibrated: Path, model: PreTrainedModel, clone) -> None:
    original = wina_calib.load(calibrated)
    other = clone(original)
    wina_calib.set_sparsity(other, 0.0)
    wina_calib.set_prefill(other, "dense")
    assert sparse_sites(original)[0].state.prefill == "sparse"
    same(original, model)
    wina_calib.set_sparsity(other, 0.5)
    wina_calib.set_prefill(other, "sparse")
    same(other, model)


# --- accelerate and peft ---------------------------------------------------------------------------------------------


def test_part_of_the_model_on_disk(model: PreTrainedModel, calibrated: Path, tmp_path: Path) -> None:
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    same(wina_calib.load(calibrated, device_map=places, offload_folder=tmp_path / "offload"), model)


def test_a_model_on_disk_saves_complete(model: PreTrainedModel, calibrated: Path, tmp_path: Path) -> None:
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    places |= {"model.layers": "disk"}
    loaded = wina_calib.load(calibrated, device_map=places, offload_folder=tmp_path / "offload")
    with pytest.warns(UserWarning, match="offloaded modules"):
        loaded.save_pretrained(tmp_path / "saved")
    same(wina_calib.load(tmp_path / "saved"), model)


def test_accelerate_offloads_to_cpu_and_disk(model: PreTrainedModel, calibrated: Path, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    offloaded = accelerate.cpu_offload(wina_calib.load(calibrated), execution_device="cpu")
    assert torch.equal(offloaded(IDS).logits, model(IDS).logits)
    offloaded = accelerate.disk_offload(wina_calib.load(calibrated), tmp_path, execution_device="cpu")
    assert torch.equal(offloaded(IDS).logits, model(IDS).logits)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # peft asks transformers by an old name
def test_train_an_adapter_save_and_load_it(calibrated: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(wina_calib.load(calibrated), config)
    adapted.train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        loss = adapted(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapted.eval().save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(wina_calib.load(calibrated), tmp_path).eval()
    assert torch.equal(again(IDS).logits, adapted(IDS).logits)
    assert wina_calib.set_sparsity(again, 0.25) == pytest.approx(0.25, abs=1e-6)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("name", ["v_proj", "o_proj", "norm"])
def test_an_adapter_that_trains_a_whole_module_follows_the_model(calibrated: Path, name: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=[name], task_type="CAUSAL_LM")
    adapted, model = peft.get_peft_model(wina_calib.load(calibrated), config).eval(), wina_calib.load(calibrated)
    own = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert sum(p.numel() for p in adapted.parameters()) == own + sum(p.numel() for p in model.parameters())
    for sparsity in (0.5, 0.25, 0.0):
        for one in (adapted, model):
            wina_calib.set_sparsity(one, sparsity)
        with torch.no_grad():
            torch.testing.assert_close(adapted(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-6)
    found = adapted(IDS, labels=IDS).loss
    found.backward()
    trained = [p.grad for path, p in adapted.named_parameters() if "modules_to_save" in path]
    assert trained
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in trained)


def test_train_all_weights(calibrated: Path) -> None:
    model = wina_calib.load(calibrated)
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())


# --- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiled_whole_graph_computes_the_same(model: PreTrainedModel) -> None:
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    expected = model(IDS, use_cache=False).logits
    torch.testing.assert_close(compiled(IDS, use_cache=False).logits, expected, atol=1e-5, rtol=1e-4)


# --- where something is missing --------------------------------------------------------------------------------------

PLAIN = """
import json, sys, torch
from transformers import AutoModelForCausalLM
assert "wina_calib" not in sys.modules
ids = torch.tensor([[1, 40, 50, 60, 70, 80, 90, 100]])
base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
worst = 0.0
for folder in sys.argv[2:4]:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    with torch.no_grad():
        worst = max(worst, float((model(ids).logits - base(ids).logits).abs().max()))
    assert not report["missing_keys"] and not report["mismatched_keys"]
    assert report["unexpected_keys"] and all(".wina." in key for key in report["unexpected_keys"])
model.save_pretrained(sys.argv[4])
print(json.dumps(worst))
"""


@pytest.fixture(scope="module")
def rotated(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, calibrated with a transform that its weights absorb."""
    folder = tmp_path_factory.mktemp("rotated") / "sparse"
    tiny.calibrate(llama, folder, text, transform="global", samples=80)
    return folder


def test_without_wina_calib_it_is_the_dense_model_and_saving_it_there_is_noticed(
    llama: Path, calibrated: Path, rotated: Path, tmp_path: Path
) -> None:
    assert script.run_json(PLAIN, llama, calibrated, rotated, tmp_path) < 1e-4
    for load in (wina_calib.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=r"calibration tensors are missing.*calibrate again"):
            load(tmp_path)


def test_weights_of_another_model_are_noticed(calibrated: Path, tmp_path: Path) -> None:
    model = wina_calib.load(calibrated)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeLoadError, match="not those that the calibration was made for"):
        wina_calib.load(tmp_path)


CHANGED = {
    "qwen2": ("self_attn.k_proj.bias", "post_attention_layernorm.weight"),
    "qwen3": ("self_attn.q_norm.weight",),
    "gemma2": ("pre_feedforward_layernorm.weight",),
}


@pytest.mark.parametrize("family", CHANGED)
def test_another_gain_or_bias_of_any_layer_is_noticed_and_a_cast_is_none(
    family: str, text: Path, tmp_path: Path
) -> None:
    tiny.save(family, tmp_path / "m")
    tiny.calibrate(tmp_path / "m", tmp_path / "s", text, grid=(0.5,))
    model = wina_calib.load(tmp_path / "s")
    for number, name in enumerate(CHANGED[family]):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.get_parameter(f"model.layers.{number}.{name}").add_(0.1)
        other.save_pretrained(tmp_path / "other")
        with pytest.raises(RuntimeLoadError, match=rf"1 weights are not those .*layers\.{number}\.{name}"):
            wina_calib.load(tmp_path / "other")
    model.bfloat16().save_pretrained(tmp_path / "cast")
    assert wina_calib.load(tmp_path / "cast").dtype == torch.bfloat16


NORM = "model.layers.0.wina.attn_in.shared.norm"


@pytest.mark.parametrize(
    ("file", "name", "value", "said"),
    [
        (WINA_FILE, NORM, torch.ones(3), f"{NORM} has shape (3,), expected (64,)"),
        (WINA_FILE, NORM, -torch.ones(64), f"{NORM} holds negative values"),
        ("model-", "model.norm.weight", torch.ones(7), "model.norm.weight has shape (7,), expected (64,)"),
    ],
)
def test_a_tensor_that_cannot_be_is_named(
    file: str, name: str, value: torch.Tensor, said: str, calibrated: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(calibrated, tmp_path / "s"))
    (path,) = (p for p in folder.glob(f"{file}*") if name in load_file(p))
    save_file(load_file(path) | {name: value}, path, {"format": "pt"})
    for load in (wina_calib.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=re.escape(said)):
            load(folder)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"num_hidden_layers": 1}, r"holds model\.layers\.1\..*, but config\.json says that there are 1 layers"),
        ({"hidden_size": 32}, r"expected \(320, 32\)"),
        ({"model_type": "qwen2"}, "has shape"),
        ({"hidden_size": None}, r"config\.json cannot be read"),
    ],
)
def test_a_config_of_another_model_is_noticed(
    values: dict[str, Any], said: str, calibrated: Path, tmp_path: Path
) -> None:
    file = Path(shutil.copytree(calibrated, tmp_path / "s"), "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    with pytest.raises((CheckpointError, ModelFolderError), match=said):
        wina_calib.load(tmp_path / "s")


def test_a_missing_file_is_named(calibrated: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(calibrated, broken)
    (broken / "wina.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"wina\.safetensors.*missing"):
        wina_calib.load(broken)
