"""Fuzzing of the checkpoint reader: whatever is in the files, only our errors come out, soon and in little memory."""

import json
import random
import struct
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hostile import ODD, only_our_errors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from wina_calib.errors import CheckpointError
from wina_calib.storage import Shards, read_json
from wina_calib.storage.safe_files import MAX_JSON_BYTES

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CASES = 1100

TOKENS = [b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\\ud800", b"\xff", b"\0", b"-", b"1e999", b"NaN", b"null"]


def first_file() -> bytes:
    return save({"a": torch.ones(2, 3), "b": torch.ones(4).bfloat16(), "c": torch.zeros(0, 2)}, {"format": "pt"})


def second_file() -> bytes:
    return save({"d": torch.ones(3, dtype=torch.int8), "e": torch.tensor(True)})


def index() -> bytes:
    weight_map = {name: "a.safetensors" for name in "abc"} | {name: "b.safetensors" for name in "de"}
    return json.dumps({"metadata": {"total_size": 36}, "weight_map": weight_map}).encode()


def change_value(rng: random.Random, value: object) -> object:
    """A copy of a JSON value with one spot replaced, removed or added."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        copy = dict(value)
        key = rng.choice(list(copy))
        action = rng.random()
        if action < 0.1:
            del copy[key]
        elif action < 0.2:
            copy[rng.choice(["", "zz", "__metadata__", "weight_map", "shape"])] = rng.choice(ODD)
        elif action < 0.3:
            copy[rng.choice(list(copy))] = copy[key]
        else:
            copy[key] = change_value(rng, copy[key])
        return copy
    if isinstance(value, list) and value and rng.random() < 0.7:
        items = list(value)
        items[rng.randrange(len(items))] = change_value(rng, rng.choice(items))
        return items if rng.random() < 0.8 else items * rng.choice([0, 2, 20])
    if type(value) is int and rng.random() < 0.5:
        return value + rng.choice([-8, -4, -1, 1, 4, 8, 2**32])
    return rng.choice(ODD)


def change_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flip, cut, insert, repeat or replace some bytes."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(changed) + 1)
        action = rng.randrange(5)
        if action == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif action == 1:
            del changed[at : at + rng.choice([1, 2, 8, 1000])]
        elif action == 2:
            changed[at:at] = rng.choice(TOKENS) * rng.choice([1, 1, 2, 3000])
        elif action == 3:
            changed[at:at] = changed[at : at + 40]
        else:
            changed[at : at + 1] = rng.choice(TOKENS)
    return bytes(changed)


def change_header(rng: random.Random, data: bytes) -> bytes:
    """Change the JSON of a header, with a length that fits it most of the time."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    for _ in range(rng.choice([1, 1, 2])):
        changed = change_value(rng, header)
        header = changed if isinstance(changed, dict) else header
    text = json.dumps(header).encode()
    if rng.random() < 0.15:
        text = change_bytes(rng, text)
    declared = len(text) if rng.random() < 0.95 else rng.choice([0, 1, len(text) + 9, 2**24, 2**60, 2**64 - 1])
    return struct.pack("<Q", declared) + text + data[8 + length :]


def change_index(rng: random.Random, data: bytes) -> bytes:
    return json.dumps(change_value(rng, json.loads(data))).encode()


def read_everything(folder: Path) -> None:
    shards = Shards.open(folder)
    for name, info in shards.items():
        loaded = shards.load(name, rows=slice(None) if info.shape else None)
        assert (loaded.dtype, tuple(loaded.shape)) == (info.dtype, info.shape)
    assert len(shards.fingerprint(shards)) == 64


def reading(action: Callable[[], object]) -> bool:
    """Whether reading was refused, in the little memory that files of some hundred bytes may take."""
    return only_our_errors(action, extra=50_000_000)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(first_file())
    (tmp_path / "b.safetensors").write_bytes(second_file())
    return tmp_path


@pytest.mark.parametrize(
    ("file", "valid", "change"),
    [
        ("a.safetensors", first_file, change_header),
        ("a.safetensors", first_file, change_bytes),
        (INDEX, index, change_index),
        (INDEX, index, change_bytes),
    ],
)
def test_mutated_files(folder, file, valid, change):
    (folder / INDEX).write_bytes(index())
    read_everything(folder)
    refused = 0
    for seed in range(CASES):
        mutated = change(random.Random(seed), valid())
        (folder / file).write_bytes(mutated)
        try:
            refused += reading(lambda: read_everything(folder))
        except BaseException as error:
            error.add_note(f"seed {seed}: {mutated[:300]!r}")
            raise
    # Neither all nor none: mutations that are always caught by the first check would test nothing behind it.
    assert CASES * 0.3 < refused < CASES


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(ODD),
    lambda children: (
        st.lists(children, max_size=4)
        | st.dictionaries(
            st.sampled_from(["a", "dtype", "shape", "data_offsets", "__metadata__", "weight_map"])
            | st.text(max_size=4),
            children,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=JSON, data=st.binary(max_size=40), as_index=st.booleans())
def test_generated_json(folder, header, data, as_index):
    text = json.dumps(header).encode()
    (folder / INDEX).unlink(missing_ok=True)
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + data)
    if as_index:
        (folder / INDEX).write_bytes(text)
    reading(lambda: read_everything(folder))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=80) | st.text(max_size=40).map(str.encode))
def test_generated_bytes(folder, data):
    (folder / "c.json").write_bytes(data)
    reading(lambda: read_json(folder / "c.json", max_bytes=60))
    (folder / SINGLE).write_bytes(data)
    assert reading(lambda: read_everything(folder))


@pytest.mark.parametrize(
    "bomb",
    [
        b"[" * MAX_JSON_BYTES,
        b"[" * 900_000,
        b'{"a":' * 300_000,
        b"{" + b'"a":1,' * 900_000 + b'"a":1}',
        b"[" + b"{}," * 400_000 + b"{}]",
        b"[" + b'{"":1},' * 400_000 + b"{}]",
        b'"' + b"\\u0041" * 2_000_000 + b'"',
        b"[" + b"9" * (MAX_JSON_BYTES - 2) + b"]",
        b'["' + "\U0001f600".encode() * 4_000_000 + b'"]',
        b" " * MAX_JSON_BYTES,
    ],
    ids=lambda bomb: f"{bomb[:6]!r}x{len(bomb)}",
)
def test_json_bombs(tmp_path, bomb):
    """The largest texts let through: more memory than for damaged files, but bounded."""
    path = tmp_path / "c.json"
    path.write_bytes(bomb)
    only_our_errors(lambda: read_json(path))
    tracemalloc.start()
    try:
        with suppress(CheckpointError):
            read_json(path)
        assert tracemalloc.get_traced_memory()[1] < 300e6
    finally:
        tracemalloc.stop()


def test_absurd_header_is_refused_at_once(tmp_path):
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", 2**60) + b"{}" + bytes(1000))
    start = time.perf_counter()
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=str(2**60)):
            Shards.open(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - start < 0.5
