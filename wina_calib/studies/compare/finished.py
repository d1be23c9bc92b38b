"""Finished calibrations and cells of a comparison on disk."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wina_calib.checkpoint.reader import open_checkpoint
from wina_calib.common.text import finite
from wina_calib.errors import CheckpointError, WinaError
from wina_calib.storage import read_json
from wina_calib.studies.compare.table import Row

FORMAT = "wina-compare-cell/2"


def finished_seconds(place: Path, sparsities: Sequence[float]) -> float | None:
    """Seconds that the calibration kept at `place` took; None where there is none that has these sparsities."""
    try:
        seconds = read_json(place / "seconds.json")
        anchors = open_checkpoint(place / "checkpoint").settings.anchors
    except (WinaError, OSError):
        return None
    return seconds if isinstance(seconds, float) and set(sparsities) <= set(anchors) else None


def read_cell(path: Path, key: Mapping[str, Any]) -> Row | None:
    """A finished cell; None where there is none, or the file is damaged or of another key."""
    if not path.is_file():
        return None
    try:
        record = read_json(path)
        if not isinstance(record, dict) or record.get("format") != FORMAT or record.get("key") != key:
            return None
        values: dict[str, Any] = {name: math.inf if value is None else value for name, value in record["row"].items()}
        return Row(**values)
    except (CheckpointError, KeyError, TypeError, AttributeError):
        return None


def key_digest(key: Mapping[str, Any]) -> str:
    """A short name of all that a cell depends on."""
    return hashlib.sha256(json_bytes(key)).hexdigest()[:12]


def json_bytes(value: Any) -> bytes:
    """Readable JSON, the same bytes for equal values."""
    return (json.dumps(finite(value), indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode()
