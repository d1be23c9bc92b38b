"""Products with quantized weights on a CPU: every format, shape and instruction set against the definition in float64."""

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import error, random_weight
from quantized_cases import CASES, FORMATS, exact, inputs

from wina_calib.quantization.formats import Quantized, QuantizedRows, WeightFormat, quantize_rows
from wina_calib.runtime.kernels import native, native_build, quantized_cpu

needs_compiler = pytest.mark.skipif(not native.available(torch.float32), reason="needs a C compiler")
X86 = {"avx512": ("avx512bw", "avx512vl", "avx512_vnni"), "avx2": ("avx2", "fma", "f16c"), "plain": ()}
FLAGS = {"avx512": native_build.TARGETS[0], "avx2": ("-mavx2", "-mfma", "-mf16c"), "plain": ()}
# What 16 bits and the output's dtype leave, relative to the norm of the outputs.
LIMITS = {torch.float32: 2e-4, torch.bfloat16: 4e-3, torch.float16: 6e-4}
# Around the inputs that are taken at a time, 64, their pairs, the outputs of a vector, 32 to 128, and those of a tile, 6144.
# And enough inputs to be summed in four parts, 512.
SHAPES = [(1, 64), (2, 128), (63, 192), (64, 256), (65, 320), (520, 128), (130, 704), (67, 6144), (9, 12416)]


@contextlib.contextmanager
def compiled(flags, folder):
    """The code in C as compiled with these flags instead of this processor's."""
    compiler = next(filter(None, map(shutil.which, native_build.COMPILERS)))
    patch = pytest.MonkeyPatch()
    patch.setattr(native_build, "TARGETS", (flags,))
    patch.setattr(native_build, "COMPILE_SECONDS", 300)  # sanitizers take their time
    opened = native_build._open(native_build._compile(compiler, folder))
    assert opened is not None
    patch.setattr(native_build, "library", lambda: opened)
    patch.setattr(native, "MIN_SHARED", 1)
    native.functions.cache_clear()
    try:
        yield
    finally:
        patch.undo()
        native.functions.cache_clear()


def processor_has(names) -> bool:
    with contextlib.suppress(OSError):
        return set(names) <= set(Path("/proc/cpuinfo").read_text().split())
    return not names


@pytest.fixture(scope="module", params=FLAGS)
def target(request, tmp_path_factory):
    """Each instruction set that there is code for."""
    if not native.available(torch.float32) or not processor_has(X86[request.param]):
        pytest.skip(f"needs a C compiler and a processor with {request.param}")
    with compiled(FLAGS[request.param], tmp_path_factory.mktemp(request.param)):
        yield request.param


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def check(form, width, out, rows, dtype, cases=CASES):
    """Products of all cases, with and without bias, rows that are kept whole and more threads, against float64."""
    weight = random_weight(form, width, out)
    bias = torch.randn(out).to(dtype)
    dense_rows = torch.arange(rows) % 3 == 1
    for case in cases:
        x, norm, threshold = inputs(case, rows, width, dtype)
        for added, dense in ((None, None), (bias, None), (None, dense_rows)):
            found = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                found.append(quantized_cpu.sparse_site(x, weight, norm, threshold, dense, added))
            expected = exact(x, weight, norm, threshold, dense, added)
            assert found[0].dtype == dtype
            assert error(found[0], expected) <= LIMITS[dtype], (case, form)
            assert torch.equal(found[0], found[1])
            assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize(("width", "out"), SHAPES)
def test_one_row_of_every_format_and_shape(target, form, width, out):
    for outs in (out, out + form.group_size):
        check(form, width, outs, 1, torch.float32)
    check(form, width, out, 1, torch.bfloat16, ("plain", "one"))
    check(form, width, out, 1, torch.float16, ("plain",))


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("rows", [2, 3, 4, 5, 8, 18])
def test_a_few_rows_of_every_format(target, form, rows):
    for width, out in ((1, 64), (130, 704 + form.group_size), (65, 6208)):
        check(form, width, out, rows, torch.float32)
    check(form, 130, 704, rows, torch.bfloat16, ("plain", "one"))


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_dequantized_tiles_are_the_definition(target, form):
    weight = random_weight(form, 33, 256 + form.group_size)
    for dtype, (start, stop) in itertools.product(
        LIMITS, ((0, weight.out_features), (128, 256), (256, 256 + form.group_size))
    ):
        expected = weight.dequantize(dtype)[:, start:stop]
        assert torch.equal(quantized_cpu.dequantized(weight, start, stop, dtype), expected)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_many_rows_are_multiplied_by_tiles(form, monkeypatch):
    monkeypatch.setattr(quantized_cpu, "TILE_BYTES", 1 << 16)
    weight, bias = random_weight(form, 130, 704), torch.randn(704)
    x, norm, threshold = inputs("plain", 70, 130, torch.float32)
    rows = torch.arange(70) % 3 == 1
    found = quantized_cpu.sparse_site(x, weight, norm, threshold, rows, bias)
    assert error(found, exact(x, weight, norm, threshold, rows, bias)) <= 1e-5
    for dtype in LIMITS:
        x = x.to(dtype)
        expected = exact(x, weight, norm, torch.tensor(-1.0))
        assert error(quantized_cpu.dense_site(x, weight), expected) <= 2 * LIMITS[dtype]
        assert error(quantized_cpu.dense_site(x[:2], weight), expected[:2]) <= LIMITS[dtype]


