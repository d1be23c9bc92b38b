"""A calibration that is stopped goes on at the last finished layer, and its result is the same to the byte."""

import dataclasses
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import script
import tiny
import torch
from click.testing import CliRunner

import wina_calib
from wina_calib.calibration import identity
from wina_calib.calibration.layer_stream import LayerStream
from wina_calib.cli import main
from wina_calib.common.progress import Silent
from wina_calib.errors import NumericError, OutputError, StateError
from wina_calib.storage import resume
from wina_calib.storage.hidden_states import HiddenStates

SMALL: dict[str, Any] = {"samples": 64, "seq_len": 128, "grid": (0.5,), "sparsity": 0.5}
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "open loop": {"loop": "open", "budget": "uniform", "transform": "none"},
    "greedy, run-time matrices": {"budget": "greedy", "transform": "stacked"},
    "int4": {"bits": 4, "group_size": 32, "transform": "none", "budget": "uniform"},
    "by reference": {"weights": "reference", "budget": "uniform", "grid": (0.25, 0.5)},
}


class Stopping(Silent):
    """Counts steps; raises after so many."""

    def __init__(self, after: int = 10**9, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.after, self.error, self.steps, self.notes = after, error, list[str](), list[str]()
        self.is_reading = False  # layers again, before a descent

    def phase(self, name: str, steps: int) -> None:
        self.is_reading = "read layers" in name

    def step(self, note: str) -> None:
        if self.is_reading:
            return
        self.steps.append(note)
        if len(self.steps) >= self.after:
            raise self.error("stopped by the test")

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(autouse=True)
def every_layer_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "PATIENCE", 0.0)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def assert_equal(found: Path, expected: Path) -> None:
    a, b = contents(found), contents(expected)
    assert a.keys() == b.keys()
    assert [name for name in a if a[name] != b[name]] == []


@pytest.mark.parametrize("case", [pytest.param(name, marks=[pytest.mark.slow] * (name != "default")) for name in CASES])
def test_stopped_again_and_again_the_result_is_the_same(case: str, tmp_path: Path, llama: Path, text: Path) -> None:
    options = SMALL | {"data": str(text)} | CASES[case]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = Stopping()
    wina_calib.calibrate(llama, tmp_path / "a" / "out", progress=whole, **options)
    assert names(tmp_path / "a") == ["out"]
    heard, runs = list[str](), 0
    while True:
        progress = Stopping(after=6 if case == "default" else 3)
        try:
            wina_calib.calibrate(llama, tmp_path / "b" / "out", progress=progress, **options)
        except KeyboardInterrupt as error:
            assert "the same command goes on" in str(error)
            assert names(tmp_path / "b") == [".out.state"]
            runs += 1
            assert runs < 20
            heard += progress.steps
            continue
        break
    heard += progress.steps
    assert runs >= 2
    # No step is done twice, but for reading the layers before a descent.
    assert heard == whole.steps
    assert names(tmp_path / "b") == ["out"]
    assert_equal(tmp_path / "b" / "out", tmp_path / "a" / "out")


@pytest.fixture
def stopped(tmp_path: Path, text: Path) -> tuple[Path, Path, dict[str, Any]]:
    """A model, and an output whose calibration was stopped in the first phase."""
    tiny.save("llama", tmp_path / "m")
    options = SMALL | {"data": str(text), "budget": "uniform", "transform": "none"}
    with pytest.raises(KeyboardInterrupt):
        wina_calib.calibrate(tmp_path / "m", tmp_path / "out", progress=Stopping(after=2), **options)
    return tmp_path / "m", tmp_path / "out", options


def _other_weights(model: Path) -> None:
    tiny.save("llama", model, seed=1)


def _other_config(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda model, options: _other_weights(model), r"model\.weights was"),
        (lambda model, options: _other_config(model), r"model\.config was"),
        (lambda model, options: options.update(sparsity=0.6), r"options\.sparsity was 0\.5, is 0\.6"),
        (lambda model, options: options.update(samples=70), r"text\.calibration was"),
        (lambda model, options: options.update(micro_batch=5), r"compute\.micro_batch was 16, is 5"),
        (lambda model, options: options.update(dtype="bfloat16"), r'compute\.dtype was "float32", is "bfloat16"'),
    ],
)
def test_what_changed_is_said(
    change: Callable[[Path, dict[str, Any]], None],
    told: str,
    stopped: tuple[Path, Path, dict[str, Any]],
) -> None:
    model, out, options = stopped
    change(model, options)
    before = contents(out.with_name(".out.state") / "dense-perplexity" / "0002")
    with pytest.raises(StateError, match=told) as error:
        wina_calib.calibrate(model, out, **options)
    assert "--restart" in str(error.value)
    assert contents(out.with_name(".out.state") / "dense-perplexity" / "0002") == before


def test_restart_starts_over(stopped: tuple[Path, Path, dict[str, Any]]) -> None:
    model, out, options = stopped
    progress = Stopping()
    wina_calib.calibrate(model, out, progress=progress, restart=True, **(options | {"sparsity": 0.6}))
    assert progress.steps[0] == "layer 1"
    assert names(out.parent) == ["m", "out"]


