"""Attention of one token on CUDA with rotary embedding and cache, against its definition in float64."""

import itertools

import pytest
import torch
from kernel_cases import error

from wina_calib.runtime.fast_path import token_attention
from wina_calib.runtime.kernels import attention_cuda

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICE = torch.device("cuda")
LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
# Query heads, key heads, size, places.
SHAPES = [(32, 8, 128, 320), (32, 32, 128, 70), (64, 8, 128, 700), (14, 2, 64, 100), (8, 4, 256, 50), (4, 4, 32, 33)]


@pytest.fixture(autouse=True)
def card():
    if not attention_cuda.available(0):
        pytest.skip("needs a card with clusters")


def given(heads, key_heads, size, length, place, dtype, normed, masked):
    """What the kernel takes, of `dtype` on a CPU; places that it must not read hold no numbers."""
    generator = torch.Generator().manual_seed(heads + place)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    angle = torch.randn(1, 1, size // 2, generator=generator).repeat(1, 1, 2)
    gains = [1 + random(size) / 4 for _ in range(2)] if normed else [None, None]
    keys, values = random(1, key_heads, length, size), random(1, key_heads, length, size)
    keys[:, :, place:] = values[:, :, place:] = torch.nan
    mask = torch.rand(1, 1, 1, length, generator=generator) < 0.7 if masked else None
    turns = angle.cos().to(dtype), angle.sin().to(dtype)
    return (random(1, 1, (heads + 2 * key_heads) * size), *turns, *gains, keys, values, torch.tensor(place), mask)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_definition(shape, dtype):
    heads, key_heads, size, length = shape
    assert attention_cuda.serves(dtype, size, heads, key_heads)
    for normed, masked, place in itertools.product((False, True), (False, True), (0, 1, 7, length // 2, length - 1)):
        small = given(*shape, place, dtype, normed, masked)
        wide = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in small]
        wide[5], wide[6] = wide[5].nan_to_num(), wide[6].nan_to_num()
        expected = token_attention.by_operators(*wide, 1e-6, size**-0.5)
        there = [t if t is None else t.to(DEVICE) for t in small]
        assert attention_cuda.reads(*there)
        y = attention_cuda.attend(*there, 1e-6, size**-0.5)
        assert error(y.cpu(), expected) <= LIMITS[dtype], (normed, masked, place)
        for now, before, new in zip(there[5:7], small[5:7], wide[5:7], strict=True):
            assert error(now[:, :, place].cpu(), new[:, :, place]) <= LIMITS[dtype]
            assert torch.equal(now[:, :, :place].cpu(), before[:, :, :place])
            assert now[:, :, place + 1 :].isnan().all()
        again = [t if t is None else t.to(DEVICE) for t in small]
        assert torch.equal(attention_cuda.attend(*again, 1e-6, size**-0.5), y)


def test_what_it_reads():
    tensors = [t if t is None else t.to(DEVICE) for t in given(8, 2, 64, 40, 3, torch.bfloat16, False, True)]
    assert attention_cuda.reads(*tensors)
    odd = torch.zeros(1, 1, 12 * 64 + 1, dtype=torch.bfloat16, device=DEVICE)[..., 1:]
    assert not attention_cuda.reads(odd, *tensors[1:])
    assert not attention_cuda.reads(*tensors[:7], tensors[7].int(), tensors[8])


@pytest.mark.parametrize("place", [40, 41, 1 << 40, -1])
def test_a_full_cache_is_left_alone_and_the_result_shows_it(place):
    small = given(8, 2, 64, 40, 39, torch.bfloat16, False, True)
    small[5].nan_to_num_()
    small[6].nan_to_num_()
    there = [t if t is None else t.to(DEVICE) for t in small]
    there[7].fill_(place)
    beside = [torch.zeros(3, *small[5].shape, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
    for room, filled in zip(beside, there[5:7], strict=True):
        room[1] = filled
    there[5:7] = [room[1] for room in beside]
    assert attention_cuda.attend(*there, 1e-6, 0.125).isnan().all()
    for room, before in zip(beside, small[5:7], strict=True):
        assert torch.equal(room[1].cpu(), before)
        assert not room[0].any() and not room[2].any()
