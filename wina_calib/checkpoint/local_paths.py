"""Paths of this machine: what of them is published, and where the rest is kept for later commands.

A checkpoint is made to be shown to others, who learn nothing from where its maker keeps files. `published` leaves the last
part of a path; the whole of it lies in the user's cache (`storage/places.py`), so that no upload of the folder takes it along.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wina_calib.common.printable import printable
from wina_calib.corpus.sources import catalogue
from wina_calib.model.locate import base_key
from wina_calib.storage.hub_client import is_repo_name
from wina_calib.storage.places import places_of, remember_places

_ORIGIN = re.compile(r"_?name_or_path|.*_file")  # keys of configs that may tell where something was loaded from
_PLACES = 8  # of one base model that are remembered
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
    told = dict(facts)
    for name in ("base_model", "command"):
        if isinstance(told.get(name), str):
            told[name] = published(told[name]) if name == "base_model" else _without_paths(told[name])
    for name in ("data", "base_ppl_data"):
        if isinstance(told.get(name), list | tuple):
            told[name] = [published(str(spec)) for spec in told[name]]
    return told


def _without_paths(command: str) -> str:
    try:
        return published_command(shlex.split(command))
    except ValueError:  # no command line
        return re.sub(r"(?:~|\.{0,2})/(?:[^\s/]+/)*(?=[^\s/])", "", command)


def without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """A config of transformers without the places that it was loaded from, which some versions write into it."""
    return {
        key: without_paths(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if not (isinstance(value, str) and _ORIGIN.fullmatch(key)) or published(value) == value
    }


def remember(weights: str, facts: Mapping[str, Any], *, base_model: Path | None, data: Sequence[str] = ()) -> None:
    """Keep where a checkpoint's base model and its text are on this machine.

    Args:
        weights: the fingerprint of the checkpoint's weights.
        facts: its provenance, with what is published of both.
        base_model: the base model's folder; None where it is of the Hub, or not known.
        data: the data specs as they were given, where that is known.
    """
    if base_model is not None:
        key, here = base_key(weights, str(facts.get("base_model"))), str(base_model.absolute())
        earlier = (place for place in places_of(key) or () if place != here)  # the same model, should this one be moved
        remember_places(key, [here, *earlier][:_PLACES])
    whole = [str(Path.cwd() / Path(spec).expanduser()) if is_path_of_here(spec) else spec for spec in data]
    if whole and tuple(whole) != _told(facts):
        remember_places(_data_key(facts), whole)


def base_model_here(weights: str, told: str) -> Path | None:
    """The folder of the base model of which `told` is published, if it is one of this machine."""
    known = places_of(base_key(weights, told)) or ()
    places = (told, *known) if Path(told).is_absolute() else known  # earlier versions told the whole path
    return next((Path(place) for place in places if Path(place).is_dir()), None)


def data_here(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """Data specs that a checkpoint was calibrated on, with the paths of this machine where they are known."""
    return places_of(_data_key(facts)) or _told(facts)


def _told(facts: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(map(str, facts.get("data", ())))


def _data_key(facts: Mapping[str, Any]) -> tuple[str, ...]:
    return ("text", str(facts.get("data_fingerprint")), *_told(facts))
