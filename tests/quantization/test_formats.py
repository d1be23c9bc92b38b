"""Bytes of int4 and int8 mask groups, and what is refused."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wina_calib.errors import UsageError
from wina_calib.quantization.formats import (
    Quantized,
    WeightFormat,
    pack_codes,
    pack_zeros,
    quantize_rows,
    unpack_codes,
    unpack_zeros,
)


def random_group(form: WeightFormat, width: int, out: int, seed: int = 0) -> Quantized:
    """A mask group of random bytes; half of the scales are negative."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (dtype, shape) in form.specs(width, [out]).items():
        if dtype.is_floating_point:
            tensors[name] = torch.randn(shape, generator=generator).to(dtype)
        else:
            info = torch.iinfo(dtype)
            tensors[name] = torch.randint(info.min, info.max + 1, shape, generator=generator, dtype=torch.int64).to(
                dtype
            )
    return Quantized.of(form, tensors)


def test_one_group_of_int4_byte_by_byte() -> None:
    codes = torch.arange(64, dtype=torch.uint8).remainder(16).flip(0).view(1, 1, 64)
    packed = pack_codes(codes, 64)
    assert packed.shape == (1, 32)
    assert packed[0, 0] == 15 | 15 << 4  # outputs 0 and 32
    assert packed[0, 1] == 14 | 14 << 4  # outputs 1 and 33
    group = Quantized(WeightFormat(4, 64, zero_point=False), packed, torch.full((1, 1), -0.5, dtype=torch.float16))
    assert group.dequantize()[0, :3].tolist() == [-0.5 * 7, -0.5 * 6, -0.5 * 5]
    with_zero = Quantized(WeightFormat(4, 64), packed, group.scales, torch.tensor([[3]], dtype=torch.uint8))
    assert with_zero.dequantize()[0, :3].tolist() == [-0.5 * 12, -0.5 * 11, -0.5 * 10]


def test_a_group_is_read_by_its_definition_output_by_output() -> None:
    for form in (WeightFormat(4, 32), WeightFormat(4, 64), WeightFormat(4, 32, zero_point=False), WeightFormat(8)):
        group = random_group(form, 3, 192)
        weights, scales = group.dequantize(), group.scales.float()
        for j in range(3):
            for o in range(192):
                g, place = divmod(o, form.group_size)
                if form.bits == 8:
                    expected = scales[o] * int(group.codes[j, o])
                else:
                    half = form.group_size // 2
                    byte = int(group.codes[j, g * half + place % half])
                    code = byte >> 4 if place >= half else byte & 15
                    zero = 8
                    if group.zeros is not None:
                        zero = int(group.zeros[j, g // 2]) >> 4 * (g % 2) & 15
                    expected = scales[j, g] * (code - zero)
                assert weights[j, o] == expected, (form, j, o)


@given(st.integers(1, 5), st.integers(1, 5), st.sampled_from((32, 64)), st.integers(0, 1000))
def test_codes_and_zeros_survive_packing(width: int, groups: int, size: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    codes = torch.from_numpy(generator.integers(0, 16, (width, groups, size), dtype=np.uint8))
    zeros = torch.from_numpy(generator.integers(0, 16, (width, groups), dtype=np.uint8))
    assert torch.equal(unpack_codes(pack_codes(codes, size), size), codes)
    assert pack_zeros(zeros).shape == (width, (groups + 1) // 2)
    assert torch.equal(unpack_zeros(pack_zeros(zeros), groups), zeros)


@pytest.mark.parametrize("form", [WeightFormat(4, 32), WeightFormat(4, 64, zero_point=False), WeightFormat(8)], ids=str)
def test_parts_tiles_and_devices_give_the_same_weights(form: WeightFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    group = random_group(form, 10, 320)
    weights = group.dequantize()
    monkeypatch.setattr("wina_calib.quantization.formats.TILE_ELEMENTS", 3 * 320)
    assert [tile.shape[0] for _, tile in group.tiles(torch.float32)] == [3, 3, 3, 1]
    assert torch.equal(group.whole(torch.float32), weights.t())
    assert torch.equal(group.whole(torch.bfloat16), weights.t().bfloat16())
    assert torch.equal(group.outputs(64, 192).dequantize(), weights[:, 64:192])
    assert torch.equal(group.outputs(192, 320).whole(torch.float32), weights[:, 192:].t())
    assert torch.equal(group.dequantize(inputs=slice(4, 6)), weights[4:6])
    assert group.outputs(64, 192).out_features == 128


def test_a_part_may_begin_with_an_odd_group() -> None:
    group = random_group(WeightFormat(4, 32), 4, 160)
    assert torch.equal(group.outputs(32, 128).dequantize(), group.dequantize()[:, 32:128])


def test_bits_count_scales_and_zeros() -> None:
    outs = [576, 192, 192]
    assert WeightFormat(4, 64, zero_point=False).bits_a_weight(outs) == 4.25
    assert WeightFormat(4, 64).bits_a_weight([128]) == 4.3125
    assert WeightFormat(4, 64).bits_a_weight([64]) == 4.375  # one zero takes a byte of its own
    assert WeightFormat(4, 32).bits_a_weight(outs) == 4.625
    assert WeightFormat(3, 64).bits_a_weight(outs) == 3 + 16 / 64 + 3 / 64
    assert WeightFormat(8).bits_a_weight(outs) == 8
    assert WeightFormat(8).stored_bits(10, outs) == 8 * 10 * 960 + 32 * 960


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WeightFormat(5), "5 bits are not known; there are 4 and 8"),
        (lambda: WeightFormat(4, 48), "groups of 48 outputs are not known; there are 32 and 64"),
        (lambda: WeightFormat(4, 64).specs(8, [64, 96]), "96 outputs, which do not divide into groups of 64"),
    ],
)
def test_what_is_not_known_is_refused(make, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


def test_rows_in_int8() -> None:
    matrix = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]])
    rows = quantize_rows(matrix)
    assert rows.codes.tolist() == [[64, -127, 32], [0, 0, 0]]
    assert rows.scales.tolist() == [pytest.approx(2 / 127), 0]
    assert torch.equal(rows.dequantize()[1], matrix[1])
    assert (rows.dequantize() - matrix).abs().max() <= 1 / 127
