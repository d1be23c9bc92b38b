"""Text to fixed-length blocks of tokens: built-in data, text files, Hub datasets.

A data spec is one of: `builtin` (or `builtin:heldout`), a name of the catalogue (`wikitext2`, `c4` ...),
`hub:NAME[:config][:split][:column]`, or the path of a .txt, .jsonl or .parquet file (`file.jsonl:field` names a field) or of
a folder of them.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from wina_calib.errors import CorpusError, UsageError

MIN_TOKENS = 8_000
DEFAULT_DATA = ("builtin",)
HELDOUT_DATA = ("builtin:heldout",)
_SUFFIXES = (".txt", ".jsonl", ".parquet")
_SHUFFLE_BUFFER = 10_000


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that packing needs."""

    bos_token_id: int | None
    eos_token_id: int | None

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any:
        """Return an object with `input_ids`."""


@dataclass(frozen=True)
class Blocks:
    """Packed text: `ids` is (blocks, seq_len) int64, `fingerprint` the SHA-256 of ids and shape."""

    ids: Tensor
    data: tuple[str, ...]
    requested: int
    fingerprint: str

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.ids.numel()


def load_blocks(
    data: Sequence[str], tokenizer: Tokenizer, *, samples: int, seq_len: int, seed: int, min_tokens: int = MIN_TOKENS
) -> Blocks:
    """Read, shuffle, tokenize and pack text.

    Sources are mixed evenly: each gives an equal number of blocks, or all it has. Every block starts with the BOS token where
    the tokenizer puts one before a text, and holds no padding. Fewer blocks than asked are used as they are.

    Args:
        data: data specs, see the module.
        tokenizer: the model's tokenizer.
        samples: number of blocks asked for.
        seq_len: tokens a block.
        seed: order of the documents.
        min_tokens: fewer tokens than this are an error.

    Raises:
        CorpusError: a source is missing, unreadable, empty, or all sources together are too short.
    """
    shares = [samples // len(data) + (i < samples % len(data)) for i in range(len(data))]
    packed = [
        _pack(_shuffled(spec, seed), tokenizer, count, seq_len)
        for spec, count in zip(data, shares, strict=True)
        if count
    ]
    rows = [row for turn in range(max(shares)) for source in packed if turn < len(source) for row in (source[turn],)]
    tokens = len(rows) * seq_len
    if tokens < max(min_tokens, 1):
        raise CorpusError(
            f"{', '.join(data)}: only {tokens:,} tokens in whole blocks of {seq_len}; at least {min_tokens:,} are needed. "
            "Give more text with --data, or a smaller --seq-len."
        )
    ids = torch.tensor(rows, dtype=torch.int64)
    return Blocks(ids, tuple(data), samples, fingerprint(ids))


def fingerprint(ids: Tensor) -> str:
    """SHA-256 of a (blocks, seq_len) tensor of token ids and its shape."""
    digest = hashlib.sha256(f"{tuple(ids.shape)}".encode())
    digest.update(ids.to(torch.int32).contiguous().numpy().astype("<i4", copy=False).tobytes())
    return digest.hexdigest()


def text_hashes(data: Sequence[str], limit: int = 100_000) -> set[int]:
    """Hashes of the first `limit` lines (stripped, 40 characters or more) of some sources, to find overlap between them."""
    found: set[int] = set()
    for spec in data:
        for text in documents(spec):
            for line in text.splitlines():
                if len(line.strip()) >= 40:
                    found.add(int.from_bytes(hashlib.blake2b(line.strip().encode(), digest_size=8).digest()))
            if len(found) >= limit:
                return found
    return found


def documents(spec: str) -> Iterator[str]:
    """Yield the texts of one data spec in stored order.

    Raises:
        CorpusError: the source cannot be read or lacks the field.
        UsageError: the spec does not parse.
    """
    if spec in ("builtin", "builtin:calibration", "builtin:heldout"):
        wanted = "heldout" if spec.endswith("heldout") else "calibration"
        return (d["text"] for d in _builtin() if d["split"] == wanted)
    if spec.startswith("hub:"):
        return _hub_documents(_hub_spec(spec), spec)
    if spec in catalogue():
        return _hub_documents(catalogue()[spec], spec)
    return _path_documents(spec)


def check_spec(spec: str) -> None:
    """Raise UsageError where a data spec cannot mean anything, without reading data."""
    if spec.startswith("hub:"):
        _hub_spec(spec)
    elif not spec.startswith("builtin") and spec not in catalogue():
        _split_path(spec)


@cache
def catalogue() -> dict[str, dict[str, Any]]:
    """Named Hub datasets: path, config, split, column or template, licence."""
    text = _data_file("catalogue.json")
    entries: dict[str, dict[str, Any]] = json.loads(text)
    return entries


@cache
def _builtin() -> tuple[dict[str, str], ...]:
    return tuple(json.loads(line) for line in _data_file("corpus.jsonl").splitlines())


def _data_file(name: str) -> str:
    installed = resources.files("wina_calib") / "data" / "calibration_data" / name
    in_checkout = Path(__file__).parent.parent / "calibration_data" / name
    return installed.read_text("utf-8") if installed.is_file() else in_checkout.read_text("utf-8")


def _hub_spec(spec: str) -> dict[str, Any]:
    name, *rest = spec.removeprefix("hub:").split(":")
    if not name or len(rest) > 3:
        raise UsageError(f"data spec {spec!r}: expected hub:NAME[:config][:split][:column].")
    config, split, column = (*rest, "", "", "")[:3]
    return {"path": name, "config": config or None, "split": split or "train", "column": column or "text"}


def _hub_documents(entry: dict[str, Any], spec: str) -> Iterator[str]:
    import datasets

    try:
        rows = datasets.load_dataset(entry["path"], entry.get("config"), split=entry["split"], streaming=True)
        for row in rows:
            yield _row_text(row, entry, spec)
    except CorpusError:
        raise
    except Exception as error:
        raise CorpusError(
            f"data {spec!r}: the dataset {entry['path']!r} (config {entry.get('config')}, split {entry['split']}) could not "
            f"be read: {error}. Check the name and the network, or give a local file with --data."
        ) from error


def _row_text(row: dict[str, Any], entry: dict[str, Any], where: str) -> str:
    try:
        if "template" in entry:
            return str(entry["template"]).format(**row)
        value = row[entry["column"]]
    except KeyError as error:
        raise CorpusError(f"data {where!r}: no field {error} in a row; it has {', '.join(map(str, row))}.") from error
    if isinstance(value, list):  # chat messages
        return "\n".join(f"{turn.get('role', '')}: {turn.get('content', '')}" for turn in value if isinstance(turn, dict))
    if not isinstance(value, str):
        raise CorpusError(f"data {where!r}: field {entry['column']!r} holds {type(value).__name__}, not text.")
    return value


def _split_path(spec: str) -> tuple[Path, str]:
    path, field = Path(spec), "text"
    if not path.exists() and ":" in spec:
        head, field = spec.rsplit(":", 1)
        path = Path(head)
    if not path.exists():
        raise UsageError(
            f"data {spec!r} is neither a file or folder, nor `builtin`, `hub:NAME`, nor one of {', '.join(catalogue())}."
        )
    if path.is_file() and path.suffix not in _SUFFIXES:
        raise UsageError(f"data {spec!r}: {path.suffix or 'no'} suffix; expected one of {', '.join(_SUFFIXES)}.")
    return path, field


def _path_documents(spec: str) -> Iterator[str]:
    path, field = _split_path(spec)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in _SUFFIXES and p.is_file())
    if not files:
        raise CorpusError(f"data {spec!r}: the folder holds no {', '.join(_SUFFIXES)} file.")
    for file in files:
        yield from _file_documents(file, field)


