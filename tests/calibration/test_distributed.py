"""Several processes make the checkpoint that one makes, to the byte."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import script
import torch
from torch.distributed import distributed_c10d

from wina_calib.common import distributed
from wina_calib.common.distributed import ALONE, Ranks
from wina_calib.errors import RankError

_RANK = """
import sys
sys.argv[0] = "wina-calib"
from wina_calib.storage import resume
resume.PATIENCE = 0.0
from wina_calib.cli import main
main()
"""
# As `_RANK`, but the last process dies by a signal it cannot catch, at its third layer.
_DYING = """
import os, signal, sys
sys.argv[0] = "wina-calib"
from wina_calib.calibration import fit_thresholds
from wina_calib.storage import resume
resume.PATIENCE = 0.0
whole = fit_thresholds.fit_layer
def dying(stream, masked, hidden, targets):
    if os.environ["RANK"] == "1" and masked.layer.index == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(stream, masked, hidden, targets)
fit_thresholds.fit_layer = dying
from wina_calib.cli import main
main()
"""


def options(model: Path, text: Path, *more: str) -> list[str]:
    common = ["calibrate", str(model), "-o", "out", "--data", str(text), "--samples", "70", "--seq-len", "128"]
    return [*common, "--micro-batch", "4", "--grid", "0.5", "--device", "cpu", *more]


def start(folder: Path, processes: int, code: str, arguments: list[str]) -> subprocess.Popen[str]:
    """Start a calibration in a new folder, by one process or by several under torchrun."""
    folder.mkdir(exist_ok=True)
    script = folder.parent / f"rank-{abs(hash(code))}.py"
    script.write_text(code)
    launcher = (
        [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    )
    return subprocess.Popen(
        [sys.executable, *launcher, str(script), *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], seconds: float = 240.0) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # torchrun and all that it has started
        process.communicate()
        pytest.fail("the processes hang")
    return process.returncode, out, err


def made(folder: Path, processes: int, code: str, arguments: list[str]) -> dict[str, bytes]:
    """Files of the checkpoint that a calibration makes."""
    status, out, err = finish(start(folder, processes, code, arguments))
    assert status == 0, err
    assert out.count("calibrated for") == 1  # the first process alone reports
    assert err.count("plan:") == 1
    assert [p.name for p in folder.iterdir()] == ["out"]
    return {p.name: p.read_bytes() for p in (folder / "out").iterdir()}


def assert_equal(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


def test_two_processes_make_what_one_makes(tmp_path: Path, llama: Path, text: Path) -> None:
    arguments = options(llama, text)
    (tmp_path / "1").mkdir()
    done = script.forked(_RANK, *arguments, folder=tmp_path / "1")
    assert done.returncode == 0, done.stderr
    alone = {p.name: p.read_bytes() for p in (tmp_path / "1" / "out").iterdir()}
    assert_equal(made(tmp_path / "2", 2, _RANK, arguments), alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--budget", "greedy", "--transform", "stacked"),
        ("--loop", "open", "--budget", "uniform", "--masks", "per-projection"),
        (
            "--weights",
            "reference",
        ),
        ("--micro-batch", "40"),  # fewer micro-batches than processes
        ("--bits", "4", "--group-size", "32", "--transform", "none", "--micro-batch", "40"),
    ],
)
def test_four_processes_make_what_one_makes(more: tuple[str, ...], tmp_path: Path, llama: Path, text: Path) -> None:
    arguments = options(llama, text, *more)
    alone = made(tmp_path / "1", 1, _RANK, arguments)
    assert_equal(made(tmp_path / "4", 4, _RANK, arguments), alone)


@pytest.mark.slow
def test_a_process_that_dies_ends_all_and_others_go_on(tmp_path: Path, llama: Path, text: Path) -> None:
    """The state that three left is used by two."""
    arguments = options(llama, text)
    status, out, err = finish(start(tmp_path / "a", 3, _DYING, arguments), 120.0)
    assert status != 0
    assert "calibrated" not in out
    said = [line for line in err.splitlines() if line.startswith(("Error:", "Stopped;"))]
    assert len(said) == 1
    assert "process of this job has stopped" in said[0] or "the same command goes on" in said[0]
    assert [p.name for p in (tmp_path / "a").iterdir() if not p.name.endswith(".lock")] == [".out.state"]
    status, out, err = finish(start(tmp_path / "a", 2, _RANK, arguments))
    assert status == 0, err
    assert "going on after 2 of 3" in err
    found = {p.name: p.read_bytes() for p in (tmp_path / "a" / "out").iterdir()}
    assert_equal(found, made(tmp_path / "b", 1, _RANK, arguments))


@pytest.mark.slow
def test_an_error_is_said_once(tmp_path: Path, llama: Path, text: Path) -> None:
    status, _, err = finish(start(tmp_path / "a", 2, _RANK, options(llama, text, "--samples", "1")), 120.0)
    assert status != 0
    # torchrun adds a report of its own, which says "Error" in other words.
    said = [line for line in err.splitlines() if line.startswith("Error:")]
    assert len(said) == 1
    assert "at least 8,000 are needed" in said[0]
    assert err.count("are needed") == 1
    assert list((tmp_path / "a").iterdir()) == []


@pytest.mark.slow
def test_stopped_from_outside_all_end(tmp_path: Path, llama: Path, text: Path) -> None:
    process = start(tmp_path / "a", 2, _RANK, options(llama, text))
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("a/.out.state/*/state.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    status, _, err = finish(process, 120.0)
    assert status != 0
    assert err.count("the same command goes on") == 1
    assert [p.name for p in (tmp_path / "a").iterdir()] == [".out.state"]


# --- shares ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5, 7, 64])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 9])
def test_shares_are_contiguous_and_the_first_has_one(count: int, size: int) -> None:
    shares = [Ranks(rank, size).share(count) for rank in range(size)]
    assert [item for share in shares for item in share] == list(range(count))
    assert len(shares[0]) >= 1
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert all(item in shares[Ranks(0, size).owner(item, count)] for item in range(count))


def test_alone_nothing_is_shared() -> None:
    counts = torch.tensor([1, 2])
    ALONE.add(counts)
    assert counts.tolist() == [1, 2]
    assert ALONE.gather([1, 2]) == [1, 2]
    assert ALONE.from_first("x") == "x"
    assert ALONE.first(lambda tick: tick()) is None
    with pytest.raises(ValueError, match="as it is"):
        ALONE.agree(lambda: (_ for _ in ()).throw(ValueError("as it is")))
    assert ALONE.speaks(ValueError())


def _interrupted() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("abort", [_interrupted, None])
def test_nothing_met_while_leaving_hides_the_error_on_its_way(abort: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a request to end nor a torch without the function."""
    monkeypatch.setattr(
        distributed, "rendezvous", lambda *args, **kwargs: iter([(torch.distributed.HashStore(), 0, 2)])
    )
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **kwargs: None)
    monkeypatch.setattr(distributed_c10d, "_abort_process_group", abort)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RankError, match="gone"), distributed.shared_ranks():
        raise RankError("the other one is gone")
