"""What a run keeps on disk, and what it refuses."""

import json
import os
from pathlib import Path

import pytest
import torch

from wina_calib.common.progress import Silent
from wina_calib.errors import StateError
from wina_calib.storage import resume, resume_files
from wina_calib.storage.hidden_states import HiddenStates
from wina_calib.storage.resume import Phase, RunState, open_run_state
from wina_calib.storage.resume_files import check_same


@pytest.fixture(autouse=True)
def every_layer_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "PATIENCE", 0.0)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def filled(values: list[torch.Tensor], folder: Path | None = None) -> HiddenStates:
    store = HiddenStates(folder, torch.device("cpu"))
    for index, value in enumerate(values):
        store[index] = value
    return store


@pytest.mark.parametrize("spilled", [False, True])
def test_a_save_keeps_what_was_and_shares_what_stays(spilled: bool, tmp_path: Path) -> None:
    spill = tmp_path if spilled else None
    kept = open_run_state(tmp_path / "s", lambda: {"a": 1})
    values = [torch.randn(2, 3, 4).bfloat16(), torch.randn(1, 3, 4).bfloat16()]
    store, phase = filled(values, spill), kept.phase("p")
    phase.save(1, tensors={"x": torch.tensor([1.0])}, values={"f": 0.1}, stores={"h": store})
    inode = (tmp_path / "s" / "p" / "0001" / "h.1").stat().st_ino
    store[0] = -values[0]  # after the save, before the next
    again = HiddenStates(spill, torch.device("cpu"))
    reopened = RunState(tmp_path / "s").phase("p")
    reopened.restore("h", again, {0: 2, 1: 1})
    assert torch.equal(again[0], values[0])
    assert torch.equal(again[1], values[1])
    phase.save(2, tensors={"y": torch.tensor([2])}, values={"f": 0.2}, stores={"h": store})
    assert names(tmp_path / "s" / "p") == ["0001.safetensors", "0002", "0002.safetensors", "state.json"]
    assert (tmp_path / "s" / "p" / "0002" / "h.1").stat().st_ino == inode
    reopened = RunState(tmp_path / "s").phase("p")
    assert (reopened.done_items, reopened.values, reopened.finished) == (2, {"f": 0.2}, False)
    assert reopened.tensors() == {"x": torch.tensor([1.0]), "y": torch.tensor([2])}
    reopened.restore("h", again, {0: 2, 1: 1})
    assert torch.equal(again[0], -values[0])


def test_what_passes_counts_until_the_next_save(tmp_path: Path) -> None:
    phase = open_run_state(tmp_path / "s", dict).phase("p")
    phase.save(1, tensors={"x": torch.tensor([1])}, passing={"state": torch.tensor([7])})
    assert RunState(tmp_path / "s").phase("p").tensors() == {"x": torch.tensor([1]), "state": torch.tensor([7])}
    phase.save(2, passing={"state": torch.tensor([8])})
    assert RunState(tmp_path / "s").phase("p").tensors() == {"x": torch.tensor([1]), "state": torch.tensor([8])}
    phase.finish(tensors={"y": torch.tensor([2])})
    assert RunState(tmp_path / "s").phase("p").tensors() == {"x": torch.tensor([1]), "y": torch.tensor([2])}
    assert not list((tmp_path / "s").rglob("*passing*"))


@pytest.mark.parametrize("kept", [0, 1, 24])  # bytes, of two blocks of 24
def test_hidden_states_that_were_cut_are_refused(kept: int, tmp_path: Path) -> None:
    phase = open_run_state(tmp_path / "s", dict).phase("p")
    phase.save(1, stores={"h": filled([torch.randn(2, 3, 4).bfloat16()])})
    (tmp_path / "s" / "p" / "0001" / "h.0").write_bytes(bytes(kept))
    with pytest.raises(StateError, match="not as long as"):
        RunState(tmp_path / "s").phase("p").restore("h", HiddenStates(None, torch.device("cpu")), {0: 2})


def test_saving_costs_a_twentieth_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "PATIENCE", 20.0)
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    phase = open_run_state(tmp_path / "s", dict).phase("p")
    saved = []
    for step in range(1, 60):

        def prepare() -> None:
            clock[0] += 1.0  # what a save takes

        clock[0] += 4.0  # what a layer takes
        phase.save(step, tensors={str(step): torch.tensor(step)}, prepare=prepare)
        if phase.done_items == step:
            saved.append(step)
    assert saved == list(range(1, 60, 5))
    assert sorted(map(int, RunState(tmp_path / "s").phase("p").tensors())) == list(range(1, 57))


def test_waiting_for_the_identity_is_no_part_of_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "PATIENCE", 20.0)
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])

    def identity() -> dict[str, int]:
        clock[0] += 1000.0  # all weights are read
        return {"a": 1}

    phase = open_run_state(tmp_path / "s", identity).phase("p")
    phase.save(1)
    clock[0] += 1.0
    phase.save(2)
    assert phase.done_items == 2


def test_small_values_keep_their_order(tmp_path: Path) -> None:
    """They go into config.json: in another order its bytes would differ."""
    values = {"second": {"b": 0.1, "a": [1, 2]}, "first": None}
    open_run_state(tmp_path / "s", dict).phase("p").finish(values=values)
    found = RunState(tmp_path / "s").phase("p").values
    assert json.dumps(found) == json.dumps(values)


def test_a_full_disk_does_not_end_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    report = Silent()
    monkeypatch.setattr(report, "note", notes.append)
    phase = open_run_state(tmp_path / "s", dict, report=report).phase("p")
    phase.save(1, tensors={"a": torch.tensor(1)})

    def full(path: Path) -> None:
        if path.name == "0002.safetensors":  # it is written, but not all of it fits
            raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(resume, "sync_file", full)
        phase.save(2, tensors={"b": torch.tensor(2)})
    assert "too full" in notes[0]
    assert names(tmp_path / "s" / "p") == ["0001", "0001.safetensors", "state.json"]
    assert RunState(tmp_path / "s").phase("p").done_items == 1
    phase.save(3, tensors={"c": torch.tensor(3)})
    reopened = RunState(tmp_path / "s").phase("p")
    assert (reopened.done_items, sorted(reopened.tensors())) == (3, ["a", "b", "c"])


def test_differences_are_listed(tmp_path: Path) -> None:
    kept = open_run_state(tmp_path / "s", lambda: {"options": {"a": 1, "b": [1, 2]}, "gone": "x"})
    kept.phase("p").save(1)
    check_same(tmp_path / "s", {"options": {"b": (1, 2), "a": 1}, "gone": "x"})
    with pytest.raises(StateError, match=r'gone was "x", is nothing; options\.a was 1, is 2; options\.c was nothing'):
        check_same(tmp_path / "s", {"options": {"a": 2, "b": [1, 2], "c": None}})


def test_a_folder_half_removed_counts_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_run_state(tmp_path / "s", lambda: {"a": 1}).phase("p").save(1)
    monkeypatch.setattr("shutil.rmtree", lambda *args, **kwargs: None)
    resume_files.drop(tmp_path / "s")
    monkeypatch.undo()
    assert names(tmp_path / "s") == ["p"]
    assert open_run_state(tmp_path / "s", lambda: {"a": 2}).phase("p").done_items == 0


def test_without_a_folder_nothing_is_kept() -> None:
    phase = RunState().phase("p")
    phase.save(1, tensors={"a": torch.tensor(1)})
    phase.finish()
    assert isinstance(phase, Phase)
    assert (phase.done_items, phase.finished, phase.tensors()) == (0, False, {})
