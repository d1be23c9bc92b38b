"""Reading and writing of safetensors shards."""

import json
import os
import resource
import shutil
import stat
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wina_calib.errors import CheckpointError, OutputError, UsageError
from wina_calib.shards import Shards, ShardWriter, plan_shards, read_json
from wina_calib.shards.files import MAX_JSON_MARKS
from wina_calib.shards.layout import DTYPES, MAX_HEADER_BYTES

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


# Reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (4, 5), (0, 4), (2, 3, 4)], ids=str)
def test_load_equals_what_safetensors_saved(tmp_path, dtype, shape):
    tensor = random_tensor(dtype, shape)
    save_file({"a": tensor, "b": torch.ones(3)}, tmp_path / SINGLE)
    shards = Shards.open(tmp_path)
    assert (shards["a"].dtype, shards["a"].shape, shards["a"].nbytes) == (dtype, shape, tensor.nbytes)
    assert same_bytes(shards.load("a"), tensor)
    assert same_bytes(shards.load("b"), torch.ones(3))


def test_mapping_and_metadata(tmp_path):
    shards = Shards.open(
        sharded(tmp_path, {"x.safetensors": {"a": torch.ones(2)}, "y.safetensors": {"b": torch.ones(3)}})
    )
    assert list(shards) == ["a", "b"]
    assert len(shards) == 2
    assert "a" in shards
    assert "c" not in shards
    assert shards.metadata == {"x.safetensors": {"format": "pt"}, "y.safetensors": {"format": "pt"}}
    assert shards["b"].file == tmp_path / "y.safetensors"
    with pytest.raises(CheckpointError, match="no tensor 'c'"):
        shards.load("c")


def test_index_is_preferred_to_a_single_file(tmp_path):
    save_file({"old": torch.ones(1)}, tmp_path / SINGLE)
    assert list(Shards.open(sharded(tmp_path, {"x.safetensors": {"a": torch.ones(2)}}))) == ["a"]


@pytest.mark.parametrize("rows", [slice(1, 3), slice(0, 0), slice(None, 2), slice(-2, None), slice(2, 99), slice(3, 1)])
def test_load_rows(tmp_path, rows):
    tensor = torch.arange(20.0).reshape(5, 4)
    save_file({"pad": torch.ones(7), "a": tensor}, tmp_path / SINGLE)
    assert same_bytes(Shards.open(tmp_path).load("a", rows=rows), tensor[rows])


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
    assert sizes == [3 * 4 * 4]


def test_load_rows_needs_rows_and_step_one(tmp_path):
    save_file({"s": torch.tensor(1.0), "a": torch.ones(4)}, tmp_path / SINGLE)
    shards = Shards.open(tmp_path)
    for name, rows in (("s", slice(0, 1)), ("a", slice(0, 4, 2)), ("a", slice(None, None, -1))):
        with pytest.raises(CheckpointError, match="step 1"):
            shards.load(name, rows=rows)


