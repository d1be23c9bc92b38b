"""Asking for the base model: at a terminal, and nowhere else."""

import io
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from wina_calib.cli import main
from wina_calib.commands.push import _asked


class Stream(io.StringIO):
    """A standard stream that is a terminal, or is none."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


def streams(monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> Stream:
    monkeypatch.setattr(sys, "stdin", Stream(terminal))
    monkeypatch.setattr(sys, "stderr", shown := Stream(terminal))
    return shown


@pytest.mark.parametrize(("answer", "found"), [(" me/BASE ", "me/BASE"), ("", None)])
def test_a_person_is_asked(monkeypatch: pytest.MonkeyPatch, answer: str, found: str | None) -> None:
    streams(monkeypatch, terminal=True)
    monkeypatch.setattr(click, "prompt", lambda text, **options: answer)
    assert _asked() == found


def test_elsewhere_it_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = streams(monkeypatch, terminal=False)

    def prompt(*_: Any, **__: Any) -> str:
        raise AssertionError("nobody is there to answer")

    monkeypatch.setattr(click, "prompt", prompt)
    assert _asked() is None
    assert "--base-model USER/NAME names it" in shown.getvalue()


def test_an_interrupted_question_sends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    streams(monkeypatch, terminal=True)

    def prompt(*_: Any, **__: Any) -> str:
        raise click.Abort

    monkeypatch.setattr(click, "prompt", prompt)
    with pytest.raises(KeyboardInterrupt, match="nothing was sent"):
        _asked()


def test_a_name_that_none_can_be_meant_by_is_refused_before_anybody_is_asked(tmp_path: Path) -> None:
    for given, said in ((["alone"], "does not say whose repository it is"), (["me/it", "--base-model", "x"], "is 'x'")):
        refused = CliRunner().invoke(main, ["push", str(tmp_path), *given])
        assert refused.exit_code == 2 and said in refused.output and "note:" not in refused.output
