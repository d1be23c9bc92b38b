"""Checkpoints with quantized weights: their bytes, read by NumPy alone; what is damaged; the dense model they stand for."""

import json
import re
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import script
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import wina_calib
from wina_calib.checkpoint.card import write_card
from wina_calib.checkpoint.dequantized import open_weights
from wina_calib.checkpoint.evaluation_file import save_evaluation
from wina_calib.checkpoint.export_dense import export_dense
from wina_calib.checkpoint.reader import open_checkpoint
from wina_calib.commands.evaluate import render
from wina_calib.common.text import human_bytes
from wina_calib.errors import CheckpointError, UsageError
from wina_calib.masks.score import column_norms
from wina_calib.storage import Shards
from wina_calib.studies.report import page

SMALL: dict[str, Any] = {"samples": 64, "seq_len": 128, "grid": (0.5,), "budget": "uniform", "sparsity": 0.4}
PACKED = "model.layers.1.wina.attn_in.shared"
CODES, SCALES = f"{PACKED}.codes", f"{PACKED}.scales"


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory, llama: Path, text: Path) -> Path:
    """The tiny Llama in int4, groups of 32 with zeros, lm_head in int8; without a transform."""
    folder = tmp_path_factory.mktemp("int4") / "sparse"
    wina_calib.calibrate(llama, folder, transform="none", data=str(text), bits=4, group_size=32, **SMALL)
    return folder


def read_with_numpy(folder: Path, layer: str, site: str, group: str) -> np.ndarray[Any, Any]:
    """Weights (in, out) of a mask group in int4, from docs/format.md alone."""
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    files = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    size = settings["group_size"]

    def tensor(part: str) -> np.ndarray[Any, Any]:
        name = f"{layer}.wina.{site}.{group}.{part}"
        raw = (folder / files[name]).read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        info = json.loads(raw[8 : 8 + length])[name]
        start, end = (8 + length + offset for offset in info["data_offsets"])
        return np.frombuffer(raw[start:end], {"U8": "u1", "F16": "<f2"}[info["dtype"]]).reshape(info["shape"])

    codes, scales = tensor("codes"), tensor("scales").astype(np.float32)
    by_group = codes.reshape(len(codes), -1, size // 2)
    values = np.concatenate([by_group & 15, by_group >> 4], axis=2).astype(np.float32)
    zeros = np.full(scales.shape, 8.0)
    if settings["zero_point"]:
        packed = tensor("zeros")
        zeros = np.stack([packed & 15, packed >> 4], axis=2).reshape(len(packed), -1)[:, : scales.shape[1]]
    return ((values - zeros[:, :, None]) * scales[:, :, None]).reshape(len(codes), -1)


def test_numpy_reads_what_the_model_computes_with(int4: Path) -> None:
    model = wina_calib.load(int4, dtype=torch.float32)
    for site, modules in (("attn_in", ("q_proj", "k_proj", "v_proj")), ("attn_out", ("o_proj",))):
        found = torch.from_numpy(read_with_numpy(int4, "model.layers.1", site, "shared")).float()
        attention = model.model.layers[1].self_attn
        assert torch.equal(torch.cat([getattr(attention, name).weight for name in modules]), found.T)
        norm = load_file(int4 / "wina.safetensors")[f"model.layers.1.wina.{site}.shared.norm"]
        assert torch.equal(norm, column_norms([found.T]))


def test_quantized_weights_are_near_those_they_are_made_of(int4: Path, llama: Path) -> None:
    base, settings = Shards.open(llama), open_checkpoint(int4).settings
    assert (settings.bits, settings.group_size, settings.zero_point, settings.head_bits) == (4, 32, True, 8)
    assert settings.format_version == "2.0"
    dense = open_weights(int4)
    for name in ("model.layers.0.mlp.down_proj.weight", "lm_head.weight"):
        weight = base.load(name)
        bound = 0.15 if "down" in name else 0.01
        assert 0 < (dense.load(name) - weight).norm() < bound * weight.norm()
    assert torch.equal(dense.load("model.norm.weight"), base.load("model.norm.weight"))
    assert torch.equal(dense.load("lm_head.weight", torch.tensor([5, 9])), dense.load("lm_head.weight")[[5, 9]])


def test_the_files_are_a_third_of_the_dense_ones(int4: Path, llama: Path) -> None:
    stored = Shards.open(int4)
    sizes = {"packed": 0, "dense": 0}
    for name, info in stored.items():
        sizes["packed"] += info.nbytes if ".wina." in name and name.endswith((".codes", ".scales", ".zeros")) else 0
    sizes["dense"] = sum(i.nbytes for n, i in Shards.open(llama).items() if "_proj" in n)
    assert sizes["packed"] * 8 == pytest.approx(4.625 * sizes["dense"] / 4, rel=0.02)
    assert not any(name.endswith("_proj.weight") for name in stored)


def test_without_wina_calib_loading_fails_and_names_it(int4: Path) -> None:
    expected = {
        "AutoModelForCausalLM": ["model type `wina_calib-llama`", "does not recognize this architecture"],
        "LlamaForCausalLM": ["`wina_calib-llama`", "norm.weight", "size"],
    }
    for loader, said in script.plain_errors(int4, *expected).items():
        assert not [message for message in expected[loader] if message not in said], (loader, said)


def test_an_export_is_the_dense_model_of_the_same_weights(int4: Path, tmp_path: Path) -> None:
    export_dense(int4, tmp_path / "dense")
    ids = torch.tensor([[1, 40, 50, 60, 70, 80]])
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "dense")
    assert type(plain) is LlamaForCausalLM
    with torch.no_grad():
        ours = wina_calib.load(int4, 0.0, dtype=torch.float32)(ids).logits
        assert torch.allclose(plain(ids).logits, ours, atol=1e-4)


