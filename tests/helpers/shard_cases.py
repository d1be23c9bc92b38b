"""Shards to read, valid and not, for the tests of `wina_calib.storage`."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from wina_calib.errors import CheckpointError
from wina_calib.storage import Shards

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def raw_file(path: Path, header: object, data: bytes = b"") -> Path:
    """Write a file with any header (bytes or JSON) and data, valid or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def sharded(folder: Path, files: dict[str, dict[str, torch.Tensor]], weight_map: object = None) -> Path:
    for file, tensors in files.items():
        save_file(tensors, folder / file, {"format": "pt"})
    if weight_map is None:
        weight_map = {name: file for file, tensors in files.items() for name in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return folder


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    raw = torch.randint(0, 100, (*shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).view(shape)


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*as_bytes)


def refuses(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Shards.open(folder)
    for word in words:
        assert word in str(caught.value)
    assert len(str(caught.value)) < 4000
