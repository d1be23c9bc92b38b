"""Writing safetensors files tensor by tensor, in any order and little memory."""

import errno
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from wina_calib.common.atomic import sync_folder
from wina_calib.errors import CheckpointError, OutputError, UsageError
from wina_calib.storage.safe_files import listed, open_regular, read_into, shown
from wina_calib.storage.safetensors_layout import Specs, TensorInfo, build_header, nbytes

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def plan_shards(specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], max_bytes: int) -> list[Specs]:
    """Cut tensors, in their order, into shards of at most `max_bytes` bytes of data; no tensor is split.

    A tensor larger than `max_bytes` has a shard of its own.

    Raises:
        UsageError: `max_bytes` is not positive.
    """
    if max_bytes <= 0:
        raise UsageError(f"the shard size is {max_bytes} bytes; give a positive size")
    shards: list[Specs] = []
    room = 0
    for name, (dtype, shape) in specs.items():
        size = nbytes(dtype, shape)
        if not shards or size > room:
            shards.append({})
            room = max_bytes
        shards[-1][name] = dtype, shape
        room -= size
    return shards


class ShardWriter:
    """Writes one safetensors file whose tensors are known beforehand; the order of writes does not change its bytes.

    As a context manager it closes the file at the end of the block, and removes it when the block raises.
    The whole file is allocated at once, so a full disk is noticed before the work.

    Example:
        ```python
        with ShardWriter(path, {"w": (torch.bfloat16, (4, 8))}, {"format": "pt"}) as writer:
            writer.write_rows("w", 2, lower)  # (2, 8)
            writer.write_rows("w", 0, upper)  # (2, 8)
        ```
    """

    def __init__(
        self,
        path: Path,
        plan: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str],
        written: Collection[str] = frozenset(),
    ) -> None:
        """Create the file, or go on with a partial one.

        Args:
            path: the file; an existing one is replaced.
            plan: dtype and shape of each tensor. See `layout.build_header` for the resulting order in the file.
            metadata: the header's `__metadata__`.
            written: names that an earlier writer with the same plan and metadata has wholly written. When there is
                any, the file is reopened and they count as written.

        Raises:
            CheckpointError: the plan cannot be stored, or the file to go on with is not the one planned.
            OutputError: the file cannot be created or the disk is full; then none is left.
        """
        self.path = path
        header, self._infos = build_header(dict(plan), metadata, path)
        self._size = max((info.end for info in self._infos.values()), default=len(header))
        # Byte spans written so far of each tensor, sorted and merged.
        self._spans: dict[str, list[tuple[int, int]]] = {}
        self._descriptor: int | None = None
        if written:
            self._check_partial(header, written)
            self._spans = {name: [(0, self._infos[name].nbytes)] for name in written}
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (0 if written else os.O_CREAT | os.O_TRUNC)
        with self._output_errors():
            # Not a temporary-file helper: those force mode 0600, this one obeys the umask.
            self._descriptor = os.open(path, flags, 0o666)
        if written:
            return
        try:
            with self._output_errors():
                _allocate(self._descriptor, self._size)
                self._pwrite(memoryview(header), 0)
        except BaseException:
            self.abort()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one whole tensor, of the planned dtype and shape, from any device.

        Raises:
            CheckpointError: the tensor is not as planned, or the writer is closed.
            OutputError: the file cannot be written.
        """
        info = self._checked(name, tensor, tensor.shape)
        self._put(info, 0, tensor)

    def write_rows(self, name: str, first_row: int, tensor: torch.Tensor) -> None:
        """Write rows `first_row` to `first_row + len(tensor)` of a tensor; see `write`."""
        whole = self._info(name).shape[:1] + tensor.shape[1:] if tensor.dim() else ()
        info = self._checked(name, tensor, whole)
        if not tensor.dim() or first_row < 0 or first_row + tensor.shape[0] > info.shape[0]:
            raise CheckpointError(
                f"{self.path}: tensor {shown(name)}: rows from {first_row} of a tensor of shape {tuple(tensor.shape)} "
                f"do not lie within shape {info.shape}"
            )
        self._put(info, first_row * nbytes(info.dtype, info.shape[1:]), tensor)

    def sync(self) -> None:
        """Force what was written to the disk, for instance before a state file says that it is there."""
        with self._output_errors():
            os.fsync(self._open_descriptor())

    def close(self) -> None:
        """Check that everything was written, force it to the disk and close. A second call does nothing.

        Raises:
            CheckpointError: listing the tensors that were not wholly written; the file is removed.
            OutputError: the disk does not take the data; the file is removed.
        """
        if self._descriptor is None:
            return
        missing = [n for n, info in self._infos.items() if self._spans.get(n) != [(0, info.nbytes)]]
        try:
            if missing:
                names = listed([shown(name) for name in missing])
                raise CheckpointError(f"{self.path}: tensors not wholly written: {names}")
            self.sync()
        except BaseException:
            self.abort()
            raise
        self._release()
        with self._output_errors():
            sync_folder(self.path.parent)

    def suspend(self) -> None:
        """Force what was written to the disk and close, keeping the partial file for a writer with `written`."""
        if self._descriptor is not None:
            self.sync()
            self._release()

    def abort(self) -> None:
        """Close and remove the file. After `close` or `suspend` it does nothing."""
        if self._descriptor is not None:
            self._release()
            self.path.unlink(missing_ok=True)

    def _release(self) -> None:
        descriptor, self._descriptor = self._open_descriptor(), None
        os.close(descriptor)

    def _open_descriptor(self) -> int:
        if self._descriptor is None:
            raise CheckpointError(f"{self.path}: the writer is closed")
        return self._descriptor

    def _info(self, name: str) -> TensorInfo:
        if name not in self._infos:
            raise CheckpointError(f"{self.path}: tensor {shown(name)} is not in the plan of this file")
        return self._infos[name]

    def _checked(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> TensorInfo:
        info = self._info(name)
        if tensor.is_meta or (tensor.dtype, tuple(shape)) != (info.dtype, info.shape):
            raise CheckpointError(
                f"{self.path}: tensor {shown(name)}: got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, "
                f"the plan says {info.dtype} {info.shape}"
            )
        return info

    def _put(self, info: TensorInfo, offset: int, tensor: torch.Tensor) -> None:
        """Write a tensor's bytes at byte `offset` within the tensor `info`."""
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        with self._output_errors():
            self._pwrite(raw.numpy().data, info.start + offset)
        spans = [*self._spans.get(info.name, []), (offset, offset + raw.numel())]
        self._spans[info.name] = _merged(spans)

    def _pwrite(self, data: memoryview, offset: int) -> None:
        descriptor, done = self._open_descriptor(), 0
        while done < len(data):
            done += os.pwrite(descriptor, data[done:], offset + done)

    @contextmanager
    def _output_errors(self) -> Iterator[None]:
        """Turn the system's errors into OutputError, a full disk with the space needed."""
        try:
            yield
        except OSError as error:
            message = f"{self.path}: cannot be written: {error.strerror or error}"
            if error.errno in _FULL:
                message += (
                    f"; the file needs {self._size} bytes{_free(self.path.parent)}; free some space and run again"
                )
            raise OutputError(message) from error

    def _check_partial(self, header: bytes, written: Collection[str]) -> None:
        """Refuse to go on with a file that another plan, or none, has begun."""
        unknown = [shown(name) for name in written if name not in self._infos]
        if unknown:
            raise CheckpointError(f"{self.path}: already written but not in the plan: {listed(unknown)}; start afresh")
        with open_regular(self.path) as (descriptor, size):
            start = bytearray(min(len(header), size))
            read_into(descriptor, memoryview(start), 0, self.path)
        if size != self._size or start != header:
            raise CheckpointError(f"{self.path}: the partial file is of another plan; remove it and start afresh")


def _allocate(descriptor: int, size: int) -> None:
    """Reserve `size` bytes, where the file system can."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except (AttributeError, OSError) as error:  # not every system has it, and not every file system
        if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(descriptor, size)


def _free(folder: Path) -> str:
    try:
        return f" and {shutil.disk_usage(folder).free} are free"
    except OSError:
        return ""


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The union of half-open byte spans, sorted, touching ones joined."""
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((begin, end))
    return merged
