"""Products with quantized weights on CUDA: every format, shape, launch shape and number of rows against float64."""

import dataclasses

import pytest
import torch
from kernel_cases import error, random_weight
from quantized_cases import CASES, FORMATS, exact, inputs

from wina_calib.quantization.formats import Quantized, quantize_rows
from wina_calib.runtime.kernels import (
    autotune,
    codes_by_rows,
    codes_card,
    dequantized,
    dispatch,
    gathered,
    quantized_cuda,
    reference,
    streamed,
)
from wina_calib.runtime.kernels.around import Around

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICE = torch.device("cuda")
# Weights of 4 bits are rounded to float16; the rest is the output's dtype.
LIMITS = {torch.float32: 4e-4, torch.bfloat16: 4e-3, torch.float16: 6e-4}
# Around the inputs of a warp, 16 and 32, and the outputs of a thread, 16 and 32, and of a block, 64 to 256.
SHAPES = [(1, 64), (15, 128), (17, 192), (333, 256), (513, 320), (1100, 704), (2050, 1088)]


@pytest.fixture(autouse=True, params=["clusters", "two kernels"])
def way(request, monkeypatch, tmp_path):
    """With clusters and without, as on cards before Hopper; no launch shape is measured."""
    if not quantized_cuda.available(0):
        pytest.skip("needs compute capability 8.0 and NVRTC")
    if request.param == "clusters" and not codes_card.overlaps(0):
        pytest.skip("needs a card with clusters")
    monkeypatch.setenv("WINA_CALIB_CACHE", str(tmp_path))
    monkeypatch.setenv("WINA_CALIB_AUTOTUNE", "0")
    monkeypatch.setattr(autotune, "_known", {})
    monkeypatch.setattr(autotune, "_loaded", set())
    if request.param == "two kernels":
        monkeypatch.setattr(codes_card, "overlaps", lambda index: False)
        for module, names in (
            (gathered, ("_site", "_combine", "site_code")),
            (codes_by_rows, ("_rows",)),
            (dequantized, ("_dequantize", "_dequantizer")),
        ):
            for name in names:
                monkeypatch.setattr(module, name, memo(getattr(module, name).__wrapped__))
    return request.param


_made: dict = {}


def memo(function):
    """A cache of its own, since what is compiled for cards without clusters is other code."""

    def found(*key):
        if (function, key) not in _made:
            _made[function, key] = function(*key)
        return _made[function, key]

    return found


def on_card(weight):
    return weight.to(DEVICE)


def check(form, width, out, rows, dtype, cases=CASES, shape=None):
    """All cases, with and without bias and rows that are kept whole, against float64; the same bits when it is run again."""
    weight = random_weight(form, width, out)
    bias, dense_rows = torch.randn(out).to(dtype), torch.arange(rows) % 3 == 1
    there = on_card(weight)
    for case in cases:
        x, norm, threshold = inputs(case, rows, width, dtype)
        for added, dense in ((None, None), (bias, None), (None, dense_rows)):
            given = [t if t is None else t.to(DEVICE) for t in (norm, threshold, dense, added)]
            x_there = x.to(DEVICE)

            def run(x=x_there, given=given):
                if shape is None:
                    return dispatch.quantized_site(x, there, *given)
                return quantized_cuda.launch(shape, x, there, *given)

            y = run()
            assert y.dtype == dtype
            found = error(y.cpu(), exact(x, weight, norm, threshold, dense, added))
            assert found <= LIMITS[dtype], (case, form, shape, found)
            assert torch.equal(run(), y)


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize(("width", "out"), SHAPES)
def test_one_row_of_every_format_and_shape(form, width, out):
    for outs in (out, out + form.group_size):
        check(form, width, outs, 1, torch.bfloat16)
    check(form, width, out, 1, torch.float32)
    check(form, width, out, 1, torch.float16, ("plain", "one"))


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("rows", [2, 3, 4, 5, 6, 7, 8, 9, 18])
def test_a_few_rows(form, rows):
    check(form, 333, 320, rows, torch.bfloat16)
    if rows in (2, 3, 4, 5, 9):
        check(form, 333, 320, rows, torch.float32, ("plain", "one", "outlier"))


@pytest.mark.parametrize("form", [FORMATS[0], FORMATS[3], FORMATS[4]], ids=str)
@pytest.mark.parametrize("shape", gathered.SHAPES, ids=str)
def test_every_launch_shape(form, shape):
    check(form, 1100, 704, 1, torch.bfloat16, ("plain", "everything"), shape)
    check(form, 1100, 320, 4, torch.float16, ("plain",), shape)


