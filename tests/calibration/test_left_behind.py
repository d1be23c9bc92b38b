"""What lies where a calibration works: links and leftovers at every level, and a run that died when all was done."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import wina_calib
from wina_calib.calibration import run
from wina_calib.common.progress import Silent
from wina_calib.errors import OutputError

SMALL: dict[str, Any] = {"samples": 64, "seq_len": 128, "grid": (0.5,), "budget": "uniform", "transform": "none"}


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.phases: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def phase(self, name: str, steps: int) -> None:
        self.phases.append(name)


@pytest.fixture
def calibrate(tmp_path: Path, llama: Path, text: Path) -> Callable[..., Notes]:
    def work(**options: Any) -> Notes:
        heard = Notes()
        wina_calib.calibrate(llama, tmp_path / "out", data=str(text), progress=heard, **(SMALL | options))
        return heard

    return work


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def dies_after_publishing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    def dies(work: Callable[[], object]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(run, "drop", lambda state: os._exit(9))
            pid = os.fork()
            if not pid:
                try:
                    work()
                finally:
                    os._exit(1)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9

    return dies


def test_the_same_command_finds_it_finished(tmp_path: Path, calibrate: Any, dies_after_publishing: Any):
    dies_after_publishing(calibrate)
    assert names(tmp_path) == [".out.lock", ".out.state", "out"]
    before = {path.name: (path.read_bytes(), path.stat().st_ino) for path in (tmp_path / "out").iterdir()}
    heard = calibrate()
    assert heard.notes == [f"{tmp_path / 'out'} was finished already; what was left of its making is removed"]
    assert heard.phases == []
    assert names(tmp_path) == ["out"]
    assert {path.name: (path.read_bytes(), path.stat().st_ino) for path in (tmp_path / "out").iterdir()} == before
    with pytest.raises(OutputError, match=r"out exists\. Give"):
        calibrate()


def test_another_command_is_refused_and_clears_up(tmp_path: Path, calibrate: Any, dies_after_publishing: Any):
    dies_after_publishing(calibrate)
    with pytest.raises(OutputError, match="exists, made with other options; what was left of its making is removed"):
        calibrate(seed=5)
    assert names(tmp_path) == ["out"]


def test_another_command_that_may_replace_it_begins_anew(tmp_path: Path, calibrate: Any, dies_after_publishing: Any):
    dies_after_publishing(calibrate)
    assert "fit thresholds" in calibrate(seed=5, overwrite=True).phases
    assert names(tmp_path) == ["out"]
    dies_after_publishing(lambda: calibrate(seed=5, overwrite=True))
    assert calibrate(seed=5, overwrite=True).phases == []


def test_an_output_that_was_changed_since_is_not_taken_for_the_result(
    tmp_path: Path, calibrate: Any, dies_after_publishing: Any
):
    dies_after_publishing(calibrate)
    config = tmp_path / "out" / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(OutputError, match="exists"):
        calibrate()
    assert config.exists()


def test_a_state_that_is_kept_is_not_taken_for_a_leftover(tmp_path: Path, calibrate: Any):
    calibrate(keep_state=True)
    with pytest.raises(OutputError, match=r"out exists"):
        calibrate()
    assert names(tmp_path) == [".out.state", "out"]


@pytest.mark.parametrize("level", ["", "output", "spill", "job.json", "finished.json", "weights", "weights/state.json"])
def test_a_link_at_any_level_of_the_state_is_refused_before_the_work(level: str, tmp_path: Path, calibrate: Any):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "letter.txt").write_text("mine")
    place = tmp_path / ".out.state" / level
    if level:
        (tmp_path / ".out.state").mkdir(mode=0o700)
        place.parent.mkdir(exist_ok=True)
    place.symlink_to(precious / "letter.txt" if "." in level else precious)
    with pytest.raises(OutputError, match="is a link"):
        calibrate()
    assert names(precious) == ["letter.txt"]
    heard = calibrate(restart=True)
    assert "fit thresholds" in heard.phases
    assert names(precious) == ["letter.txt"]
    assert names(tmp_path) == ["out", "precious"]


def test_a_state_that_others_may_write_is_refused(tmp_path: Path, calibrate: Any):
    (tmp_path / ".out.state").mkdir()
    (tmp_path / ".out.state").chmod(0o777)
    with pytest.raises(OutputError, match="may be written by others"):
        calibrate()


def test_the_state_is_ones_own_while_it_is_made(tmp_path: Path, calibrate: Any, monkeypatch: pytest.MonkeyPatch):
    modes = []
    write = run.write_card

    def look(folder: Path, **more: Any) -> None:
        modes.append(folder.parent.stat().st_mode & 0o777)
        write(folder, **more)

    monkeypatch.setattr(run, "write_card", look)
    calibrate()
    assert modes == [0o700]
    (tmp_path / "any").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "any").stat().st_mode
