"""What is announced before the work is what happens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from heard import Heard

import wina_calib
from wina_calib.checkpoint.format import WINA_FILE
from wina_calib.storage import Shards

OPTIONS = {"samples": 64, "seq_len": 128, "grid": (0.3, 0.6), "sparsity": 0.5}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"transform": "none", "budget": "uniform"},
        {"transform": "paper", "budget": "uniform", "loop": "open"},
        {"transform": "none", "budget": "greedy", "weights": "reference"},
    ],
)
def test_the_phases_are_those_of_the_plan(options: dict[str, object], tmp_path: Path, text: Path) -> None:
    heard = Heard()
    tiny.save("llama", tmp_path / "m", num_hidden_layers=2)
    wina_calib.calibrate(tmp_path / "m", tmp_path / "s", data=str(text), progress=heard, **(OPTIONS | options))
    heard.check()


@pytest.mark.parametrize(
    "options",
    [
        {"transform": "none"},
        {"transform": "global+head"},
        {"transform": "paper"},
        {"transform": "global+head", "bits": 4, "group_size": 32},
        {"transform": "none", "bits": 8},
        {"transform": "none", "weights": "reference"},
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_the_weights_take_the_bytes_that_the_plan_says(
    options: dict[str, Any], tied: bool, tmp_path: Path, text: Path
) -> None:
    heard = Heard()
    tiny.save("llama", tmp_path / "m", num_hidden_layers=2, tie_word_embeddings=tied)
    given = OPTIONS | {"budget": "uniform"} | options
    wina_calib.calibrate(tmp_path / "m", tmp_path / "s", data=str(text), progress=heard, **given)
    shards = [info for info in Shards.open(tmp_path / "s").values() if info.file.name != WINA_FILE]
    assert heard.estimate.kept_bytes == sum(info.nbytes for info in shards)
    assert heard.estimate.disk_bytes > heard.estimate.kept_bytes


def test_a_function_hears_how_far_each_phase_is(tmp_path: Path, llama: Path, text: Path) -> None:
    told: list[tuple[int, int]] = []
    options = OPTIONS | {"transform": "none", "budget": "uniform"}
    wina_calib.calibrate(llama, tmp_path / "s", data=str(text), progress=lambda *seen: told.append(seen), **options)
    layers = tiny.make("llama").config.num_hidden_layers
    assert (layers, layers) in told
