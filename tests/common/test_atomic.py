"""An output folder appears whole or not at all, whenever the process dies."""

import errno
import itertools
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import script
import tiny

import wina_calib
from wina_calib.checkpoint.reader import open_checkpoint
from wina_calib.common.atomic import check_output, output_folder, readable_errors
from wina_calib.errors import OutputError


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_appears_when_done(tmp_path: Path) -> None:
    with output_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["a"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_vanishes_when_the_work_fails(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), output_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
        raise error
    assert names(tmp_path) == []


def test_overwrite_keeps_the_old_folder_until_the_new_one_is_whole(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("1")
    with pytest.raises(OutputError, match=r"--overwrite \(Python: overwrite=True\)"), output_folder(tmp_path / "out"):
        pass
    with pytest.raises(ValueError, match="stop"), output_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "new").write_text("2")
        raise ValueError("stop")
    assert names(tmp_path / "out") == ["old"]
    with output_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "new").write_text("2")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["new"]


def test_an_overwrite_that_died_between_its_renames_is_undone(tmp_path: Path) -> None:
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "old").write_text("1")
    with pytest.raises(OutputError, match="exists"), output_folder(tmp_path / "out"):
        pass
    assert names(tmp_path / "out") == ["old"]
    assert names(tmp_path) == ["out"]


def test_only_own_folders_are_replaced(tmp_path: Path, llama: Path, text: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("1")
    options = {"data": str(text), "samples": 64, "seq_len": 128, "overwrite": True}
    with pytest.raises(OutputError, match="not made by"):
        wina_calib.calibrate(llama, tmp_path / "thesis", **options)
    for target in (llama, llama.parent):
        with pytest.raises(OutputError, match="read from"):
            wina_calib.calibrate(llama, target, **options)
    assert names(tmp_path / "thesis") == ["thesis.txt"]
    with pytest.raises(OutputError, match="too long"):
        check_output(tmp_path / ("x" * 300), overwrite=False)


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for content in "ab":
        with output_folder(tmp_path / "link", overwrite=True) as folder:
            (folder / content).write_text("1")
    assert names(tmp_path) == ["link", "real"]
    assert names(tmp_path / "real") == ["b"]


def test_two_processes_on_one_folder(tmp_path: Path) -> None:
    with (
        output_folder(tmp_path / "out"),
        pytest.raises(OutputError, match="another process"),
        output_folder(tmp_path / "out"),
    ):
        pass
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EACCES, "cannot be written"),
        (errno.EROFS, "cannot be written"),
    ],
)
def test_errors_of_the_system_say_what_to_do(number: int, text: str) -> None:
    with pytest.raises(OutputError, match=text), readable_errors(Path("out")):
        raise OSError(number, os.strerror(number))


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A small file system in memory; skips where mounting is not allowed."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk(tmp_path: Path, llama: Path, text: Path) -> None:
    with mounted(tmp_path / "small", "size=300k") as folder:
        with pytest.raises(OutputError, match=r"[Ff]ree"):
            tiny.calibrate(llama, folder / "out", text)
        assert set(names(folder)) <= {".out.state"}  # from which the same command goes on when there is room


def test_a_disk_that_fills_while_the_fit_is_written(tmp_path: Path, llama: Path, text: Path) -> None:
    """The weights fit, wina.safetensors does not."""
    weights = sum(p.stat().st_size for p in llama.iterdir())
    with mounted(tmp_path / "small", f"size={weights // 4096 * 4 + 40}k") as folder:
        with pytest.raises(OutputError, match=r"[Ff]ree"):
            tiny.calibrate(llama, folder / "out", text)
        assert set(names(folder)) <= {".out.state"}  # from which the same command goes on when there is room


def test_a_read_only_disk(tmp_path: Path, llama: Path, text: Path) -> None:
    with mounted(tmp_path / "fixed", "ro,size=1m") as folder, pytest.raises(OutputError, match=r"writable|written"):
        tiny.calibrate(llama, folder / "out", text)


