"""Models that come quantized are dequantized by transformers, with a note; what it cannot do is said in one sentence."""

import gc
import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

import wina_calib
from wina_calib.errors import ModelFolderError, UnsupportedModel, UsageError
from wina_calib.model.source import open_source

OPTIONS = {"budget": "uniform", "samples": 80, "seq_len": 128, "grid": (0.5,), "transform": "none"}
IDS = torch.arange(4, 28).view(2, 12)
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def quantized(folder: Path, section: dict[str, Any], store: Callable[[torch.Tensor], dict[str, torch.Tensor]]) -> Path:
    """A folder whose decoder weights are stored otherwise: what `store` gives is named by what follows the weight's name."""
    model = tiny.make("llama")
    tiny.tokenizer().save_pretrained(folder)
    model.config.save_pretrained(folder)
    state = {}
    for name, tensor in model.state_dict().items():
        stored = store(tensor) if tensor.ndim == 2 and "layers" in name else {"": tensor}
        state |= {name + suffix: value.contiguous() for suffix, value in stored.items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": section}))
    return folder


def fp8(folder: Path) -> Path:
    """Weights in 8-bit floating point, with a scale for each block."""

    def store(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        scale = weight.abs().max() / 448
        return {"": (weight / scale).to(torch.float8_e4m3fn), "_scale_inv": scale.view(1, 1)}

    section = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    return quantized(folder, section, store)


def compressed(folder: Path) -> Path:
    """Weights in int8 with a scale an output, as compressed-tensors stores them."""

    def store(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        scale = weight.abs().amax(1, keepdim=True) / 127
        return {"": torch.round(weight / scale).to(torch.int8), "_scale": scale}

    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    group = {"targets": ["Linear"], "format": "int-quantized", "weights": weights}
    section = {"quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed"}
    return quantized(folder, section | {"ignore": ["lm_head"], "config_groups": {"group_0": group}}, store)


def gguf_file(path: Path) -> Path:
    """A Llama in GGUF's q8_0, with its tokenizer."""
    gguf = pytest.importorskip("gguf")
    model, kind = tiny.make("llama"), gguf.GGMLQuantizationType.Q8_0
    config, tokenizer = model.config, tiny.tokenizer()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    tokens = {number: token for token, number in tokenizer.get_vocab().items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([tokens.get(i, f"<{i}>") for i in range(config.vocab_size)])
    writer.add_token_types([1] * config.vocab_size)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        module, _, kept = name.rpartition(".")
        values = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:  # the order of rotary pairs there
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            values = values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        if tensor.ndim > 1:
            values = gguf.quants.quantize(values.copy(), kind)
        writer.add_tensor(f"{names.get_name(module)}.{kept}", values, raw_dtype=kind if tensor.ndim > 1 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def close_to_the_original(source: Any, rtol: float) -> None:
    right = tiny.make("llama").state_dict()
    for name in right:
        found = source.load(name).float()
        assert (found - right[name]).abs().max() <= rtol * right[name].abs().max(), name


@torch.no_grad()
def test_fp8_weights_are_dequantized_with_a_note(tmp_path: Path, text: Path) -> None:
    source = open_source(fp8(tmp_path / "m"))
    (note,) = source.notes
    assert "dequantized from fp8 by transformers" in note
    close_to_the_original(source, 1 / 16)
    place = source.shards[Q_PROJ].file.parent
    assert place != tmp_path / "m" and place.is_dir()
    wina_calib.calibrate(tmp_path / "m", tmp_path / "out", data=str(text), **OPTIONS)
    found = wina_calib.load(tmp_path / "out", sparsity=0)
    right = AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    torch.testing.assert_close(found(IDS).logits, right(IDS).logits.to(found.dtype), atol=2e-4, rtol=2e-4)
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert section["quant_method"] == "wina"
    with pytest.raises(UsageError, match="weights by reference need a model that is calibrated as it lies"):
        wina_calib.calibrate(tmp_path / "m", tmp_path / "out2", weights="reference", **OPTIONS)
    del source
    gc.collect()
    assert not place.exists()


def test_compressed_tensors_are_dequantized(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    source = open_source(compressed(tmp_path / "m"))
    assert "dequantized from compressed-tensors" in source.notes[0]
    close_to_the_original(source, 1 / 100)


def test_a_gguf_file_is_dequantized(tmp_path: Path, text: Path) -> None:
    file = gguf_file(tmp_path / "small.gguf")
    for given in (file, tmp_path):
        source = open_source(given)
        assert "dequantized from GGUF" in source.notes[0]
        close_to_the_original(source, 1 / 100)
    assert source.tokenizer()("a text").input_ids == tiny.tokenizer()("a text", add_special_tokens=False).input_ids
    wina_calib.calibrate(file, tmp_path / "out", data=str(text), **OPTIONS)
    assert wina_calib.load(tmp_path / "out")(IDS).logits.isfinite().all()
    shutil.copy(file, tmp_path / "other.gguf")
    with pytest.raises(UsageError, match=r"holds 2 GGUF files\. Give one of them"):
        open_source(tmp_path)


@pytest.mark.parametrize("content", [b"GGUF" + bytes(60), b"", b"GGUF\3\0\0\0" + b"\xff" * 64, b"no"], ids=repr)
def test_a_damaged_gguf_file_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "small.gguf").write_bytes(content)
    with pytest.raises(
        UnsupportedModel, match=r"small\.gguf is a GGUF file, and transformers cannot read it here"
    ) as said:
        open_source(tmp_path / "small.gguf")
    assert "\n" not in str(said.value) and len(str(said.value)) < 800


def test_what_transformers_cannot_dequantize_is_one_sentence(tmp_path: Path) -> None:
    folder = quantized(tmp_path / "m", {"quant_method": "gptq", "bits": 4, "group_size": 32}, lambda w: {"": w})
    with pytest.raises(
        UnsupportedModel,
        match=r"is quantized \(gptq\), and transformers has no way back from that to plain weights\. Give",
    ) as said:
        open_source(folder)
    assert "\n" not in str(said.value)


def test_where_there_is_no_room_for_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")(1, 1, 10)
    monkeypatch.setattr("wina_calib.model.dense_copy.shutil.disk_usage", lambda _: usage)
    with pytest.raises(ModelFolderError, match=r"the dense copy takes .* set TMPDIR"):
        open_source(fp8(tmp_path / "m"))
