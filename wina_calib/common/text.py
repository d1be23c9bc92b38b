"""Plain text for people: tables and numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from wina_calib.common.printable import one_line

_LONG = 1e6


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with a rule under its headers, if it has any; numbers to the right, words to the left; a cell is one line."""
    rows = [[one_line(cell) for cell in row] for row in rows]
    columns = list(zip(headers, *rows, strict=True))
    widths = [max(len(cell) for cell in column) for column in columns]
    right = [all(_is_number(cell) for cell in column[1:]) and len(column) > 1 for column in columns]

    def line(cells: Sequence[str]) -> str:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True))
        return "  ".join(padded).rstrip()

    top = [line(headers), "  ".join("-" * width for width in widths)] if any(headers) else []
    return "\n".join([*top, *map(line, rows)])


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; cells are taken as they are."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (headers, ["---"] * len(headers), *rows))


def percent(share: float, digits: int = 1) -> str:
    """`0.1234` -> `12.3 %`."""
    return f"{100 * share:.{digits}f} %"


def whole(sparsity: float) -> float:
    """A sparsity in whole percent, rounded down: what it costs is then no more than that of the sparsity itself."""
    return math.floor(100 * sparsity + 1e-6) / 100


def share(sparsity: float) -> str:
    """A sparsity for people: `27 %`, and `27.7 %` where it is not in whole percent."""
    return percent(sparsity, 0 if abs(100 * sparsity - round(100 * sparsity)) < 0.05 else 1)


def rise(value: float, base: float) -> str:
    """Relative change with its sign: `+12.3 %`, `+1.43e+11 %`."""
    change = 100 * (value / base - 1)
    return f"{change:+.1f} %" if abs(change) < _LONG else f"{change:+.3g} %"


def give_or_take(error: float) -> str:
    """The standard error of a relative change: ` ± 0.4`, in percent; nothing where it is too small or large to say anything."""
    return f" ± {100 * error:.{1 if error < 0.0995 else 0}f}" if 0.0005 <= error < 1 else ""


def fixed(value: float) -> str:
    """Three decimals, or three digits of a number too long to read: `32.958`, `4.72e+10`."""
    return f"{value:.3f}" if abs(value) < _LONG else f"{value:.3g}"


def human_bytes(count: float) -> str:
    """`1234567` -> `1.2 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def human_time(seconds: float) -> str:
    """`95` -> `1.6 min`."""
    if seconds < 59.5:
        return f"{max(seconds, 0.0):.0f} s"
    minutes = seconds / 60
    if minutes < 90:
        return f"{minutes:.1f} min" if minutes < 9.95 else f"{minutes:.0f} min"
    return f"{minutes / 60:.1f} h"


def _is_number(cell: str) -> bool:
    return bool(cell) and cell.strip().rstrip("%x").replace(",", "").strip().lstrip("+-").replace(".", "", 1).isdigit()


def finite(value: Any) -> Any:
    """A value as JSON holds it: null for numbers that are not finite, lists for tuples; at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def first_line(error: BaseException) -> str:
    """The first line of an error's text with what it announces by a colon, or the error's type where it has no text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    announced = next((n for n, line in enumerate(lines, 1) if not line.endswith(":")), len(lines))
    return " ".join(lines[:announced])[:300] or type(error).__name__
