"""Results, notes and progress bars."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from wina_calib.common.progress import Estimate, human_bytes
from wina_calib.common.text import finite
from wina_calib.errors import OutputError


def check_files(paths: Iterable[Path], *, overwrite: bool) -> None:
    """Refuse files that cannot be written, or that exist unless they may be replaced.

    Raises:
        OutputError: a file exists, is a folder, or lies in a folder that does not exist.
    """
    for path in paths:
        if not path.absolute().parent.is_dir():
            raise OutputError(f"{path.parent} does not exist. Create it, or give another file.")
        if path.is_dir():
            raise OutputError(f"{path} is a folder. Give a file.")
        if path.exists() and not overwrite:
            raise OutputError(f"{path} exists. Give another file, or --overwrite to replace it.")


def emit(value: Any, text: str, *, as_json: bool) -> None:
    """Print a result: one JSON object, or text for people."""
    click.echo(json.dumps(finite(value), ensure_ascii=False) if as_json else text)


def note(text: str) -> None:
    """Print a line on standard error, unless quiet."""
    if not quiet():
        click.echo(text, err=True)


def quiet() -> bool:
    """Whether `--quiet` was given."""
    context = click.get_current_context(silent=True)
    return bool(context and context.find_root().params.get("quiet"))


def bar(total: int, label: str) -> Any:
    """A progress bar on standard error: none where nobody looks."""
    from tqdm import tqdm

    hidden = quiet() or not sys.stderr.isatty()
    return tqdm(total=total, desc=label, file=sys.stderr, disable=hidden, leave=False, ascii="NO_COLOR" in os.environ)


@contextmanager
def steps(label: str) -> Iterator[Callable[[int, int], None]]:
    """Progress as a bar: a function to call after each step with the steps done and the steps in all."""
    with bar(0, label) as shown:

        def progress(done: int, total: int) -> None:
            shown.total = total
            shown.update(done - shown.n)

        yield progress


class Bars:
    """Progress of a calibration as an estimate and bars on standard error."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._start = time.monotonic()

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def planned(self, estimate: Estimate) -> None:
        """Print what the work will take."""
        note(
            f"plan: {estimate.tokens:,} tokens, {estimate.passes:.1f} forward passes ({estimate.flops / 1e12:,.1f} TFLOP), "
            f"about {human_bytes(estimate.memory_bytes)} of memory, {human_bytes(estimate.disk_bytes)} on disk"
        )
        for line in estimate.notes:
            note(f"note: {line}")

    def phase(self, name: str, steps: int) -> None:
        """Begin a bar."""
        self._close()
        note(f"[{time.monotonic() - self._start:6.1f} s] {name}")
        self._bar = bar(steps, name)

    def step(self, text: str) -> None:
        """Advance the bar."""
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()

    def note(self, text: str) -> None:
        """Print a line."""
        note(f"note: {text}")

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
