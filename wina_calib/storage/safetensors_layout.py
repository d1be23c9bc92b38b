"""The safetensors layout: 8 bytes of header length, a JSON header, then the tensors' bytes without a gap.

Pure functions; nothing here touches a file.
"""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from wina_calib.errors import CheckpointError
from wina_calib.storage.safe_files import MAX_JSON_BYTES, listed, parse_json, shown

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = "__metadata__"
MAX_HEADER_BYTES = MAX_JSON_BYTES
MAX_RANK = 16
MAX_INT = 2**63 - 1
_GIT_LFS = b"version "  # begins what Git holds of a file whose bytes lie elsewhere
_OTHER_FILE = "it is not a safetensors file; download or save it again"

Specs = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: bytes `start` to `end` (exclusive) of `file`, row-major, little-endian."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return self.end - self.start


def nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor of `dtype` and `shape` takes in a file."""
    return math.prod(shape) * dtype.itemsize


def check_spec(dtype: object, shape: object) -> str | None:
    """What is wrong with a tensor's dtype and shape (None: nothing)."""
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPE_NAMES:
        return f"dtype {shown(str(dtype))} is not supported (supported: {', '.join(DTYPES)})"
    if not isinstance(shape, list | tuple) or len(shape) > MAX_RANK:
        return f"the shape is not a list of at most {MAX_RANK} dimensions"
    if not all(type(size) is int and 0 <= size <= MAX_INT for size in shape):
        return "a dimension of the shape is not an integer from 0 to 2^63 - 1"
    # A zero elsewhere in the shape must not hide an overflow: strides are computed from the other dimensions.
    if math.prod(max(size, 1) for size in shape) * dtype.itemsize > MAX_INT:
        return "the shape's size overflows 63 bits"
    return None


def header_length(prefix: bytes | bytearray, file_size: int, path: Path) -> int:
    """Length in bytes of the header of `path`, from the file's first 8 bytes.

    Raises:
        CheckpointError: the length is impossible or absurd.
    """
    if len(prefix) < 8:
        raise CheckpointError(f"{path}: has {file_size} bytes, too few for a safetensors file; download it again")
    if prefix == _GIT_LFS:
        raise CheckpointError(
            f"{path}: is a pointer of Git LFS, and not the file itself; get it with `git lfs pull`, or download it again"
        )
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: declares a header of {length} bytes, more than {MAX_HEADER_BYTES}; {_OTHER_FILE}"
        )
    if length > file_size - 8:
        raise CheckpointError(
            f"{path}: truncated: the header needs {length + 8} bytes, the file has {file_size}; download it again"
        )
    return int(length)


def parse_header(header: bytes | bytearray, file_size: int, path: Path) -> dict[str, TensorInfo]:
    """Validate the header of the file `path` and return its tensors, by name in file order.

    Raises:
        CheckpointError: listing everything that is wrong with the header.
    """
    if header[:1] != b"{":
        raise CheckpointError(f"{path}: its header does not begin with '{{'; {_OTHER_FILE}")
    entries = parse_json(header, path)
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: its header is not a JSON object; {_OTHER_FILE}")
    metadata = entries.pop(METADATA, {})
    problems: list[str] = []
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        problems.append(f"{METADATA} is not an object of strings")
    infos: list[TensorInfo] = []
    for name, entry in entries.items():
        info = _tensor_info(name, entry, path, 8 + len(header))
        if isinstance(info, TensorInfo):
            infos.append(info)
        else:
            problems.append(f"tensor {shown(name)}: {info}")
    infos.sort(key=lambda info: (info.start, info.end))
    if not problems:
        end = infos[-1].end if infos else 8 + len(header)
        problems = _gaps(infos, 8 + len(header), file_size)
        if len(problems) == 1 and end > file_size:
            raise CheckpointError(
                f"{path} is truncated: its tensors end at byte {end:,}, the file has {file_size:,}; copy or make it again."
            )
    if problems:
        raise CheckpointError(f"{path}: damaged header, convert or download it again: {listed(problems)}")
    return {info.name: info for info in infos}


def _tensor_info(name: str, entry: object, path: Path, data_start: int) -> TensorInfo | str:
    """The header entry of one tensor as a TensorInfo, or what is wrong with it."""
    if not name:
        return "the name is empty"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "its entry does not have exactly dtype, shape and data_offsets"
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    problem = check_spec(dtype or entry["dtype"], entry["shape"])
    if problem is not None or dtype is None:
        return problem or "no dtype"
    offsets = entry["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2:
        return "data_offsets are not two numbers"
    begin, end = offsets
    if not all(type(offset) is int and 0 <= offset <= MAX_INT for offset in offsets) or begin > end:
        return "data_offsets are not two integers in ascending order from 0 to 2^63 - 1"
    shape = tuple(entry["shape"])
    if end - begin != nbytes(dtype, shape):
        return f"data_offsets span {end - begin} bytes, {entry['dtype']} {shape} takes {nbytes(dtype, shape)}"
    return TensorInfo(name, dtype, shape, path, data_start + begin, data_start + end)


def _gaps(infos: list[TensorInfo], data_start: int, file_size: int) -> list[str]:
    """Holes and overlaps between tensors sorted by place, and a wrong file size."""
    problems, position = [], data_start
    for info in infos:
        if info.start != position:
            kind = "overlaps the one before it" if info.start < position else "leaves a hole before it"
            problems.append(f"tensor {shown(info.name)}: starts at byte {info.start} instead of {position}: it {kind}")
        position = info.end
    if position != file_size:
        kind = "truncated" if position > file_size else "trailing bytes"
        problems.append(f"{kind}: the tensors end at byte {position}, the file has {file_size}")
    return problems


def build_header(plan: Specs, metadata: Mapping[str, str], path: Path) -> tuple[bytes, dict[str, TensorInfo]]:
    """The first bytes of a safetensors file that holds `plan`, and the place of each tensor in it.

    Tensors lie by descending element size, so that each is aligned, and in the plan's order within one size; metadata
    keys are sorted. Equal plans and metadata give equal bytes.

    Raises:
        CheckpointError: listing every tensor that the format cannot hold.
    """
    problems = [
        f"tensor {shown(name)}: {problem}"
        for name, spec in plan.items()
        if (problem := "the name is reserved" if name in ("", METADATA) else check_spec(*spec)) is not None
    ]
    if not all(isinstance(text, str) for item in metadata.items() for text in item):
        problems.append("metadata keys and values must be strings")
    if problems:
        raise CheckpointError(f"{path}: cannot be written: {listed(problems)}")
    entries: dict[str, object] = {METADATA: dict(sorted(metadata.items()))} if metadata else {}
    offsets: dict[str, tuple[int, int]] = {}
    position = 0
    for name, (dtype, shape) in sorted(plan.items(), key=lambda item: -item[1][0].itemsize):
        offsets[name] = position, position + nbytes(dtype, shape)
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": offsets[name]}
        position = offsets[name][1]
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path}: the header of {len(plan)} tensors is too large; plan smaller shards")
    infos = {
        name: TensorInfo(name, *plan[name], path, 8 + len(text) + begin, 8 + len(text) + end)
        for name, (begin, end) in offsets.items()
    }
    return struct.pack("<Q", len(text)) + text, infos
