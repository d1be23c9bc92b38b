"""Writing of safetensors shards: exact bytes, errors, full disks, going on; what is written is read back."""

import os
import resource
import shutil
import stat
import struct
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from shard_cases import SINGLE, random_tensor, same_bytes

from wina_calib.errors import CheckpointError, OutputError, UsageError
from wina_calib.storage import Shards, ShardWriter, plan_shards
from wina_calib.storage.safetensors_layout import DTYPES, MAX_HEADER_BYTES

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


@pytest.mark.parametrize("known", [True, False])
def test_file_or_operating_system_without_allocation(tmp_path, monkeypatch, known):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    if not known:
        monkeypatch.delattr(os, "posix_fallocate")
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
        from wina_calib.storage import ShardWriter
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
    with safe_open(folder / SINGLE, "pt") as file:
        assert (file.metadata() or {}) == metadata
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