@pytest.mark.parametrize("way", ["clusters"], indirect=True)  # no other way streams
@pytest.mark.parametrize("form", FORMATS[:4], ids=str)
@pytest.mark.parametrize("shape", streamed.SHAPES, ids=str)
def test_every_launch_shape_of_streamed_columns(form, shape):
    for width, out in ((40, 512), (1100, 1536), (4096, 2048 + 512)):
        assert streamed.serves(torch.bfloat16, on_card(random_weight(form, width, out)), 0)
        check(form, width, out, 1, torch.bfloat16, shape=shape)
    # Outputs of tiny inputs are subnormal in float16.
    check(form, 333, 1024, 1, torch.float16, tuple(case for case in CASES if case != "tiny"), shape)


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("rows", [33, 100])
def test_many_rows_have_the_bits_of_the_definition(form, dtype, rows, monkeypatch):
    monkeypatch.setattr(dequantized, "TILE_BYTES", 1 << 18)
    weight = random_weight(form, 300, 448)
    there = on_card(weight)
    room = torch.empty(300 * 448, dtype=dtype, device=DEVICE)
    for start, stop in ((0, 448), (128, 256), (384, 448)):
        tile = dequantized.dequantized(there, start, stop, room)
        assert torch.equal(tile.cpu(), weight.dequantize(dtype)[:, start:stop])
    x, norm, threshold = inputs("plain", rows, 300, dtype)
    bias = torch.randn(448).to(dtype)
    for added in (None, bias):
        given = [t if t is None else t.to(DEVICE) for t in (norm, threshold, None, added)]
        y = dispatch.quantized_site(x.to(DEVICE), there, *given)
        assert error(y.cpu(), exact(x, weight, norm, threshold, None, added)) <= max(LIMITS[dtype], 1e-3)


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", LIMITS)
def test_many_rows_made_ready(form, dtype, monkeypatch):
    weight, bias = random_weight(form, 300, 448), torch.randn(448).to(dtype)
    there = on_card(weight)
    x, norm, _ = inputs("plain", 40, 300, dtype)
    for added in (None, bias):
        ready = quantized_cuda.many_rows_of(there, None if added is None else added.to(DEVICE), dtype)
        expected = exact(x, weight, norm, torch.tensor(-1.0), None, added)
        y = ready(x.to(DEVICE))
        assert error(y.cpu(), expected) <= max(LIMITS[dtype], 1e-3)
        assert torch.equal(ready(x.to(DEVICE)), y)
        monkeypatch.setattr(dequantized, "TILE_BYTES", 1 << 18)
        assert error(ready(x.to(DEVICE)).cpu(), expected) <= max(LIMITS[dtype], 1e-3)
        monkeypatch.setattr(dequantized, "TILE_BYTES", 256 << 20)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9, 32, 33])
def test_rows_by_rows(dtype, rows):
    for out, width in ((1, 64), (17, 128), (333, 576), (5000, 896), (40, 70)):
        weight = quantize_rows(torch.randn(out, width))
        for scale in (1.0, 2.0**-20, 2.0**20 if dtype != torch.float16 else 2.0**4):
            x = (torch.randn(1, rows, width) * scale).to(dtype)
            there = type(weight)(weight.codes.to(DEVICE), weight.scales.to(DEVICE))
            y = dispatch.quantized_rows(x.to(DEVICE), there)
            expected = x.double() @ weight.dequantize().double().t()
            if dtype == torch.float16 and scale < 1:
                assert torch.allclose(y.cpu().double(), expected, atol=1e-7, rtol=2e-3)
            else:
                assert error(y.cpu(), expected) <= LIMITS[dtype]


def test_what_is_not_finite_shows():
    for form in FORMATS:
        weight = on_card(random_weight(form, 100, 128))
        for bad in (torch.nan, torch.inf):
            x = torch.randn(1, 100, device=DEVICE)
            x[0, 40] = bad
            y = dispatch.quantized_site(x, weight, torch.ones(100, device=DEVICE), torch.tensor(0.5, device=DEVICE))
            assert not y.isfinite().all()


