"""The dense model in 4 and 8 bits beside a checkpoint's own figures."""

import json
from pathlib import Path

import pytest
import tiny
from click.testing import CliRunner

import wina_calib
from wina_calib.cli import main
from wina_calib.errors import UsageError


def run(*arguments: str) -> dict:
    done = CliRunner().invoke(main, ["evaluate", *arguments, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_fewer_bits_cost_more(calibrated: Path, text: Path) -> None:
    found = run(str(calibrated), "--data", str(text), "--tokens", "2048", "--against", "int4-32,int8,int3-32")
    int4, int8, int3 = found["against"]
    assert (int4["name"], int8["name"], int8["bits_read"]) == ("int4-32", "int8", 8)
    assert int4["bits_read"] == pytest.approx(4.64, abs=0.02)
    dense = found["dense_ppl"]
    assert abs(int8["ppl"] / dense - 1) < 0.003
    assert abs(int8["ppl"] / dense - 1) < abs(int4["ppl"] / dense - 1) < 0.2
    assert 0 < abs(int3["ppl"] / dense - 1) < 0.2 and int3["ppl"] != int4["ppl"]
    assert int3["bits_read"] == 3 + 19 / 32
    assert found["bits_stored"] == 16


def test_the_int4_row_is_what_calibrate_makes(llama: Path, calibrated: Path, text: Path, tmp_path: Path) -> None:
    options = {
        "transform": "none",
        "budget": "uniform",
        "data": str(text),
        "samples": 80,
        "seq_len": 128,
        "grid": (0.5,),
    }
    wina_calib.calibrate(llama, tmp_path / "q", bits=4, group_size=32, keep_head=True, sparsity=0, **options)
    row = run(str(calibrated), "--data", str(text), "--tokens", "2048", "--against", "int4-32")["against"][0]
    whole = wina_calib.evaluate(tmp_path / "q", data=str(text), tokens=2048)
    assert row["ppl"] == pytest.approx(whole.dense_ppl, rel=1e-3)
    assert row["bits_read"] == pytest.approx(whole.bits_stored)


def test_what_cannot_be_compared_is_refused(
    calibrated: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for names, message in (
        ("int2", "'int2' is no format of weights here"),
        ("int4", "32 outputs, which do not divide"),
    ):
        done = CliRunner().invoke(main, ["evaluate", str(calibrated), "--data", str(text), "--against", names])
        assert done.exit_code == UsageError.exit_code
        assert message in done.stderr
    tiny.save("llama", tmp_path / "m")
    options = {
        "transform": "none",
        "budget": "uniform",
        "data": str(text),
        "samples": 80,
        "seq_len": 128,
        "grid": (0.5,),
    }
    wina_calib.calibrate(tmp_path / "m", tmp_path / "q", bits=8, sparsity=0, **options)
    monkeypatch.setattr("wina_calib.studies.evaluate.evaluate", lambda *_, **__: pytest.fail("it was measured first"))
    done = CliRunner().invoke(main, ["evaluate", str(tmp_path / "q"), "--data", str(text), "--against", "int8"])
    assert done.exit_code == UsageError.exit_code
    assert "holds quantized weights" in done.stderr
