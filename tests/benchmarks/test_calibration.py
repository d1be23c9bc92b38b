"""The benchmark of a calibration's phases runs and gives every figure that the docs quote."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import script


@pytest.mark.slow
def test_it_measures_every_phase(tmp_path: Path) -> None:
    command = "benchmarks/calibration.py --shape small --layers 2 --samples 32 --seq-len 128 --decompositions 64"
    done = subprocess.run(
        [sys.executable, *command.split(), "--device", "cpu", "--folder", str(tmp_path)],
        capture_output=True,
        text=True,
        env=script.environment(),
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found["ratios"]) == {
        "statistics",
        "fit at one sparsity",
        "each further sparsity",
        "transform and global budget",
    }
    assert all(value > 0 for value in found["seconds"].values())
    assert {"collect layer inputs", "write weights", "find where to drop: backward pass", "fit thresholds"} <= set(
        found["phases"]
    )
