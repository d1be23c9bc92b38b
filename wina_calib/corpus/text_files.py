"""Documents out of files of text, source code, .jsonl and .parquet, in memory that does not grow with the file."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wina_calib.common.printable import checked_name
from wina_calib.common.text import first_line
from wina_calib.corpus.rows import Tally, shown, texts, type_name
from wina_calib.errors import CorpusError, UsageError

ROWS = (".jsonl", ".parquet")
SUFFIXES = (".txt", *ROWS)
"""Of files that are data wherever they lie."""
_LANGUAGES = (
    "c cc cpp cs cu cuh cxx dart erl ex f90 go h hpp hs java jl js jsx kt lua m ml nim php pl pm py pyi r rb rs scala sh sql "
    "swift ts tsx vue zig"
)
CODE = tuple(f".{name}" for name in _LANGUAGES.split())
PROSE = (".md", ".markdown", ".rst", ".tex", ".adoc", ".org")
"""Further text, which beside rows of data only describes them."""
_KNOWN = frozenset((*SUFFIXES, *PROSE, *CODE))
EXPECTED = "text (.txt, .md, .py and other source code), .jsonl or .parquet"
PIECE = 1 << 18
"""Characters: a .txt file is read as documents of at most this length, cut at a blank line where there is one."""
MAX_LINE = 16 << 20
"""Bytes: a longer line of a .jsonl file is refused before it is parsed."""
_PARQUET_ROWS = 64


def split_path(spec: str) -> tuple[Path, str]:
    """Split `PATH` or `PATH:FIELD` into an existing path and the field that holds the text.

    A path that exists as it is written wins, so that file names may hold a colon.

    Raises:
        UsageError: there is no such file or folder, it is of another type, or the field makes no sense.
    """
    path, field = Path(checked_name(spec)), "text"
    if not path_exists(path) and ":" in spec:
        head, field = spec.rsplit(":", 1)
        path = Path(head)
    if not spec.strip() or not path_exists(path):
        raise UsageError(f"data {shown(spec)}: there is no such file or folder.")
    if not path.is_dir() and not path.is_file():
        raise UsageError(f"data {shown(spec)}: neither a file nor a folder.")
    if path.is_file() and path.suffix.lower() not in _KNOWN:
        raise UsageError(
            f"data {shown(spec)}: the name ends in {path.suffix or 'no suffix'}; expected {EXPECTED}. "
            "Rename or convert the file."
        )
    if not field or (path.is_file() and path.suffix.lower() not in ROWS and str(path) != str(Path(spec))):
        raise UsageError(
            f"data {shown(spec)}: field {field!r} was asked for. Only .jsonl and .parquet files have fields, as in "
            "file.jsonl:FIELD."
        )
    return path, field


def path_documents(path: Path, field: str, tally: Tally) -> Iterator[str]:
    """Yield the documents of a file, or of all text files below a folder in the order of their names.

    Files and folders below it whose name begins with a dot are left out, and where some are .jsonl or .parquet, so is what may
    only describe them: all but these and .txt.

    Raises:
        CorpusError: there is no text file, or one cannot be read.
    """
    try:
        files = _files_below(path) if path.is_dir() else [path]
        if not files:
            raise CorpusError(f"{path}: the folder holds no {EXPECTED}.")
        for file in files:
            rows = _ROW_READERS.get(file.suffix.lower())
            yield from _pieces_of(file) if rows is None else texts(rows(file, field), {"column": field}, tally)
    except OSError as error:
        raise CorpusError(f"{error.filename or path}: cannot be read ({error.strerror or error}).") from error


def pieces(text: str, size: int = PIECE) -> Iterator[str]:
    """Cut a text into pieces of at most `size` characters, after a blank line, a line or a space where there is one."""
    start = 0
    while len(text) - start > size:
        marks = (text.rfind(mark, start + size // 2, start + size) + len(mark) for mark in ("\n\n", "\n", " "))
        end = next((cut for cut in marks if cut > start + size // 2), start + size)
        yield text[start:end]
        start = end
    yield text[start:]


def path_exists(path: Path) -> bool:
    """Whether a path exists; False also where the system cannot tell, as for a name that is too long."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _files_below(folder: Path) -> list[Path]:
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in _KNOWN
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )
    if any(path.suffix.lower() in ROWS for path in found):
        return [path for path in found if path.suffix.lower() in SUFFIXES]
    return found


def _pieces_of(file: Path) -> Iterator[str]:
    with file.open(encoding="utf-8-sig") as stream:
        rest = ""
        try:
            while chunk := stream.read(PIECE):
                *whole, rest = pieces(rest + chunk)
                yield from whole
        except UnicodeDecodeError as error:
            raise CorpusError(
                f"{file}: not UTF-8 text ({error.reason}). Convert it, for example with `iconv -t utf-8`."
            ) from error
        if rest:
            yield rest


def _json_rows(file: Path, field: str) -> Iterator[tuple[str, dict[str, Any] | None]]:
    with file.open("rb") as lines:
        number = 0
        while line := lines.readline(MAX_LINE + 1):
            number += 1
            where = f"{file}, line {number}"
            if len(line) > MAX_LINE:
                raise CorpusError(f"{where}: longer than {MAX_LINE >> 20} MiB; expected one JSON object a line.")
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield where, _json_object(line, where)


def _json_object(line: bytes, where: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode("utf-8"))
    except RecursionError as error:
        raise CorpusError(f"{where}: nested too deeply; expected an object with a text field.") from error
    except ValueError as error:  # bad UTF-8, bad JSON, a number of thousands of digits
        raise CorpusError(f"{where}: not JSON in UTF-8 ({error}); expected one JSON object a line.") from error
    if row is not None and not isinstance(row, dict):
        raise CorpusError(f"{where}: found {type_name(row)}; expected a JSON object.")
    return row


def _parquet_rows(file: Path, field: str) -> Iterator[tuple[str, dict[str, Any] | None]]:
    import pyarrow
    import pyarrow.parquet as parquet

    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            columns = [field] if field in names else names[:20]
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", row
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise CorpusError(
            f"{file}: not a readable parquet file ({first_line(error)}); get or write it again."
        ) from error


_ROW_READERS = {".jsonl": _json_rows, ".parquet": _parquet_rows}