def _file_documents(file: Path, field: str) -> Iterator[str]:
    if file.suffix == ".txt":
        try:
            yield file.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise CorpusError(f"{file}: not UTF-8 text ({error}). Convert it, for example with iconv.") from error
    elif file.suffix == ".jsonl":
        yield from _jsonl_documents(file, field)
    else:
        import pyarrow.parquet as parquet

        try:
            for batch in parquet.ParquetFile(file).iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    yield _row_text(row, {"column": field}, str(file))
        except (OSError, ValueError) as error:
            raise CorpusError(f"{file}: not a readable parquet file ({error}).") from error


def _jsonl_documents(file: Path, field: str) -> Iterator[str]:
    with file.open(encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise CorpusError(f"{file}, line {number}: expected a JSON object, found {type(row).__name__}.")
                yield _row_text(row, {"column": field}, f"{file}, line {number}")
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise CorpusError(f"{file}: a line is not a JSON object in UTF-8 ({error}).") from error


def _shuffled(spec: str, seed: int) -> Iterator[str]:
    """Shuffle through a bounded buffer, so that a streamed dataset is never read whole."""
    rng = random.Random(f"{seed}:{spec}" if spec.startswith("hub:") else seed)
    buffer: list[str] = []
    for text in documents(spec):
        buffer.append(text)
        if len(buffer) >= _SHUFFLE_BUFFER:
            last = rng.randrange(len(buffer))
            buffer[last], buffer[-1] = buffer[-1], buffer[last]
            yield buffer.pop()
    rng.shuffle(buffer)
    yield from buffer


def _pack(texts: Iterator[str], tokenizer: Tokenizer, count: int, seq_len: int) -> list[list[int]]:
    """Cut one stream of tokens into blocks; documents are joined by EOS, each block begins with what a text begins with."""
    first = list(tokenizer("a", add_special_tokens=True).input_ids[:1])
    start = first if first and first[0] == tokenizer.bos_token_id else []
    between = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    body = seq_len - len(start)
    stream: list[int] = []
    blocks: list[list[int]] = []
    for text in texts:
        if not text.strip():
            continue
        stream += [*tokenizer(text, add_special_tokens=False).input_ids, *between]
        while len(stream) >= body and len(blocks) < count:
            blocks.append(start + stream[:body])
            del stream[:body]
        if len(blocks) == count:
            break
    return blocks
