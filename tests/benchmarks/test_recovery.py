"""The benchmark of recovery runs from a dense model to its line of figures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import script


@pytest.mark.slow
def test_it_gives_every_figure(tmp_path: Path, llama: Path, text: Path) -> None:
    command = "benchmarks/recovery.py {} --data {} --heldout {} --folder {} --seq-len 128 --samples 70 --tokens 2048"
    more = "--batch 4 --heldout-tokens 4096 --sparsities 0.4,0.65 --turns 1,2 --lr 1e-3"
    done = subprocess.run(
        [sys.executable, *command.format(llama, text, text, tmp_path / "work").split(), *more.split()],
        capture_output=True,
        text=True,
        env=script.environment(),
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1].startswith("RESULT work: 0.4 ")
    found = json.loads((tmp_path / "work/result.json").read_text())
    assert found["after"].keys() == {"0.4", "0.65"}
    assert found["before"].keys() == {"0.4", "0.5", "0.65"}
    assert found["after"]["0.65"]["achieved"] == pytest.approx(0.65, abs=0.03)
    assert len(found["recovery"]["training"]["losses"]) == 4
