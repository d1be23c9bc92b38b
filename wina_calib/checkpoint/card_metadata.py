"""Metadata at the head of model cards, read within bounds: those of a base model are written by others.

Of another's card only a few short facts are taken, and a card that is no plain YAML has none. A checkpoint's own card keeps
all that people wrote into it.
"""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from wina_calib.common.plain_yaml import Node, PlainYamlError, parse_plain_yaml
from wina_calib.common.printable import printable
from wina_calib.errors import CheckpointError
from wina_calib.storage.safe_files import open_regular, read_into, safe_path

CARD = "README.md"
MAX_CARD = 2 << 20
_MAX_BLOCK, _MAX_DEPTH, _MAX_VALUES = 256 << 10, 12, 50_000
_MAX_NUMBER = 1 << 63
_BLOCK = re.compile(r"\A---[ \t]*\r?\n(.*?\n)---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_NOTHING = ("", "~", "null", "Null", "NULL")
# What a fact of another's card looks like; the Hub takes no others.
_FACTS = {
    "license": re.compile(r"[\w][\w.+ -]{0,99}"),
    "license_name": re.compile(r"[^\n]{1,200}"),
    "license_link": re.compile(r"https?://[^\s<>\"'`()\\]{1,400}|(?!(?:.*/)?\.\.?(?:/|\Z))[\w.+-]+(?:/[\w.+-]+)*"),
    "language": re.compile(r"[A-Za-z][\w-]{0,39}"),
}
_MAX_LANGUAGES = 400
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's safe loader, or yaml's own


def facts_of_base(folder: Path) -> dict[str, str | list[str]]:
    """Licence and languages from the card of a base model: what is short and sound of it, or nothing. Never raises."""
    try:
        path = safe_path(folder, CARD)
        with open_regular(path) as (descriptor, size):
            data = bytearray(min(size, _MAX_BLOCK))
            read_into(descriptor, memoryview(data), 0, path)
        block = _BLOCK.match(data.decode("utf-8", "replace"))
        tree = parse_plain_yaml(block[1], max_depth=_MAX_DEPTH, max_values=_MAX_VALUES) if block else None
    except (CheckpointError, PlainYamlError):
        return {}  # a card that cannot be read tells nothing
    return sound_facts(tree if isinstance(tree, dict) else {})


def sound_facts(metadata: Any) -> dict[str, str | list[str]]:
    """Those facts of a base model's metadata that a card can take over."""
    sound: dict[str, str | list[str]] = {}
    for name, form in _FACTS.items():
        value: Node | None = metadata.get(name) if isinstance(metadata, dict) else None
        if isinstance(value, str) and _is_sound(value, form):
            sound[name] = value
        elif name == "language" and isinstance(value, list | tuple):
            known = [item for item in value[:_MAX_LANGUAGES] if isinstance(item, str) and _is_sound(item, form)]
            if known:
                sound[name] = known
    return sound


def _is_sound(value: str, form: re.Pattern[str]) -> bool:
    return value not in _NOTHING and form.fullmatch(value) is not None and printable(value) == value


def split_card(path: Path) -> tuple[dict[str, Any], str]:
    """Metadata and text of a checkpoint's own card.

    Raises:
        CheckpointError: the metadata is no plain YAML mapping, or the file is too large.
    """
    with open_regular(path) as (descriptor, size):
        if size > MAX_CARD:
            raise CheckpointError(f"{path} has more than {MAX_CARD} bytes. Shorten it.")
        data = bytearray(size)
        read_into(descriptor, memoryview(data), 0, path)
    text = data.decode("utf-8", errors="replace")
    block = _BLOCK.match(text)
    if block is None:
        return {}, text
    if len(block[1]) > _MAX_BLOCK:
        raise CheckpointError(f"{path}: the metadata between the --- lines have more than {_MAX_BLOCK} characters.")
    try:
        tree = parse_plain_yaml(block[1], max_depth=_MAX_DEPTH, max_values=_MAX_VALUES)
        metadata = _LOADER(block[1]).get_single_data()
    except (PlainYamlError, yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:
        problem = error if isinstance(error, PlainYamlError) else str(error).split("\n")[0][:200]
        raise CheckpointError(
            f"{path}: the metadata between the --- lines is no plain YAML ({problem}). Correct or delete it."
        ) from error
    if not isinstance(tree, dict | None) or not isinstance(metadata, dict | None):
        raise CheckpointError(f"{path}: the metadata between the --- lines is no mapping. Correct or delete it.")
    if not _is_writable(metadata or {}):
        raise CheckpointError(f"{path}: the metadata between the --- lines holds a value that no card has. Delete it.")
    return metadata or {}, text[block.end() :].lstrip("\n")


def _is_writable(value: Any) -> bool:
    """Whether YAML of a value can be written and read again."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_writable(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_is_writable, value))
    if isinstance(value, int):
        return abs(value) < _MAX_NUMBER
    return value is None or isinstance(value, str | float | date)


def head(metadata: dict[str, Any]) -> str:
    """Metadata as the lines between the --- of a card."""
    return str(yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=1000))
