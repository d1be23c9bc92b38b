"""The text of rows: which field holds it, and what becomes of rows that hold none."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from wina_calib.corpus.chat import conversation, is_conversation, valid
from wina_calib.errors import CorpusError

_CHATS = ("messages", "conversations", "conversation")  # taken where no field `text` is there and none was asked for
_LOOKED = 1000  # rows without a text after which no more are looked at
_SHOWN = 200


@dataclass
class Tally:
    """How many rows were read, and how many of them held no text."""

    rows: int = 0
    empty: int = 0

    def note(self, spec: str) -> str | None:
        """What to tell of a data spec's rows without text."""
        return f"data {shown(spec)}: {self.empty:,} of {self.rows:,} rows held no text" if self.empty else None


def texts(
    rows: Iterable[tuple[str, Mapping[str, Any] | None]], entry: Mapping[str, Any], tally: Tally
) -> Iterator[str]:
    """Yield the texts of rows; those without one are counted and left out.

    Raises:
        CorpusError: a field holds what is no text, or no row has a text.
    """
    problem: CorpusError | None = None
    any_text = False
    for looked, (where, row) in enumerate(rows, 1):
        tally.rows += 1
        try:
            text = row_text(row or {}, entry, where) if row is not None else None
        except Missing as error:
            text, problem = None, problem or error
        if text is None or not text.strip():
            tally.empty += 1
        if text is not None:
            any_text = True
            yield text
        elif problem is None:
            held = "null"
            if row is not None:
                column = _column(row, entry)
                held = f"field {column!r} holds {'nothing (null)' if row[column] is None else 'no text'}"
            problem = CorpusError(f"{where}: {held}; expected text, or a list of chat messages.")
        if looked >= _LOOKED and not any_text and problem is not None:
            break
    if problem is not None and not any_text:
        raise problem


class Missing(CorpusError):
    """A row lacks the field with the text."""


def row_text(row: Mapping[str, Any], entry: Mapping[str, Any], where: str) -> str | None:
    """Text of one row: a template filled in, a column of text or of chat messages; None where the column holds nothing.

    Raises:
        Missing: there is no such column.
        CorpusError: the column holds something else.
    """
    try:
        if "template" in entry:
            filled = str(entry["template"]).format(**row)
            return valid(re.sub(r"\n{3,}", "\n\n", filled))  # an empty field leaves no gap
        column = _column(row, entry)
        value = row[column]
    except KeyError as error:
        names = ", ".join(str(name) for name in list(row)[:20])[:_SHOWN] or "none"
        raise Missing(
            f"{where}: there is no field {error}; found {names}. Name the field that holds the text, as in "
            "file.jsonl:FIELD or hub:NAME:config:split:COLUMN."
        ) from error
    if value is None or value == [] or value != value:  # a NaN is what tables write of a row without a value
        return None
    if is_conversation(value):
        said = conversation(value, f"{where}, field {column!r}")
        return said if any(turn["content"].strip() for turn in said.turns) else None
    if not isinstance(value, str):
        raise CorpusError(
            f"{where}: field {column!r} holds {type_name(value)}; expected text, or a list of chat messages."
        )
    return valid(value)


def _column(row: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
    """The field of a row that holds the text: the one asked for, or where none was, one of messages."""
    column = str(entry.get("column"))
    if column == "text" and column not in row:
        return next((name for name in _CHATS if name in row), column)
    return column


def shown(text: str) -> str:
    """A quoted text for messages, not longer than a line or two."""
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")


def type_name(value: object) -> str:
    """What a value is called in messages."""
    return "nothing (null)" if value is None else f"a value of type {type(value).__name__}"