def test_an_earlier_format_is_still_read(calibrated: Path) -> None:
    settings = open_checkpoint(calibrated).settings
    assert (settings.format_version, settings.bits, settings.weight_format) == ("1.0", 16, None)
    assert "bits" not in json.loads((calibrated / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("options", [{"bits": 8}, {"bits": 4, "group_size": 32, "symmetric": True, "keep_head": True}])
def test_other_formats_round_trip(options: dict[str, Any], tied: bool, text: Path, tmp_path: Path) -> None:
    tiny.save("qwen2", tmp_path / "base", tie_word_embeddings=tied)
    wina_calib.calibrate(tmp_path / "base", tmp_path / "q", transform="none", data=str(text), **(SMALL | options))
    opened = open_checkpoint(tmp_path / "q")
    opened.verify_weights()
    assert opened.settings.head_bits == (16 if "keep_head" in options else 8)
    assert any(name.endswith(".zeros") for name in opened.shards) is False
    ids = torch.tensor([[1, 40, 50, 60, 70, 80]])
    with torch.no_grad():
        loaded, base = (wina_calib.load(tmp_path / "q", 0.0), AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
        assert (loaded(ids).logits - base(ids).logits).norm() < 0.2 * base(ids).logits.norm()


def damage(folder: Path, change: Any) -> None:
    path = folder / "model-00001-of-00001.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    kept = {n: f for n, f in index["weight_map"].items() if f != path.name}
    index["weight_map"] = kept | dict.fromkeys(tensors, path.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop(f"{PACKED}.zeros"),
            r"1 of \d+ tensors of quantized weights are missing, such as .*shared.zeros",
        ),
        (
            lambda t: t.update({CODES: t[CODES][:, :-16].clone()}),
            "attn_in.shared.codes is uint8 of shape",
        ),
        (
            lambda t: t.update({CODES: t[CODES].view(torch.int8)}),
            "is int8 of shape .* expected uint8",
        ),
        (
            lambda t: t.update({SCALES: t[SCALES] * torch.nan}),
            "attn_in.shared.scales holds NaN",
        ),
        (lambda t: t["lm_head.scales"].fill_(torch.inf), "lm_head.scales holds NaN or infinite"),
    ],
    ids=["missing", "shape", "dtype", "nan", "head"],
)
def test_damage_is_one_clear_error(change: Any, message: str, int4: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(int4, tmp_path / "damaged"))
    damage(folder, change)
    for use in (open_checkpoint, wina_calib.load, open_weights):
        with pytest.raises(CheckpointError, match=message):
            use(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 3}, "bits is 3, expected 4 or 8 or 16"),
        ({"bits": True}, "bits is True"),
        ({"group_size": 48}, "group_size is 48, expected 32 or 64"),
        ({"group_size": 64}, "do not divide into groups of 64|expected float16 of shape"),
        ({"zero_point": 1}, "zero_point is 1, expected true or false"),
        ({"head_bits": 4}, "head_bits is 4, expected 8 or 16"),
        ({"format_version": "3.0"}, r"has format 3.0, this wina_calib reads up to 2.0"),
    ],
)
def test_settings_that_are_wrong_are_refused(values: dict[str, Any], message: str, int4: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(int4, tmp_path / "changed"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= values
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "bits is 3; expected 0, 4 or 8"),
        ({"bits": 4, "group_size": 16}, "group-size is 16; expected 32 or 64"),
        ({"bits": 4, "weights": "reference"}, "quantized weights cannot stay in the base model"),
        ({"bits": 4, "loop": "open"}, "weights are quantized in closed loop"),
        ({"bits": 4, "group_size": 64}, "32 outputs, which do not divide into groups of 64"),
    ],
)
def test_what_cannot_be_quantized_is_refused_before_the_work(
    options: dict[str, Any], message: str, llama: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        wina_calib.calibrate(llama, tmp_path / "none", transform="none", data=str(text), **(SMALL | options))
    assert list(tmp_path.iterdir()) == []


def test_every_figure_says_what_it_is_measured_against(int4: Path, text: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(int4, tmp_path / "q")
    result = wina_calib.evaluate(folder, data=str(text), tokens=1024)
    save_evaluation(folder, result.to_dict())
    shown = render(result)
    assert "int4, 0 %" in shown.splitlines()[0] and "KL from int4, 0 %" in shown and "dense" not in shown
    assert f"quantizing alone cost {100 * result.quantizing_rise:+.1f} % over the original model" in shown
    assert "of its int4 weights at sparsity 0, " in page(open_checkpoint(folder), ())
    write_card(folder)
    card = (folder / "README.md").read_text()
    assert "| KL divergence from int4, 0 % |" in card and "from dense" not in card
    assert re.search(r"perplexity sparse \| [\d.]+ \([+-][\d.]+ % over int4, 0 %\)", card)
    assert (
        "| rise over the original model | not measured on this text; on calibration's held-out text int4 alone cost"
        in card
    )
    sizes = [i.nbytes for i in Shards.open(folder).values() if i.file.name != "wina.safetensors"]
    assert f"Its files hold {human_bytes(sum(sizes))} of weights and" in card
    own = replace(result, base_ppl=result.sparse_ppl / 1.25, base_ppl_comparable=True)
    assert "rise over the original model: +25.0 %" in render(own)
    save_evaluation(folder, own.to_dict())
    base_ppl = {"base_ppl": own.base_ppl}
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["provenance"] |= base_ppl
    (folder / "config.json").write_text(json.dumps(config))
    write_card(folder)
    assert "| rise over the original model | +25.0 % |" in (folder / "README.md").read_text()
