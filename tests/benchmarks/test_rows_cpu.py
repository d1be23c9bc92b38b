"""The benchmark of several rows of a quantized layer on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import script


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_it_measures_each_number_of_rows(llama: Path, bits: int) -> None:
    command = [sys.executable, "benchmarks/rows_cpu.py", "--shape", str(llama), "--rows", "2,41", "--turns", "2"]
    command += ["--sparsity", "0,0.4", "--bits", str(bits), "--threads", "1", "--json"]
    environment, root = script.environment(), Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert list(found) == ["2", "41"]
    assert all(set(row) == {"dense_ms", "0%", "40%"} and min(row.values()) > 0 for row in found.values())
