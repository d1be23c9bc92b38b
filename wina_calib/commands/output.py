"""Results, notes and progress bars."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from wina_calib.common.bars import hearing
from wina_calib.common.printable import checked_name, printable_json, unfiltered
from wina_calib.common.progress import Progress
from wina_calib.common.text import finite
from wina_calib.errors import OutputError


def check_files(paths: Iterable[Path], *, overwrite: bool) -> None:
    """Refuse files that cannot be written, or that exist unless they may be replaced.

    Raises:
        OutputError: a file exists, is a folder, or lies in a folder that does not exist.
    """
    for path in paths:
        checked_name(str(path))
        if not path.absolute().parent.is_dir():
            raise OutputError(f"{path.parent} does not exist. Create it, or give another file.")
        if path.is_dir():
            raise OutputError(f"{path} is a folder. Give a file.")
        if path.exists() and not overwrite:
            raise OutputError(f"{path} exists. Give another file, or --overwrite to replace it.")


def emit(value: Any, text: str, *, as_json: bool, coloured: bool = False) -> None:
    """Print a result: one JSON object, or text for people. `coloured` text has colours of its own and nothing of others."""
    if as_json:
        click.echo(printable_json(json.dumps(finite(value), ensure_ascii=False)))
    else:
        click.echo(text, file=unfiltered(sys.stdout) if coloured else None)


def note(text: str) -> None:
    """Print a line on standard error, unless quiet."""
    if not quiet():
        click.echo(text, err=True)


def quiet() -> bool:
    """Whether `--quiet` was given."""
    context = click.get_current_context(silent=True)
    return bool(context and context.find_root().params.get("quiet"))


@contextmanager
def bars() -> Iterator[Progress]:
    """Progress of a command on standard error; nothing where `--quiet` was given."""
    with hearing(not quiet()) as report:
        yield report
