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
    batches = Batches(text(first=False), 2, seed=3)
    for epoch in range(3):
        seen = rows(batches, range(3 * epoch, 3 * epoch + 3))
        assert sorted(seen.flatten().tolist()) == list(range(1000, 1060))
    first, second = rows(batches, range(3)), rows(batches, range(3, 6))
    assert {row[0].item() for row in first} == set(range(1000, 1060, 10))
    assert {row[0].item() for row in first} != {row[0].item() for row in second}


def test_a_first_token_that_all_have_stays_the_first() -> None:
    seen = rows(Batches(text(first=True), 2, seed=0), range(9))
    assert (seen[:, 0] == 1).all()
    assert (seen[:, 1:] != 1).all()


def test_a_step_depends_on_its_number_alone() -> None:
    batches = Batches(text(first=True), 4, seed=0)
    assert torch.equal(batches.rows(7), Batches(text(first=True), 4, seed=0).rows(7))
    assert not torch.equal(batches.rows(7), Batches(text(first=True), 4, seed=1).rows(7))