def test_load_converts_dtype(tmp_path):
    tensor = torch.randn(3, 4).bfloat16()
    save_file({"a": tensor}, tmp_path / SINGLE)
    assert same_bytes(Shards.open(tmp_path).load("a", dtype=torch.float32), tensor.float())


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


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ({"a": entry("F99")}, 8, ["'a'", "F99", "not supported"]),
        ({"a": entry("C64", (1,))}, 8, ["C64"]),
        ({"a": entry(shape=[-2])}, 8, ["'a'", "dimension"]),
        ({"a": entry(shape=[2.0])}, 8, ["dimension"]),
        ({"a": entry(shape=[True, 2])}, 8, ["dimension"]),
        ({"a": entry(shape=["2"])}, 8, ["dimension"]),
        ({"a": entry(shape=[2**64])}, 8, ["dimension"]),
        ({"a": entry(shape=[2**32, 2**32])}, 8, ["overflow"]),
        ({"a": entry(shape=[2**62, 2**62, 0], offsets=(0, 0))}, 0, ["overflow"]),
        ({"a": entry(shape=[1] * 17, offsets=(0, 4))}, 4, ["16 dimensions"]),
        ({"a": {**entry(), "shape": {"0": 2}}}, 8, ["dimensions"]),
        ({"a": entry(offsets=(0, 4))}, 4, ["'a'", "span 4 bytes", "takes 8"]),
        ({"a": entry(offsets=(8, 0))}, 8, ["data_offsets"]),
        ({"a": entry(offsets=(-8, 0))}, 8, ["data_offsets"]),
        ({"a": entry(offsets=(0, 2**70))}, 8, ["data_offsets"]),
        ({"a": entry(offsets=(0, 8, 8))}, 8, ["data_offsets"]),
        ({"a": entry(offsets=(0.0, 8.0))}, 8, ["data_offsets"]),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, ["exactly"]),
        ({"a": {**entry(), "extra": 1}}, 8, ["exactly"]),
        ({"a": {**entry(), "dtype": ["F32"]}}, 8, ["dtype"]),
        ({"a": [1, 2]}, 8, ["exactly"]),
        ({"": entry()}, 8, ["name is empty"]),
        ({"a": entry(), "b": entry(offsets=(12, 20))}, 20, ["'b'", "hole"]),
        ({"a": entry(offsets=(4, 12))}, 12, ["'a'", "hole"]),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, 12, ["'b'", "overlaps"]),
        ({"a": entry(), "b": entry()}, 8, ["overlaps"]),
        ({"a": entry()}, 7, ["truncated"]),
        ({"a": entry()}, 9, ["trailing"]),
        ({"__metadata__": {"k": 1}, "a": entry()}, 8, ["__metadata__"]),
        ({"__metadata__": ["k"], "a": entry()}, 8, ["__metadata__"]),
        ({"__metadata__": None, "a": entry()}, 8, ["__metadata__"]),
        ({"a": entry("X"), "b": entry("Y"), "c": 3}, 8, ["'a'", "'b'", "'c'"]),
        ({}, 0, ["no tensor"]),
        (b"", 0, ["does not begin"]),
        (b"[]", 0, ["does not begin"]),
        (b" {}", 0, ["does not begin"]),
        (b"{", 0, ["damaged"]),
        (b'{"a":1}x', 0, ["damaged"]),
        (b'{"\xff":1}', 0, ["damaged"]),
        (b'{"\\ud800":1}', 0, ["damaged"]),
        (b'{"a":' + b"9" * 5000 + b"}", 0, ["damaged"]),
        (b'{"a":1,"a":2}', 0, ["'a'", "more than once"]),
        (b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8, ["'dtype'", "more than once"]),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 0, ["nested"]),
        (b'{"a":' + b"[" * 40 + b"]" * 40 + b"}", 0, ["nested"]),
        (b'{"a":[' + b"0," * MAX_JSON_MARKS + b"0]}", 0, ["values"]),
    ],
)
def test_bad_header_is_refused(tmp_path, header, data, words):
    raw_file(tmp_path / SINGLE, header, bytes(data))
    refuses(tmp_path, SINGLE, *words)


@pytest.mark.parametrize("declared", [2**60, 2**64 - 1, MAX_HEADER_BYTES + 1])
def test_absurd_header_length_is_refused_at_once(tmp_path, declared):
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", declared) + b"{}")
    refuses(tmp_path, SINGLE, str(declared), "header")


@pytest.mark.parametrize("content", [b"", b"\x01", b"\x00" * 7, struct.pack("<Q", 100) + b"{}"])
def test_truncated_header_is_refused(tmp_path, content):
    (tmp_path / SINGLE).write_bytes(content)
    refuses(tmp_path, SINGLE, "download it again")


def test_long_names_do_not_flood_the_message(tmp_path):
    raw_file(tmp_path / SINGLE, {f"{i}" + "x" * 10_000: 3 for i in range(100)})
    refuses(tmp_path, "and 92 more")


