"""Quantized checkpoints with random damage: one named error, or weights that can be computed with; never a crash."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import wina_calib
from wina_calib.checkpoint.dequantized import open_weights
from wina_calib.errors import WinaError

WEIGHTS = "model-00001-of-00001.safetensors"
DTYPES = (torch.uint8, torch.int8, torch.float16, torch.float32, torch.bfloat16, torch.int16, torch.bool)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, llama: Path, text: Path) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "int4"
    options: dict[str, Any] = {"samples": 64, "seq_len": 128, "grid": (0.5,), "budget": "uniform", "transform": "none"}
    wina_calib.calibrate(llama, folder, data=str(text), bits=4, group_size=32, **options)
    return folder


def change_tensor(folder: Path, data: st.DataObject) -> None:
    """Another dtype, shape, order or content of one quantized tensor."""
    tensors = load_file(folder / WEIGHTS)
    name = data.draw(st.sampled_from(sorted(n for n in tensors if n.endswith((".codes", ".scales", ".zeros")))))
    tensor = tensors[name]
    kind = data.draw(st.sampled_from(("dtype", "cut", "turn", "flat", "bytes", "gone")))
    if kind == "dtype":
        tensors[name] = tensor.to(data.draw(st.sampled_from(DTYPES)))
    elif kind == "cut":
        tensors[name] = tensor[: data.draw(st.integers(0, len(tensor)))].clone()
    elif kind == "turn":
        tensors[name] = tensor.t().contiguous() if tensor.ndim == 2 else tensor.flip(0)
    elif kind == "flat":
        tensors[name] = tensor.reshape(-1)
    elif kind == "bytes":
        raw = tensor.contiguous().view(-1).view(torch.uint8)
        raw[data.draw(st.integers(0, len(raw) - 1)) :: 7] = data.draw(st.integers(0, 255))
    else:
        del tensors[name]
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    others = {n: f for n, f in index["weight_map"].items() if f != WEIGHTS}
    index["weight_map"] = others | dict.fromkeys(tensors, WEIGHTS)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def change_config(folder: Path, data: st.DataObject) -> None:
    """Other values of the keys that say how weights are stored."""
    config = json.loads((folder / "config.json").read_text())
    keys = ("bits", "group_size", "zero_point", "head_bits", "format_version", "masks", "modules_to_not_convert")
    key = data.draw(st.sampled_from(keys))
    odd = (0, 3, 4, 8, 16, 32, 64, 48, -4, 1 << 70, 4.0, "4", [4], {}, "2.1", "3.0", "1.0", "-1", ["lm_head"], [[]])
    kept = [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
    values = st.one_of(st.none(), st.booleans(), st.sampled_from(odd), st.lists(st.sampled_from(kept), max_size=3))
    config["quantization_config"][key] = data.draw(values)
    (folder / "config.json").write_text(json.dumps(config))


def not_finite(folder: Path, data: st.DataObject) -> None:
    """A scale that is NaN or infinite."""
    tensors = load_file(folder / WEIGHTS)
    scales = tensors[data.draw(st.sampled_from(sorted(n for n in tensors if n.endswith(".scales"))))].view(-1)
    scales[data.draw(st.integers(0, len(scales) - 1))] = data.draw(st.sampled_from((torch.nan, torch.inf, -torch.inf)))
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def cut_file(folder: Path, data: st.DataObject) -> None:
    """A file that ends too early."""
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(raw[: data.draw(st.integers(0, len(raw) - 1))])


def change_header(folder: Path, data: st.DataObject) -> None:
    """Other bytes in the header, which says where tensors lie, of what dtype and shape."""
    raw = bytearray((folder / WEIGHTS).read_bytes())
    length = int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, 7 + length))] = data.draw(st.sampled_from(b'0129{}[]",:FU86 '))
    (folder / WEIGHTS).write_bytes(raw)


CHANGES = (change_tensor, change_tensor, change_config, change_config, not_finite, cut_file, change_header)


@given(change=st.sampled_from(CHANGES), data=st.data())
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_is_a_named_error_or_does_no_harm(change: Any, data: st.DataObject, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    change(folder, data)
    try:
        source = open_weights(folder)
        model = wina_calib.load(folder)
    except WinaError as error:
        assert "\n" not in str(error).strip()
        return
    assert all(source.shards.load(name).isfinite().all() for name in source.shards if name.endswith("_proj.weight"))
    assert change is not not_finite
    with torch.no_grad():
        for ids in ([[1, 5, 9, 13]], [[7]]):  # by blocks of rows, and the row that decodes
            assert model(torch.tensor(ids)).logits.shape == (1, len(ids[0]), 320)
