"""The product in C: what it computes, that it is compiled once, and that everything works without it."""

import hashlib
import logging
import os
import pwd
import shutil
import subprocess
import sys

import pytest
import torch
from kernel_cases import ADVERSARIAL, LIMITS, adversarial, error, exact, operands

from wina_calib.common import own_cache
from wina_calib.masks.mask import keep_mask
from wina_calib.runtime.kernels import native, native_build

needs_compiler = pytest.mark.skipif(not native.available(torch.float32), reason="needs a C compiler")
# Around the numbers of rows and outputs that are taken at a time: 8, 16, 32, 6144; odd ones; less than a block.
SHAPES = [(1, 1), (5, 3), (8, 32), (17, 33), (16, 47), (64, 2049), (333, 130), (33, 6145), (96, 12301)]


@pytest.fixture(autouse=True)
def threads():
    """Gives the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("dtype", native_build.DTYPES)
@pytest.mark.parametrize(("width", "out"), SHAPES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_shape(dtype, width, out, count, monkeypatch):
    monkeypatch.setattr(native, "MIN_SHARED", 1)
    torch.set_num_threads(count)
    bias = torch.randn(out).to(dtype)
    for case in ADVERSARIAL if width > 16 else ["plain", "everything", "nothing"]:
        x, weight_t, norm, threshold = adversarial(case, width, out, dtype)
        for added in (None, bias):
            y = native.Row(weight_t, norm, threshold, added)(x)
            assert error(y, exact(x, weight_t, norm, threshold, None, added)) <= LIMITS[dtype], case


@needs_compiler
@pytest.mark.parametrize("dtype", native_build.DTYPES)
def test_the_same_bits_for_any_number_of_threads(dtype, monkeypatch):
    monkeypatch.setattr(native, "MIN_SHARED", 1)
    x, weight_t, norm, threshold = operands(1, 700, 5000, dtype)
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(native.Row(weight_t, norm, threshold)(x))
    assert all(torch.equal(found[0], other) for other in found)


@needs_compiler
@pytest.mark.parametrize("dtype", native_build.DTYPES)
def test_the_mask_is_the_references(dtype):
    """Powers of two as weights of one output: their sum says which inputs were kept."""
    torch.manual_seed(0)
    for threshold in (-1.0, 0.0, 0.5, 0.75):
        x = torch.randint(-4, 5, (1, 8)).to(dtype) / 4
        norm = torch.tensor([1.0, 0.5, 2.0, 1.0, 0.0, 1.5, 1.0, 3.0])
        keep = keep_mask(x, norm, torch.tensor(threshold)) & (x != 0)
        weight_t = torch.where(x[0] == 0, 0.0, 2.0 ** torch.arange(8) / x[0].float()).to(dtype)[:, None].contiguous()
        expected = (keep[0] * (x[0].double() * weight_t[:, 0].double())).sum()
        found = native.Row(weight_t, norm, torch.tensor(threshold))(x)
        assert error(found, expected.reshape(1, 1)) <= LIMITS[dtype] / 4


@needs_compiler
@pytest.mark.parametrize("dtype", native_build.DTYPES)
@pytest.mark.parametrize("shared", [1, 1 << 40])
def test_the_mask_of_many_rows_is_the_references(dtype, shared, monkeypatch):
    monkeypatch.setattr(native, "MIN_SHARED", shared)
    torch.set_num_threads(2)
    torch.manual_seed(0)
    x, norm = torch.randn(2, 9, 45).to(dtype), torch.rand(45) * torch.randint(0, 2, (45,))
    x[0, 3, 5], x[1, 2, 7] = torch.nan, torch.inf
    rows = torch.rand(2, 9) < 0.3
    for threshold in map(torch.tensor, (-1.0, 0.0, 0.4)):
        for dense in (None, rows):
            found = native.mask_inputs(x.transpose(0, 1), norm, threshold, None if dense is None else dense.T)
            keep = ~((x.float().abs() * norm) <= threshold)
            keep = keep if dense is None else keep | dense.unsqueeze(-1)
            expected = torch.where(keep, x, torch.zeros((), dtype=dtype)).transpose(0, 1)
            assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


@needs_compiler
def test_bfloat16_is_rounded_as_torch_does():
    values = torch.cat([torch.randn(4000), torch.tensor([0.0, -0.0, float("inf"), float("-inf"), 3.3e38, 1e-40])])
    weight_t = torch.stack([values.bfloat16(), (values * 0.00390625).bfloat16()])
    x, norm = torch.ones(2).bfloat16(), torch.ones(2)
    expected = (weight_t[0].float() + weight_t[1].float()).bfloat16()
    found = native.Row(weight_t, norm, torch.tensor(-1.0))(x)
    if found[-1] == 0:  # the instruction that multiplies pairs takes what is not normal for zero, and nothing else
        expected[-1] = 0
    assert torch.equal(found, expected)


@needs_compiler
@pytest.mark.parametrize("dtype", native_build.DTYPES)
def test_shapes_strides_and_everything(dtype):
    x, weight_t, norm, threshold = operands(1, 512, 128, dtype)
    halved = weight_t[:256].clone()
    product = native.Row(halved, norm[:256], threshold)
    assert error(product(x[:, ::2]), exact(x[:, ::2], halved, norm[:256], threshold)) <= LIMITS[dtype]
    row = x[0, :256].reshape(1, 1, 256)
    assert product(row).shape == (1, 1, 128)
    expected = exact(x[:, :256], halved, norm[:256], torch.tensor(-1.0))
    assert error(product(row, everything=True)[0], expected) <= LIMITS[dtype]


@needs_compiler
def test_the_threshold_is_read_at_every_call():
    x, weight_t, norm, threshold = operands(1, 512, 128, torch.float32)
    product = native.Row(weight_t, norm, threshold)
    for value in (0.75, 1.5, -1.0):
        threshold.fill_(value)
        assert error(product(x), exact(x, weight_t, norm, threshold)) <= LIMITS[torch.float32]


@needs_compiler
def test_what_does_not_fit_is_refused():
    x, weight_t, norm, threshold = operands(2, 64, 128, torch.float32)
    product = native.Row(weight_t, norm, threshold)
    for wrong in (x, x[:1, :63], x[:1].double(), x[:1].to("meta")):
        with pytest.raises(ValueError, match="expected one row of 64"):
            product(wrong)


RUN = """
import sys, torch
from wina_calib.runtime.kernels import native
print(native.available(torch.bfloat16))
names = {line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line or "libomp" in line}
print(len(names))
"""


@needs_compiler
def test_compiled_with_torchs_threads_and_kept(tmp_path):
    """In a process of its own: no second OpenMP, with threads of its own, is loaded."""
    given = os.environ | {"WINA_CALIB_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", RUN], env=given, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "1"]
    (folder,) = (tmp_path / "cache").iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    (made,) = folder.iterdir()
    assert hashlib.sha256(made.read_bytes()).hexdigest() in made.name


class Opened:
    """The library as a new process would open it, from a cache of its own; what is compiled is a copy of what was."""

    def __init__(self, cache, monkeypatch):
        self.cache, self.compiled = cache, 0
        (whole,) = native_build.cache_folder().glob(f"site-{native_build._fingerprint(self.compiler)}-*.so")
        self.whole = whole.read_bytes()
        monkeypatch.setenv("WINA_CALIB_CACHE", str(cache))
        monkeypatch.setattr(native_build, "_compile", self.compile)

    @property
    def compiler(self):
        return next(filter(None, map(shutil.which, (os.environ.get("CC", ""), *native_build.COMPILERS))))

    def compile(self, compiler, folder):
        self.compiled += 1
        (folder / "site.so").write_bytes(self.whole)
        return folder / "site.so"

    def again(self):
        """Whether it was compiled; it is there in any case, as one file that is kept, if any is."""
        before = self.compiled
        assert native_build.library.__wrapped__() is not None
        return self.compiled > before

    @property
    def kept(self):
        (folder,) = self.cache.iterdir()
        (made,) = folder.iterdir()
        return made


@pytest.fixture
def opened(tmp_path, monkeypatch):
    return Opened(tmp_path / "cache", monkeypatch)


@needs_compiler
def test_compiled_once_and_again_where_what_is_kept_is_damaged(opened):
    assert opened.again()
    made = opened.kept
    before = made.stat().st_mtime_ns, made.stat().st_ino
    assert not opened.again()
    assert (opened.kept, made.stat().st_mtime_ns, made.stat().st_ino) == (made, *before)
    whole = made.read_bytes()
    for damaged in (b"damaged", whole[: len(whole) // 3], whole[:5000] + b"?" + whole[5001:], b""):
        opened.kept.unlink()  # not written over: it is open in this process
        made.write_bytes(damaged)
        assert opened.again()
        assert opened.kept.read_bytes() == whole


@needs_compiler
def test_without_a_home_it_is_compiled_all_the_same(opened, monkeypatch):
    def unknown(_):
        raise KeyError("uid")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "WINA_CALIB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    assert opened.again()
    assert not opened.cache.exists()


@needs_compiler
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of others")
def test_what_others_put_into_the_cache_is_not_run(opened, caplog):
    own_cache._warn.cache_clear()
    assert opened.again()
    os.chown(opened.kept, 65534, 65534)
    opened.cache.chmod(0o1777)
    assert opened.again()
    made = opened.kept
    assert made.stat().st_uid == 0
    os.chown(made.parent, 65534, 65534)
    before = made.stat().st_atime_ns
    assert opened.again()
    assert opened.again()
    assert caplog.text.count("belongs to another user") == 1
    assert (opened.kept, made.stat().st_atime_ns) == (made, before)


def test_without_a_compiler_one_line_says_so(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "")
    assert native_build.library.__wrapped__() is None
    assert caplog.text.count("no C compiler") == 1
    monkeypatch.undo()
    monkeypatch.setenv("WINA_CALIB_NATIVE", "0")
    assert native_build.library.__wrapped__() is None


@pytest.mark.parametrize("there", [True, False])
def test_it_is_available_where_the_library_is(there, monkeypatch):
    library = native_build.library() if there else None
    if there and library is None:
        pytest.skip("needs a C compiler")
    monkeypatch.setattr(native, "library", lambda: library)
    assert native.available(torch.float32) is there


@needs_compiler
def test_a_compiler_that_fails_and_a_cache_that_cannot_be_written(tmp_path, monkeypatch, caplog):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho cannot >&2\nexit 1\n")
    broken.chmod(0o755)
    with caplog.at_level(logging.DEBUG):
        assert native_build._load(tmp_path, "none", str(broken)) is None
    assert "cannot" in caplog.text
    assert not list(tmp_path.glob("tmp*"))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WINA_CALIB_CACHE", str(tmp_path / "file"))
    assert native_build.library.__wrapped__() is not None


needs_product = pytest.mark.skipif(
    not native.has_product(torch.bfloat16), reason="needs a processor that multiplies pairs of bfloat16"
)


@needs_product
@pytest.mark.parametrize(("width", "out"), [*SHAPES[:6], (333, 130), (257, 31), (520, 160), (130, 4200)])
@pytest.mark.parametrize("rows", [2, 32, 33, 150])
@pytest.mark.parametrize("masked", [False, True])
def test_the_product_of_several_rows(rows, width, out, masked, monkeypatch):
    """Around 32 and 128 rows, 16 and 128 inputs, 32, 64, 512 and 2,048 outputs; a row does not depend on the others."""
    monkeypatch.setattr(native, "MIN_SHARED", 1)
    x, weight_t, norm, threshold = operands(rows, width, out, torch.bfloat16)
    x[-1] = 0
    mask = (norm, threshold, torch.arange(rows) % 3 == 1) if masked else ()
    keep = keep_mask(x, norm, threshold) | mask[2][:, None] if masked else torch.ones_like(x, dtype=torch.bool)
    for bias in (None, torch.randn(out).bfloat16()):
        expected = (x.double() * keep) @ weight_t.double() + (0 if bias is None else bias.double())
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(native.product(x, weight_t, bias, *mask))
        assert error(found[0], expected) <= LIMITS[torch.bfloat16]
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])
        few = slice(-2, None) if rows <= 32 else slice(-33, None)
        alone = native.product(x[few], weight_t, bias, *mask[:2], *(part[few] for part in mask[2:]))
        assert torch.equal(alone, found[0][few])


@needs_product
@pytest.mark.parametrize("rows", [4, 40])
def test_the_product_masks_as_the_reference(rows):
    """Weights are a unit matrix, so that the product is the masked input; scores lie on the threshold and beside it."""
    x = torch.tensor([0.5, 0.25, -0.5, 1.0]).bfloat16().repeat(rows, 40)
    norm = torch.where(torch.arange(160) % 3 == 0, 1.0, 1 + 2**-20)
    found = native.product(x, torch.eye(160).bfloat16(), None, norm, torch.tensor(0.5))
    assert torch.equal(found, torch.where(keep_mask(x, norm, torch.tensor(0.5)), x, 0))


@needs_product
@pytest.mark.parametrize("rows", [8, 40])
def test_the_product_shows_what_is_not_finite_and_takes_any_strides(rows):
    x, weight_t, _, _ = operands(rows, 64, 40, torch.bfloat16)
    expected = native.product(x, weight_t)
    assert torch.equal(native.product(x.t().contiguous().t(), weight_t), expected)
    x[1, 5], x[2, 6] = torch.nan, torch.inf
    found = native.product(x, weight_t)
    assert found[1].isnan().all()
    assert found[2].isinf().all()
    assert torch.equal(found[3:], expected[3:])


@needs_product
def test_the_product_refuses_weights_of_another_kind():
    x, weight_t, _, _ = operands(4, 64, 40, torch.bfloat16)
    for other in (weight_t.float(), weight_t[:63], weight_t.to("meta")):
        with pytest.raises(ValueError, match="expected (bfloat16 on the CPU|rows of 63 torch.bfloat16)$"):
            native.product(x, other)


@needs_compiler
def test_the_norm_takes_weights_of_any_stride():
    x, weights = torch.randn(3, 24), torch.randn(24, 2)
    found = native.norm(x, weights[:, 0], 1e-5)
    assert torch.equal(found, native.norm(x, weights[:, 0].clone(), 1e-5))


@needs_compiler
@pytest.mark.parametrize("dtype", native_build.DTYPES)
@pytest.mark.parametrize("width", [1, 15, 64, 2049])
def test_the_norm_is_torchs_to_rounding(dtype, width, monkeypatch):
    monkeypatch.setattr(native, "MIN_SHARED", 1)
    x, weight = (torch.randn(3, 7, width) * 3).to(dtype), torch.randn(width).to(dtype)
    wide = x.double()
    expected = weight.double() * (wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).to(dtype).double()
    found = native.norm(x.transpose(0, 1), weight, 1e-5)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(), expected.transpose(0, 1), rtol=8e-3 if dtype == torch.bfloat16 else 1e-6, atol=0
    )
