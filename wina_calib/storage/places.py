"""Where on this machine lies what a checkpoint names without its path, kept in this user's cache and in no checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from wina_calib.common.atomic import write_file
from wina_calib.common.own_cache import cache_folder, read_own
from wina_calib.errors import OutputError

_MAX_BYTES = 1 << 20


def remember_places(about: Sequence[str], places: Sequence[str]) -> None:
    """Keep for later commands of this user where something is; without a cache nothing is kept.

    `about` is by what it is known: what a checkpoint publishes of it.
    """
    file = _file(about)
    if file is not None:
        try:
            write_file(file, json.dumps({"about": list(about), "places": list(places)}).encode())
        except (OSError, OutputError):
            return


def places_of(about: Sequence[str]) -> tuple[str, ...] | None:
    """What was kept of it; None where nothing is."""
    file = _file(about)
    data = None if file is None else read_own(file, _MAX_BYTES)
    try:
        record = json.loads(data or b"null")
    except ValueError:
        return None
    places = record.get("places") if isinstance(record, dict) and record.get("about") == list(about) else None
    return tuple(places) if isinstance(places, list) and all(isinstance(place, str) for place in places) else None


def _file(about: Sequence[str]) -> Path | None:
    folder = cache_folder()
    digest = hashlib.sha256(json.dumps(list(about)).encode("utf-8", "surrogatepass")).hexdigest()
    return None if folder is None else folder / f"place-{digest[:32]}.json"
