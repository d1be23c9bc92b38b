"""Checkpoints that refer to their base model's weights."""

import gc
import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner

import wina_calib
from wina_calib.checkpoint.export_dense import export_dense
from wina_calib.checkpoint.hub import prepare
from wina_calib.checkpoint.reader import open_checkpoint
from wina_calib.cli import main
from wina_calib.common.progress import Silent
from wina_calib.errors import CheckpointError, ModelFolderError, UnsupportedModel, UsageError
from wina_calib.model.locate import load_tokenizer
from wina_calib.model.source import open_source
from wina_calib.studies.evaluate import evaluate

OPTIONS = {"budget": "uniform", "samples": 80, "seq_len": 128, "sparsity": 0.5, "grid": (0.25, 0.5, 0.65)}
IDS = torch.arange(4, 28).view(2, 12)


@pytest.fixture(scope="module")
def reference(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    told: list[str] = []

    class Listening(Silent):
        def note(self, text: str) -> None:
            told.append(text)

    folder = tmp_path_factory.mktemp("reference") / "sparse"
    wina_calib.calibrate(llama, folder, weights="reference", data=str(text), progress=Listening(), **OPTIONS)
    assert [note for note in told if "cannot be pushed" in note] == told[:1]
    return folder


@torch.no_grad()
def test_it_is_small_and_equals_the_checkpoint_with_weights(reference: Path, calibrated: Path) -> None:
    assert {path.name for path in reference.iterdir()} == {
        "README.md",
        "model.safetensors.index.json",
        "wina.safetensors",
        "wina_config.json",
    }
    assert (reference / "wina.safetensors").read_bytes() == (calibrated / "wina.safetensors").read_bytes()
    model = wina_calib.load(reference)
    assert torch.equal(model(IDS).logits, wina_calib.load(calibrated)(IDS).logits)
    assert model.name_or_path == str(reference)


@torch.no_grad()
@pytest.mark.parametrize("shard", ["60KB", "5GB"])
@pytest.mark.parametrize("tied", [False, True])
def test_one_file_or_many_tied_or_not(tmp_path: Path, text: Path, shard: str, tied: bool) -> None:
    base = tmp_path / "base"
    tiny.save("llama", base, shard=shard, tie_word_embeddings=tied)
    wina_calib.calibrate(base, tmp_path / "reference", weights="reference", data=str(text), **OPTIONS)
    wina_calib.calibrate(base, tmp_path / "whole", transform="none", data=str(text), **OPTIONS)
    expected = wina_calib.load(tmp_path / "whole")(IDS).logits
    assert torch.equal(wina_calib.load(tmp_path / "reference")(IDS).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("weights", ["full", "reference"])
def test_an_adapter_config_beside_the_weights_is_left_behind(tmp_path: Path, text: Path, weights: str) -> None:
    tiny.save("llama", tmp_path / "m")
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "nobody/nothing", "target_modules": ["q_proj"]}
    (tmp_path / "m" / "adapter_config.json").write_text(json.dumps(adapter))
    options = OPTIONS | {"transform": "none", "weights": weights}
    wina_calib.calibrate(tmp_path / "m", tmp_path / "s", data=str(text), **options)
    assert wina_calib.load(tmp_path / "s")(IDS).logits.isfinite().all()


@torch.no_grad()
def test_saving_it_makes_a_whole_checkpoint(reference: Path, tmp_path: Path) -> None:
    model = wina_calib.load(reference)
    model.save_pretrained(tmp_path / "whole")
    assert torch.equal(wina_calib.load(tmp_path / "whole")(IDS).logits, model(IDS).logits)


@torch.no_grad()
def test_weights_on_disk_stay_readable_as_long_as_the_model(reference: Path, tmp_path: Path) -> None:
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    model = wina_calib.load(reference, device_map=places | {"model.layers": "disk"}, offload_folder=tmp_path)
    gc.collect()
    assert torch.equal(model(IDS).logits, wina_calib.load(reference)(IDS).logits)


def test_other_weights_are_refused_before_use(reference: Path, llama: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(llama, tmp_path / "other"))
    shard = sorted(other.glob("*.safetensors"))[-1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match="not those that the calibration was made for"):
        wina_calib.load(reference, base=str(other))
    wina_calib.load(reference, base=str(shutil.copytree(llama, tmp_path / "moved")))


@pytest.mark.parametrize("sizes", [{"hidden_size": 32}, {"intermediate_size": 96}, {"num_hidden_layers": 2}])
def test_another_model_is_not_the_base_model(reference: Path, tmp_path: Path, sizes: dict[str, int]) -> None:
    tiny.save("llama", tmp_path / "other", **sizes)
    with pytest.raises(CheckpointError, match=f"is not the base model that {reference} was made for"):
        wina_calib.load(reference, base=str(tmp_path / "other"))


def test_a_base_model_is_found_where_it_was_beside_the_checkpoint_or_where_one_says_once(
    reference: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(reference, tmp_path / "a" / "sparse"))
    assert json.loads((folder / "wina_config.json").read_text())["base_model"] == llama.name
    wina_calib.load(folder)  # where it was
    monkeypatch.setenv("WINA_CALIB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(
        ModelFolderError, match=f"takes its weights from {llama.name}, which is not here. Put that folder"
    ):
        wina_calib.load(folder)
    (folder.parent / llama.name).symlink_to(llama)
    wina_calib.load(folder)
    (folder.parent / llama.name).unlink()
    wina_calib.load(folder, base=str(llama))
    wina_calib.load(folder)
    assert CliRunner().invoke(main, ["inspect", str(folder)]).exit_code == 0


@pytest.mark.parametrize("name", ["..", ".", "../x", "sparse", ""])
def test_a_crafted_name_of_a_base_model_leads_nowhere(reference: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(reference, tmp_path / "a" / "sparse"))
    (tmp_path / "x").mkdir()
    raw = json.loads((folder / "wina_config.json").read_text())
    (folder / "wina_config.json").write_text(json.dumps(raw | {"base_model": name}))
    with pytest.raises(ModelFolderError, match="is not here"):
        wina_calib.load(folder)


def test_a_base_model_that_is_not_here_is_named(reference: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(reference, tmp_path / "broken"))
    raw = json.loads((broken / "wina_config.json").read_text())
    (broken / "wina_config.json").write_text(json.dumps(raw | {"base_model": "/nowhere/base"}))
    with pytest.raises(ModelFolderError, match=r"takes its weights from /nowhere/base.*base=.*--no-weights"):
        wina_calib.load(broken)
    done = CliRunner().invoke(main, ["inspect", str(broken), "--no-weights"])
    assert done.exit_code == 0, done.output
    (broken / "wina_config.json").write_text(json.dumps(raw | {"base_model": 3}))
    with pytest.raises(ModelFolderError, match="names no base model"):
        wina_calib.load(broken)


def test_transforms_that_change_weights_are_refused(llama: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="transform is global"):
        wina_calib.calibrate(llama, tmp_path / "x", weights="reference", transform="global", data=str(text), **OPTIONS)
    assert not (tmp_path / "x").exists()


def test_a_local_base_model_cannot_be_pushed(reference: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="which nobody else has"):
        prepare(Path(shutil.copytree(reference, tmp_path / "copy")), "me/sparse")


def test_other_commands_take_it(reference: Path, text: Path, llama: Path, tmp_path: Path) -> None:
    open_checkpoint(reference).verify_weights()
    assert load_tokenizer(reference)("a text")["input_ids"]
    assert evaluate(reference, data=str(text), tokens=512).model_sparsity == pytest.approx(0.5, abs=0.1)
    with pytest.raises(ModelFolderError, match="calibrated already"):
        open_source(str(reference))
    with pytest.raises(UnsupportedModel, match=f"the dense model is {llama}"):
        export_dense(reference, tmp_path / "dense")
