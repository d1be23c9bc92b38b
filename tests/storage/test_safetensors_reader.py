"""Reading of safetensors shards: tensors, rows, dtypes, fingerprints, JSON."""

import json
import os
import resource
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from shard_cases import SINGLE, entry, random_tensor, raw_file, same_bytes, sharded

from wina_calib.errors import CheckpointError
from wina_calib.storage import Shards, read_json
from wina_calib.storage.safetensors_layout import DTYPES


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (4, 5), (0, 4), (2, 3, 4)], ids=str)
def test_load_equals_what_safetensors_saved(tmp_path, dtype, shape):
    tensor = random_tensor(dtype, shape)
    save_file({"a": tensor, "b": torch.ones(3)}, tmp_path / SINGLE)
    shards = Shards.open(tmp_path)
    assert (shards["a"].dtype, shards["a"].shape, shards["a"].nbytes) == (dtype, shape, tensor.nbytes)
    assert same_bytes(shards.load("a"), tensor)
    assert same_bytes(shards.load("b"), torch.ones(3))


def test_mapping(tmp_path):
    shards = Shards.open(
        sharded(tmp_path, {"x.safetensors": {"a": torch.ones(2)}, "y.safetensors": {"b": torch.ones(3)}})
    )
    assert list(shards) == ["a", "b"]
    assert len(shards) == 2
    assert "a" in shards
    assert "c" not in shards
    assert shards["b"].file == tmp_path / "y.safetensors"
    with pytest.raises(CheckpointError, match="no tensor 'c'"):
        shards.load("c")


def test_a_single_file_is_preferred_to_an_index_as_by_transformers(tmp_path):
    save_file({"old": torch.ones(1)}, tmp_path / SINGLE)
    assert list(Shards.open(sharded(tmp_path, {"x.safetensors": {"a": torch.ones(2)}}))) == ["old"]


@pytest.mark.parametrize("rows", [slice(1, 3), slice(0, 0), slice(None, 2), slice(-2, None), slice(2, 99), slice(3, 1)])
def test_load_rows(tmp_path, rows):
    tensor = torch.arange(20.0).reshape(5, 4)
    save_file({"pad": torch.ones(7), "a": tensor}, tmp_path / SINGLE)
    assert same_bytes(Shards.open(tmp_path).load("a", rows=rows), tensor[rows])


@pytest.mark.parametrize("rows", [[], [0], [0, 1, 2, 4], [1, 3, 3], [4, 2, 3], range(5)])
def test_load_rows_by_number(tmp_path, rows):
    tensor, numbers = torch.arange(20.0).reshape(5, 4), torch.tensor(list(rows), dtype=torch.int64)
    save_file({"pad": torch.ones(7), "a": tensor}, tmp_path / SINGLE)
    assert same_bytes(Shards.open(tmp_path).load("a", rows=numbers), tensor[numbers])


@pytest.mark.parametrize("rows", [[-1], [3, 5], [1 << 40], [4, -1, 2]])
def test_load_rows_that_are_not_there(tmp_path, rows):
    save_file({"a": torch.ones(5, 4)}, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match="5 rows"):
        Shards.open(tmp_path).load("a", rows=torch.tensor(rows))


def test_load_rows_reads_only_those_bytes(tmp_path, monkeypatch):
    save_file({"a": torch.arange(4000.0).reshape(1000, 4)}, tmp_path / SINGLE)
    shards = Shards.open(tmp_path)
    sizes = []
    preadv = os.preadv

    def counting(descriptor, buffers, offset):
        sizes.append(sum(len(b) for b in buffers))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counting)
    shards.load("a", rows=slice(10, 13))
    shards.load("a", rows=torch.tensor([1, 7, 8, 9]))
    assert sizes == [3 * 4 * 4, 1 * 4 * 4, 3 * 4 * 4]


def test_load_rows_needs_rows_and_step_one(tmp_path):
    save_file({"s": torch.tensor(1.0), "a": torch.ones(4)}, tmp_path / SINGLE)
    shards = Shards.open(tmp_path)
    for name, rows in (("s", slice(0, 1)), ("a", slice(0, 4, 2)), ("a", slice(None, None, -1))):
        with pytest.raises(CheckpointError, match="step 1"):
            shards.load(name, rows=rows)


def test_bool_bytes_are_normalised(tmp_path):
    raw_file(tmp_path / SINGLE, {"a": entry("BOOL", (3,), (0, 3))}, b"\x00\x01\x07")
    loaded = Shards.open(tmp_path).load("a")
    assert loaded.view(torch.uint8).tolist() == [0, 1, 1]


