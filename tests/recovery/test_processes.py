"""Several processes train as one does that takes their sequences one after another."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# Thresholds follow what one process alone sees of a step, so here they stay.
_CODE = """
import json, os, sys
from wina_calib.recovery import masked_model, run
masked_model.MOVE = 0.0
run.MEASURED_TOKENS = 256
found = run.recover(sys.argv[1], "out", **json.loads(sys.argv[2]))
if os.environ.get("RANK", "0") == "0":
    print(json.dumps({"losses": found.trained.losses, "held": list(found.trained.held_out.values())}))
"""


def trained(folder: Path, processes: int, *arguments: str) -> dict[str, Any]:
    folder.mkdir()
    (folder / "work.py").write_text(_CODE)
    launcher = (
        [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    )
    done = subprocess.run(
        [sys.executable, *launcher, "work.py", *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert (folder / "out/config.json").exists()
    assert not list(folder.glob(".*"))
    return found


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(calibrated: Path, llama: Path, text: Path, tmp_path: Path) -> None:
    options = {"base": str(llama), "data": str(text), "tokens": 8 * 4 * 64, "seq_len": 64, "batch": 4, "lr": 1e-3}
    given = json.dumps(options | {"device": "cpu", "micro_batch": 2, "sparsities": [0.5, 0.65]})
    one, two = (trained(tmp_path / str(count), count, str(calibrated), given) for count in (1, 2))
    assert len(one["losses"]) == 8
    np.testing.assert_allclose(two["losses"], one["losses"], rtol=1e-3)
    np.testing.assert_allclose(two["held"], one["held"], rtol=1e-3)
    assert abs(one["losses"][0] - one["losses"][6]) > 0.01 * one["losses"][0]  # else any two curves are alike