@pytest.mark.parametrize("form", [FORMATS[0], FORMATS[3], FORMATS[4]], ids=str)
@pytest.mark.parametrize("dtype", LIMITS)
def test_what_is_around_a_product(form, dtype):
    width, out = 544, 320
    weight = random_weight(form, width, out)
    there = on_card(weight)
    _, norm, threshold = inputs("plain", 1, width, dtype)
    generator = torch.Generator().manual_seed(5)
    x, halves, added, bias, gain = (
        torch.randn(1, n, generator=generator).to(dtype) for n in (width, 2 * width, out, out, width)
    )
    for around, given in (
        (Around(gain[0], 1e-5), x),
        (Around(gated=True), halves),
        (Around(added=added), x),
        (Around(gain[0], 1e-5, added=added), x),
        (Around(gated=True, added=added), halves),
    ):
        moved = Around(*(v.to(DEVICE) if isinstance(v, torch.Tensor) else v for v in dataclasses.astuple(around)))
        y = dispatch.quantized_step(
            given.to(DEVICE), there, norm.to(DEVICE), threshold.to(DEVICE), bias[0].to(DEVICE), moved
        )
        expected = exact(around.input(given), weight, norm, threshold, None, bias[0])
        expected = expected if around.added is None else expected + added.double()
        # An input beside the threshold, or beside a rounding, may fall on the other side.
        assert error(y.cpu(), expected) <= 2 * LIMITS[dtype] + 5e-3


@pytest.mark.parametrize("form", [FORMATS[0], FORMATS[4]], ids=str)
def test_graph_follows_the_threshold(form):
    weight = random_weight(form, 512, 256)
    there = on_card(weight)
    x, norm, _ = inputs("plain", 1, 512, torch.bfloat16)
    threshold, x_there, norm_there = torch.tensor(0.5, device=DEVICE), x.to(DEVICE), norm.to(DEVICE)
    dispatch.quantized_site(x_there, there, norm_there, threshold)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = dispatch.quantized_site(x_there, there, norm_there, threshold)
    for value in (0.75, 0.2, -1.0):
        threshold.fill_(value)
        y.fill_(float("nan"))
        graph.replay()
        assert error(y.cpu(), exact(x, weight, norm, torch.tensor(value))) <= LIMITS[torch.bfloat16]


@pytest.mark.parametrize("rows", [1, 4, 40])
def test_compiled(rows):
    torch._dynamo.reset()
    weight, head = random_weight(FORMATS[0], 256, 128), quantize_rows(torch.randn(200, 128))
    there, head_there = on_card(weight), type(head)(head.codes.to(DEVICE), head.scales.to(DEVICE))
    x, norm, threshold = (t.to(DEVICE) for t in inputs("plain", rows, 256, torch.bfloat16))

    def site(x):
        return dispatch.quantized_rows(dispatch.quantized_site(x + 1, there, norm, threshold) * 2, head_there)

    with torch.no_grad():
        expected = site(x)
        found = torch.compile(site, fullgraph=True)(x)
    assert error(found, expected.double()) <= 1e-2


def test_what_it_cannot_read_goes_elsewhere():
    odd = on_card(random_weight(FORMATS[4], 64, 72))
    x = torch.randn(1, 64, device=DEVICE)
    assert not quantized_cuda.serves(x, odd)
    assert not quantized_cuda.serves(x.double(), on_card(random_weight(FORMATS[4], 64, 64)))
    turned = Quantized(odd.format, odd.codes.t().contiguous().t(), odd.scales)
    assert not quantized_cuda.serves(x, turned)
    ones, limit = torch.ones(64, device=DEVICE), torch.tensor(-1.0, device=DEVICE)
    assert torch.equal(dispatch.quantized_site(x, odd, ones, limit), reference.dense_quantized(x, odd))


def test_a_gradient_goes_the_reference_way():
    weight = on_card(random_weight(FORMATS[0], 64, 64))
    x = torch.randn(3, 64, device=DEVICE, requires_grad=True)
    y = dispatch.quantized_site(x, weight, torch.ones(64, device=DEVICE), torch.tensor(0.5, device=DEVICE))
    y.sum().backward()
    assert x.grad is not None


def test_tuned_once_and_remembered(way, monkeypatch):
    monkeypatch.delenv("WINA_CALIB_AUTOTUNE")
    weight = random_weight(FORMATS[0], 1024, 1280)
    there = on_card(weight)
    x, norm, threshold = inputs("plain", 1, 1024, torch.bfloat16)
    given = (x.to(DEVICE), there, norm.to(DEVICE), threshold.to(DEVICE))
    dispatch.quantized_site(*given)
    (known,) = autotune._known.values()
    shapes = (*gathered.SHAPES, *(streamed.SHAPES if way == "clusters" else ()))
    assert known in [dataclasses.astuple(shape) for shape in shapes]
    monkeypatch.setattr(quantized_cuda, "_fastest", None)
    assert error(dispatch.quantized_site(*given).cpu(), exact(x, weight, norm, threshold)) <= LIMITS[torch.bfloat16]