def test_index_problems_are_gathered(tmp_path):
    files = {"x.safetensors": {"a": torch.ones(2), "extra": torch.ones(1)}, "y.safetensors": {"b": torch.ones(3)}}
    weight_map = {"a": "x.safetensors", "b": "y.safetensors", "ghost": "y.safetensors", "c": "gone.safetensors"}
    sharded(tmp_path, files, weight_map)
    refuses(tmp_path, "x.safetensors holds tensor 'extra'", "y.safetensors lacks tensor 'ghost'", "'gone.safetensors'")


def test_tensor_in_two_files_is_refused(tmp_path):
    files = {"x.safetensors": {"a": torch.ones(2)}, "y.safetensors": {"a": torch.zeros(2), "b": torch.ones(3)}}
    sharded(tmp_path, files, {"a": "x.safetensors", "b": "y.safetensors"})
    refuses(tmp_path, "y.safetensors holds tensor 'a'")


@pytest.mark.parametrize(
    "file",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "sub\\x.safetensors",
        "..",
        "",
        "a\0.safetensors",
        "x.bin",
        3,
        None,
        ["x.safetensors"],
    ],
)
def test_index_may_not_name_other_places(tmp_path, file):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path, folder, folder / "sub"):
        save_file({"a": torch.ones(2)}, place / "x.safetensors")
    sharded(folder, {}, {"a": file})
    refuses(folder, INDEX, "'a'", "plain names")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": ["a"]}', "{", "null", "\ufeff{}"]
)
def test_damaged_index_is_refused(tmp_path, text):
    save_file({"a": torch.ones(2)}, tmp_path / SINGLE)
    (tmp_path / INDEX).write_text(text)
    refuses(tmp_path, INDEX)


def test_index_with_duplicate_key_is_refused(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "x.safetensors", "a": "x.safetensors"}}')
    refuses(tmp_path, "'a'", "more than once")


def test_overlong_file_name_is_refused(tmp_path):
    sharded(tmp_path, {}, {"a": "x" * 5000 + ".safetensors"})
    refuses(tmp_path, "cannot be reached")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "weights.pkl"])
