"""An output folder appears whole or not at all, whenever the process dies."""

import errno
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import wina_calib
from wina_calib.checkpoint import open_checkpoint
from wina_calib.errors import OutputError
from wina_calib.output import check_output, output_folder, readable_errors


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
    with pytest.raises(OutputError, match="--overwrite"), output_folder(tmp_path / "out"):
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
    [(errno.ENOSPC, "disk is full"), (errno.EACCES, "cannot be written"), (errno.EROFS, "cannot be written")],
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
            wina_calib.calibrate(llama, folder / "out", data=str(text), samples=64, seq_len=128, budget="uniform")
        assert set(names(folder)) <= {".out.state"}  # from which the same command goes on when there is room


def test_a_disk_that_fills_while_the_fit_is_written(tmp_path: Path, llama: Path, text: Path) -> None:
    """The weights fit, wina.safetensors does not."""
    weights = sum(p.stat().st_size for p in llama.iterdir())
    with mounted(tmp_path / "small", f"size={weights // 4096 * 4 + 40}k") as folder:
        with pytest.raises(OutputError, match=r"[Ff]ree"):
            wina_calib.calibrate(llama, folder / "out", data=str(text), samples=64, seq_len=128, budget="uniform")
        assert set(names(folder)) <= {".out.state"}  # from which the same command goes on when there is room


def test_a_read_only_disk(tmp_path: Path, llama: Path, text: Path) -> None:
    with mounted(tmp_path / "fixed", "ro,size=1m") as folder, pytest.raises(OutputError, match=r"writable|written"):
        wina_calib.calibrate(llama, folder / "out", data=str(text), samples=64, seq_len=128, budget="uniform")


_WORK = """
import sys, torch
torch.set_num_threads(1)
import wina_calib
wina_calib.calibrate(sys.argv[1], sys.argv[2], data=sys.argv[3], samples=64, seq_len=128, overwrite=True, budget="uniform")
"""


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGINT])
def test_killed_at_random_moments_leaves_no_half_folder(
    sig: signal.Signals, tmp_path: Path, llama: Path, text: Path
) -> None:
    rng = random.Random(int(sig))
    target = tmp_path / "out"
    command = [sys.executable, "-c", textwrap.dedent(_WORK), str(llama), str(target), str(text)]
    start = time.monotonic()
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    whole = time.monotonic() - start
    for _ in range(3 if sig == signal.SIGKILL else 2):
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(rng.uniform(0.4, 1.0) * whole)
        except subprocess.TimeoutExpired:
            process.send_signal(sig)
            process.wait()
        if target.exists():
            open_checkpoint(target).verify_weights()
        else:
            assert (tmp_path / ".out.old").is_dir()
        if sig == signal.SIGINT:
            assert set(names(tmp_path)) <= {"out", ".out.state"}
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    assert names(tmp_path) == ["out"]
    open_checkpoint(target).verify_weights()
