"""Scores, joint norms and masks."""

import math

import pytest
import torch

from wina_calib.choices import SCORES
from wina_calib.masks.mask import KEEP_ALL, keep_mask, mask_inputs
from wina_calib.masks.score import column_norms, scores, stored_norm
from wina_calib.model.source import all_finite


def test_joint_norm_is_the_norm_of_the_stacked_columns() -> None:
    a, b = torch.randn(3000, 7), torch.randn(5, 7)
    assert torch.allclose(column_norms([a, b]), torch.cat([a, b]).double().norm(dim=0).float(), rtol=1e-6)
    assert torch.equal(stored_norm("teal", [a]), torch.ones(7))
    assert torch.allclose(stored_norm("wina", [a], 0.5), column_norms([a]).sqrt())


def test_weights_are_left_as_they_are() -> None:
    weight = torch.randn(5, 7, dtype=torch.float64)
    before = weight.clone()
    column_norms([weight])
    assert torch.equal(weight, before)


def test_score_is_magnitude_times_norm() -> None:
    x, norm = torch.tensor([[-2.0, 0.5, 0.0]]), torch.tensor([1.0, 8.0, 3.0])
    assert scores(x, norm).tolist() == [[2.0, 4.0, 0.0]]
    assert scores(x, norm, "weight").tolist() == [[1.0, 8.0, 3.0]]


def test_kept_where_the_score_is_above_the_threshold() -> None:
    x, norm = torch.tensor([1.0, 2.0, 3.0]), torch.ones(3)
    assert keep_mask(x, norm, torch.tensor(2.0)).tolist() == [False, False, True]
    assert keep_mask(torch.zeros(3), norm, torch.tensor(KEEP_ALL)).all()


@pytest.mark.parametrize("score", SCORES)
def test_dense_rows_and_kept_values_are_unchanged(score: str) -> None:
    x = torch.randn(2, 4, 16, dtype=torch.bfloat16)
    rows = torch.zeros(2, 4, dtype=torch.bool)
    rows[:, 0] = True
    norm = torch.rand(16)
    threshold = scores(x, norm, score).median()
    out = mask_inputs(x, norm, threshold, score, rows)
    assert torch.equal(out[:, 0], x[:, 0])
    kept = keep_mask(x, norm, threshold, score, rows)
    assert not bool(out[~kept].signbit().any())
    assert torch.equal(out[kept], x[kept])
    assert not out[~kept].any()


def test_random_scores_repeat_and_are_spread_evenly() -> None:
    x = torch.randn(200, 64)
    first, second = scores(x, torch.ones(64), "random"), scores(x, torch.ones(64), "random")
    assert torch.equal(first, second)
    for share in (0.25, 0.5, 0.75):
        assert float((first < share).float().mean()) == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 17, 999])
def test_one_bad_number_is_found(dtype: torch.dtype, value: float, at: int) -> None:
    numbers = torch.randn(1000).to(dtype)
    assert all_finite(numbers)
    numbers[at] = value
    assert not all_finite(numbers)
    assert all_finite(numbers[:0])