def test_pickles_are_refused_with_the_conversion_hint(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    refuses(tmp_path, name, "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)")


def test_folder_without_weights(tmp_path):
    refuses(tmp_path, "no weights", SINGLE)
    refuses(tmp_path / "absent", "not a readable model folder")
    (tmp_path / "file").write_text("")
    refuses(tmp_path / "file", "not a readable model folder")
    save_file({"a": torch.ones(2)}, tmp_path / "model-00001-of-00002.safetensors")
    refuses(tmp_path, INDEX, "model-00001-of-00002.safetensors")


def test_link_inside_the_folder_is_followed(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "real.safetensors")
    (tmp_path / SINGLE).symlink_to("real.safetensors")
    alias = tmp_path.parent / f"{tmp_path.name}-alias"
    alias.symlink_to(tmp_path)
    for folder in (tmp_path, alias):
        assert Shards.open(folder).load("a").tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", [SINGLE, INDEX])
def test_link_out_of_the_folder_is_refused(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / SINGLE)
    sharded(tmp_path, {"x.safetensors": {"a": torch.ones(2)}})
    (folder / name).symlink_to(Path("..") / name)
    refuses(folder, name, "leaves the folder")


def test_dangling_and_looping_links_are_refused(tmp_path):
    (tmp_path / SINGLE).symlink_to("nothing")
    refuses(tmp_path, SINGLE, "missing")
    (tmp_path / SINGLE).unlink()
    (tmp_path / SINGLE).symlink_to(SINGLE)
    refuses(tmp_path, SINGLE)


def hub_cache(root: Path, target: str) -> Path:
    model = root / "models--org--tiny"
    folder = model / "snapshots" / "0123"
    folder.mkdir(parents=True)
    (model / "blobs").mkdir()
    (root / "models--org--other" / "blobs").mkdir(parents=True)
    for place in (model / "blobs" / "abc", model / "stray", root / "models--org--other" / "blobs" / "abc"):
        save_file({"a": torch.ones(2)}, place)
    (folder / SINGLE).symlink_to(target)
    return folder


def test_hub_cache_links_are_followed(tmp_path):
    assert Shards.open(hub_cache(tmp_path, "../../blobs/abc")).load("a").tolist() == [1.0, 1.0]


@pytest.mark.parametrize("target", ["../../stray", "../../../models--org--other/blobs/abc"])
def test_links_elsewhere_in_the_hub_cache_are_refused(tmp_path, target):
    refuses(hub_cache(tmp_path, target), "leaves the folder")


def test_link_swapped_after_opening_is_refused(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for place in (tmp_path, folder):
        save_file({"a": torch.ones(2)}, place / SINGLE)
    shards = Shards.open(folder)
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to(tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match="leaves the folder"):
        shards.load("a")


def test_special_files_are_refused_without_blocking(tmp_path):
    os.mkfifo(tmp_path / SINGLE)
    refuses(tmp_path, SINGLE, "not a regular file")
    (tmp_path / SINGLE).unlink()
    (tmp_path / SINGLE).mkdir()
    refuses(tmp_path, SINGLE, "not a regular file")
    os.mkfifo(tmp_path / INDEX)
    refuses(tmp_path, INDEX, "not a regular file")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_json(Path("/dev/zero"), max_bytes=10)


def test_pipe_that_takes_the_place_of_a_checked_file(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / SINGLE)
    is_regular, checked_before = stat.S_ISREG, iter([True])
    monkeypatch.setattr(stat, "S_ISREG", lambda mode: next(checked_before, is_regular(mode)))
    refuses(tmp_path, SINGLE, "not a regular file")


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
    monkeypatch.setattr("wina_calib.shards.reader._CHUNK", 300)
    assert shards.fingerprint(["a"]) == whole


def test_read_json(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('{"a": [1, 2.5, "\\u00e9"], "b": null}')
    assert read_json(path, max_bytes=100) == {"a": [1, 2.5, "é"], "b": None}
    with pytest.raises(CheckpointError, match="more than the 10"):
        read_json(path, max_bytes=10)
    with pytest.raises(CheckpointError, match="cannot be opened"):
        read_json(tmp_path / "absent.json", max_bytes=10)


# Writing ---------------------------------------------------------------------------------------------------------

PLAN = {
    "b": (torch.bfloat16, (4, 3)),
    "z": (torch.float32, ()),
    "a": (torch.float32, (2, 2)),
    "e": (torch.int8, (0, 5)),
}


def plan_tensors() -> dict[str, torch.Tensor]:
    return {name: random_tensor(*spec) for name, spec in PLAN.items()}


def test_exact_file_bytes(tmp_path):
    path = tmp_path / SINGLE
    with ShardWriter(path, {"b": (torch.int8, (2,)), "a": (torch.int16, (1,))}, {"y": "é", "format": "pt"}) as writer:
        writer.write("b", torch.tensor([1, 2], dtype=torch.int8))
        writer.write("a", torch.tensor([3], dtype=torch.int16))
    header = (
        b'{"__metadata__":{"format":"pt","y":"\\u00e9"},'
        b'"a":{"dtype":"I16","shape":[1],"data_offsets":[0,2]},'
        b'"b":{"dtype":"I8","shape":[2],"data_offsets":[2,4]}}'
    )
    header += b" " * (-len(header) % 8)
    assert path.read_bytes() == struct.pack("<Q", len(header)) + header + b"\x03\x00\x01\x02"
    assert len(header) % 8 == 0


def test_bytes_do_not_depend_on_the_order_of_writes(tmp_path):
    tensors = plan_tensors()
    with ShardWriter(tmp_path / "one", PLAN, {"format": "pt", "k": "v"}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    with ShardWriter(tmp_path / "two", PLAN, {"k": "v", "format": "pt"}) as writer:
        for name in ("e", "a", "z"):
            writer.write(name, tensors[name])
        for row in (3, 1, 0, 2):
            writer.write_rows("b", row, tensors["b"][row : row + 1])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    loaded = load_file(tmp_path / "two")
    assert all(same_bytes(loaded[name], tensor) for name, tensor in tensors.items())
    with safe_open(tmp_path / "one", "pt") as file:
        assert file.metadata() == {"format": "pt", "k": "v"}


def test_larger_old_file_is_replaced(tmp_path):
    (tmp_path / SINGLE).write_bytes(b"x" * 10_000)
    with ShardWriter(tmp_path / SINGLE, {"a": (torch.float32, (2,))}, {}) as writer:
        writer.write_rows("a", 0, torch.ones(2))
    assert Shards.open(tmp_path).load("a").tolist() == [1.0, 1.0]


def test_every_tensor_is_aligned(tmp_path):
    plan = {
        "c": (torch.uint8, (3,)),
        "a": (torch.float64, (1,)),
        "b": (torch.bfloat16, (3,)),
        "d": (torch.float32, (1,)),
    }
    with ShardWriter(tmp_path / SINGLE, plan, {}) as writer:
        for name, spec in plan.items():
            writer.write(name, random_tensor(*spec))
    assert all(info.start % info.dtype.itemsize == 0 for info in Shards.open(tmp_path).values())


def test_non_contiguous_and_gradient_tensors(tmp_path):
    tensor = torch.nn.Parameter(torch.randn(6, 4)).t()[:, ::2]
    with ShardWriter(tmp_path / SINGLE, {"a": (torch.float32, (4, 3))}, {}) as writer:
        writer.write("a", tensor)
    assert same_bytes(Shards.open(tmp_path).load("a"), tensor.detach())


def test_no_tensors_at_all(tmp_path):
    with ShardWriter(tmp_path / SINGLE, {}, {}):
        pass
    assert load_file(tmp_path / SINGLE) == {}


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("b", torch.zeros(4, 3), "float32"),
        ("b", torch.zeros(3, 4).bfloat16(), "plan says"),
        ("q", torch.zeros(1), "not in the plan"),
        ("a", torch.zeros(2, 2, device="meta"), "meta"),
    ],
)
def test_mismatch_is_an_error_and_leaves_no_file(tmp_path, name, tensor, words):
    with pytest.raises(CheckpointError, match=words), ShardWriter(tmp_path / SINGLE, PLAN, {}) as writer:
        writer.write(name, tensor)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "row", "shape"), [("b", 3, (2, 3)), ("b", -1, (1, 3)), ("b", 0, (1, 4)), ("b", 0, (3,)), ("z", 0, ())]
)
def test_rows_must_lie_within_the_tensor(tmp_path, name, row, shape):
    with ShardWriter(tmp_path / SINGLE, PLAN, {}) as writer:
        with pytest.raises(CheckpointError, match=f"'{name}'"):
            writer.write_rows(name, row, torch.zeros(shape, dtype=PLAN[name][0]))
        for planned, tensor in plan_tensors().items():
            writer.write(planned, tensor)


