"""The histogram's quantiles are within its stated resolution; merging is exact."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wina_calib.masks.histogram import BINS, RELATIVE_ERROR, ScoreHistogram, windowed_counts

assert RELATIVE_ERROR <= 0.005  # what docs and users count on

scores = st.lists(
    st.floats(min_value=2.0**-100, max_value=2.0**100, width=32, allow_nan=False), min_size=1, max_size=300
).map(lambda values: torch.tensor(values, dtype=torch.float32))


@given(scores, st.floats(0.0, 1.0))
@settings(max_examples=200, deadline=None)
def test_quantiles_are_between_neighbouring_scores(values: torch.Tensor, level: float) -> None:
    histogram = ScoreHistogram()
    histogram.update(values)
    found = float(histogram.quantiles(torch.tensor([level], dtype=torch.float64))[0])
    ordered = values.double().sort().values
    position = level * len(ordered)
    low = ordered[max(0, min(len(ordered) - 1, int(position + 1e-9) - 1))]
    high = ordered[min(len(ordered) - 1, int(position + 1e-9))]
    assert float(low) * (1 - RELATIVE_ERROR) <= found <= float(high) * (1 + RELATIVE_ERROR)


@given(scores, scores)
@settings(max_examples=100, deadline=None)
def test_merging_is_exact_and_has_no_order(a: torch.Tensor, b: torch.Tensor) -> None:
    one, two, both = ScoreHistogram(), ScoreHistogram(), ScoreHistogram()
    one.update(a)
    two.update(b)
    both.update(torch.cat([b, a]))
    assert torch.equal(one.counts + two.counts, both.counts)
    assert both.total == len(a) + len(b)


def test_resolution_is_below_half_a_percent_on_real_sizes() -> None:
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(200_000, generator=generator) * torch.exp(torch.randn(200_000, generator=generator))).abs()
    histogram = ScoreHistogram()
    for part in values.split(7_000):
        histogram.update(part)
    levels = torch.tensor([0.01, 0.1, 0.25, 0.4, 0.5, 0.65, 0.9, 0.99], dtype=torch.float64)
    exact = torch.quantile(values.double(), levels)
    assert ((histogram.quantiles(levels) / exact - 1).abs() < 0.005).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_noticed(bad: float) -> None:
    histogram = ScoreHistogram()
    histogram.update(torch.tensor([1.0, 2.0]))
    assert histogram.finite
    histogram.update(torch.tensor([bad]))
    assert not histogram.finite


def test_zeros_and_size() -> None:
    histogram = ScoreHistogram()
    histogram.update(torch.zeros(10))
    assert float(histogram.quantiles(torch.tensor([0.5], dtype=torch.float64))[0]) < 1e-38
    assert histogram.counts.shape == (BINS,)
    assert ScoreHistogram().quantiles(torch.tensor([0.5], dtype=torch.float64)).tolist() == [0.0]


@pytest.mark.parametrize("spread", [1.0, 30.0, 80.0])
def test_counting_in_a_window_is_exact(spread: float) -> None:
    """As on a GPU: also where many scores are zero or far below the largest."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.exp2(torch.randn(5000, generator=generator) * spread).clamp(max=1e38)
    scores[::7] = 0.0
    index = scores.view(torch.int32) >> 15
    assert torch.equal(windowed_counts(index), torch.bincount(index, minlength=BINS))
    assert int(windowed_counts(index[:0]).sum()) == 0
