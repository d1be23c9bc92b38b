"""config.json of a folder is opened once in a load, and what was read is handed on."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from opened import opened_files

import wina_calib
from wina_calib.checkpoint.reader import open_checkpoint
from wina_calib.model.source import open_source
from wina_calib.runtime.generate import generate
from wina_calib.studies.bench.models import open_pair
from wina_calib.studies.bounds.measure import model_bounds
from wina_calib.studies.evaluate import evaluate

OF_CHECKPOINTS: dict[str, Callable[[Path], object]] = {
    "open": open_checkpoint,
    "load": lambda folder: wina_calib.load(folder, sparsity=0.4),
    "evaluate": lambda folder: evaluate(folder, tokens=256),
    "generate": lambda folder: generate(folder, "a short text", new=2),
    "bench": lambda folder: open_pair(str(folder), device=torch.device("cpu"), dtype=None),
    "bounds": lambda folder: model_bounds(folder, tokens=256),
}
OF_MODELS: dict[str, Callable[[Path], object]] = {
    "tokenizer": lambda folder: (source := open_source(folder)).raw_config and source.tokenizer()("a text"),
    "bench": OF_CHECKPOINTS["bench"],
    "bounds": lambda folder: model_bounds(folder, transforms=("none",), tokens=256),
}


@pytest.mark.parametrize("command", OF_CHECKPOINTS)
def test_of_a_checkpoint(command: str, calibrated: Path) -> None:
    with opened_files("config.json") as seen:
        OF_CHECKPOINTS[command](calibrated)
    assert seen == [str(calibrated / "config.json")]


@pytest.mark.parametrize("command", OF_MODELS)
def test_of_a_model(command: str, llama: Path) -> None:
    with opened_files("config.json") as seen:
        OF_MODELS[command](llama)
    assert seen == [str(llama / "config.json")]


def test_of_a_model_that_is_calibrated(llama: Path, text: Path, tmp_path: Path) -> None:
    with opened_files("config.json") as seen:
        tiny.calibrate(llama, tmp_path / "s", text)
    assert seen.count(str(llama / "config.json")) == 1


def test_of_a_checkpoint_by_reference_and_of_its_base_model(llama: Path, text: Path, tmp_path: Path) -> None:
    tiny.calibrate(llama, tmp_path / "s", text, weights="reference")
    with opened_files("wina_config.json") as own, opened_files("config.json") as seen:
        wina_calib.load(tmp_path / "s")
    assert own == [str(tmp_path / "s" / "wina_config.json")]
    assert seen.count(str(llama / "config.json")) == 1
    assert len(seen) == 2  # the other one is written for transformers, which is handed what stands in it
