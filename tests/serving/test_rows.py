"""First tokens are known by their position, in whatever way a server cuts and mixes its requests."""

import pytest
import torch

from wina_calib.serving.rows import open_rows

# Each request: tokens that were there before, and tokens that are computed now.
CASES = {
    "prompts begin": ([(0, 3), (0, 1), (0, 2)], [0, 3, 4], [0, 1, 2, 4, 5]),
    "a prompt goes on": ([(4, 3), (0, 2)], [3], [0, 1, 2, 3, 4]),
    "a cached prefix": ([(16, 5)], [], [0, 1, 2, 3, 4]),
    "decoding": ([(7, 1), (1, 1)], [], []),
    "mixed": ([(9, 1), (0, 4), (3, 1), (0, 1)], [1, 6], [1, 2, 3, 4]),
    "a request without tokens": ([(5, 0), (0, 2)], [0], [0, 1]),
}


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
