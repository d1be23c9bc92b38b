"""What of a block is computed in C: rotary embedding, attention of one token, gated MLPs."""

import pytest
import torch
from kernel_cases import LIMITS, error, operands
from torch.nn.functional import gelu, scaled_dot_product_attention, silu

from wina_calib.runtime.kernels import native, native_build

pytestmark = pytest.mark.skipif(not native.available(torch.float32), reason="needs a C compiler")
DTYPES = pytest.mark.parametrize("dtype", native_build.DTYPES)
THREADS = pytest.mark.parametrize("threads", [1, 2, 3])


@pytest.fixture(autouse=True)
def shared(request, monkeypatch):
    """Shares the smallest work among the threads that a test asks for, and gives torch's number back."""
    monkeypatch.setattr(native, "MIN_SHARED", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(request.node.callspec.params.get("threads", 2))
    yield
    torch.set_num_threads(before)


def turned(x, cosine, sine):
    """Rotary embedding as transformers writes it."""
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-second, first], dim=-1) * sine


@DTYPES
@THREADS
@pytest.mark.parametrize(("heads", "size"), [((4, 2), 16), ((3, 1), 6), ((2, 2), 64), ((7, 1), 128)])
@pytest.mark.parametrize("bias", [False, True])
def test_heads_are_turned_as_by_torch(dtype, threads, heads, size, bias):
    out = (heads[0] + 2 * heads[1]) * size
    x, weight_t, norm, threshold = operands(1, 40, out, dtype)
    row = native.Row(weight_t, norm, threshold, torch.randn(out).to(dtype) if bias else None)
    angle = torch.randn(1, 1, size)
    cosine, sine = angle.cos().to(dtype), angle.sin().to(dtype)
    found = native.turned(row, x[None], cosine, sine, heads).view(-1, size)
    expected = row(x[None]).view(-1, size)
    expected[: sum(heads)] = turned(expected[: sum(heads)], cosine[0], sine[0])
    if dtype == torch.bfloat16:
        assert torch.equal(found, expected)
    assert error(found, expected.double()) <= LIMITS[torch.float32]


@DTYPES
@THREADS
def test_heads_are_normed_before_they_are_turned(dtype, threads):
    heads, size, epsilon = (5, 2), 34, 0.25
    x, weight_t, norm, threshold = operands(1, 40, 9 * size, dtype)
    row = native.Row(weight_t, norm, threshold)
    cosine, sine = torch.randn(2, 1, 1, size).to(dtype)
    weights = [torch.randn(size).to(dtype), torch.randn(size).to(dtype)]
    found = native.turned(row, x[None], cosine, sine, heads, weights, epsilon).view(-1, size)
    expected = row(x[None]).view(-1, size).double()
    for part, weight in ((slice(0, 5), weights[0]), (slice(5, 7), weights[1])):
        unit = expected[part] * (expected[part].square().mean(-1, keepdim=True) + epsilon).rsqrt()
        expected[part] = turned(unit * weight.double(), cosine[0].double(), sine[0].double())
    assert error(found, expected) <= LIMITS[dtype]


@DTYPES
@THREADS
@pytest.mark.parametrize("uses_gelu", [False, True])
@pytest.mark.parametrize(("width", "inner"), [(40, 96), (1, 1), (33, 31), (130, 2050)])
def test_a_gated_mlp_is_its_parts(dtype, threads, uses_gelu, width, inner):
    x, into, norm, threshold = operands(1, width, 2 * inner, dtype)
    _, out_of, inner_norm, inner_threshold = operands(1, inner, width, dtype, seed=1)
    first = native.Row(into, norm, threshold, torch.randn(2 * inner).to(dtype))
    second = native.Row(out_of, inner_norm, inner_threshold / 4, torch.randn(width).to(dtype))
    found = native.gated(first, second, x[None], gelu=uses_gelu)
    gate, up = first(x[None]).chunk(2, dim=-1)
    expected = second((gelu(gate, approximate="tanh") if uses_gelu else silu(gate)) * up)
    assert found.shape == expected.shape == (1, 1, width)
    assert error(found, expected.double()) <= LIMITS[dtype]


