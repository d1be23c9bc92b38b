"""What cannot be calibrated gets one clear message and an exit code, and leaves nothing behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

import wina_calib
from wina_calib.calibration.options import make_options
from wina_calib.cli import main
from wina_calib.errors import UsageError
from wina_calib.model.architecture import SUPPORTED
from wina_calib.storage import Shards, ShardWriter
from wina_calib.studies.bounds.measure import model_bounds
from wina_calib.studies.diagnose import diagnose
from wina_calib.studies.transfer import transfer

SMALL = ("--samples", "64", "--seq-len", "128", "--budget", "uniform", "--grid", "0.5", "--transform", "none")
MLP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    """A model folder to damage."""
    return Path(shutil.copytree(llama, tmp_path / "m"))


@pytest.fixture
def refused(tmp_path: Path, text: Path) -> Callable[..., None]:
    """Calibrate `m` into `s` with some words more; it has to fail with the code and the words."""

    def run(said: str, *more: str, code: int = 1, model: Path | str = tmp_path / "m", output: str = "s") -> None:
        before = sorted(tmp_path.rglob("*"))
        data = () if "--data" in more else ("--data", str(text))
        given = ["calibrate", str(model), "-o", str(tmp_path / output), *SMALL, *data, *more]
        done = CliRunner().invoke(main, given)
        assert done.exit_code == code, done.output
        assert done.stdout == ""
        assert "Traceback" not in done.stderr
        errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
        assert errors == done.stderr.splitlines()[-1:], done.stderr
        assert said in errors[0]
        assert sorted(tmp_path.rglob("*")) == before

    return run


@pytest.mark.parametrize("sparsity", ["-0.1", "1.0", "150%", "nan"])
def test_sparsity_out_of_range(sparsity: str, refused: Callable[..., None]) -> None:
    refused("sparsity is", "--sparsity", sparsity, code=2, model="demo")


def test_unknown_options_and_choices(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown option sparsty"):
        wina_calib.calibrate("demo", tmp_path / "s", sparsty=0.5)
    with pytest.raises(UsageError, match="score is 'wine'"):
        wina_calib.calibrate("demo", tmp_path / "s", score="wine", sparsity=0.5, grid=(0.25, 0.5, 0.65))
    with pytest.raises(UsageError, match="seed is -1; expected a whole number from 0 to 4294967295"):
        wina_calib.calibrate("demo", tmp_path / "s", seed=-1, sparsity=0.5, grid=(0.25, 0.5, 0.65))
    for grid in ("0.5,0.6", "all", None, ["a"], ("0.5", None)):
        with pytest.raises(UsageError, match=r"grid is .*; expected numbers in \(0, 1\)"):
            wina_calib.calibrate("demo", tmp_path / "s", grid=grid, sparsity=0.5)
    assert make_options({"grid": "0.5"}) == make_options({"grid": 0.5})


# --- the model folder ------------------------------------------------------------------------------------------------


def test_a_folder_without_config(model: Path, refused: Callable[..., None]) -> None:
    (model / "config.json").unlink()
    refused("has no config.json")


def test_a_folder_without_weights(model: Path, refused: Callable[..., None]) -> None:
    for file in model.glob("*.safetensors*"):
        file.unlink()
    refused("safetensors")


def test_no_tokenizer(model: Path, refused: Callable[..., None]) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()
    refused("no tokenizer that can be loaded")


def test_a_calibrated_model(calibrated: Path, refused: Callable[..., None]) -> None:
    refused("calibrated already", model=calibrated)


def test_a_quantized_model(model: Path, refused: Callable[..., None]) -> None:
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (model / "config.json").write_text(json.dumps(config))
    refused("is quantized (gptq)")


def test_other_kinds_of_models_are_refused_with_what_is_supported(tmp_path: Path, refused: Callable[..., None]) -> None:
    AutoModelForCausalLM.from_config(tiny.EXPERTS).save_pretrained(tmp_path / "experts")
    t5 = T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=320)
    T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    refused("model.layers.0.mlp (MixtralSparseMoeBlock) has no down_proj", model=tmp_path / "experts")
    refused("'t5' is an encoder-decoder model", model=tmp_path / "t5")
    for folder in ("experts", "t5"):
        refused(SUPPORTED, model=tmp_path / folder)


# --- weights and activations -----------------------------------------------------------------------------------------


def rewrite(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace one tensor of a sharded model."""
    shards = Shards.open(folder)
    file = shards[MLP].file
    tensors = {n: shards.load(n) for n, info in shards.items() if info.file == file}
    tensors[MLP] = change(tensors[MLP])
    with ShardWriter(file, {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}, {"format": "pt"}) as writer:
        for n, t in tensors.items():
            writer.write(n, t)


