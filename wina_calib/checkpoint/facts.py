"""What a checkpoint's provenance may say: facts of a known name count where they are of their kind, else as not told.

Everything that shows or uses provenance reads it through here, so that a number in the place of a list, or a number of 5,000
digits, is "unknown" everywhere and an error nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

INTERPOLATED = "interpolated_anchors"  # anchors whose tables were interpolated, not fitted
REBUDGETED = "rebudgeted"  # how thresholds came about when the budget was chosen after calibration
_MAX_TEXT, _MAX_ITEMS, _MAX_COUNT = 10_000, 1_000, 1 << 53


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _MAX_TEXT


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_COUNT


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < _MAX_COUNT or (isinstance(value, float) and math.isfinite(value))


def _is_list(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple) and len(value) <= _MAX_ITEMS and all(map(of, value))


def _is_texts(value: Any) -> bool:
    return _is_list(value, _is_text)


_KINDS: dict[str, Callable[[Any], bool]] = {
    "base_model": _is_text,
    "base_commit": lambda value: value is None or _is_text(value),
    "base_ppl": _is_number,
    "base_ppl_data": _is_texts,
    "base_ppl_tokens": _is_count,
    "base_ppl_fingerprint": _is_text,
    "data": _is_texts,
    "data_fingerprint": _is_text,
    "samples": _is_count,
    "quick": lambda value: isinstance(value, bool),
    "blocks": _is_count,
    "seq_len": _is_count,
    "seed": lambda value: _is_number(value) and isinstance(value, int),
    "loop": lambda value: value in ("closed", "open"),
    "compute_dtype": _is_text,
    "untied": lambda value: isinstance(value, bool),
    "command": _is_text,
    "held_out": lambda value: isinstance(value, Mapping),
    "verdict": lambda value: isinstance(value, Mapping),
    "recovered": lambda value: isinstance(value, Mapping),
    "versions": lambda value: isinstance(value, Mapping) and _is_texts([*value.keys(), *value.values()]),
    "prediction": lambda value: isinstance(value, Mapping),
    INTERPOLATED: lambda value: _is_list(value, _is_number),
    REBUDGETED: _is_text,
}


def sound_facts(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """A provenance without those facts of a known name that are not of their kind; what has another name stays."""
    return {name: value for name, value in provenance.items() if name not in _KINDS or _KINDS[name](value)}
