"""Opening files and parsing JSON that may be hostile, without blocking, following stray links or unbounded memory."""

import json
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from wina_calib.errors import CheckpointError

MAX_JSON_BYTES = 16 << 20
# Containers and separators in one JSON text. Python needs up to 250 bytes for each, so this bounds parsing.
MAX_JSON_MARKS = 1_000_000
MAX_JSON_DEPTH = 32


def shown(text: str) -> str:
    """`text` quoted for a message, escaped and cut to 80 characters."""
    return repr(text) if len(text) <= 80 else f"{text[:77]!r}..."


def listed(problems: Sequence[str], limit: int = 8) -> str:
    """`problems` joined for one message; past `limit` only their number is told."""
    rest = len(problems) - limit
    return "; ".join(problems[:limit]) + (f"; and {rest} more" if rest > 0 else "")


def safe_path(folder: Path, name: str) -> Path:
    """The real path of the file `name` of a model folder, links resolved.

    A link may point inside the folder, or, in a folder of the Hub cache (`models--*/snapshots/<revision>`), to the
    `blobs` of the same model.

    Raises:
        CheckpointError: `name` is not a plain name, the file does not exist, or its link leaves the folder.
    """
    if name in ("", ".", "..") or any(c in name for c in "/\\\0"):
        raise CheckpointError(f"{folder}: {shown(name)} is not a plain file name; no file outside the folder is read")
    try:
        root = folder.resolve(strict=True)
        real = (root / name).resolve(strict=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: file {shown(name)} is missing; download or copy the model again") from error
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"{folder}: file {shown(name)} cannot be reached: {reason}") from error
    blobs = [
        snapshots.parent / "blobs"
        for snapshots in root.parents
        if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--")
    ]
    if not any(real.is_relative_to(allowed) for allowed in (root, *blobs)):
        raise CheckpointError(
            f"{folder}: {shown(name)} is a link that leaves the folder (to {real}); put the file itself there"
        )
    return real


@contextmanager
def open_regular(path: Path) -> Iterator[tuple[int, int]]:
    """Open a regular file for reading and yield (descriptor, size in bytes).

    Raises:
        CheckpointError: it is no regular file (a pipe, device or folder is never opened) or cannot be opened.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path}: not a regular file; only regular files are read")
        # Non-blocking, because a pipe may have taken the file's place since the check.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be opened: {error}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: not a regular file; only regular files are read")
        yield descriptor, status.st_size
    finally:
        os.close(descriptor)


def read_into(descriptor: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Fill `buffer` from byte `offset` of an open file.

    Raises:
        CheckpointError: the file ends too early or the system cannot read it.
    """
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
        except OSError as error:
            raise CheckpointError(f"{path}: reading at byte {offset + done} failed: {error}") from error
        if count == 0:
            raise CheckpointError(
                f"{path}: ends at byte {offset + done}, {offset + len(buffer)} expected; it was cut short while in use"
            )
        done += count


def read_json(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> object:
    """Read one JSON file under limits on its size, depth and number of values.

    Returns:
        The parsed value. NaN and infinities are accepted as Python writes them; check numbers where they are used.

    Raises:
        CheckpointError: the file cannot be read, is too large, is not UTF-8 JSON, or repeats a key.
    """
    with open_regular(path) as (descriptor, size):
        if size > max_bytes:
            raise CheckpointError(f"{path}: has {size} bytes, more than the {max_bytes} that such a file may have")
        data = bytearray(size)
        read_into(descriptor, memoryview(data), 0, path)
    return parse_json(data, path)


def parse_json(data: bytes | bytearray, path: Path) -> object:
    """Parse JSON text found in `path`; see `read_json`."""
    if sum(map(data.count, (b"{", b"[", b","))) > MAX_JSON_MARKS:
        raise CheckpointError(f"{path}: its JSON has more than {MAX_JSON_MARKS} values; no checkpoint needs as many")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_without_duplicates)
        if b"\\u" in data:
            # An escape can spell half a surrogate pair, which no file, terminal or hash could encode later.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise CheckpointError(f"{path}: its JSON is nested deeper than {MAX_JSON_DEPTH} levels") from error
    except ValueError as error:
        raise CheckpointError(
            f"{path}: its JSON is damaged, get or write the file again: {str(error)[:300]}"
        ) from error
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [child for parent in level if isinstance(parent, dict | list) for child in _children(parent)]
        if not level:
            return value
    raise CheckpointError(f"{path}: its JSON is nested deeper than {MAX_JSON_DEPTH} levels")


def _children(parent: dict[str, object] | list[object]) -> Sequence[object]:
    return list(parent.values()) if isinstance(parent, dict) else parent


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """The object of `pairs`; a repeated key, which readers resolve differently, is a ValueError."""
    result = dict(pairs)
    if len(result) != len(pairs):
        (repeated, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {shown(repeated)} appears more than once")
    return result
