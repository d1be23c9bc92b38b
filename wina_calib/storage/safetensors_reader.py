"""A lazy, validated view of the safetensors files of a model folder."""

import hashlib
import json
import math
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from wina_calib.common.memory import OWN_PAGES, advise_huge_pages
from wina_calib.common.threads import ENDING, Background
from wina_calib.errors import CheckpointError
from wina_calib.storage.safe_files import listed, open_regular, read_into, read_json, safe_path, shown
from wina_calib.storage.safetensors_layout import DTYPE_NAMES, TensorInfo, header_length, parse_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_CHUNK = 8 << 20
_HASHERS = min(4, os.cpu_count() or 1)


class Shards(Mapping[str, TensorInfo]):
    """The tensors of a checkpoint by name. Opening reads and validates headers only; `load` reads one tensor.

    Instances hold no open file and may be used from several threads.

    Attributes:
        folder: the model folder.
    """

    def __init__(self, folder: Path, infos: Mapping[str, TensorInfo]) -> None:
        self.folder = folder
        self._infos = dict(infos)

    @classmethod
    def open(cls, folder: Path, files: Sequence[str] | None = None) -> "Shards":
        """Open files of a folder; an index that names just these has to fit them.

        Args:
            folder: the model folder.
            files: their names; None is what transformers takes unless config.json says otherwise: `model.safetensors`,
                or else the files that `model.safetensors.index.json` names.

        Raises:
            CheckpointError: no such weights, or a file that is damaged, hostile or does not fit the index.
        """
        names = _file_names(folder)
        if files is None:
            files = [SINGLE] if SINGLE in names else None
        if files is None and INDEX not in names or any(not file.endswith(".safetensors") for file in files or ()):
            raise CheckpointError(_no_weights(folder, names))
        expected: dict[str, set[str] | None] = dict.fromkeys(files or ())
        if INDEX in names and SINGLE not in expected:
            index = _read_index(folder)
            expected = index if not expected or expected.keys() == index.keys() else expected
        infos: dict[str, TensorInfo] = {}
        problems: list[str] = []
        for file in sorted(expected):
            try:
                header = _read_header(folder, file)
            except CheckpointError as error:
                problems.append(str(error))
                continue
            listed_names = expected[file]
            if listed_names is not None:
                problems += [f"{file} lacks tensor {shown(name)}" for name in sorted(listed_names - header.keys())]
                extra = sorted(header.keys() - listed_names)
                problems += [f"{file} holds tensor {shown(name)}, which {INDEX} does not place there" for name in extra]
            infos.update(header)
        if problems:
            raise CheckpointError(f"{folder}: the checkpoint cannot be used: {listed(problems)}")
        if not infos:
            raise CheckpointError(
                f"{folder}: {listed(sorted(expected))} holds no tensor; save or download the model again"
            )
        return cls(folder, infos)

    def renamed(self, names: Mapping[str, str]) -> "Shards":
        """The tensors that `names` has, by the names that it gives them.

        Raises:
            CheckpointError: two tensors would have one name.
        """
        infos = {names[name]: info for name, info in self._infos.items() if name in names}
        if len(infos) < len(names):
            twice = next(n for n, count in Counter(names.values()).items() if count > 1)
            raise CheckpointError(
                f"{self.folder}: holds tensor {shown(twice)} twice, under two names; remove one of them"
            )
        return Shards(self.folder, infos)

    def __getitem__(self, name: str) -> TensorInfo:
        return self._infos[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def load(self, name: str, *, rows: slice | torch.Tensor | None = None) -> torch.Tensor:
        """Read one tensor, or some of its rows, into memory of its own.

        Args:
            name: the tensor.
            rows: read only these entries of the first dimension: a slice of step 1, otherwise like any Python slice, or
                their numbers (n,) int64, best in ascending order.

        Returns:
            A CPU tensor of the stored shape, with the chosen number of rows.

        Raises:
            CheckpointError: no such tensor, it has no rows, or the file has changed and cannot be read.
        """
        info = self._info(name)
        shape, runs = info.shape, [(0, info.shape[0])] if info.shape else [(0, 1)]
        if rows is not None:
            if not shape or (isinstance(rows, slice) and rows.step not in (None, 1)):
                raise CheckpointError(f"{info.file}: tensor {shown(name)}: rows need a first dimension and step 1")
            if isinstance(rows, slice):
                first, stop, _ = rows.indices(shape[0])
                runs = [(first, max(first, stop))]
            else:
                runs = list(_runs(rows.tolist()))
                if any(not 0 <= first < stop <= shape[0] for first, stop in runs):
                    raise CheckpointError(
                        f"{info.file}: tensor {shown(name)} has {shape[0]} rows, no others can be read"
                    )
            shape = (sum(stop - first for first, stop in runs), *shape[1:])
        size = math.prod(shape) * info.dtype.itemsize
        try:
            raw = torch.empty(size, dtype=torch.uint8)
        except RuntimeError as error:
            raise CheckpointError(f"{info.file}: tensor {shown(name)}: no memory for {size} bytes") from error
        if size >= OWN_PAGES:  # page by page, the system takes twice as long to give the memory as to copy into it
            advise_huge_pages(raw.data_ptr(), size)
        self._read(info, raw, runs, math.prod(shape[1:]) * info.dtype.itemsize)
        # A byte other than 0 and 1 in a bool tensor is undefined behaviour.
        tensor = raw.ne(0) if info.dtype == torch.bool else raw.view(info.dtype)
        return tensor.view(shape)

    def fingerprint(self, names: Iterable[str]) -> str:
        """SHA-256 (hex) over that of each tensor's name, dtype, shape and bytes, in the order of the names.

        It does not depend on the order of `names` nor on which file holds a tensor. A few tensors are read side by side, 8 MiB
        of each at a time, in threads that end with the process.

        Raises:
            CheckpointError: no such tensor, or the file has changed and cannot be read.
        """
        wanted = sorted(set(names))
        waiting, parts = deque(wanted), dict[str, bytes]()

        def work() -> None:
            buffer = torch.empty(_CHUNK, dtype=torch.uint8)
            while not ENDING.is_set():
                try:
                    name = waiting.popleft()
                except IndexError:
                    return
                parts[name] = self._digest(name, buffer)

        workers = [Background(work) for _ in range(min(_HASHERS, len(wanted)))]
        try:
            for worker in workers:
                worker()
        finally:
            waiting.clear()
        return hashlib.sha256(b"".join(parts[name] for name in wanted)).hexdigest()

    def _digest(self, name: str, buffer: torch.Tensor) -> bytes:
        """SHA-256 of a tensor's name, dtype, shape and bytes, which go through `buffer`."""
        info = self._info(name)
        digest = hashlib.sha256(json.dumps([name, DTYPE_NAMES[info.dtype], info.shape]).encode() + b"\n")
        for offset in range(0, info.nbytes, len(buffer)):
            if ENDING.is_set():  # nobody asks for it any more
                break
            chunk = buffer[: info.nbytes - offset]
            self._read(info, chunk, [(offset, offset + len(chunk))], 1)
            digest.update(chunk.numpy().data)
        return digest.digest()

    def _info(self, name: str) -> TensorInfo:
        if name not in self._infos:
            raise CheckpointError(f"{self.folder}: the checkpoint has no tensor {shown(name)}; is it another model's?")
        return self._infos[name]

    def _read(self, info: TensorInfo, raw: torch.Tensor, runs: Iterable[tuple[int, int]], row_bytes: int) -> None:
        """Fill the byte tensor `raw` with runs (first, stop) of rows, one after the other."""
        into, done = raw.numpy().data, 0
        with open_regular(safe_path(self.folder, info.file.name)) as (descriptor, _):
            for first, stop in runs:
                size = (stop - first) * row_bytes
                read_into(descriptor, into[done : done + size], info.start + first * row_bytes, info.file)
                done += size


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Neighbouring numbers as (first, stop), so that their rows are read at once."""
    start = 0
    for at in range(1, len(numbers) + 1):
        if at == len(numbers) or numbers[at] != numbers[at - 1] + 1:
            yield numbers[start], numbers[at - 1] + 1
            start = at


def _file_names(folder: Path) -> set[str]:
    try:
        return {path.name for path in folder.iterdir()}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: not a readable model folder: {error}") from error


def _read_header(folder: Path, file: str) -> dict[str, TensorInfo]:
    path = folder / file
    with open_regular(safe_path(folder, file)) as (descriptor, size):
        prefix = bytearray(min(8, size))
        read_into(descriptor, memoryview(prefix), 0, path)
        header = bytearray(header_length(prefix, size, path))
        read_into(descriptor, memoryview(header), 8, path)
    return parse_header(header, size, path)


def _read_index(folder: Path) -> dict[str, set[str] | None]:
    """The tensor names that the index places in each file."""
    path = folder / INDEX
    index = read_json(safe_path(folder, INDEX))
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map of tensor names to files; download or save the model again")
    files: dict[str, set[str] | None] = {}
    problems: list[str] = []
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or any(c in file for c in "/\\\0"):
            problems.append(f"tensor {shown(name)} is placed in {shown(str(file))}")
        elif (names := files.setdefault(file, set())) is not None:
            names.add(name)
    if problems:
        raise CheckpointError(
            f"{path}: only plain names of .safetensors files in the same folder are read: {listed(problems)}"
        )
    return files


def _no_weights(folder: Path, names: set[str]) -> str:
    """Why a folder without the expected files cannot be used, and what to do."""
    pickles = sorted(name for name in names if name.endswith(_PICKLES))
    others = sorted(name for name in names if name.endswith(".safetensors"))
    if others:
        return (
            f"{folder}: has {listed([shown(name) for name in others])} but neither {INDEX} nor {SINGLE}; "
            "download the index too, or save the model again with save_pretrained"
        )
    if pickles:
        return (
            f"{folder}: has only pickled weights ({listed([shown(name) for name in pickles])}), which can run code "
            "when read; convert them once, if you trust their source: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    return f"{folder}: holds no weights: expected {SINGLE}, or {INDEX} with the files it names"
