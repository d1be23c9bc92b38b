"""Several processes train as one does that takes their sequences one after another."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

# Thresholds follow what one process alone sees of a step, and are fitted to that, so here they stay.
_CODE = """
import json, os, sys
from wina_calib.recovery import masked_model, run, train
from wina_calib.storage import resume
masked_model.MOVE = 0.0
train.SETTLING = 0
train.SAVE_AFTER = resume.PATIENCE = 0.0
step = train.Training._step
def stopped(self, distiller, number):
    if number == int(os.environ["STOP"]):
        raise KeyboardInterrupt
    return step(self, distiller, number)
train.Training._step = stopped
run.MEASURED_TOKENS = 256
found = run.recover(sys.argv[1], "out", **json.loads(sys.argv[2]))
if os.environ.get("RANK", "0") == "0":
    print(json.dumps({"losses": found.trained.losses, "held": list(found.trained.held_out.values())}))
"""


def trained(folder: Path, processes: int, *arguments: str, stop: int = -1) -> dict[str, Any]:
    """What a training came to; nothing where it is stopped before a step."""
    folder.mkdir(exist_ok=True)
    (folder / "work.py").write_text(_CODE)
    launcher = (
        [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    )
    done = subprocess.run(
        [sys.executable, *launcher, "work.py", *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "STOP": str(stop)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    if stop >= 0:
        assert "KeyboardInterrupt" in done.stderr
        return {}
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


@pytest.mark.slow
def test_weights_spread_over_two_processes_have_the_losses_of_one(
    calibrated: Path, llama: Path, text: Path, tmp_path: Path
) -> None:
    options = {"base": str(llama), "data": str(text), "tokens": 6 * 4 * 64, "seq_len": 64, "batch": 4, "lr": 1e-3}
    given = options | {"device": "cpu", "micro_batch": 1, "sparsities": [0.5]}
    one = trained(tmp_path / "1", 1, str(calibrated), json.dumps(given))
    spread = str(calibrated), json.dumps(given | {"train": "sharded"})
    assert not trained(tmp_path / "2", 2, *spread, stop=3)
    two = trained(tmp_path / "2", 2, *spread)
    np.testing.assert_allclose(two["losses"], one["losses"][3:], rtol=1e-3)
    np.testing.assert_allclose(two["held"], one["held"], rtol=1e-3)
    assert one["held"][-1][0] < 0.99 * one["held"][0][0]
    weights = [load_file(tmp_path / count / "out/model-00001-of-00001.safetensors") for count in ("1", "2")]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-2, atol=1e-3)