def test_loaded_memory_is_independent_of_the_file(tmp_path):
    save_file({"a": torch.ones(4)}, tmp_path / SINGLE)
    loaded = Shards.open(tmp_path).load("a")
    loaded.mul_(2)
    (tmp_path / SINGLE).write_bytes(b"")
    assert loaded.tolist() == [2.0] * 4


def test_short_read_is_noticed(tmp_path):
    save_file({"a": torch.ones(400)}, tmp_path / SINGLE)
    shards = Shards.open(tmp_path)
    os.truncate(tmp_path / SINGLE, 1000)
    with pytest.raises(CheckpointError, match="cut short"):
        shards.load("a")
    (tmp_path / SINGLE).unlink()
    with pytest.raises(CheckpointError, match="missing"):
        shards.load("a")


def test_small_reads_are_continued(tmp_path, monkeypatch):
    tensor = torch.randn(100)
    save_file({"a": tensor}, tmp_path / SINGLE)
    shards = Shards.open(tmp_path)
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: preadv(fd, [buffers[0][:7]], at))
    assert same_bytes(shards.load("a"), tensor)


def test_no_memory_is_our_error(tmp_path):
    header = json.dumps({"a": entry("U8", (2**50,), (0, 2**50))}).encode()
    raw_file(tmp_path / SINGLE, header)
    try:
        os.truncate(tmp_path / SINGLE, 8 + len(header) + 2**50)
    except OSError:  # file systems with smaller files: the limit of the process does the same
        size = 2**40
        header = json.dumps({"a": entry("U8", (size,), (0, size))}).encode()
        raw_file(tmp_path / SINGLE, header)
        os.truncate(tmp_path / SINGLE, 8 + len(header) + size)
    shards = Shards.open(tmp_path)
    old = resource.getrlimit(resource.RLIMIT_AS)
    limit = 64 << 30 if old[1] == resource.RLIM_INFINITY else min(64 << 30, old[1])
    resource.setrlimit(resource.RLIMIT_AS, (limit, old[1]))
    try:
        with pytest.raises(CheckpointError, match="no memory"):
            shards.load("a")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


def test_fingerprint(tmp_path):
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4).bfloat16()}
    folders = [tmp_path / str(i) for i in range(6)]
    for folder in folders:
        folder.mkdir()
    save_file(tensors, folders[0] / SINGLE, {"other": "metadata"})
    sharded(folders[1], {"x.safetensors": {"b": tensors["b"]}, "y.safetensors": {"a": tensors["a"]}})
    save_file({**tensors, "a": tensors["a"] + 1}, folders[2] / SINGLE)
    save_file({**tensors, "a": tensors["a"].reshape(3, 2)}, folders[3] / SINGLE)
    save_file({**tensors, "a": tensors["a"].view(torch.int32)}, folders[4] / SINGLE)
    save_file({"b": tensors["b"], "c": tensors["a"]}, folders[5] / SINGLE)
    marks = [Shards.open(f).fingerprint(["b", "a" if i < 5 else "c"]) for i, f in enumerate(folders)]
    assert marks[0] == marks[1] == Shards.open(folders[0]).fingerprint(iter(["a", "b", "a"]))
    assert len(set(marks)) == 5
    assert len(marks[0]) == 64
    with pytest.raises(CheckpointError, match="no tensor 'z'"):
        Shards.open(folders[0]).fingerprint(["z"])


def test_fingerprint_streams_past_one_chunk(tmp_path, monkeypatch):
    save_file({"a": torch.randn(1000)}, tmp_path / SINGLE)
    shards = Shards.open(tmp_path)
    whole = shards.fingerprint(["a"])
    monkeypatch.setattr("wina_calib.storage.safetensors_reader._CHUNK", 300)
    assert shards.fingerprint(["a"]) == whole


def test_read_json(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('{"a": [1, 2.5, "\\u00e9"], "b": null}')
    assert read_json(path, max_bytes=100) == {"a": [1, 2.5, "é"], "b": None}
    with pytest.raises(CheckpointError, match="more than the 10"):
        read_json(path, max_bytes=10)
    with pytest.raises(CheckpointError, match="cannot be opened"):
        read_json(tmp_path / "absent.json", max_bytes=10)


def test_a_fingerprint_that_is_given_up_ends_with_the_process(tmp_path):
    """The threads that hash are not waited for: a large model on a slow disk would keep an interrupted process for minutes."""
    save_file({str(i): torch.zeros(4) for i in range(40)}, tmp_path / "model.safetensors")
    code = """
import sys, threading
from pathlib import Path
from wina_calib.common.threads import Background
from wina_calib.storage import Shards

reading = threading.Event()
Shards._read = lambda *args: (reading.set(), threading.Event().wait())  # a disk that never answers
shards = Shards.open(Path(sys.argv[1]))
Background(lambda: shards.fingerprint(shards))
reading.wait()
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=300)
