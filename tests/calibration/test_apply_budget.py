"""A budget put into a checkpoint with quantized weights: what to expect is told beside the original model all the same."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

import wina_calib
from wina_calib.budgets import Setting
from wina_calib.calibration.apply_budget import Refit, apply
from wina_calib.calibration.rebudget import Request, choose
from wina_calib.checkpoint.format import WINA_FILE
from wina_calib.checkpoint.reader import Checkpoint, open_checkpoint
from wina_calib.checkpoint.verdict import HELD_OUT, HeldOut, Verdict

LOSS, KL = 0.5, 0.6  # what quantizing is said to have cost, far above what it costs


@pytest.fixture(scope="module")
def made(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "q"
    options = {"bits": 4, "group_size": 32, "transform": "none", "budget": "global", "samples": 80, "seq_len": 128}
    wina_calib.calibrate(llama, folder, data=str(text), sparsity=0.4, grid=(0.25,), **options)
    return folder


@pytest.fixture
def opened(made: Path, tmp_path: Path) -> Checkpoint:
    """The checkpoint, with facts that say that quantizing cost much."""
    found = open_checkpoint(Path(shutil.copytree(made, tmp_path / "q")))
    facts = found.settings.provenance
    held = facts[HELD_OUT]
    more = {"loss_rise": [LOSS + 0.1, LOSS + 0.2], "kl": [KL + 0.1, KL + 0.2], "unmasked": [LOSS, KL]}
    settings = replace(found.settings, provenance=facts | {HELD_OUT: held | more})
    return replace(found, settings=settings)


def expected(opened: Checkpoint) -> tuple[HeldOut, Verdict]:
    """What a checkpoint on disk says of itself."""
    facts = open_checkpoint(opened.folder).settings.provenance
    held, verdict = HeldOut.from_dict(facts[HELD_OUT]), Verdict.from_facts(facts)
    assert held is not None and verdict is not None
    return held, verdict


def test_a_budget_by_the_curves_counts_what_quantizing_cost(opened: Checkpoint) -> None:
    pinned = Request(settings=(Setting.parse_option("layers.0.*=0.1"),))
    apply(choose(opened, pinned), opened)
    held, verdict = expected(opened)
    before = HeldOut.from_dict(opened.settings.provenance[HELD_OUT])
    assert before is not None
    assert held.base == pytest.approx(before.base, rel=1e-3)
    assert math.log1p(verdict.rise) > before.base
    assert all(loss > before.base for loss in held.loss)
    with safe_open(opened.folder / WINA_FILE, "pt") as file:
        assert file.metadata()["wina_format"] == "2.0"


def test_a_refit_measures_beside_the_original_model(opened: Checkpoint) -> None:
    apply(choose(opened, Request()), opened, refit=Refit())
    held, verdict = expected(opened)
    assert held.unmasked == (LOSS, KL)
    assert all(abs(loss - LOSS) < 0.1 for loss in held.loss_rise)  # of a random model, sparsity alone costs little
    assert math.log1p(verdict.rise) > 0.3