@pytest.mark.parametrize(
    ("module", "name", "value", "told"),
    [
        (torch, "__version__", "99.0", r'versions\.torch was "2.*is "99\.0"'),
        (identity, "FORMAT", 99, "format was .*is 99"),
    ],
    ids=["torch", "what phases give"],
)
def test_another_version_is_noticed(
    module: Any,
    name: str,
    value: object,
    told: str,
    stopped: tuple[Path, Path, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, out, options = stopped
    monkeypatch.setattr(module, name, value)
    with pytest.raises(StateError, match=told):
        wina_calib.calibrate(model, out, **options)


def test_a_damaged_state_is_refused(stopped: tuple[Path, Path, dict[str, Any]]) -> None:
    model, out, options = stopped
    part = out.with_name(".out.state") / "dense-perplexity" / "0002" / "hidden.0"
    part.write_bytes(part.read_bytes()[:-1])
    progress = Stopping()
    with pytest.raises(StateError, match="--restart"):
        wina_calib.calibrate(model, out, progress=progress, **options)
    assert part.is_file()  # nothing is removed without --restart
    assert not any("the same command" in note for note in progress.notes)


def test_a_disk_too_full_to_go_on_is_no_damage(
    stopped: tuple[Path, Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out, options = stopped

    def full(*args: object) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch, pytest.raises(OutputError, match="the disk is full"):
        patch.setattr(HiddenStates, "__setitem__", full)
        patch.setattr(LayerStream, "embed", LayerStream.store)
        wina_calib.calibrate(model, out, **options)
    progress = Stopping()
    wina_calib.calibrate(model, out, progress=progress, **options)
    assert progress.steps[0] == "layer 3"


@pytest.mark.parametrize("patience", [0.0, 1e9])
def test_state_is_kept_when_asked(
    patience: float, tmp_path: Path, llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved after every layer, or at the end of each phase only."""
    monkeypatch.setattr(resume, "PATIENCE", patience)
    options = SMALL | {"data": str(text), "keep_state": True}
    wina_calib.calibrate(llama, tmp_path / "out", **options)
    first = contents(tmp_path / "out")
    assert names(tmp_path) == [".out.state", "out"]
    progress = Stopping()
    wina_calib.calibrate(llama, tmp_path / "out", progress=progress, overwrite=True, **options)
    assert contents(tmp_path / "out") == first
    assert all(step.startswith("weights") for step in progress.steps)  # the only thing that was moved away


def test_what_would_fail_again_leaves_nothing(tmp_path: Path, llama: Path, text: Path) -> None:
    progress = Stopping(after=5, error=NumericError)
    with pytest.raises(NumericError):
        wina_calib.calibrate(llama, tmp_path / "out", progress=progress, data=str(text), **SMALL)
    assert names(tmp_path) == []


def test_an_error_of_the_disk_keeps_the_state(tmp_path: Path, llama: Path, text: Path) -> None:
    progress = Stopping(after=5, error=OutputError)
    with pytest.raises(OutputError):
        wina_calib.calibrate(llama, tmp_path / "out", progress=progress, data=str(text), **SMALL)
    assert names(tmp_path) == [".out.state"]
    assert "the same command goes on" in progress.notes[0]


@pytest.mark.parametrize("sent", [None, signal.SIGTERM])
def test_interrupted_on_the_command_line(
    sent: signal.Signals | None, tmp_path: Path, llama: Path, text: Path, monkeypatch: Any
) -> None:
    """By Ctrl-C, and by what a scheduler or `timeout` sends."""
    steps = Stopping(after=5)

    def step(self: object, text: str) -> None:
        try:
            steps.step(text)
        except KeyboardInterrupt:
            if sent is None:
                raise
            os.kill(os.getpid(), sent)

    monkeypatch.setattr("wina_calib.common.progress.Silent.step", step)
    command = ["calibrate", str(llama), "-o", str(tmp_path / "out"), "--data", str(text), "--samples", "64"]
    result = CliRunner().invoke(main, ["--quiet", *command, "--seq-len", "128"])
    assert result.exit_code == 130
    assert result.stderr.splitlines() == [
        f"Stopped; what is finished is kept in {tmp_path}/.out.state: the same command goes on from there."
    ]


_KILLED = """
import random, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import wina_calib
from killing import Killer
from wina_calib.common.progress import Silent
from wina_calib.storage import resume

resume.PATIENCE = 0.0
model, folder, data = sys.argv[1:]

class Notes(Silent):
    def note(self, text):
        print(text, flush=True)

def work(name):
    out = Path(folder) / name / "out"
    return lambda: wina_calib.calibrate(
        model, out, data=data, samples=64, seq_len=128, micro_batch=4, progress=Notes(),
        sparsity=0.5, grid=(0.25, 0.5, 0.65)
    )

killer, stopped = Killer(work("a"), random.Random(0)), 0
while stopped < 10 and killer.stop(work("b"), signal.SIGKILL):
    stopped += 1
if stopped == 10:
    work("b")()
print("stopped", stopped)
"""


@pytest.mark.slow
def test_killed_in_a_loop_at_random_moments(tmp_path: Path, llama: Path, text: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    done = script.run(_KILLED, llama, tmp_path, text)
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout.splitlines()
    assert int(said[-1].removeprefix("stopped ")) >= 2
    assert any(line.startswith("going on with the run") for line in said)
    assert names(tmp_path / "b") == ["out"]
    assert_equal(tmp_path / "b" / "out", tmp_path / "a" / "out")


def test_options_that_do_not_count_are_options() -> None:
    from wina_calib.calibration.identity import _LEFT_OUT

    assert {f.name for f in dataclasses.fields(wina_calib.calibration.options.CalibrateOptions)} >= _LEFT_OUT
