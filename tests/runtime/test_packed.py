"""Projections of a mask group as one: the magnitude limit, views, what keeps a group apart, thresholds written directly."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.nn.functional import linear

from wina_calib.masks.mask import mask_inputs
from wina_calib.runtime.forward_pass import Pass
from wina_calib.runtime.kernels import dispatch
from wina_calib.runtime.packed import PackedGroup, magnitude_limit
from wina_calib.runtime.state import RuntimeState


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(-20, 20), dtype=st.sampled_from(["float32", "bfloat16", "float16"]))
def test_the_limit_drops_what_the_score_drops(seed: int, scale: float, dtype: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    norm = torch.exp(torch.randn(200, generator=generator)) * 2.0**scale
    x = torch.randn(50, 200, generator=generator).to(getattr(torch, dtype))
    x[0] = torch.linspace(-1, 1, 200)
    score = x.float().abs() * norm
    for threshold in (score.flatten()[int(torch.randint(10_000, (), generator=generator))], score.median()):
        limit = magnitude_limit(norm, threshold)
        assert torch.equal(x.abs() <= limit, score <= threshold)


def test_the_limit_is_exact_beside_it() -> None:
    norm = torch.rand(5000, generator=torch.Generator().manual_seed(0)) + 0.1
    threshold = torch.tensor(0.7310585)
    limit = magnitude_limit(norm, threshold)
    above = torch.nextafter(limit, torch.full_like(limit, torch.inf))
    assert bool((limit * norm <= threshold).all())
    assert bool((above * norm > threshold).all())


@pytest.mark.parametrize(("threshold", "dropped"), [(-1.0, [False] * 4), (0.0, [True, False, True, True])])
def test_the_limit_of_odd_norms(threshold: float, dropped: list[bool]) -> None:
    norm = torch.tensor([1.0, 2.0, 0.0, 0.0])
    x = torch.tensor([0.0, 1.0, 3.0, 0.0])
    assert (x <= magnitude_limit(norm, torch.tensor(threshold))).tolist() == dropped
    assert (x * norm <= threshold).tolist() == dropped


NOW = Pass(RuntimeState(), kernels="auto", dense=False, masks=True)


def packed(*, columns: bool) -> tuple[PackedGroup, list[nn.Parameter], torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    weights = [nn.Parameter(torch.randn(out, 48, generator=generator)) for out in (32, 16, 16)]
    threshold = torch.tensor(0.6)
    made = PackedGroup(weights, [None, nn.Parameter(torch.ones(16)), None], columns=columns)
    made.attach(1, torch.rand(48, generator=generator) + 0.5, threshold, None)
    return made, weights, threshold


@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("rows", [1, 7])
@torch.no_grad()
def test_parts_are_the_masked_products(columns: bool, rows: int) -> None:
    made, weights, threshold = packed(columns=columns)
    x = torch.randn(1, rows, 48, generator=torch.Generator().manual_seed(2))
    masked = mask_inputs(x, made.norm, threshold)
    for position, weight in enumerate(weights):
        expected = linear(masked, weight) + (1.0 if position == 1 else 0.0)
        assert torch.allclose(made.part(position, x, NOW), expected, atol=1e-5)
    assert NOW.x is NOW.out is None
    last = made.part(2, x.clone(), NOW)
    assert torch.allclose(last, linear(masked, weights[2]), atol=1e-5)


@torch.no_grad()
def test_a_threshold_written_directly_counts_at_the_next_call() -> None:
    made, _, threshold = packed(columns=False)
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(2))
    assert 0.2 < float((made.mask_inputs(x, None) == 0).float().mean()) < 0.8
    threshold.fill_(-1.0)
    assert torch.equal(made.mask_inputs(x, None), x)
    x[0, 0] = float("nan")
    threshold.fill_(1e9)
    assert made.mask_inputs(x, None).isnan().sum() == 1
    assert made.mask_inputs(x, None).nansum() == 0


@torch.no_grad()
def test_an_input_at_the_threshold_is_dropped() -> None:
    made, _, threshold = packed(columns=False)
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(2))
    for position in range(48):
        threshold.copy_(x[1, position].abs() * made.norm[position])
        found = made.mask_inputs(x, None)
        assert found[1, position] == 0
        assert torch.equal(found, mask_inputs(x, made.norm, threshold))


@torch.no_grad()
def test_dense_rows_are_kept() -> None:
    rows = torch.tensor([[True, False], [False, True]])
    made, _, threshold = packed(columns=False)
    x = torch.randn(2, 2, 48, generator=torch.Generator().manual_seed(2))
    found = made.mask_inputs(x, rows)
    assert torch.equal(found, mask_inputs(x, made.norm, threshold, "wina", rows))
    assert torch.equal(found[0, 0], x[0, 0])
    assert torch.equal(made.mask_inputs(x.view(4, 48), rows.view(4)), found.view(4, 48))


def test_masking_is_differentiable() -> None:
    made, _, threshold = packed(columns=False)
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(2), requires_grad=True)
    made.product(x, NOW).sum().backward()
    assert x.grad is not None
    kept = mask_inputs(x.detach(), made.norm, threshold) != 0
    assert torch.equal(x.grad != 0, kept)


def test_weights_are_stored_once() -> None:
    for columns in (True, False):
        made, weights, _ = packed(columns=columns)
        storage = made.weight_t.untyped_storage()
        assert storage.nbytes() == sum(w.numel() for w in weights) * 4
        parts = made.parts_of(made.weight)
        assert all(torch.equal(part, weight) for part, weight in zip(parts, weights, strict=True))
        assert {part.untyped_storage().data_ptr() for part in parts} == {storage.data_ptr()}
        assert made.weight_t.is_contiguous() == columns
    single = nn.Parameter(torch.randn(8, 4))
    assert PackedGroup([single], [None], columns=False).weight.data_ptr() == single.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dense", [True, False])
@torch.no_grad()
def test_many_rows_on_a_cpu_are_masked_as_the_score_says(dtype: torch.dtype, dense: bool) -> None:
    """Against the reference, with ties, and a NaN and an infinity at every place of a vector."""
    made, _, threshold = packed(columns=True)
    x = torch.randn(2, 70, 48, generator=torch.Generator().manual_seed(4)).to(dtype)
    x[0, range(48), range(48)] = torch.nan
    x[1, range(1, 49), range(48)] = torch.inf
    made.norm[:8], threshold[...] = 1.0, 0.5
    x[:, 60:, :8] = 0.5
    rows = (torch.arange(70) == 65).expand(2, 70) if dense else None
    flat = None if rows is None else rows.reshape(-1)
    found, expected = (
        made.mask_inputs(x, rows),
        dispatch.mask_inputs(x.view(-1, 48), made.norm, threshold, flat).view(x.shape),
    )
    assert found.dtype == dtype
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())
    zeros = found == 0
    assert torch.equal(found.signbit() & zeros, expected.signbit() & zeros)  # what is dropped is +0
    assert bool((found[:, 65] == 0).any()) is not dense
    assert found.isnan().sum() == 48
