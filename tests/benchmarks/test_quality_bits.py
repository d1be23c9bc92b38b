"""The benchmark of perplexity over bits read: what it shares between cases is what `calibrate` makes for each."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import script

import wina_calib


@pytest.mark.slow
def test_its_checkpoints_are_those_of_calibrate(llama: Path, text: Path, tmp_path: Path) -> None:
    text_options = ["--calibration", str(text), "--heldout", str(text), "--blocks", "64", "--heldout-blocks", "4"]
    command = [sys.executable, "benchmarks/quality_bits.py", str(llama), str(tmp_path / "out"), *text_options]
    command += ["--seq-len", "128", "--device", "cpu", "--at", "0,0.25,0.5", "--case", "16::0.5", "--case", "4:32:0.25"]
    environment, root = script.environment(), Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out" / "quality_bits.json").read_text())
    rows = {(row["case"], row["sparsity"]): row for row in found["rows"]}
    assert list(rows) == [(case, s) for case in ("16::0.5", "4:32:0.25") for s in (0.0, 0.25, 0.5)]
    assert rows["16::0.5", 0.0]["rise"] == pytest.approx(0, abs=1e-4)
    options = {"data": str(text), "samples": 64, "seq_len": 128, "grid": (0.25, 0.5)}
    wina_calib.calibrate(llama, tmp_path / "q", bits=4, group_size=32, sparsity=0.25, **options)
    alone = wina_calib.evaluate(tmp_path / "q", data=str(text), tokens=4 * 128)
    row = rows["4:32:0.25", 0.25]
    assert row["perplexity"] == pytest.approx(alone.sparse_ppl, rel=1e-4)
    assert (row["achieved"], row["bits_read"]) == pytest.approx((alone.model_sparsity, alone.bits_read), rel=1e-3)
