"""Weights that are not those of the calibration are noticed when a model is loaded, wherever the change is."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import wina_calib
from wina_calib.checkpoint.reader import read_settings
from wina_calib.checkpoint.settings import SAMPLES
from wina_calib.checkpoint.weight_sample import matches, places, sample
from wina_calib.cli import main
from wina_calib.errors import RuntimeLoadError
from wina_calib.runtime.load import sparse_sites

PROJECTIONS = [
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
]  # fmt: skip


def changed(folder: Path, target: Path, change: Callable[[PreTrainedModel], None], **options: object) -> Path:
    model = wina_calib.load(folder, **options)
    with torch.no_grad():
        change(model)
    model.save_pretrained(target)
    return target


def merge(name: str, scale: float = 1e-4) -> Callable[[PreTrainedModel], None]:
    """A low-rank change of one projection, small beside its weights, as training an adapter makes."""

    def change(model: PreTrainedModel) -> None:
        weight = model.get_submodule(name).weight
        torch.manual_seed(0)
        delta = torch.randn(weight.shape[0], 2) @ torch.randn(2, weight.shape[1])
        weight.add_((delta * scale * weight.std() / delta.std()).to(weight.dtype))

    return change


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("name", PROJECTIONS)
def test_a_small_change_of_any_projection(layer: int, name: str, calibrated: Path, tmp_path: Path) -> None:
    full = f"model.layers.{layer}.{name}"
    folder = changed(calibrated, tmp_path / "changed", merge(full))
    with pytest.raises(RuntimeLoadError, match=rf"1 weights are not .*such as {full}\..*Calibrate them again"):
        wina_calib.load(folder)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_a_small_change_outside_of_the_layers(name: str, calibrated: Path, tmp_path: Path) -> None:
    folder = changed(calibrated, tmp_path / "changed", lambda model: model.get_parameter(name).mul_(1.001))
    with pytest.raises(RuntimeLoadError, match=rf"1 weights are not .*such as {name}"):
        wina_calib.load(folder)


@pytest.mark.parametrize("options", [{"transform": "stacked"}, {"bits": 8}, {"bits": 8, "keep_head": True}], ids=str)
def test_a_change_outside_of_the_layers_of_what_is_stored_otherwise(
    options: dict[str, object], text: Path, tmp_path: Path
) -> None:
    """With run-time matrices and quantized weights, tied and with biases: the final norm, gains, biases, a 16-bit embedding."""
    tiny.save("qwen2", tmp_path / "m", tie_word_embeddings=True)
    tiny.calibrate(tmp_path / "m", tmp_path / "sparse", text, **({"transform": "none", "grid": (0.5,)} | options))
    model = wina_calib.load(tmp_path / "sparse")
    names = ["model.norm.weight", "model.layers.1.input_layernorm.weight", "model.layers.2.self_attn.k_proj.bias"]
    if options.get("keep_head", "bits" not in options):
        names.append("model.embed_tokens.weight")
    for name in names:
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.get_parameter(name).mul_(1.5)
        other.save_pretrained(tmp_path / name)
        with pytest.raises(RuntimeLoadError, match=rf"1 weights are not .*such as {name}"):
            wina_calib.load(tmp_path / name)


@pytest.mark.parametrize("rows", [310, 328])
def test_an_embedding_of_more_or_fewer_tokens_is_no_change(rows: int, calibrated: Path, tmp_path: Path) -> None:
    def resize(model: PreTrainedModel) -> None:
        model.resize_token_embeddings(rows, mean_resizing=False)

    folder = changed(calibrated, tmp_path / "resized", resize)
    assert wina_calib.load(folder).get_input_embeddings().weight.shape[0] == rows
    folder = changed(folder, tmp_path / "changed", lambda model: model.lm_head.weight.mul_(1.001))
    with pytest.raises(RuntimeLoadError, match="lm_head"):
        wina_calib.load(folder)


@pytest.mark.parametrize(
    "options",
    [{"score": "teal"}, {"score": "random"}, {"exponent": 0.0}, {"transform": "stacked"}, {"transform": "paper"}],
    ids=str,
)
def test_whatever_norms_are_stored(options: dict[str, object], llama: Path, text: Path, tmp_path: Path) -> None:
    common = {
        "transform": "none",
        "budget": "uniform",
        "data": str(text),
        "samples": 64,
        "seq_len": 128,
        "grid": (0.5,),
    }
    wina_calib.calibrate(llama, tmp_path / "sparse", **(common | options))
    untouched = changed(tmp_path / "sparse", tmp_path / "untouched", lambda model: None)
    wina_calib.load(untouched)
    for name in ("self_attn.k_proj", "mlp.down_proj"):
        folder = changed(untouched, tmp_path / name, merge(f"model.layers.1.{name}", 1e-2))
        with pytest.raises(RuntimeLoadError, match=name):
            wina_calib.load(folder)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("stored", DTYPES)
def test_casts_are_not_changes(stored: torch.dtype, text: Path, tmp_path: Path) -> None:
    tiny.save("llama", tmp_path / "model", dtype=stored)
    common = {
        "transform": "none",
        "budget": "uniform",
        "data": str(text),
        "samples": 64,
        "seq_len": 128,
        "grid": (0.5,),
    }
    wina_calib.calibrate(tmp_path / "model", tmp_path / "sparse", **common)
    for first in DTYPES:
        saved = changed(tmp_path / "sparse", tmp_path / str(first), lambda model: None, dtype=first)
        for second in DTYPES:
            wina_calib.load(saved, dtype=second)
    folder = changed(tmp_path / "sparse", tmp_path / "changed", merge("model.layers.1.mlp.up_proj", 0.05))
    with pytest.raises(RuntimeLoadError, match=r"1\.mlp\.up_proj"):
        wina_calib.load(folder, dtype=torch.bfloat16)


def without_samples(folder: Path, target: Path) -> Path:
    """A checkpoint as versions before wrote it."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    tensors = load_file(target / "wina.safetensors")
    save_file({n: t for n, t in tensors.items() if not n.endswith(".sample")}, target / "wina.safetensors")
    index = json.loads((target / "model.safetensors.index.json").read_text())
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if not n.endswith(".sample")}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((target / "config.json").read_text())
    for name in ("samples", "whole_layers", "vocab"):
        del config["quantization_config"][name]
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_checkpoints_without_stored_elements_are_known_by_their_norms(calibrated: Path, tmp_path: Path) -> None:
    old = without_samples(calibrated, tmp_path / "old")
    for dtype in DTYPES:
        again = changed(old, tmp_path / str(dtype), lambda model: None, dtype=dtype)
        assert read_settings(again).samples == 0
    for name in PROJECTIONS:
        folder = changed(old, tmp_path / name, merge(f"model.layers.1.{name}", 1.0))
        with pytest.raises(RuntimeLoadError, match=r"layers\.1\."):
            wina_calib.load(folder)


@pytest.mark.parametrize("refit", [[], ["--refit"]], ids=str)
def test_a_budget_chosen_later_keeps_them(refit: list[str], calibrated: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(calibrated, tmp_path / "copy")
    args = ["budget", str(folder), "--set", "*=0.4", "--apply", str(folder), *refit]
    done = CliRunner().invoke(main, args)
    assert done.exit_code == 0, done.output
    assert read_settings(folder).sparsity == pytest.approx(0.4)
    site = sparse_sites(wina_calib.load(folder))[0]
    assert site.sample.shape == (3, SAMPLES)
    assert torch.equal(site.sample[1], sample(site.linears[1].weight))


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (32, 64), (100, 5), (4096, 1024)])
def test_places_are_all_over(shape: tuple[int, int]) -> None:
    rows, columns = places(*shape)
    assert bool((rows < shape[0]).all() and (columns < shape[1]).all())
    assert rows.tolist() == sorted(rows.tolist())
    assert len(set(rows.tolist())) == min(shape[0], SAMPLES)
    assert len(set(columns.tolist())) >= min(shape[1], SAMPLES) // 2
    weight = torch.randn(shape)
    assert matches(sample(weight), weight)
    assert not matches(sample(weight), weight * 1.001)
