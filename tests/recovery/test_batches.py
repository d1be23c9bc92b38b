"""Which tokens a step trains on."""

import torch
from torch import Tensor

from wina_calib.recovery.batches import Batches


def text(*, first: bool) -> Tensor:
    ids = torch.arange(1000, 1060).view(6, 10).clone()
    if first:
        ids[:, 0] = 1
    return ids


def rows(batches: Batches, steps: range) -> Tensor:
    return torch.cat([batches.rows(step) for step in steps])


def test_all_text_is_seen_before_any_is_seen_again() -> None:
    batches = Batches(text(first=False), 2, 0.0, seed=3)
    for epoch in range(3):
        seen = rows(batches, range(3 * epoch, 3 * epoch + 3))
        assert sorted(seen.flatten().tolist()) == list(range(1000, 1060))
    first, second = rows(batches, range(3)), rows(batches, range(3, 6))
    assert {row[0].item() for row in first} == set(range(1000, 1060, 10))
    assert {row[0].item() for row in first} != {row[0].item() for row in second}


def test_a_first_token_that_all_have_stays_the_first() -> None:
    seen = rows(Batches(text(first=True), 2, 0.0, seed=0), range(9))
    assert (seen[:, 0] == 1).all()
    assert (seen[:, 1:] != 1).all()


def test_a_step_depends_on_its_number_alone() -> None:
    batches = Batches(text(first=True), 4, 0.3, seed=0)
    assert torch.equal(batches.rows(7), Batches(text(first=True), 4, 0.3, seed=0).rows(7))
    assert not torch.equal(batches.rows(7), Batches(text(first=True), 4, 0.3, seed=1).rows(7))


def test_noise_replaces_its_share_of_all_but_first_tokens() -> None:
    ids = torch.arange(20_000).view(20, 1000)
    plain, noisy = (Batches(ids, 20, noise, seed=0).rows(0) for noise in (0.0, 0.1))
    changed = plain != noisy
    assert not changed[:, 0].any()
    assert 0.09 < changed.float().mean() < 0.11
    assert set(noisy.flatten().tolist()) <= set(ids.flatten().tolist())
