"""Documents of data specs: built-in text, catalogue, Hub data sets, files.

A data spec is one of
- `builtin`, the built-in text for calibration, or `builtin:heldout`, its held-out part; `builtin:code` or
  `builtin:heldout:fiction` are its documents of one kind, and `builtin:chat` conversations made of them;
- a name of the catalogue (`wikitext2`, `c4` ...), with another split than the catalogue's as `wikitext2:test`;
- `hub:NAME[:config][:split][:column]`, any Hub dataset or local dataset folder, streamed;
- the path of a file of text, source code, .jsonl or .parquet, or of a folder of them; `file.jsonl:field` names the field with
  the text or the chat messages, which the model's chat template renders.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from wina_calib.common.text import first_line
from wina_calib.corpus.conversations import conversations
from wina_calib.corpus.rows import Tally, shown, texts
from wina_calib.corpus.text_files import path_documents, path_exists, split_path
from wina_calib.errors import CorpusError, UsageError

BUILTIN, HELDOUT = "builtin", "builtin:heldout"
EVALUATED_TOKENS = 32_768  # that models are measured on by default
CHAT = "chat"
_JOINED = 1 << 18
Data = str | Path | Sequence[str | Path] | None  # None, or nothing, is the built-in text


def data_specs(data: Data) -> tuple[str, ...]:
    """One data spec or path, or several, as a tuple of specs."""
    return () if data is None else (str(data),) if isinstance(data, str | Path) else tuple(map(str, data))


def documents(spec: str) -> Iterator[str]:
    """Yield the texts of one data spec in stored order.

    Raises:
        CorpusError: while reading: the source cannot be read or lacks the field.
        UsageError: the spec does not parse.
    """
    return reader(spec)(Tally())


def check_spec(spec: str) -> None:
    """Raise UsageError where a data spec cannot mean anything, without reading data."""
    reader(spec)


def is_local(spec: str) -> bool:
    """Whether a data spec can be read here without a network: built-in data, or a path that exists."""
    try:
        check_spec(spec)
    except UsageError:
        return False
    return not spec.startswith("hub:") and spec.partition(":")[0] not in catalogue()


@cache
def catalogue() -> dict[str, dict[str, Any]]:
    """Named Hub datasets: `path`, `config`, `split`, `column` or `template`, `licence`, `description`.

    Where rows are lines of longer documents, the first line of each matches the regular expression `document_start`.
    """
    entries: dict[str, dict[str, Any]] = json.loads(_data_file("catalogue.json"))
    return entries


def reader(spec: str) -> Callable[[Tally], Iterator[str]]:
    """What a spec means, as a function that reads it.

    Raises:
        UsageError: the spec does not parse.
    """
    name, colon, rest = spec.partition(":")
    if name == "builtin":
        return _builtin_reader(spec, rest.split(":") if colon else [])
    if name == "hub" and colon:
        entry = _hub_entry(rest, spec)
        return lambda tally: _hub_documents(entry, spec, tally)
    if name in catalogue():
        entry = catalogue()[name] | ({"split": rest} if rest else {})
        return lambda tally: _hub_documents(entry, spec, tally)
    try:
        path, field = split_path(spec)
    except UsageError as error:
        raise UsageError(
            f"{error} Data is `builtin`, a path (text, source code, .jsonl, .parquet or a folder of them), hub:NAME, or one of "
            f"{', '.join(catalogue())}."
        ) from None
    return lambda tally: path_documents(path, field, tally)


def _builtin_reader(spec: str, parts: list[str]) -> Callable[[Tally], Iterator[str]]:
    split = parts[0] if parts and parts[0] in ("calibration", "heldout") else "calibration"
    kinds = parts[1:] if parts and parts[0] == split else parts
    known = {document["kind"] for document in _builtin()} | {CHAT}
    if len(kinds) > 1 or not known.issuperset(kinds):
        raise UsageError(
            f"data {shown(spec)}: the built-in text is builtin, or builtin:heldout for its held-out part; of one kind, it is "
            f"builtin:KIND or builtin:heldout:KIND with {', '.join(sorted(known))}."
        )
    if kinds == [CHAT]:
        return lambda tally: conversations(*(_of(split, name) for name in ("corpus.jsonl", "conversations.jsonl")))
    wanted = set(kinds) or known
    return lambda tally: (d["text"] for d in _builtin() if d["split"] == split and d["kind"] in wanted)


@cache
def _builtin(name: str = "corpus.jsonl") -> tuple[dict[str, Any], ...]:
    return tuple(json.loads(line) for line in _data_file(name).split("\n") if line)


def _of(split: str, name: str) -> list[dict[str, Any]]:
    return [document for document in _builtin(name) if document["split"] == split]


def _data_file(name: str) -> str:
    installed = resources.files("wina_calib") / "data" / "calibration_data" / name
    in_checkout = Path(__file__).parent.parent.parent / "calibration_data" / name
    try:
        return installed.read_text("utf-8") if installed.is_file() else in_checkout.read_text("utf-8")
    except OSError as error:
        raise CorpusError(
            f"{in_checkout}: part of this package is missing ({error.strerror}). Install it again."
        ) from error


def _hub_entry(rest: str, spec: str) -> dict[str, Any]:
    # A local dataset folder may hold a colon in its name.
    name, *others = [rest] if rest and path_exists(Path(rest)) else rest.split(":")
    if not name.strip() or len(others) > 3:
        raise UsageError(f"data {shown(spec)}: expected hub:NAME[:config][:split][:column], as in hub:allenai/c4:en.")
    config, split, column = (*others, "", "", "")[:3]
    return {"path": name, "config": config or None, "split": split or "train", "column": column or "text"}


def _hub_documents(entry: dict[str, Any], spec: str, tally: Tally) -> Iterator[str]:
    import datasets

    try:
        rows = datasets.load_dataset(entry["path"], entry.get("config"), split=entry["split"], streaming=True)
        placed = ((f"data {shown(spec)}, row {number}", row) for number, row in enumerate(rows))
        lines = texts(placed, entry, tally)
        yield from _joined(lines, entry["document_start"]) if "document_start" in entry else lines
    except CorpusError:
        raise
    except Exception as error:  # the library, its file systems and its decoders raise dozens of types
        raise CorpusError(
            f"data {shown(spec)}: dataset {entry['path']!r}, config {entry.get('config')}, split {entry['split']} "
            f"could not be read: {first_line(error)} Check these names on the Hub, and the network, or give a file with --data."
        ) from error


def _joined(lines: Iterable[str], beginning: str) -> Iterator[str]:
    """Put documents together whose rows are lines; a document begins where a line matches."""
    text = ""
    for line in lines:
        if text and (re.match(beginning, line) or len(text) > _JOINED):
            yield text
            text = ""
        text += line
    if text:
        yield text