def test_a_wrong_shape(model: Path, refused: Callable[..., None]) -> None:
    rewrite(model, lambda t: t[:-1].clone())
    refused(f"{MLP} is (127, 64), config says (128, 64)")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float, model: Path, refused: Callable[..., None]) -> None:
    rewrite(model, lambda t: t.index_fill(0, torch.tensor([3]), value))
    refused(f"{MLP} holds 64 NaN or infinite values")


def test_a_shard_that_is_cut_short_or_missing(model: Path, refused: Callable[..., None]) -> None:
    shard = Shards.open(model)[MLP].file
    shard.write_bytes(shard.read_bytes()[:-10])
    refused(shard.name)
    shard.unlink()
    refused(shard.name)


def test_activations_that_overflow_name_the_site(model: Path, refused: Callable[..., None]) -> None:
    rewrite(model, lambda t: t * 1e38)
    refused("layer 1, mlp_")


# --- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "field", "said"),
    [
        ("text.txt", "", "", "text.txt"),
        ("text.txt", "too short", "", "8,000"),
        ("text.jsonl", '{"body": "a text"}\n', "", "text"),
        ("text.jsonl", '{"text": "a text"}\n', ":body", "body"),
    ],
)
def test_text_that_cannot_be_used(
    name: str, content: str, field: str, said: str, model: Path, tmp_path: Path, refused: Callable[..., None]
) -> None:
    (tmp_path / name).write_text(content)
    refused(said, "--data", f"{tmp_path / name}{field}")


# --- the output; disks that are full or read-only are in test_output.py -----------------------------------------------


def test_an_output_that_exists(model: Path, tmp_path: Path, refused: Callable[..., None]) -> None:
    (tmp_path / "s").mkdir()
    refused("--overwrite")
    (tmp_path / "file").write_text("")
    refused("is a file", "--overwrite", output="file")
    refused("does not exist", output="no/where")
    refused("/ exists, and has no name", output="/")


# --- a checkpoint ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["evaluate", "inspect", "generate", "budget", "report", "push"])
def test_a_checkpoint_of_a_newer_format(command: str, calibrated: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(calibrated, tmp_path / "s"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = "3.0"
    (folder / "config.json").write_text(json.dumps(config))
    before = {p: p.read_bytes() for p in folder.iterdir()}
    more = {"generate": ["a text"], "push": ["me/s"], "report": ["-o", str(tmp_path / "report")]}
    done = CliRunner().invoke(main, [command, str(folder), *more.get(command, [])])
    assert done.exit_code == 1, done.output
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ") and "format 3.0" in line and "Update" in line
    assert {p: p.read_bytes() for p in folder.iterdir()} == before
    assert not (tmp_path / "report").exists()


def test_a_loaded_model_is_no_name_of_one(calibrated: Path, tmp_path: Path) -> None:
    loaded = wina_calib.load(calibrated)
    calls: list[Callable[[], object]] = [
        lambda: wina_calib.evaluate(loaded),
        lambda: wina_calib.load(loaded),
        lambda: wina_calib.push_to_hub(loaded, "me/s"),
        lambda: wina_calib.calibrate(loaded, tmp_path / "s", sparsity=0.5, grid=(0.25, 0.5, 0.65)),
        lambda: wina_calib.compare(loaded, tmp_path / "c"),
        lambda: transfer(loaded, calibrated),
        lambda: transfer(calibrated, loaded),
        lambda: diagnose(loaded),
        lambda: model_bounds(loaded),
    ]
    for call in calls:
        with pytest.raises(UsageError, match="a LlamaForCausalLM was given; give its folder or its Hub id"):
            call()
    assert not list(tmp_path.iterdir())
