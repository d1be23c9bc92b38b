"""First tokens are known by their position, in whatever way a server cuts and mixes its requests."""

import pytest
import torch
from row_cases import CASES

from wina_calib.serving.rows import open_rows


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("padding", [0, 3])
def test_rows(name: str, padding: int) -> None:
    requests, first, many = CASES[name]
    now = torch.tensor([n for _, n in requests])
    starts = torch.cat([torch.zeros(1), now.cumsum(0)]).int()
    lengths = torch.tensor([before + n for before, n in requests] + [1] * padding).int()
    count = int(now.sum()) + padding
    for rows, asked in (
        (first, {"first": True, "prompts": False}),
        (sorted({*first, *many}), {"first": True, "prompts": True}),
    ):
        found = open_rows(starts, lengths, count, **asked)
        assert ([] if found is None else found.nonzero().view(-1).tolist()) == rows
        assert found is None or found.shape == (count,)