@pytest.mark.parametrize(
    ("rows", "width", "out"), [(1, 1, 1), (1, 33, 300), (3, 255, 129), (2, 256, 127), (16, 576, 257), (65, 40, 50)]
)
def test_products_with_a_matrix_by_rows(target, rows, width, out):
    weight = quantize_rows(torch.randn(out, width))
    for dtype, outlier in itertools.product(LIMITS, (False, True)):
        x = torch.randn(2, rows, width)
        x[..., width // 2] *= 300 if outlier else 1
        x = x[0].to(dtype)
        expected = x.double() @ weight.dequantize().double().T
        assert error(quantized_cpu.rows_product(x, weight), expected) <= 2 * LIMITS[dtype]


@pytest.mark.parametrize("form", [FORMATS[0], FORMATS[4]], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows(target, form, value):
    weight = random_weight(form, 70, 256)
    for rows in (1, 3):
        x, norm, threshold = inputs("plain", rows, 70, torch.float32)
        expected = quantized_cpu.sparse_site(x, weight, norm, threshold)
        x[-1, 5] = value
        found = quantized_cpu.sparse_site(x, weight, norm, threshold)
        assert found[-1].isnan().all()
        assert torch.equal(found[:-1], expected[:-1]) or error(found[:-1], expected[:-1].double()) < 1e-4
    head = quantize_rows(torch.randn(100, 70))
    assert quantized_cpu.rows_product(x[-1:], head).isnan().all()
    assert not quantized_cpu.rows_product(x[:1].nan_to_num(0.0, 0.0, 0.0), head).isnan().any()


def test_a_value_too_large_for_its_product_is_not_hidden(target):
    weight = random_weight(FORMATS[0], 4, 64)
    weight.scales.fill_(1000.0)
    x, norm, _ = inputs("plain", 1, 4, torch.float32)
    x[0, 1] = 3e38
    assert not quantized_cpu.sparse_site(x, weight, norm, torch.tensor(-1.0)).isfinite().any()


@needs_compiler
def test_blocks_in_one_call_take_quantized_weights():
    """Queries and keys turned, and the gated MLP, as the same products and steps apart, to the bit."""
    form, size = WeightFormat(4, 64), 64
    x, norm, threshold = inputs("plain", 1, 96, torch.bfloat16)
    rows = [
        native.Row(random_weight(form, 96, out), norm, threshold, None, torch.bfloat16) for out in (4 * size, 2 * 704)
    ]
    second = native.Row(
        random_weight(WeightFormat(4, 32), 704, 96), torch.ones(704), torch.tensor(0.01), None, torch.bfloat16
    )
    turn = torch.randn(2, size).bfloat16()
    apart = rows[0](x)
    heads = apart.view(4, size)[:3]
    half = torch.cat([-heads[:, 32:], heads[:, :32]], dim=-1)
    expected = torch.cat([(heads * turn[0] + half * turn[1]).view(-1), apart[0, 3 * size :]])
    assert torch.equal(native.turned(rows[0], x, turn[:1], turn[1:], (2, 1))[0], expected)
    gate, up = rows[1](x).chunk(2, dim=-1)
    found = native.gated(rows[1], second, x, gelu=False)
    assert error(found, second(torch.nn.functional.silu(gate) * up).double()) < 5e-3


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_without_a_compiler(form, monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    weight, bias = random_weight(form, 70, 128), torch.randn(128)
    for rows in (1, 3, 70):
        x, norm, threshold = inputs("plain", rows, 70, torch.float32)
        expected = exact(x, weight, norm, threshold, None, bias)
        assert error(quantized_cpu.sparse_site(x, weight, norm, threshold, None, bias), expected) <= 1e-5
        expected = exact(x, weight, norm, torch.tensor(-1.0))
        assert error(quantized_cpu.dense_site(x, weight), expected) <= 1e-5
        assert error(quantized_cpu.rows_product(x, quantize_rows(torch.eye(70))), x.double()) <= 1e-5


@needs_compiler
def test_what_does_not_fit_is_refused():
    weight = random_weight(FORMATS[0], 64, 128)
    row = native.Row(weight, torch.ones(64), torch.tensor(0.5))
    x = torch.randn(3, 64)
    for wrong in (x[:, :63], x.double(), x.repeat(30, 1), x[:0], x.to("meta")):
        with pytest.raises(ValueError, match="expected up to 64 rows of 64"):
            quantized_cpu.few(row, wrong)
    turned = Quantized(weight.format, weight.codes.t().contiguous().t(), weight.scales, weight.zeros)
    with pytest.raises(ValueError, match="codes is .* expected it contiguous"):
        native.Row(turned, torch.ones(64), torch.tensor(0.5))
    head = QuantizedRows(torch.zeros(6, 8, dtype=torch.int8).t(), torch.ones(8))
    with pytest.raises(ValueError, match="expected 6 contiguous columns"):
        quantized_cpu.rows_product(torch.randn(1, 6), head)


def test_no_rows(target):
    weight = random_weight(FORMATS[0], 64, 128)
    assert quantized_cpu.sparse_site(torch.empty(0, 64), weight, torch.ones(64), torch.tensor(0.5)).shape == (0, 128)


def test_the_error_that_is_stated(target):
    """Of 16 bits a block: the figures of the module's text, on inputs like a model's and on one that is far from the others."""
    for form, (case, limit) in itertools.product(FORMATS, (("plain", 6e-5), ("outlier", 2e-4))):
        x, norm, threshold = inputs(case, 1, 1024, torch.float32)
        weight = random_weight(form, 1024, 512)
        found = error(quantized_cpu.sparse_site(x, weight, norm, threshold), exact(x, weight, norm, threshold))
        assert 0 < found <= limit


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("rows", [1, 5])
def test_a_large_input_of_small_weights_leaves_the_others_alone(target, form, rows):
    """Rounded to 16 bits of its size, they would be lost, and it itself counts for nothing."""
    width = 300
    x, norm, threshold = inputs("plain", rows, width, torch.float32)
    x[:, 40] = 1e6
    x[-1, 250] = -3e4
    weight = random_weight(form, width, 192)
    (weight.codes if form.bits == 8 else weight.scales)[[40, 250]] = 0
    found = quantized_cpu.sparse_site(x, weight, norm, threshold)
    expected = exact(x, weight, norm, threshold)
    assert all(error(y, e) <= 2e-4 for y, e in zip(found.split(1), expected.split(1), strict=True))


SANITIZED = """
import sys, tempfile
from pathlib import Path
import torch
sys.path[:0] = [{here!r}]
import test_layers as layers
import test_quantized_cpu as cases
flags = (*cases.FLAGS[sys.argv[1]], "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
with cases.compiled(flags, Path(tempfile.mkdtemp())):
    for form in (cases.FORMATS[0], cases.FORMATS[3], cases.FORMATS[4]):
        for width, out in ((1, 64), (65, 320), (520, 64)):
            cases.check(form, width, out, 1, torch.float32, ("plain",))
            cases.check(form, width, out, 5, torch.bfloat16, ("plain",))
        cases.test_dequantized_tiles_are_the_definition(None, form)
    cases.test_products_with_a_matrix_by_rows(None, 3, 255, 129)
    cases.test_what_is_not_finite_shows(None, cases.FORMATS[0], torch.nan)
    cases.test_a_value_too_large_for_its_product_is_not_hidden(None)
    cases.test_blocks_in_one_call_take_quantized_weights()
    layers.compare(torch.bfloat16, [layers.layer_of(torch.bfloat16, cases.FORMATS[0])], masked=True, length=7)
    layers.compare(torch.float32, [layers.layer_of(torch.float32, size=6, width=40, heads=(3, 1))])
    layers.compare(torch.bfloat16, [layers.layer_of(torch.bfloat16, cases.FORMATS[0], width=576)])
print("clean")
"""


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", FLAGS)
def test_no_byte_outside_is_read_or_written(name, tmp_path):
    if not processor_has(X86[name]):
        pytest.skip(f"needs a processor with {name}")
    libraries = []
    for library in ("libasan.so", "libubsan.so"):
        command = ["gcc", f"-print-file-name={library}"]
        found = (
            shutil.which("gcc") and subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        )
        if not found or not Path(found).is_absolute():
            pytest.skip("needs gcc with its sanitizers")
        libraries.append(found)
    given = os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "TMPDIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    script = SANITIZED.format(here=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", script, name], env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "clean\n"
