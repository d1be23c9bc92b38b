"""Names that lead to no model folder get one sentence that says what is there, or what was meant."""

import fcntl
import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from wina_calib.cli import main
from wina_calib.errors import ModelFolderError
from wina_calib.model.locate import resolve
from wina_calib.model.no_folder import nearest, reason


def state(target: Path, *, step: int = 3) -> Path:
    """The state of an output that is not there."""
    folder = target.with_name(f".{target.name}.state")
    (folder / "thresholds").mkdir(parents=True)
    (folder / "job.json").write_text("{}")
    (folder / "thresholds" / "state.json").write_text(json.dumps({"step": step}))
    return folder


@pytest.mark.parametrize("name", ["small.gguf", "weights"])
def test_a_gguf_file_is_called_by_its_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ModelFolderError, match="is a file in GGUF, llama.cpp's.*safetensors"):
        resolve(tmp_path / name)


def test_a_folder_of_gguf_files_too(tmp_path: Path) -> None:
    (tmp_path / "q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelFolderError, match=r"q4\.gguf, which is GGUF"):
        resolve(tmp_path)
    (tmp_path / "config.json").write_text("{}")  # beside a model it is another copy of it
    assert resolve(tmp_path) == (tmp_path, None)


@pytest.mark.parametrize(("name", "said"), [("model.safetensors", "is one file.*folder"), ("a.txt", "not a folder")])
def test_other_files(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / name).write_text("")
    with pytest.raises(ModelFolderError, match=said):
        resolve(tmp_path / name)


@pytest.mark.parametrize("given", ["sotries260K", "./sotries260K", "Stories260k", "models/../sotries260K"])
def test_a_slip_of_the_pen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    Path("stories260K").mkdir()
    with pytest.raises(ModelFolderError, match="did you mean .*stories260K"):
        resolve(given)


def test_what_is_far_off_or_hidden_is_not_meant(tmp_path: Path) -> None:
    for name in ("stories260K", ".other", "another-model"):
        (tmp_path / name).mkdir()
    assert nearest(tmp_path / "llama") is None
    assert nearest(tmp_path / "other") is None
    assert nearest(tmp_path / "no" / "such") is None
    assert reason(str(tmp_path / "llama")) is None


@pytest.mark.parametrize("command", ["inspect", "evaluate", "report"])
def test_an_output_that_was_not_finished(tmp_path: Path, command: str) -> None:
    state(tmp_path / "out")
    flags = ["-o", str(tmp_path / "page")] if command == "report" else []
    done = CliRunner().invoke(main, [command, str(tmp_path / "out"), *flags])
    assert done.exit_code == 1
    assert "out was not finished: its making was stopped, at step 3 of thresholds" in done.stderr
    assert ".out.state" in done.stderr and len(done.stderr.splitlines()) == 1


def test_an_output_that_is_being_made(tmp_path: Path) -> None:
    state(tmp_path / "out")
    descriptor = os.open(tmp_path / ".out.lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(ModelFolderError, match=r"out is still being made, at step 3 of thresholds\. Wait"):
            resolve(tmp_path / "out")
    finally:
        os.close(descriptor)
    with pytest.raises(ModelFolderError, match="was not finished"):  # a lock that nobody holds says nothing
        resolve(tmp_path / "out")


def test_a_state_that_cannot_be_read_is_a_state_all_the_same(tmp_path: Path) -> None:
    (state(tmp_path / "out") / "thresholds" / "state.json").write_text("[1")
    with pytest.raises(ModelFolderError, match="its making was stopped, and what is finished"):
        resolve(tmp_path / "out")
