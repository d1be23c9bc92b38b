"""One hidden state a micro-batch, in memory or in mapped files."""

from __future__ import annotations

import errno
import math
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor


class HiddenStates:
    """One hidden state a micro-batch: in memory, or in one memory-mapped file a micro-batch when `folder` is given."""

    def __init__(self, folder: Path | None, device: torch.device) -> None:
        self._device = device
        self._memory: dict[int, Tensor] = {}
        self._folder = None if folder is None else Path(tempfile.mkdtemp(prefix="hidden-", dir=folder))
        self._meta: dict[int, tuple[torch.dtype, tuple[int, ...]]] = {}
        self._files: dict[int, Path] = {}  # where a micro-batch is on disk as it is now

    def __getitem__(self, index: int) -> Tensor:
        if self._folder is None:
            return self._memory[index]
        return _read(self._folder / str(index), *self._meta[index]).to(self._device)

    def __setitem__(self, index: int, value: Tensor) -> None:
        self._meta[index] = value.dtype, tuple(value.shape)
        self._files.pop(index, None)
        if self._folder is None:
            self._memory[index] = value.to(self._device)
        else:
            self._files[index] = self._folder / str(index)
            self._files[index].unlink(missing_ok=True)  # its bytes may be part of a saved state under another name
            _write(self._files[index], value)

    @property
    def indices(self) -> list[int]:
        """The micro-batches that are here."""
        return list(self._meta)

    @property
    def form(self) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype of all, and shape of one block, (seq, hidden)."""
        dtype, shape = next(iter(self._meta.values()))
        return dtype, shape[1:]

    def write_to(self, index: int, path: Path) -> None:
        """Put a micro-batch into a new file and force it to disk; what is on disk already is linked where possible."""
        try:
            path.hardlink_to(self._files[index])  # not there if that save was given up
        except (KeyError, OSError):
            _write(path, self[index])
        with path.open("rb") as file:
            os.fsync(file.fileno())
        if self._folder is None:
            self._files[index] = path

    def read_from(self, index: int, path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """Take a micro-batch of this dtype and shape from such a file."""
        self[index] = _read(path, dtype, shape)
        if self._folder is None:
            self._files[index] = path

    def copy_from(self, other: HiddenStates) -> None:
        """Copy all micro-batches of another store."""
        for index in other.indices:
            self[index] = other[index].clone()

    def clear(self) -> None:
        """Forget everything and free the space."""
        self._memory.clear()
        self._meta.clear()
        self._files.clear()
        if self._folder is not None:
            for file in self._folder.iterdir():
                file.unlink()
            self._folder.rmdir()


def _read(path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A file's numbers, memory-mapped: read as they are used, and writes stay in memory."""
    count = math.prod(shape)
    if path.stat().st_size != count * dtype.itemsize:
        raise OSError(errno.EIO, "hidden states on disk are not as long as they were written", str(path))
    return torch.from_file(str(path), shared=False, size=count, dtype=dtype).view(shape)


def _write(path: Path, value: Tensor) -> None:
    with path.open("xb") as file:
        file.write(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
