"""The files of a run's state: read, compared with the present work, dropped."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from wina_calib.common.atomic import write_file
from wina_calib.errors import OutputError, StateError

JOB, STATE, FINISHED = "job.json", "state.json", "finished.json"
FULL = (errno.ENOSPC, errno.EDQUOT)


def state_folder(target: Path) -> Path:
    """Where the state of an output lies while it is made: `.NAME.state` beside it.

    Raises:
        OutputError: nothing can lie beside it, as it is the root of all folders.
    """
    if not target.name:
        raise OutputError(f"{target} exists, and has no name. Give another folder.")
    return target.with_name(f".{target.name}.state")


def is_useful(folder: Path) -> bool:
    """Whether a folder holds finished work."""
    return (folder / JOB).exists() and any(folder.glob(f"*/{STATE}"))


def drop(folder: Path) -> None:
    """Remove a folder of finished work. What says what it is goes first: a folder half removed counts for nothing."""
    if folder.is_symlink():  # what it leads to is not ours
        folder.unlink()
        return
    (folder / JOB).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def mark_finished(folder: Path, result: Mapping[str, str]) -> None:
    """Say in the state, just before the result gets its name, what that result is, by digests of its files."""
    write_file(folder / FINISHED, encode(result))


def has_finished(folder: Path, result: Callable[[], Mapping[str, str]]) -> bool:
    """Whether the state is left over from a run whose result got its name: the one that the state speaks of."""
    if not (folder / FINISHED).is_file():
        return False
    with suppress(StateError, OSError):
        return read_record(folder / FINISHED) == dict(result())
    return False


def check_same(folder: Path, identity: Mapping[str, Any]) -> None:
    """Refuse to go on with other work.

    Raises:
        StateError: naming what was and is.
    """
    old, new = flat(read_record(folder / JOB)), flat(identity)
    differences = [
        f"{name} was {_short(old.get(name))}, is {_short(new.get(name))}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    if differences:
        raise StateError(
            f"{folder} is the state of a run that was stopped, and this is another: {'; '.join(differences)}. Run the same "
            "again to go on with it, or add --restart to start over."
        )


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested dictionaries as one, with names like `options.sparsity` and values as short JSON."""
    out: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{name}.")
        else:
            out[f"{prefix}{name}"] = encode(value).decode().strip()
    return out


def _short(text: str | None) -> str:
    return "nothing" if text is None else text if len(text) <= 40 else f"{text[:12]}...{text[-4:]}"


def encode(value: Any) -> bytes:
    """Plain values as JSON; floats and the order of names come back as they were."""
    return json.dumps(value, default=list).encode() + b"\n"


def read_record(path: Path) -> dict[str, Any]:
    """A JSON object of the state."""
    with readable(path):
        record = json.loads(path.read_bytes())
        if not isinstance(record, dict):
            raise ValueError("no JSON object")
        return record


@contextmanager
def readable(place: Path) -> Iterator[None]:
    """Turn what a damaged file raises into one message; a disk too full for what is read from it is not damage."""
    try:
        yield
    except (OSError, ValueError, KeyError, RecursionError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        raise StateError(f"{place} is damaged: {error}. Add --restart to start over.") from error
