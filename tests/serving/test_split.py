"""The parts of quantized weights that processes have are those of the dequantized weights."""

import pytest
import torch

from wina_calib.errors import RuntimeLoadError
from wina_calib.quantization.formats import Quantized, WeightFormat, pack_codes, pack_zeros
from wina_calib.serving.split import own_outputs, take_inputs, take_outputs

FORMATS = [WeightFormat(8), WeightFormat(4, 32, True), WeightFormat(4, 32, False), WeightFormat(4, 64, True)]


def weights(form: WeightFormat, width: int, out: int) -> Quantized:
    torch.manual_seed(0)
    if form.bits == 8:
        return Quantized(form, torch.randint(-127, 128, (width, out), dtype=torch.int8), torch.rand(out))
    groups = out // form.group_size
    codes = pack_codes(torch.randint(0, 16, (width, groups, form.group_size), dtype=torch.uint8), form.group_size)
    zeros = pack_zeros(torch.randint(0, 16, (width, groups), dtype=torch.uint8)) if form.zero_point else None
    return Quantized(form, codes, torch.randn(width, groups).half(), zeros)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_outputs_and_inputs_of_all_processes(form: WeightFormat, processes: int) -> None:
    whole = [256, 256, 256]
    weight = weights(form, 64, sum(whole))
    dense = weight.dequantize()
    for rank in range(processes):
        spans = own_outputs(whole, [size // processes for size in whole], rank, processes)
        wanted = torch.cat([part.chunk(processes, 1)[rank] for part in dense.split(whole, 1)], 1)
        assert torch.equal(take_outputs(weight, spans).dequantize(), wanted)
        size = 64 // processes
        assert torch.equal(take_inputs(weight, rank * size, size).dequantize(), dense.chunk(processes, 0)[rank])


def test_few_heads_are_the_same_in_several_processes() -> None:
    found = [own_outputs([256, 128, 128], [64, 64, 64], rank, 4) for rank in range(4)]
    assert [spans[0] for spans in found] == [(0, 64), (64, 128), (128, 192), (192, 256)]
    assert [spans[1] for spans in found] == [(256, 320), (256, 320), (320, 384), (320, 384)]
    assert [spans[2] for spans in found] == [(384, 448), (384, 448), (448, 512), (448, 512)]


@pytest.mark.parametrize("groups", [[(0, 32), (96, 192)], [(32, 64)], [(0, 192)]])
def test_odd_groups_keep_their_zeros(groups: list[tuple[int, int]]) -> None:
    weight = weights(WeightFormat(4, 32, True), 8, 192)
    wanted = torch.cat([weight.dequantize()[:, a:b] for a, b in groups], 1)
    assert torch.equal(take_outputs(weight, groups).dequantize(), wanted)


def test_a_group_that_would_be_cut_is_refused() -> None:
    with pytest.raises(RuntimeLoadError, match=r"at output 32, within a group of 64 that share a scale\. Use fewer"):
        take_outputs(weights(WeightFormat(4, 64, True), 8, 128), [(0, 32)])
