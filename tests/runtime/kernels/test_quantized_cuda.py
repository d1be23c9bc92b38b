"""Products with quantized weights on CUDA, as far as a machine without a card can tell; on one: `test_quantized_gpu.py`."""

import dataclasses
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch
from kernel_cases import random_weight
from quantized_cases import FORMATS

from wina_calib.quantization.formats import WeightFormat, quantize_rows
from wina_calib.runtime.kernels import (
    attention_cuda,
    codes_by_rows,
    codes_card,
    dispatch,
    gathered,
    quantized_cuda,
    streamed,
)
from wina_calib.runtime.kernels.around import Around

# Shared memory that a block may have: Ada and the smaller Ampere, A100, Hopper.
ROOMS = [99 << 10, 163 << 10, 227 << 10]
WIDTHS = [64, 896, 4096, 14336, 28672]


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", WIDTHS)
def test_there_is_a_launch_shape_for_every_card_and_width(room, bits, width, monkeypatch):
    monkeypatch.setattr(codes_card, "room", lambda index: room)
    for dtype in codes_card.TYPES:
        rows = gathered.rows_at_once.__wrapped__(0, dtype, width, bits)
        assert 1 <= rows * codes_card.sides(dtype) <= codes_card.FACTORS
        for shape in gathered.candidates(width, bits, rows, rows * codes_card.sides(dtype), room):
            assert shape.inputs(width) * shape.slices >= width
            assert shape.inputs(width) % codes_card.WARP == 0
            assert shape.passes(width) * shape.warps * codes_card.WARP >= shape.inputs(width)
            assert shape.columns(bits) % shape.slices == 0
            assert shape.blocks(bits) * shape.warps * codes_card.WARP <= 768


