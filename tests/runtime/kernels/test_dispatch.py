"""The seam, the reference and the CPU kernels; the Triton kernels through their interpreter."""

import copy
import ctypes
import gc
import importlib.util
import logging
import mmap
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.testing
from kernel_cases import ADVERSARIAL, DTYPES, LIMITS, adversarial, error, exact, operands
from torch.nn import functional as F

from wina_calib.common.memory import resident_bytes
from wina_calib.masks import mask as definition
from wina_calib.runtime.kernels import autotune, cluster, cpu, cuda, dispatch, native, native_build, nvrtc

SHAPES = [(64, 256), (333, 130), (512, 384), (96, 131)]


@pytest.fixture
def threads():
    """Sets the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def without_compiler(monkeypatch):
    """As on a machine that has no C compiler."""
    monkeypatch.setattr(native, "library", lambda: None)


@pytest.fixture(params=["in C", "bags", "sparse product"])
def each_product(request, monkeypatch):
    """Runs a test with each product that a processor may be given."""
    if request.param != "in C":
        monkeypatch.setattr(native, "library", lambda: None)
    elif not native.available(torch.float32):
        pytest.skip("needs a C compiler")
    monkeypatch.setattr(cpu, "bags_pay", lambda dtype: request.param == "bags")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "out"), SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 8])
def test_both_layouts_match_float64(dtype, width, out, rows):
    x, weight_t, norm, threshold = operands(rows, width, out, dtype)
    bias = torch.randn(out).to(dtype)
    dense_rows = torch.arange(rows) == 1
    expected = exact(x, weight_t, norm, threshold, dense_rows, bias)
    row_major = weight_t.t().contiguous().t()
    for weight in (weight_t, row_major):
        y = dispatch.sparse_site(x, weight, norm, threshold, dense_rows, bias)
        assert y.dtype == dtype
        assert error(y, expected) <= LIMITS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ADVERSARIAL)
@pytest.mark.parametrize(("width", "out"), [(1024, 512), (333, 130)])
def test_adversarial_inputs(dtype, case, width, out, threads, each_product):
    threads(2)
    args = adversarial(case, width, out, dtype)
    y = dispatch.sparse_site(*args)
    assert error(y, exact(*args)) <= LIMITS[dtype]
    if case == "nothing":
        assert not y.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_number_of_threads(dtype, count, threads, each_product):
    threads(count)
    for width, out in SHAPES:
        args = operands(1, width, out, dtype)
        assert error(dispatch.sparse_site(*args), exact(*args)) <= LIMITS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_input(dtype):
    wide, weight_t, norm, threshold = operands(3, 512, 128, dtype)
    x = wide[:, ::2]
    args = (x, weight_t[:256].contiguous(), norm[:256].contiguous(), threshold)
    assert error(dispatch.sparse_site(*args), exact(*args)) <= LIMITS[dtype]
    transposed = torch.randn(512, 3).to(dtype).t()
    args = (transposed, weight_t, norm, threshold)
    assert error(dispatch.sparse_site(*args), exact(*args)) <= LIMITS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limit", [-1.0, 0.0, 0.75, 100.0])
def test_kept_inputs_are_those_of_the_mask(dtype, limit):
    x, _, norm, _ = operands(1, 4000, 8, dtype)
    x[0, 7], norm[9] = 0.0, 0.0
    x[0, 20:40], norm[20:40] = 0.75, 1.0
    x[0, 33] = -0.75
    mask = definition.keep_mask(x, norm, torch.tensor(limit))[0] & (x[0] * norm != 0)
    assert torch.equal(cpu.kept_inputs(x[0], norm, limit), mask.nonzero().view(-1))


def test_ties_are_dropped():
    x = torch.tensor([[1.0, -2.0, 2.0, 3.0]])
    keep = definition.keep_mask(x, torch.tensor([2.0, 1.0, 1.0, 0.5]), torch.tensor(2.0))
    assert keep.tolist() == [[False, False, False, False]]
    keep = definition.keep_mask(x, torch.tensor([2.0, 1.0, 1.0, 0.5]), torch.tensor(1.5))
    assert keep.tolist() == [[True, True, True, False]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3])
def test_threshold_minus_one_has_the_bits_of_the_dense_product(dtype, rows):
    x, weight_t, norm, _ = operands(rows, 333, 130, dtype)
    x[0, :4] = torch.tensor([-0.0, 0.0, 1e-7, -1e-7]).to(dtype)
    weight, bias, everything = weight_t.t().contiguous(), torch.randn(130).to(dtype), torch.tensor(-1.0)
    masked = dispatch.mask_inputs(x, norm, everything)
    assert torch.equal(masked.view(torch.uint8), x.view(torch.uint8))
    assert torch.equal(dispatch.sparse_site(x, weight.t(), norm, everything, None, bias), F.linear(x, weight, bias))


@pytest.mark.parametrize("columns", [True, False])
def test_nan_shows_in_the_output(columns):
    x, weight_t, norm, threshold = operands(1, 64, 256, torch.float32)
    x[0, 5] = float("nan")
    y = dispatch.sparse_site(x, weight_t if columns else weight_t.t().contiguous().t(), norm, threshold)
    assert y.isnan().all()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("compiled", [True, False])
def test_masks_of_many_rows_are_those_of_the_score(dtype, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(native, "available", lambda dtype: False)
    torch.manual_seed(0)
    x, norm = torch.randn(2, 9, 45).to(dtype), torch.rand(45) * torch.randint(0, 2, (45,))
    damaged = x.clone()
    damaged[0, 3, 5], damaged[1, 2, 7] = torch.nan, torch.inf
    rows = torch.rand(2, 9) < 0.3
    for threshold in map(torch.tensor, (-1.0, 0.0, 0.4)):
        found, expected = (f(damaged, norm, threshold) for f in (dispatch.mask_inputs, definition.mask_inputs))
        assert torch.equal(
            dispatch.mask_inputs(x, norm, threshold.double()), definition.mask_inputs(x, norm, threshold)
        )
        assert found.isnan()[0, 3, 5]
        assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
        for dense in (None, rows):
            for values in (x, x[:, 1:], x[:0]):
                some = dense if dense is None or values is x else dense[: len(values), -values.shape[1] :]
                expected = definition.mask_inputs(values, norm, threshold, dense_rows=some)
                found = dispatch.mask_inputs(values, norm, threshold, some)
                assert torch.equal(found, expected)
                assert torch.equal(found.signbit(), expected.signbit())
    leaf = x.clone().requires_grad_()
    dispatch.mask_inputs(leaf, norm, torch.tensor(0.4)).sum().backward()
    assert torch.equal(leaf.grad != 0, definition.keep_mask(x, norm, torch.tensor(0.4)))


def test_no_rows():
    x, weight_t, norm, threshold = operands(1, 64, 256, torch.float32)
    assert dispatch.sparse_site(x[:0], weight_t, norm, threshold).shape == (0, 256)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_columns_in_blocks(dtype, monkeypatch):
    monkeypatch.setattr(cpu, "FLOAT_BLOCK", 100)
    monkeypatch.setattr(cpu, "has_16_bit_products", lambda dtype: False)
    x, weight_t, norm, _ = operands(6, 200, 333, dtype)
    bias = torch.randn(333).to(dtype)
    expected = exact(x, weight_t, norm, torch.tensor(-1.0), None, bias)
    assert error(cpu.dense_columns(x, weight_t, bias), expected) <= LIMITS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 6])
@pytest.mark.parametrize("columns", [True, False])
def test_dense_site(dtype, rows, columns):
    x, weight_t, norm, _ = operands(rows, 200, 333, dtype)
    bias = torch.randn(333).to(dtype)
    expected = exact(x, weight_t, norm, torch.tensor(-1.0), None, bias)
    stored = weight_t if columns else weight_t.t().contiguous().t()
    assert error(dispatch.dense_site(x, stored, bias), expected) <= LIMITS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_partial_results_that_cancel(dtype, threads, each_product):
    """The halves of the inputs cancel to a fortieth: partial results rounded to 16 bits would show."""
    threads(2)
    x, weight_t, norm, threshold = operands(1, 1024, 256, dtype, seed=5)
    x[0, 512:], norm[512:] = x[0, :512], norm[:512]
    weight_t[512:] = -weight_t[:512] * 0.96875
    args = (x, weight_t, norm, threshold)
    assert error(dispatch.sparse_site(*args), exact(*args)) <= LIMITS[dtype]


@pytest.mark.parametrize(
    ("dtype", "capability", "pays"),
    [
        (torch.bfloat16, "AVX512", True),
        (torch.float16, "AVX512", True),
        (torch.float32, "AVX512", False),
        (torch.bfloat16, "AVX2", False),
        (torch.bfloat16, "DEFAULT", False),
    ],
)
def test_bags_only_where_they_pay(monkeypatch, dtype, capability, pays):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert cpu.bags_pay.__wrapped__(dtype) is pays


def test_results_are_the_same_run_to_run(threads, each_product):
    threads(2)
    args = operands(1, 1024, 512, torch.bfloat16)
    first = dispatch.sparse_site(*args)
    assert all(torch.equal(first, dispatch.sparse_site(*args)) for _ in range(5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [1101, 2500])
def test_column_storage_copies_the_transpose(width, dtype):
    """Below and above the size that gets pages of its own."""
    weights = [
        torch.randn(1500, width).to(dtype),
        torch.randn(303, width).to(dtype),
        torch.randn(5, 2 * width).to(dtype)[:, ::2],
        torch.randn(7, width + 9).to(dtype)[:, 4 : width + 4],
    ]
    stored = cpu.column_storage(weights)
    assert stored.is_contiguous()
    assert torch.equal(stored, torch.cat(weights).t())


def test_column_storage_of_weights_of_several_dtypes():
    """That of the first counts; more numbers than it has room for are not written."""
    weights = [torch.randn(64, 96).bfloat16(), torch.randn(32, 96), torch.randn(32, 96).half()]
    stored = cpu.column_storage(weights)
    assert stored.dtype == torch.bfloat16
    assert torch.equal(stored, torch.cat([weight.bfloat16() for weight in weights]).t())
    assert torch.equal(copy.deepcopy(stored), stored)


@pytest.mark.parametrize("missing", ["memory", "huge pages"])
def test_column_storage_without_pages_of_its_own(missing, monkeypatch):
    class Mapped(mmap.mmap):
        def __new__(cls, *args, **kwargs):
            if missing == "memory":
                raise OSError(12, "Cannot allocate memory")
            return super().__new__(cls, *args, **kwargs)

        def madvise(self, *args):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Mapped)
    weight = torch.randn(1800, 2500).bfloat16()
    assert torch.equal(cpu.column_storage([weight]), weight.t())


def test_column_storage_is_given_back():
    weight = torch.randn(1800, 2500)
    before = resident_bytes()
    stored = [cpu.column_storage([weight]) for _ in range(4)]
    assert resident_bytes() - before >= 4 * weight.nbytes
    stored.clear()
    assert resident_bytes() - before < weight.nbytes


@pytest.mark.parametrize(
    ("device", "dtype", "rows", "columns", "kernel"),
    [
        ("cpu", torch.float32, 1, False, "reference"),
        ("cpu", torch.float32, 1, True, "cpu"),
        ("cpu", torch.bfloat16, 700, True, "cpu"),
        ("cpu", torch.float64, 1, True, "reference"),
        ("cuda", torch.bfloat16, 1, True, "cuda"),
        ("cuda", torch.bfloat16, 2, True, "reference"),
        ("cuda", torch.float64, 1, True, "reference"),
        ("cuda", torch.bfloat16, 1, False, "reference"),
        ("xpu", torch.bfloat16, 1, True, "reference"),
    ],
)
def test_choice(monkeypatch, device, dtype, rows, columns, kernel):
    monkeypatch.setattr(cuda, "available", lambda: True)
    assert dispatch.choose(device, dtype, rows, column_contiguous=columns) == kernel


def test_one_log_line_without_a_sparse_kernel(monkeypatch, caplog):
    monkeypatch.setattr(cuda, "available", lambda: False)
    monkeypatch.setattr(dispatch, "_said", set())
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert dispatch.choose("cuda", torch.bfloat16, 1, column_contiguous=True) == "reference"
    assert [r.message.split(":")[0] for r in caplog.records] == ["Triton is not installed"]


@pytest.mark.skipif(not native.available(torch.float32), reason="needs a C compiler")
@pytest.mark.parametrize("dtype", native_build.DTYPES)
def test_column_layout_pays_at_any_size_in_c(dtype):
    assert dispatch.column_layout_pays("cpu", dtype, 96, 96, 0.05)
    assert not dispatch.column_layout_pays("cpu", dtype, 2048, 5632, 0.0)
    assert not dispatch.column_layout_pays("cpu", torch.float64, 2048, 5632, 0.5)


@pytest.mark.usefixtures("without_compiler")
def test_column_layout_only_where_it_pays():
    assert dispatch.column_layout_pays("cpu", torch.bfloat16, 2048, 5632, 0.5)
    assert dispatch.column_layout_pays("cpu", torch.float32, 2048, 2048, 0.5)
    assert not dispatch.column_layout_pays("cpu", torch.float32, 2048, 2048, 0.35)
    assert not dispatch.column_layout_pays("cpu", torch.bfloat16, 2048, 5632, 0.0)
    assert not dispatch.column_layout_pays("cpu", torch.bfloat16, 512, 2048, 0.65)
    assert not dispatch.column_layout_pays("cpu", torch.float32, 2048, 5632, 0.25)
    assert not dispatch.column_layout_pays("cpu", torch.float64, 2048, 5632, 0.5)


def test_gradients_take_the_reference_path():
    x, weight_t, norm, threshold = operands(2, 64, 256, torch.float32)
    x.requires_grad_()
    dispatch.sparse_site(x, weight_t, norm, threshold).sum().backward()
    keep = definition.keep_mask(x.detach(), norm, threshold)
    assert torch.allclose(x.grad, weight_t.sum(1) * keep)


def test_operator_is_well_formed():
    x, weight_t, norm, threshold = operands(1, 64, 256, torch.float32)
    operator = torch.ops.wina_calib.sparse_site.default
    checks = torch.library.opcheck(operator, (x, weight_t, norm, threshold, None, torch.randn(256)))
    assert set(checks.values()) == {"SUCCESS"}


def test_compiles_without_breaks_and_follows_the_threshold():
    torch._dynamo.reset()
    x, weight_t, norm, threshold = operands(1, 64, 256, torch.float32)
    threshold = threshold.clone()
    frames = torch._dynamo.testing.CompileCounter()

    def site(x):
        return dispatch.sparse_site(x, weight_t, norm, threshold).relu()

    compiled = torch.compile(site, backend=frames, fullgraph=True)
    for value in (0.75, 1.5, -1.0):
        threshold.fill_(value)
        assert torch.equal(compiled(x), site(x))
    assert frames.frame_count == 1


@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_choice_can_be_traced(device):
    torch._dynamo.reset()

    def chosen(x):
        return x + (dispatch.choose(device, torch.bfloat16, 1, column_contiguous=True) == "cuda")

    x = torch.zeros(2)
    assert torch.equal(torch.compile(chosen, backend="eager", fullgraph=True)(x), chosen(x))


DAMAGED = ["", "{", "[]", "[" * 100_000, '{"key": [' + "9" * 5000 + "]}"]
DAMAGED += ['{"key": 3}', '{"key": [1, 2]}', '{"key": [0, 1, 2, 3]}', '{"key": [1e999, 1, 2, 3]}']


class TestAutotune:
    """Candidates, the bounded search and the file that remembers it."""

    @pytest.fixture(autouse=True)
    def fresh(self, monkeypatch, tmp_path):
        monkeypatch.setenv("WINA_CALIB_CACHE", str(tmp_path / "cache"))
        self.forget(monkeypatch)

    @staticmethod
    def forget(monkeypatch):
        monkeypatch.setattr(autotune, "_known", {})
        monkeypatch.setattr(autotune, "_loaded", set())

    def test_remembers_over_processes(self, monkeypatch):
        assert autotune.recall("key") is None
        autotune.remember("key", autotune.Config(64, 8, 256, 1))
        autotune.remember("other", autotune.Config(128, 4, 256, 2))
        self.forget(monkeypatch)
        assert autotune.recall("key") == (64, 8, 256, 1)

    @pytest.mark.parametrize(
        "content",
        [
            "",
            "{",
            "[]",
            "[" * 100_000,
            '{"key": [' + "9" * 5000 + "]}",
            '{"key": 3}',
            '{"key": [1, 2]}',
            '{"key": [0, 1, 2, 3]}',
        ],
    )
    def test_a_damaged_file_counts_as_empty(self, content):
        autotune.cache_file().write_text(content)
        assert autotune.recall("key") is None
        autotune.remember("key", autotune.Config(64, 8, 256, 1))
        assert "key" in autotune.cache_file().read_text()

    def test_a_shape_that_is_no_candidate_is_measured_again(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        shapes = autotune.candidates(4096, 4096, 2)
        autotune.cache_file().write_text('{"key": [1000000, 1000000, 1000000, 1000000]}')
        assert autotune.chosen("key", shapes, lambda: shapes[2]) == shapes[2]
        self.forget(monkeypatch)
        assert autotune.chosen("key", shapes, lambda: None) == shapes[2]

    def test_a_file_behind_a_link_or_that_others_may_write_counts_as_empty(self, monkeypatch, tmp_path):
        autotune.remember("key", autotune.Config(64, 8, 256, 1))
        file = autotune.cache_file()
        file.chmod(0o666)
        self.forget(monkeypatch)
        assert autotune.recall("key") is None
        file.chmod(0o600)
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
        self.forget(monkeypatch)
        assert autotune.recall("key") is None

    def test_a_folder_that_cannot_be_written(self, monkeypatch, tmp_path):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("WINA_CALIB_CACHE", str(tmp_path / "file"))
        autotune.remember("key", autotune.Config(64, 8, 256, 1))
        assert autotune.recall("key") == (64, 8, 256, 1)

    def test_search_skips_failures_and_stops_in_time(self):
        shapes = autotune.candidates(4096, 4096, 2)
        tried = []

        def run(config):
            tried.append(config)
            if config == shapes[0]:
                raise RuntimeError("out of registers")
            return float(len(tried))

        assert autotune.fastest(shapes, run) == shapes[1]
        assert tried == shapes
        tried.clear()
        assert autotune.fastest(shapes[1:], run, budget=-1.0) == shapes[1]
        assert len(tried) == 1
        assert autotune.fastest(shapes[:1], run) is None

    @pytest.mark.parametrize("without", ["memory", "a shape that runs"])
    def test_what_cannot_be_measured_is_tried_once_in_a_process(self, without, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        shapes, tried = autotune.candidates(4096, 4096, 2), []

        def measure():
            tried.append(1)
            if without == "memory":
                raise torch.OutOfMemoryError

        for _ in range(3):
            found = autotune.chosen("key", shapes, measure)
            assert found == (shapes[0] if without == "memory" else None)
        assert len(tried) == 1
        self.forget(monkeypatch)
        assert autotune.chosen("key", shapes, lambda: shapes[1]) == shapes[1]
        self.forget(monkeypatch)
        assert autotune.chosen("key", shapes, measure) == shapes[1]

    @pytest.mark.parametrize("itemsize", [2, 4])
    @pytest.mark.parametrize(("width", "out"), [(4096, 28672), (64, 16), (333, 130)])
    def test_candidates_are_few_and_powers_of_two(self, width, out, itemsize):
        shapes = autotune.candidates(width, out, itemsize)
        assert 1 <= len(shapes) <= 16
        for c in shapes:
            assert all(v & (v - 1) == 0 for v in (c.slice, c.block_k, c.block_n, c.warps))


class TestShapesInCuda:
    """What the code in `site.cu` takes for granted of its launch shapes, and what becomes of one that does not compile."""

    @pytest.mark.parametrize("itemsize", [2, 4])
    @pytest.mark.parametrize("out", [8, 4096, 28672])
    @pytest.mark.parametrize("width", [1, 33, 4096, 14336, 65536])
    def test_fit_the_code_and_the_card(self, width, out, itemsize):
        shapes = cluster.candidates(width, out, itemsize)
        assert len(shapes) >= (2 if width <= 16384 else 0)
        for s in shapes:
            assert s.lanes in (8, 16, 32) and s.cluster in (1, 2, 4, 8) and s.columns(itemsize) % s.cluster == 0
            assert s.warps * cluster.WARP <= 1024 and s.passes(width) <= cluster.MAX_PASSES
            assert s.cluster * s.slice(width) >= width and s.slice(width) < 1 << 16  # a place in it is a 16-bit number
            assert s.shared_bytes(width, itemsize) <= 99 << 10  # what the smallest of these cards give a block
        assert cluster.candidates(1 << 17, out, itemsize) == ()

    def test_one_that_does_not_compile_does_not_stop_the_others(self, monkeypatch):
        built = []

        def build(source, architecture, constants):
            built.append(constants["LANES"])
            if len(built) == 1:
                raise RuntimeError("does not compile")
            return b""

        monkeypatch.setattr(nvrtc, "build", build)
        monkeypatch.setattr(cluster, "_architecture", lambda index: "sm_none")
        cluster.prepare(cluster.NARROW, 0, torch.float16, 64)
        assert sorted(built) == sorted(s.lanes for s in cluster.NARROW)

    def test_serves_one_row_of_the_weights_own_dtype(self, monkeypatch):
        monkeypatch.setattr(cluster, "available", lambda index: True)
        weight_t = torch.zeros(64, 32, dtype=torch.bfloat16)
        x = torch.zeros(1, 64, dtype=torch.bfloat16)
        assert cluster.serves(x, weight_t)
        assert not cluster.serves(x.float(), weight_t)
        assert not cluster.serves(x.repeat(2, 1), weight_t)
        assert not cluster.serves(x, weight_t[:, :28].contiguous())
        assert not cluster.serves(x, torch.zeros(64 * 32 + 1, dtype=torch.bfloat16)[1:].view(64, 32))


class TestStartingInCuda:
    """What the driver is given, by a driver that only looks."""

    @pytest.fixture(autouse=True)
    def driver(self, monkeypatch):
        self.limits, self.answers = [], []
        monkeypatch.setattr(nvrtc, "_driver", lambda: self)
        monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 77, raising=False)

    def cuFuncSetAttribute(self, *given):
        self.limits.append(given)
        return 0

    def cuLaunchKernelEx(self, at, function, arguments, extra):
        assert extra is None
        given = nvrtc._Launch.from_address(at)
        attribute = given.attributes[0]
        self.seen = (
            [*given.grid],
            [*given.block],
            given.shared,
            given.stream,
            given.count,
            attribute.id,
            attribute.value,
        )
        self.values = [ctypes.c_uint64.from_address(p).value for p in arguments[:2]]
        self.values += [ctypes.c_int.from_address(p).value for p in arguments[2:]]
        return self.answers.pop(0) if self.answers else 0

    def cuGetErrorName(self, error, name):
        name._obj.value = b"CUDA_ERROR_INVALID_CLUSTER_SIZE" if error == 912 else None

    def test_structures_lie_as_the_drivers(self):
        assert ctypes.sizeof(nvrtc._Attribute) == 72 and nvrtc._Attribute.value.offset == 8
        assert [getattr(nvrtc._Launch, n).offset for n in ("stream", "attributes", "count")] == [32, 40, 48]

    def test_addresses_and_sizes_are_handed_over_again_and_again(self):
        launch = nvrtc.Launch(ctypes.c_void_p(5), (3, 2, 1), 128, 1000, 2, (7, 9))
        for address in (1 << 40, 0):
            gc.collect()
            launch(address, 11)
            assert self.values == [address, 11, 7, 9]
            assert self.seen == ([3, 2, 1], [128, 1, 1], 1000, 77, 1, nvrtc.OVERLAP_ATTRIBUTE, 1)
        assert not self.limits
        nvrtc.Launch(ctypes.c_void_p(5), (1, 1, 1), 32, 60_000, 1, ())
        assert [given[1:] for given in self.limits] == [(nvrtc.MAX_SHARED_ATTRIBUTE, 60_000)]
        with pytest.raises(ValueError, match="size"):
            launch(1)

    def test_a_thread_without_a_context_gets_one_and_other_errors_are_raised(self, monkeypatch):
        asked = []
        stream = SimpleNamespace(query=lambda: asked.append(1))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
        launch = nvrtc.Launch(ctypes.c_void_p(5), (1, 1, 1), 32, 0, 2, ())
        self.answers = [201]
        launch(1, 2)
        assert asked == [1]
        self.answers = [912, 7777]
        for told in (r"CLUSTER_SIZE \(912\)", r"an unknown error \(7777\)"):
            with pytest.raises(RuntimeError, match=told):
                launch(1, 2)
        assert not launch.lock.locked()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU itself")
def test_triton_kernels_through_the_interpreter():
    file = Path(__file__).parent / "test_gpu.py"
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", str(file)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "passed" in done.stdout


def test_attention_where_triton_cannot_compile(monkeypatch):
    monkeypatch.setattr(cuda, "_unusable", {None})
    query, key, value = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    mask[1, ..., 3:] = False
    found = cuda.attend(query, key, value, mask, 0.3)
    scores = (query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.3).masked_fill(~mask, float("-inf"))
    expected = scores.softmax(-1) @ value.repeat_interleave(2, 1)
    assert found.shape == (2, 1, 4, 8)
    assert torch.allclose(found.transpose(1, 2), expected, atol=1e-5)
