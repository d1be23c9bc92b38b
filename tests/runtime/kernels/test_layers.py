"""All layers of a token in one call: to the bit what the calls for their parts give, for any number of threads."""

import ctypes

import pytest
import torch
from kernel_cases import operands, random_weight

from wina_calib.quantization.formats import WeightFormat
from wina_calib.runtime.kernels import native, native_build
from wina_calib.runtime.kernels.layers import LayerParts, Layers, Past

pytestmark = pytest.mark.skipif(not native.available(torch.float32), reason="needs a C compiler")
SIZE, HEADS, INNER = 32, (4, 2), 192


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    monkeypatch.setattr(native, "MIN_SHARED", 1)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def row_of(width, out, dtype, form, bias=False):
    _, weight_t, norm, threshold = operands(1, width, out, dtype)
    added = torch.randn(out).to(dtype) if bias else None
    weight = weight_t if form is None else random_weight(form, width, out)
    return native.Row(weight, norm, threshold, added, dtype)


def layer_of(dtype, form=None, *, width=128, heads=HEADS, size=SIZE, normed=False, gelu=False, seed=0):
    torch.manual_seed(seed)
    queries, keys = heads
    rows = (
        row_of(width, (queries + 2 * keys) * size, dtype, form, bias=True),
        row_of(queries * size, width, dtype, form),
        row_of(width, 2 * INNER, dtype, form),
        row_of(INNER, width, dtype, form, bias=True),
    )
    norms = tuple(torch.rand(width).add(0.5).to(dtype) for _ in range(2))
    head_norms = tuple(torch.rand(size).add(0.5).to(dtype) for _ in range(2)) if normed else ()
    return LayerParts(rows, norms, (1e-5, 1e-6), heads, size, head_norms, 1e-4 if normed else 0.0, size**-0.5, gelu)


def caches(parts, places, filled, dtype):
    found = [torch.randn(2, 1, p.heads[1], places, p.size).to(dtype) for p in parts]
    past = (Past * len(parts))()
    for one, cache in zip(past, found, strict=True):
        one.hold(*cache)
        one.filled = filled
    return found, past


def apart(parts, x, turns, seen, found, filled, length):
    """The same by the calls for parts of a layer."""
    hidden = []
    for part, cache in zip(parts, found, strict=True):
        queries, keys = part.heads
        y = native.turned(
            part.rows[0],
            native.norm(x, part.norms[0], part.epsilons[0]),
            *turns,
            part.heads,
            part.head_norms,
            part.head_epsilon,
        ).view(1, -1, 1, part.size)
        query, *new = y.split_with_sizes((queries, keys, keys), dim=1)
        for held, token in zip(cache, new, strict=True):
            held[:, :, filled] = token[:, :, 0]
        out = native.attend(query, *(held[:, :, :length] for held in cache), seen, part.scale)
        x = x + part.rows[1](out.view(1, 1, -1))
        x = x + native.gated(*part.rows[2:], native.norm(x, part.norms[1], part.epsilons[1]), gelu=part.gelu)
        hidden.append(x)
    return hidden


def compare(dtype, parts, *, masked=False, filled=5, length=6, places=9):
    torch.manual_seed(1)
    x = torch.randn(1, 1, parts[0].norms[0].numel()).to(dtype)
    turns = torch.randn(2, 1, 1, parts[0].size).to(dtype)
    seen = (torch.arange(length) >= 2) & (torch.arange(length) <= filled) if masked else None
    call = Layers(parts)
    found, past = caches(parts, places, filled, dtype)
    before = [cache.clone() for cache in found]
    expected = apart(parts, x, turns, seen, [cache.clone() for cache in before], filled, length)
    for count in (1, 2, 3, 4):
        torch.set_num_threads(count)
        y = call(x, *turns, seen, past, length)
        assert [t.shape for t in y] == [x.shape] * len(parts)
        assert all(torch.equal(a, b) for a, b in zip(y, expected, strict=True))
        *_, last, normed = call(x, *turns, seen, past, length, parts[0].norms[0], 1e-5)
        assert torch.equal(normed, native.norm(last, parts[0].norms[0], 1e-5))
    apart(parts, x, turns, seen, before, filled, length)
    assert all(torch.equal(a, b) for a, b in zip(found, before, strict=True))


@pytest.mark.parametrize("dtype", native_build.DTYPES)
@pytest.mark.parametrize("form", [None, WeightFormat(4, 64), WeightFormat(4, 32), WeightFormat(8)], ids=str)
def test_layers_are_their_parts(dtype, form):
    compare(dtype, [layer_of(dtype, form, seed=i) for i in range(3)])


@pytest.mark.parametrize("form", [WeightFormat(4, 64), WeightFormat(8)], ids=str)
def test_inputs_in_parts_that_threads_share(form):
    """Enough inputs for each of four parts to have some."""
    compare(torch.bfloat16, [layer_of(torch.bfloat16, form, width=576, seed=i) for i in range(2)])


@pytest.mark.parametrize("dtype", native_build.DTYPES)
@pytest.mark.parametrize(
    "changes",
    [{"normed": True}, {"gelu": True}, {"heads": (3, 3)}, {"heads": (5, 1)}, {"size": 6, "width": 40}, {"size": 24}],
    ids=str,
)
def test_other_forms(dtype, changes):
    compare(dtype, [layer_of(dtype, seed=i, **changes) for i in range(2)])


@pytest.mark.parametrize("dtype", native_build.DTYPES)
def test_what_the_mask_hides_is_not_seen(dtype):
    parts = [layer_of(dtype, WeightFormat(4, 64)), layer_of(dtype, heads=(2, 2), seed=1)]
    compare(dtype, parts, masked=True, filled=5, length=9)


def test_a_counter_counts_on():
    parts = [layer_of(torch.float32, seed=i) for i in range(2)]
    found, past = caches(parts, 4, 0, torch.float32)
    counters = [torch.tensor(2), torch.tensor(2)]
    for one, counter in zip(past, counters, strict=True):
        one.counter = counter.data_ptr()
    x, turns = torch.randn(1, 1, 128), torch.randn(2, SIZE)
    call, before = Layers(parts), [cache.clone() for cache in found]
    for _ in range(2):
        call(x, *turns, None, past, 4)
    assert [int(counter) for counter in counters] == [4, 4]
    changed = [(a != b).any(-1).any(2).any(0).any(0).tolist() for a, b in zip(found, before, strict=True)]
    assert changed == [[False, False, True, True]] * 2
    kept = [cache.clone() for cache in found]
    with pytest.raises(ValueError, match="a cache of 4 places is full"):
        call(x, *turns, None, past, 4)
    assert [int(counter) for counter in counters] == [4, 4]
    assert all(torch.equal(a, b) for a, b in zip(found, kept, strict=True))


def test_parts_that_do_not_go_together_are_refused():
    good = layer_of(torch.float32)
    for bad in (layer_of(torch.bfloat16), layer_of(torch.float32, width=96), layer_of(torch.float32, normed=True)):
        if bad.head_norms:
            object.__setattr__(bad, "head_norms", (torch.ones(3), torch.ones(SIZE)))
        with pytest.raises(ValueError, match="the parts of layer 1 do not go together for 128 numbers"):
            Layers([good, bad])


def test_structures_are_laid_out_as_in_c():
    assert ctypes.sizeof(Past) == 8 * 8
    assert Past.counter.offset == 7 * 8