_KILLER = """
import os, random, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import wina_calib
from killing import Killer
from wina_calib.checkpoint.reader import open_checkpoint

model, target, data, number, rounds = sys.argv[1:]
target, sig, rounds = Path(target), signal.Signals(int(number)), int(rounds)

def work():
    wina_calib.calibrate(
        model, target, data=data, samples=64, seq_len=128, overwrite=True, budget="uniform",
        sparsity=0.5, grid=(0.25, 0.5), quick=True
    )

killer, stopped = Killer(work, random.Random(int(number))), 0
for _ in range(rounds):
    stopped += killer.stop(work, sig)
    if target.exists():
        open_checkpoint(target).verify_weights()
    else:
        assert (target.parent / ".out.old").is_dir()
    if sig == signal.SIGINT:
        assert set(os.listdir(target.parent)) <= {"out", ".out.state"}
assert stopped > rounds // 4, stopped
work()
assert os.listdir(target.parent) == ["out"]
open_checkpoint(target).verify_weights()
print(stopped)
"""


@pytest.mark.parametrize("rounds", [3, pytest.param(30, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGINT])
def test_killed_at_random_moments_leaves_no_half_folder(
    sig: signal.Signals, rounds: int, tmp_path: Path, llama: Path, text: Path
) -> None:
    done = script.forked(_KILLER, llama, tmp_path / "out", text, int(sig), rounds)
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_on_one_output_folder(tmp_path: Path, llama: Path, text: Path) -> None:
    """The second one is refused at once and leaves the first one's work alone."""
    code = """
    import sys, time
    from pathlib import Path
    import wina_calib

    model, out, data, marks = sys.argv[1:]

    class Wait(wina_calib.common.progress.Silent):
        def phase(self, name, steps):
            if name == "fit thresholds":
                Path(marks, "half way").touch()
                while not Path(marks, "go on").exists():
                    time.sleep(0.01)

    options = {"samples": 64, "seq_len": 128, "budget": "uniform", "transform": "none", "sparsity": 0.5, "grid": (0.5,)}
    wina_calib.calibrate(model, out, data=data, progress=Wait(), **options)
    """
    marks = tmp_path / "marks"
    marks.mkdir()
    first = script.imported().start(code, llama, tmp_path / "out", text, marks)
    deadline = time.monotonic() + 120
    while not (marks / "half way").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="another process"):
            tiny.calibrate(llama, tmp_path / "out", text, overwrite=overwrite)
    (marks / "go on").touch()
    assert first.wait().returncode == 0
    assert names(tmp_path) == ["marks", "out"]
    open_checkpoint(tmp_path / "out").verify_weights()


def test_a_folder_without_the_right_to_write(tmp_path: Path, llama: Path, text: Path) -> None:
    """As a user who is not root, for whom the system ignores permissions."""
    (tmp_path / "closed").mkdir(mode=0o555)
    code = """
    import os, sys
    from pathlib import Path
    from wina_calib.errors import OutputError
    from wina_calib.common.atomic import check_output, output_folder
    if os.getuid() == 0:
        os.setgroups([]), os.setgid(65534), os.setuid(65534)
    path = Path(sys.argv[1])
    for attempt in (lambda: check_output(path, overwrite=False), lambda: output_folder(path).__enter__()):
        try:
            attempt()
        except OutputError as error:
            assert "writ" in str(error), error
        else:
            raise SystemExit("was written")
    """
    for folder in (*tmp_path.parents, tmp_path):
        if folder.stat().st_uid == os.getuid() and str(folder).startswith(str(tmp_path.parent.parent)):
            folder.chmod(folder.stat().st_mode | 0o055)
    done = script.forked(code, tmp_path / "closed" / "out")
    assert done.returncode == 0, done.stderr[-2000:]
    assert names(tmp_path / "closed") == []


def test_a_clock_that_jumps(tmp_path: Path, llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wall time jumps back by years and forth again at every look; neither result nor bytes change."""
    options = {"data": str(text), "samples": 64, "seq_len": 128, "budget": "uniform", "quick": True}
    for name in "ab":
        (tmp_path / name).mkdir()
    wina_calib.calibrate(llama, tmp_path / "a" / "out", **options)
    real, jumps = time.time, itertools.cycle([-4e8, 0.0, 4e8])
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    monkeypatch.setattr(time, "time_ns", lambda: int((real() + next(jumps)) * 1e9))
    wina_calib.calibrate(llama, tmp_path / "b" / "out", **options)
    assert names(tmp_path / "a") == names(tmp_path / "b") == ["out"]
    for name in names(tmp_path / "a" / "out"):
        assert (tmp_path / "a" / "out" / name).read_bytes() == (tmp_path / "b" / "out" / name).read_bytes(), name
