"""Shards that are damaged or hostile are refused: headers, indexes, pickles, links, special files."""

import os
import stat
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from shard_cases import INDEX, SINGLE, entry, raw_file, refuses, sharded

from wina_calib.errors import CheckpointError
from wina_calib.storage import Shards, read_json
from wina_calib.storage.safe_files import MAX_JSON_MARKS
from wina_calib.storage.safetensors_layout import MAX_HEADER_BYTES


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


def test_what_is_no_file_of_tensors_says_how_to_get_one(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 538090408\n")
    with pytest.raises(CheckpointError, match="is a pointer of Git LFS, .* get it with `git lfs pull`"):
        Shards.open(tmp_path)
    file.write_bytes(b"<!DOCTYPE html><title>Not found</title>")
    with pytest.raises(CheckpointError, match="not a safetensors file; download or save it again"):
        Shards.open(tmp_path)


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
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
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
    (tmp_path / SINGLE).rmdir()
    os.mkfifo(tmp_path / INDEX)
    refuses(tmp_path, INDEX, "not a regular file")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_json(Path("/dev/zero"), max_bytes=10)


def test_pipe_that_takes_the_place_of_a_checked_file(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / SINGLE)
    is_regular, checked_before = stat.S_ISREG, iter([True])
    monkeypatch.setattr(stat, "S_ISREG", lambda mode: next(checked_before, is_regular(mode)))
    refuses(tmp_path, SINGLE, "not a regular file")