@DTYPES
@pytest.mark.parametrize("uses_gelu", [False, True])
def test_activations_are_torchs_for_every_size_of_number(dtype, uses_gelu):
    """The gate alone: weights that hand each input on, thresholds that keep all."""
    values = torch.tensor([0.0, -0.0, 1e-30, 1e-3, 0.5, 3, 20, 80, 87.5, 88.5, 89, 100, 1e4, 1e30]).to(dtype)
    x = torch.cat([values, -values, torch.tensor([torch.inf, torch.nan]).to(dtype)])
    for value in x:
        keep = torch.tensor(-1.0)
        first = native.Row(
            torch.tensor([[1.0, 0.0]]).to(dtype), torch.ones(1), keep, torch.tensor([0.0, 1.0]).to(dtype)
        )
        second = native.Row(torch.ones(1, 1).to(dtype), torch.ones(1), keep)
        found = native.gated(first, second, value.reshape(1, 1), gelu=uses_gelu).squeeze()
        if not value.isfinite():
            assert found.equal(value) or found.isnan()
            continue
        expected = gelu(value, approximate="tanh") if uses_gelu else silu(value)
        torch.testing.assert_close(found, expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


def attention(query, key, value, seen, scale):
    """In float64, each head by itself."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (t.double().repeat_interleave(repeats, 1) for t in (key, value))
    return scaled_dot_product_attention(query.double(), key, value, attn_mask=seen, scale=scale).transpose(1, 2)


@DTYPES
@THREADS
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(4, 2, 16), (6, 1, 8), (3, 3, 33), (32, 8, 128)])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 37, 300])
def test_attention_of_one_token(dtype, threads, heads, key_heads, size, length):
    torch.manual_seed(length)
    query = torch.randn(1, heads, 1, size).to(dtype)
    key, value = torch.randn(2, 1, key_heads, length, size).to(dtype)
    masks = [None, torch.ones(1, 1, 1, length, dtype=torch.bool), torch.rand(1, 1, 1, length) < 0.5]
    masks[2][..., length // 2] = True
    for seen in masks:
        found = native.attend(query, key, value, seen, 0.3)
        assert found.shape == (1, 1, heads, size)
        assert error(found, attention(query, key, value, seen, 0.3)) <= LIMITS[dtype]


@DTYPES
def test_attention_reads_a_cache_as_it_lies(dtype):
    """Keys and values with strides of their own, and places that are not seen, whatever is in them."""
    query = torch.randn(1, 4, 1, 16).to(dtype)
    key, value = (torch.randn(1, 40, 2, 24).to(dtype).transpose(1, 2)[..., :16] for _ in range(2))
    seen = torch.zeros(1, 1, 1, 40, dtype=torch.bool)
    seen[..., 5:9] = seen[..., 20] = True
    expected = attention(query, key, value, seen, 0.25)
    for place in (0, 4, 12, 21, 39):
        key[:, :, place], value[:, :, place] = torch.inf, 3e38
    value[:, :, 12] = 7
    assert error(native.attend(query, key, value, seen, 0.25), expected) <= LIMITS[dtype]


@DTYPES
def test_attention_with_large_scores(dtype):
    query, key = torch.full((1, 2, 1, 8), 40.0).to(dtype), torch.full((1, 1, 6, 8), 40.0).to(dtype)
    key[:, :, 3] += 1
    value = torch.arange(6.0).view(1, 1, 6, 1).expand(1, 1, 6, 8).to(dtype).contiguous()
    assert torch.equal(native.attend(query, key, value, None, 1.0), torch.full((1, 1, 2, 8), 3.0).to(dtype))
    for nan in (torch.tensor(torch.nan), torch.tensor(-1, dtype=torch.int32).view(torch.float32)):
        key[:, :, 3] = nan
        assert native.attend(query, key, value, None, 1.0).isnan().all()


@DTYPES
@pytest.mark.parametrize("length", [1, 9])
def test_attention_to_nothing_is_zero_as_torchs(dtype, length):
    query, key = torch.randn(1, 4, 1, 8).to(dtype), torch.randn(1, 2, length, 8).to(dtype)
    seen = torch.zeros(1, 1, 1, length, dtype=torch.bool)
    assert torch.equal(native.attend(query, key, key, seen, 1.0), torch.zeros(1, 1, 4, 8).to(dtype))


@DTYPES
def test_far_scores_weigh_nothing(dtype):
    """Values that only a weight of zero hides, and one at the end."""
    query, key = torch.ones(1, 1, 1, 8).to(dtype), torch.zeros(1, 1, 5, 8).to(dtype)
    key[:, :, 2] = 100
    value = torch.full((1, 1, 5, 8), 3e38).to(dtype)
    value[:, :, 2] = 1
    assert torch.equal(native.attend(query, key, value, None, 1.0), torch.ones(1, 1, 1, 8).to(dtype))
    value[:, :, 4], key[:, :, 4] = torch.inf, 100
    assert native.attend(query, key, value, None, 1.0).isinf().all()


@DTYPES
def test_results_are_the_same_for_any_number_of_threads(dtype):
    x, weight_t, norm, threshold = operands(1, 60, 12 * 32, dtype)
    row, back = native.Row(weight_t, norm, threshold), native.Row(*operands(1, 192, 60, dtype, seed=1)[1:])
    cosine, sine = torch.randn(2, 1, 1, 32).to(dtype)
    query, cache = torch.randn(1, 8, 1, 32).to(dtype), torch.randn(2, 1, 4, 50, 32).to(dtype)
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(
            (
                native.turned(row, x, cosine, sine, (6, 3)),
                native.gated(row, back, x, gelu=False),
                native.attend(query, *cache, None, 0.2),
            )
        )
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
