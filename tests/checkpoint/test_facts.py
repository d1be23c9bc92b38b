"""Facts of a provenance that are of the wrong kind are not told, in every command, and end nothing."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from wina_calib.checkpoint.card import write_card
from wina_calib.checkpoint.facts import sound_facts
from wina_calib.checkpoint.hub import prepare
from wina_calib.checkpoint.reader import read_settings
from wina_calib.cli import main

ODD = (5, -1, True, None, "x", [5], {"a": [1]}, [[]], 10**4000, 1e308, "\x1b[31m" * 9, "a" * 100_000, float("nan"))
NAMES = (
    *("base_model", "base_commit", "base_ppl", "base_ppl_data", "base_ppl_tokens", "base_ppl_fingerprint", "data"),
    *(
        "data_fingerprint",
        "samples",
        "blocks",
        "seq_len",
        "seed",
        "loop",
        "untied",
        "command",
        "versions",
        "prediction",
    ),
    *("interpolated_anchors", "rebudgeted", "held_out", "verdict", "recovered"),
)


def with_facts(folder: Path, **facts: object) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["provenance"] |= facts
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("odd", ODD, ids=lambda value: repr(value)[:12])
def test_every_fact_may_be_odd(odd: object, calibrated: Path, tmp_path: Path):
    folder = with_facts(Path(shutil.copytree(calibrated, tmp_path / "sparse")), **dict.fromkeys(NAMES, odd))
    for arguments in (["inspect", str(folder), "--no-weights"], ["inspect", str(folder), "--no-weights", "--json"]):
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 0, done.output[-500:]
        assert "\x1b" not in done.output
        assert len(done.output) < 20_000
    write_card(folder)
    prepare(folder, "me/sparse")
    assert "\x1b" not in (folder / "README.md").read_text()


def test_sound_facts_stay_as_they_are(calibrated: Path):
    facts = json.loads((calibrated / "config.json").read_text())["quantization_config"]["provenance"]
    assert sound_facts(facts) == facts
    assert read_settings(calibrated).provenance == facts
    assert set(facts) <= {*NAMES, "compute_dtype"}