def test_missing_rows_and_tensors_are_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="'b'") as caught, ShardWriter(tmp_path / SINGLE, PLAN, {}) as writer:
        writer.write_rows("b", 0, torch.zeros(2, 3).bfloat16())
        writer.write_rows("b", 3, torch.zeros(1, 3).bfloat16())
        writer.write("z", torch.tensor(1.0))
        writer.write("a", torch.zeros(2, 2))
    assert "'e'" in str(caught.value)
    assert "'z'" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_exception_leaves_no_file(tmp_path):
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path / SINGLE, PLAN, {}):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_closed_writer_refuses_writes(tmp_path):
    with ShardWriter(tmp_path / SINGLE, {"a": (torch.float32, (1,))}, {}) as writer:
        writer.write("a", torch.ones(1))
    writer.close()
    writer.abort()
    assert (tmp_path / SINGLE).exists()
    with pytest.raises(CheckpointError, match="closed"):
        writer.write("a", torch.ones(1))


@pytest.mark.parametrize(
    ("plan", "metadata"),
    [
        ({"a": (torch.complex64, (1,))}, {}),
        ({"a": (torch.float32, (-1,))}, {}),
        ({"a": (torch.float32, (2**40, 2**40))}, {}),
        ({"__metadata__": (torch.float32, (1,))}, {}),
        ({"": (torch.float32, (1,))}, {}),
        ({}, {"k": 1}),
        ({}, {"k": "x" * MAX_HEADER_BYTES}),
    ],
)
def test_plans_that_the_format_cannot_hold(tmp_path, plan, metadata):
    with pytest.raises(CheckpointError):
        ShardWriter(tmp_path / SINGLE, plan, metadata)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_file_mode_follows_the_umask(tmp_path, umask):
    old = os.umask(umask)
    try:
        with ShardWriter(tmp_path / SINGLE, {}, {}):
            pass
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / SINGLE).stat().st_mode) == 0o666 & ~umask