@pytest.mark.parametrize("form", FORMATS[:4], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_launch_shapes_of_streamed_columns_fit_a_processor(form, width):
    shapes = streamed.candidates(width, form, ROOMS[-1])
    assert shapes
    for shape in shapes:
        assert shape.inputs(width) * shape.slices >= width
        assert shape.blocks * (shape.shared_bytes(width, form) + streamed.RESERVED) <= 228 << 10
        assert shape.blocks * shape.threads <= 2048
        assert shape.shared_bytes(width, form) % 2 == 0


def test_what_is_streamed(monkeypatch):
    monkeypatch.setattr(codes_card, "overlaps", lambda index: True)
    for form in FORMATS:
        assert streamed.serves(torch.bfloat16, random_weight(form, 64, 1024), 0) == (form.bits == 4)
        assert not streamed.serves(torch.float32, random_weight(form, 64, 1024), 0)
        assert not streamed.serves(torch.bfloat16, random_weight(form, 64, 1024 + 128), 0)
    monkeypatch.setattr(codes_card, "overlaps", lambda index: False)
    assert not streamed.serves(torch.bfloat16, random_weight(FORMATS[0], 64, 1024), 0)


def test_a_launch_shape_that_computes_something_else_is_left_out():
    expected = torch.randn(1, 256, generator=torch.Generator().manual_seed(0))
    quantized_cuda.check_close((expected * 1.004).bfloat16(), expected)
    quantized_cuda.check_close(torch.zeros(1, 256), torch.zeros(1, 256))
    for wrong in (expected * 1.03, expected.roll(1), expected + torch.nan, torch.zeros(1, 256)):
        with pytest.raises(ArithmeticError, match="off"):
            quantized_cuda.check_close(wrong, expected)


def test_too_wide_a_weight_has_none():
    assert gathered.candidates(1 << 20, 4, 1, 1, ROOMS[-1]) == ()
    assert streamed.candidates(1 << 20, FORMATS[0], ROOMS[-1]) == ()


def card(**changes):
    """Something that says it is a tensor on a card."""
    return SimpleNamespace(**{"device": torch.device("cuda", 0), "dtype": torch.bfloat16, "shape": (1, 64)} | changes)


def codes(shape, **changes):
    """Codes that say that they are on a card."""
    given = {"device": torch.device("cuda", 0), "shape": shape, "numel": lambda: shape[0] * shape[1]}
    return SimpleNamespace(**given | {"data_ptr": lambda: 256, "is_contiguous": lambda: True} | changes)


def weight(form, codes, contiguous=True):
    """A weight of which only the codes are looked at closely."""
    other = SimpleNamespace(is_contiguous=lambda: contiguous, data_ptr=lambda: 256)
    return SimpleNamespace(
        format=form, codes=codes, width=codes.shape[0], named=lambda: {"codes": codes, "scales": other}
    )


def test_what_the_code_can_read(monkeypatch):
    monkeypatch.setattr(quantized_cuda, "available", lambda index: True)
    monkeypatch.setattr(codes_card, "room", lambda index: ROOMS[0])
    form = WeightFormat(8)
    assert quantized_cuda.serves(card(), weight(form, codes((64, 128))))
    for x, held in (
        (card(device=torch.device("cpu")), weight(form, codes((64, 128)))),
        (card(dtype=torch.float64), weight(form, codes((64, 128)))),
        (card(device=torch.device("cuda", 1)), weight(form, codes((64, 128)))),
        (card(), weight(form, codes((64, 120)))),
        (card(), weight(form, codes((64, 128), data_ptr=lambda: 8))),
        (card(), weight(form, codes((64, 128), is_contiguous=lambda: False))),
        (card(), weight(form, codes((64, 128)), contiguous=False)),
        (card(), weight(form, codes((1 << 20, 1 << 12)))),
    ):
        assert not quantized_cuda.serves(x, held)
    monkeypatch.setattr(quantized_cuda, "available", lambda index: False)
    assert not quantized_cuda.serves(card(), weight(form, codes((64, 128))))


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_on_a_cpu_it_serves_nothing(form):
    x, held = torch.randn(1, 64), random_weight(form, 64, 128)
    assert not quantized_cuda.serves(x, held)
    assert not codes_by_rows.serves(x, quantize_rows(torch.randn(64, 64)))
    assert dispatch.quantized_step(x, held, torch.ones(64), torch.tensor(0.1), None, Around()) is None


@pytest.mark.parametrize("rows", [1, 33])
def test_a_traced_call_on_a_card_is_an_operator(rows, monkeypatch):
    held, seen = random_weight(FORMATS[0], 64, 128), []
    monkeypatch.setattr(dispatch, "_quantized_on_cpu", lambda x, codes: False)
    monkeypatch.setattr(dispatch, "_traced_on_cuda", lambda x: True)
    operators = SimpleNamespace(quantized_site=lambda x, *rest: seen.append(rest) or x.new_empty(x.shape[0], 128))
    monkeypatch.setattr(torch.ops, "wina_calib", operators, raising=False)
    x, norm, limit = torch.randn(rows, 64), torch.ones(64), torch.tensor(-1.0)
    y = dispatch.quantized_site(x, held, norm, limit)
    assert y.shape == (rows, 128)
    assert len(seen) == 1


def test_the_operators_take_what_they_are_given():
    for form in FORMATS:
        held = random_weight(form, 64, 128)
        x = torch.randn(3, 64)
        given = (x, held.codes, held.scales, held.zeros, form.bits, form.group_size, torch.ones(64), torch.tensor(0.5))
        y = dispatch._site_operator(*given, None, None)
        assert torch.equal(y, dispatch.quantized_site(x, held, torch.ones(64), torch.tensor(0.5)))
        assert dispatch._site_shape_of(*given, None, None).shape == y.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_around_a_product_by_operators(dtype):
    x, gain, added = torch.randn(2, 64).to(dtype), torch.randn(32).to(dtype), torch.randn(2, 3).to(dtype)
    matrix = torch.randn(32, 3).to(dtype)
    gate, up = x[:, :32], x[:, 32:]
    normed = gain * torch.nn.functional.rms_norm(gate.float(), (32,), None, 1e-5).to(dtype)
    for around, given, expected in (
        (Around(), gate, gate @ matrix),
        (Around(gain, 1e-5, added=added), gate, added + normed @ matrix),
        (Around(gated=True), x, (torch.nn.functional.silu(gate) * up) @ matrix),
    ):
        torch.testing.assert_close(around.result(given, lambda v: v @ matrix), expected)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs NVIDIA's compiler")
@pytest.mark.parametrize(("architecture", "hopper"), [("sm_80", 0), ("sm_89", 0), ("sm_90", 1)])
@pytest.mark.parametrize("form", [FORMATS[0], FORMATS[3], FORMATS[4]], ids=str)
def test_it_compiles_for_every_architecture(architecture, hopper, form, tmp_path):
    first, last = gathered.SHAPES[0], gathered.SHAPES[-1]
    zeros = int(form.bits == 4 and form.zero_point)
    kind = {"BITS": form.bits, "GROUP": form.group_size, "ZEROS": zeros, "CLUSTERED": hopper, "OVERLAP": hopper}
    site = {"SLICE": 512, "ROWS": 1, "TYPE": 1, "INPUT": 0}
    for constants in (
        site | shape_constants(first, form),
        site | shape_constants(first, form) | {"INPUT": 1},
        site | shape_constants(last, form) | {"INPUT": 2, "TYPE": 2},
        site | shape_constants(last, form) | {"ROWS": 4, "TYPE": 0},
        {"ROWS": 8, "TYPE": 1, "WARPS": codes_by_rows.WARPS, "STEPS": codes_by_rows.STEPS},
        {"ROWS": 1, "TYPE": 0, "WARPS": 1, "TILE": 1},
    ):
        compile_there(codes_card.SOURCE, architecture, kind | constants, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs NVIDIA's compiler")
@pytest.mark.parametrize("form", FORMATS[:4], ids=str)
def test_streamed_columns_compile_for_hopper(form, tmp_path):
    kind = {"BITS": 4, "GROUP": form.group_size, "ZEROS": int(form.zero_point), "CLUSTERED": 1, "OVERLAP": 1, "TYPE": 1}
    for i, shape in enumerate(streamed.SHAPES):
        found = kind | streamed.constants(shape, shape.inputs(4096), i % 3)
        compile_there(streamed.SOURCE, "sm_90", found, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs NVIDIA's compiler")
@pytest.mark.parametrize(("size", "group"), [(32, 1), (64, 7), (128, 4), (128, 8), (256, 4)])
def test_attention_of_a_token_compiles_for_hopper(size, group, tmp_path):
    for dtype, normed in ((torch.bfloat16, True), (torch.float16, False)):
        found = attention_cuda.constants(dtype, size, group, 8, normed=normed, masked=normed)
        compile_there(attention_cuda.SOURCE, "sm_90", found, tmp_path)


def compile_there(source, architecture, constants, folder):
    flags = [f"-D{name}={value}" for name, value in constants.items()]
    command = ["nvcc", "-cubin", f"-arch={architecture}", "-o", str(folder / "code"), *flags, str(source)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not made.returncode, made.stderr[-2000:]


def shape_constants(shape, form):
    names = "VEC", "WARPS", "ACROSS", "CLUSTER", "UNROLL"
    return dict(zip(names, dataclasses.astuple(shape), strict=True)) | {"BLOCKS": shape.blocks(form.bits)}
