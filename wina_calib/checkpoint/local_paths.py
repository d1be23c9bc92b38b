"""Paths of this machine: what of them is published, and a file beside the checkpoint, never pushed, that keeps the rest.

A checkpoint is made to be shown to others, who learn nothing from where its maker keeps files. `published` leaves the last
part of a path; `.wina_local.json` has the whole of it for later commands on the same machine, and may be deleted.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wina_calib.common.atomic import write_file
from wina_calib.common.printable import printable
from wina_calib.corpus.sources import catalogue
from wina_calib.errors import CheckpointError
from wina_calib.storage.hub_client import is_repo_name
from wina_calib.storage.safe_files import read_json

LOCAL_FILE = ".wina_local.json"
_MAX_BYTES = 1 << 20
_ORIGINS = ("_name_or_path", "name_or_path")  # keys of configs
_NAMED = ("builtin", "hub")  # what a data spec begins with that is no path
_PATH = re.compile(r"(?:~|\.{0,2}/|[A-Za-z]:[\\/])")  # begins what can only be a path


def published(text: str) -> str:
    """A model, data spec or argument as others may read it: of a local path its last part, anything else as it is."""
    option, equals, value = text.partition("=") if text.startswith("-") else ("", "", text)
    kind, colon, rest = value.partition(":")
    if kind == "hub" and colon and _is_path(rest):
        kept = f"hub:{_last(rest)}"
    elif kind in _NAMED or kind in catalogue() or "://" in value:
        kept = value
    else:
        kept = _last(value) if _is_path(value) else value
    return printable(f"{option}{equals}{kept}")


def published_command(arguments: Sequence[str]) -> str:
    """A command line as others may read it."""
    return shlex.join(map(published, arguments))


def is_path_of_here(spec: str) -> bool:
    """Whether a data spec is a path, and not built-in text or a name."""
    kind = spec.partition(":")[0]
    return kind not in _NAMED and kind not in catalogue()


def _is_path(text: str) -> bool:
    if _PATH.match(text) or text in (".", "..", "~"):
        return True
    return "/" in text and (not is_repo_name(text.partition(":")[0]) or os.path.lexists(text.partition(":")[0]))


def _last(path: str) -> str:
    """The name of what a path leads to, with the field or split that may follow it."""
    parts = re.split(r"[\\/]" if re.match("[A-Za-z]:", path) else "/", path.rstrip("/"))
    name = parts[-1] if parts else ""
    return Path(path).expanduser().resolve().name if name in ("", ".", "..", "~") else name


def published_facts(facts: dict[str, Any]) -> dict[str, Any]:
    """The provenance of a checkpoint without paths; the same where there are none."""
    found = dict(facts)
    for name in ("base_model", "command"):
        if isinstance(found.get(name), str):
            found[name] = published(found[name]) if name == "base_model" else _without_paths(found[name])
    for name in ("data", "base_ppl_data"):
        if isinstance(found.get(name), list | tuple):
            found[name] = [published(str(spec)) for spec in found[name]]
    return found


def _without_paths(command: str) -> str:
    try:
        return published_command(shlex.split(command))
    except ValueError:  # no command line
        return re.sub(r"(?:~|\.{0,2})/(?:[^\s/]+/)*(?=[^\s/])", "", command)


def without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """A config of transformers without the folder that it was loaded from, which some versions write into it."""
    return {k: v for k, v in config.items() if k not in _ORIGINS or not isinstance(v, str) or published(v) == v}


def remember(folder: Path, *, base_model: Path | None, data: Sequence[str]) -> None:
    """Keep beside a checkpoint where its base model and its text are on this machine."""
    whole = [str(Path.cwd() / Path(spec).expanduser()) if is_path_of_here(spec) else spec for spec in data]
    record = {"base_model": None if base_model is None else str(base_model.absolute()), "data": whole}
    write_file(folder / LOCAL_FILE, json.dumps(record, indent=1).encode())


def base_model_here(folder: Path, told: str) -> Path | None:
    """The folder of a checkpoint's base model of which `told` is published, if it is one of this machine."""
    base = (
        told if Path(told).is_absolute() else _record(folder).get("base_model")
    )  # earlier versions told the whole path
    return Path(base) if isinstance(base, str) and published(base) == published(told) and Path(base).is_dir() else None


def data_here(folder: Path, facts: dict[str, Any]) -> tuple[str, ...]:
    """Data specs that a checkpoint was calibrated on, with the paths of this machine where they are known."""
    told = tuple(map(str, facts.get("data", ())))
    here = _record(folder).get("data")
    if isinstance(here, list) and all(isinstance(spec, str) for spec in here) and tuple(map(published, here)) == told:
        return tuple(here)
    return told


def _record(folder: Path) -> dict[str, Any]:
    try:
        found = read_json(folder / LOCAL_FILE, max_bytes=_MAX_BYTES)
    except CheckpointError:
        return {}
    return found if isinstance(found, dict) else {}