def test_file_and_folder_are_forced_to_disk(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync

    def recording(descriptor):
        synced.append(stat.S_ISDIR(os.fstat(descriptor).st_mode))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recording)
    with ShardWriter(tmp_path / SINGLE, {}, {}):
        pass
    assert synced == [False, True]


def test_output_that_cannot_be_created(tmp_path):
    with pytest.raises(OutputError, match="cannot be written"):
        ShardWriter(tmp_path / "absent" / SINGLE, {}, {})
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(OutputError, match="cannot be written"):
        ShardWriter(tmp_path / "link", {}, {})
    assert not (tmp_path / "target").exists()


LARGE = {"a": (torch.float32, (1 << 20,))}


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_full_disk_names_the_space_needed(tmp_path, monkeypatch, call):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with (
        pytest.raises(OutputError, match=r"needs 4194\d+ bytes and \d+ are free"),
        ShardWriter(tmp_path / SINGLE, LARGE, {}) as writer,
    ):
        writer.write("a", torch.zeros(1 << 20))
    assert list(tmp_path.iterdir()) == []


def test_file_system_without_allocation(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    with ShardWriter(tmp_path / SINGLE, LARGE, {}) as writer:
        writer.write("a", torch.ones(1 << 20))
    assert same_bytes(load_file(tmp_path / SINGLE)["a"], torch.ones(1 << 20))


def test_size_limit_of_the_system_is_a_full_disk(tmp_path):
    """A real refusal by the kernel, in every environment: the largest file of a process."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, old[1]))
    try:
        with pytest.raises(OutputError, match="needs 4194"):
            ShardWriter(tmp_path / SINGLE, LARGE, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert list(tmp_path.iterdir()) == []


def can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    command = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=1m none /mnt"]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="this system does not let a test mount a tmpfs")
def test_really_full_disk(tmp_path):
    code = textwrap.dedent(
        """
        import sys, torch
        from pathlib import Path
        from wina_calib.errors import OutputError
        from wina_calib.shards import ShardWriter
        path = Path(sys.argv[1]) / "m.safetensors"
        try:
            ShardWriter(path, {"a": (torch.float32, (1 << 20,))}, {})
        except OutputError as error:
            print(error, "left:", path.exists())
        """
    )
    script = 'mount -t tmpfs -o size=1m none "$1" && exec "$2" -c "$3" "$1"'
    command = ["unshare", "-rm", "sh", "-c", script, "sh", str(tmp_path), sys.executable, code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "No space left on device; the file needs 4194" in done.stdout
    assert "left: False" in done.stdout


def test_suspend_and_go_on(tmp_path):
    tensors, metadata = plan_tensors(), {"format": "pt"}
    with ShardWriter(tmp_path / "whole", PLAN, metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    writer = ShardWriter(tmp_path / "part", PLAN, metadata)
    writer.write("b", tensors["b"])
    writer.write_rows("a", 0, tensors["a"][:1])
    writer.sync()
    writer.suspend()
    with ShardWriter(tmp_path / "part", PLAN, metadata, written={"b"}) as writer:
        for name in ("e", "a", "z"):
            writer.write(name, tensors[name])
    assert (tmp_path / "part").read_bytes() == (tmp_path / "whole").read_bytes()


def test_going_on_still_needs_every_tensor(tmp_path):
    writer = ShardWriter(tmp_path / SINGLE, PLAN, {})
    writer.write("b", plan_tensors()["b"])
    writer.suspend()
    with pytest.raises(CheckpointError, match="'a'"), ShardWriter(tmp_path / SINGLE, PLAN, {}, written={"b"}):
        pass


def test_going_on_with_another_file_is_refused(tmp_path):
    path = tmp_path / SINGLE
    writer = ShardWriter(path, PLAN, {"format": "pt"})
    writer.suspend()
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="another plan"):
        ShardWriter(path, PLAN, {"format": "np"}, written={"b"})
    with pytest.raises(CheckpointError, match="another plan"):
        ShardWriter(path, {**PLAN, "q": (torch.int8, (1,))}, {"format": "pt"}, written={"b"})
    with pytest.raises(CheckpointError, match="not in the plan"):
        ShardWriter(path, PLAN, {"format": "pt"}, written={"q"})
    with pytest.raises(CheckpointError, match="cannot be opened"):
        ShardWriter(tmp_path / "absent", PLAN, {"format": "pt"}, written={"b"})
    assert path.read_bytes() == before


def test_plan_shards():
    specs = {
        "a": (torch.float32, (2,)),
        "b": (torch.bfloat16, (4,)),
        "huge": (torch.int8, (50,)),
        "c": (torch.int8, (16,)),
        "d": (torch.int8, (0,)),
    }
    shards = plan_shards(specs, 16)
    assert [list(shard) for shard in shards] == [["a", "b"], ["huge"], ["c", "d"]]
    assert {name: spec for shard in shards for name, spec in shard.items()} == specs
    assert plan_shards({}, 16) == []
    with pytest.raises(UsageError, match="positive"):
        plan_shards(specs, 0)


# Properties ------------------------------------------------------------------------------------------------------

NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
SPECS = st.tuples(st.sampled_from(list(DTYPES.values())), st.lists(st.integers(0, 4), max_size=3).map(tuple))
PLANS = st.dictionaries(NAMES, SPECS, min_size=1, max_size=5)
METADATA = st.dictionaries(
    st.text(st.characters(codec="utf-8"), max_size=5), st.text(st.characters(codec="utf-8"), max_size=9), max_size=3
)


@settings(max_examples=60, deadline=None)
@given(PLANS, METADATA, st.randoms(use_true_random=False))
def test_round_trip_both_ways(tmp_path_factory, plan, metadata, random):
    folder = tmp_path_factory.mktemp("round")
    tensors = {name: random_tensor(*spec, seed=i) for i, (name, spec) in enumerate(plan.items())}
    order = list(plan)
    random.shuffle(order)
    with ShardWriter(folder / SINGLE, plan, metadata) as writer:
        for name in order:
            tensor = tensors[name]
            if tensor.dim() and random.random() < 0.5:
                for row in range(tensor.shape[0]):
                    writer.write_rows(name, row, tensor[row : row + 1])
                writer.write_rows(name, 0, tensor[:0])
            else:
                writer.write(name, tensor)
    ours, theirs = Shards.open(folder), load_file(folder / SINGLE)
    assert ours.metadata == {SINGLE: metadata}
    assert set(ours) == set(theirs) == set(plan)
    for name, tensor in tensors.items():
        assert same_bytes(ours.load(name), tensor)
        assert same_bytes(theirs[name], tensor)
    mark = ours.fingerprint(plan)
    save_file(tensors, folder / SINGLE, metadata or None)
    again = Shards.open(folder)
    assert all(same_bytes(again.load(name), tensor) for name, tensor in tensors.items())
    assert again.fingerprint(plan) == mark


@settings(max_examples=100, deadline=None)
@given(PLANS, st.integers(1, 200))
def test_planned_shards_hold_everything_in_order(plan, max_bytes):
    shards = plan_shards(plan, max_bytes)
    assert [name for shard in shards for name in shard] == list(plan)
    for shard in shards:
        size = sum(torch.empty(shape, dtype=dtype).nbytes for dtype, shape in shard.values())
        assert size <= max_bytes or sum(torch.empty(s, dtype=d).nbytes > 0 for d, s in shard.values()) == 1
