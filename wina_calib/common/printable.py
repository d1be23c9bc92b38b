"""The one filter between text of others and a terminal: nothing that is printed steers what shows it.

Names of tensors, values of configs, cards of the Hub and what a model writes may hold escape sequences, marks that turn the
order of reading, or no end. `printable` spells such characters out; `printable_output` puts it before standard output and
standard error for as long as a command runs, so that results, errors, logs, warnings and bars all pass it.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import IO, Any, TextIO, cast

from wina_calib.errors import UsageError

MAX_LINE = 2000  # characters of a line of messages
MAX_CELL = 400  # of a cell of a table

# Control characters of C0 but tab and newline, DEL, C1; what sets the direction of reading; what has no width; line and
# paragraph separators; halves of surrogate pairs; tags. The two joiners stay in scripts that need them and in emoji.
_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]|(?<![^\x00-\x7f])[\u200c\u200d]|[\u200c\u200d](?![^\x00-\x7f])"
)
# What progress bars write between texts: up to lines above, and down again.
_MOVES = re.compile("(?:\n|\x1b\\[A)*")


def printable(text: str, limit: int | None = None) -> str:
    r"""Text with all that steers a terminal spelled out; lines stay lines.

    What is beyond `limit` characters of a line is counted instead.

    Returns:
        The same text where there is nothing to spell out.

    Example:
        ```python
        printable("\x1b[31mred")  # '\\x1b[31mred'
        ```
    """
    if limit is not None and len(text) > limit:
        text = "\n".join(clipped(line, limit) for line in text.split("\n"))
    return _STEERING.sub(_spelled, text)


def one_line(text: str, limit: int | None = MAX_CELL) -> str:
    """As `printable`, with line breaks and tabs spelled out too."""
    return printable(text, limit).replace("\n", "\\n").replace("\t", "\\t")


def checked_name(name: str) -> str:
    """A name of a file or folder, if it is text: the libraries that read and write models take no other bytes.

    Raises:
        UsageError: it is not.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UsageError(f"the name {printable(name)} holds bytes that are no UTF-8 text. Rename it.") from None
    return name


def clipped(text: str, limit: int) -> str:
    """Text of at most about `limit` characters, which says how long it was."""
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text):,} characters)"


def printable_json(text: str) -> str:
    """JSON text with the same meaning, in which all that steers a terminal is an escape of JSON."""
    return _STEERING.sub(_escaped, text)


def _spelled(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file's name that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _escaped(match: re.Match[str]) -> str:
    if match[0] in "\n\r":  # between values; within a text JSON has escaped them
        return match[0]
    units = match[0].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))


class PrintableStream:
    """A text stream that passes what is written through `printable`; all else is the stream's own.

    Bars may return to the start of the line, as every one of their texts begins, and move between lines.
    """

    def __init__(self, stream: IO[str], limit: int | None = None) -> None:
        self.stream, self._limit = stream, limit

    @property
    def buffer(self) -> Any:
        """None to be had: who looks for the bytes below, as click does where the encoding is ASCII, is led past the filter."""
        raise AttributeError("the stream takes text only")

    def write(self, text: str) -> int:
        """Write printable text; gives the length of what was given."""
        if _MOVES.fullmatch(text):
            self.stream.write(text)
            return len(text)
        start = len(text) - len(text.lstrip("\r"))
        shown = text[:start] + printable(text[start:], self._limit)
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        self.stream.write(shown.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def printable_output() -> Iterator[None]:
    """Pass all that is printed inside the context through the filter, and the traceback of an error that leaves it."""
    before = sys.stdout, sys.stderr
    sys.stdout = cast("TextIO", PrintableStream(sys.stdout))
    sys.stderr = cast("TextIO", PrintableStream(sys.stderr, MAX_LINE))
    try:
        yield
    except Exception:
        sys.excepthook = _printable_traceback
        raise
    finally:
        sys.stdout, sys.stderr = before


def unfiltered(stream: IO[str]) -> IO[str]:
    """The stream below the filter, for text that is ours to the last character, as a coloured table."""
    return stream.stream if isinstance(stream, PrintableStream) else stream


def _printable_traceback(kind: type[BaseException], error: BaseException, place: TracebackType | None) -> None:
    for part in traceback.format_exception(kind, error, place):
        sys.stderr.write(printable(part, MAX_LINE))
