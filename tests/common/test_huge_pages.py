"""Weights moved to huge pages: what lies elsewhere stays what it is."""

import sys
from pathlib import Path

import pytest
import torch

from wina_calib.common.memory import moved_to_huge_pages

NUMBERS = torch.arange(1 << 20, dtype=torch.float32)


def test_memory_that_others_hold_stays() -> None:
    """As that of a state dict which a model was loaded from."""
    given = NUMBERS.clone()
    held = given[:]
    made = moved_to_huge_pages(given)
    assert made.data_ptr() != held.data_ptr()
    assert torch.equal(made, NUMBERS)
    assert torch.equal(held, NUMBERS)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")
def test_pages_of_a_file_are_given_back_and_can_be_read_again(tmp_path: Path) -> None:
    file = tmp_path / "numbers"
    file.write_bytes(NUMBERS.numpy().tobytes())
    given = torch.from_file(str(file), shared=False, size=len(NUMBERS), dtype=torch.float32)
    assert torch.equal(given, NUMBERS)
    assert resident(file) > 3 << 20
    assert torch.equal(moved_to_huge_pages(given), NUMBERS)
    assert resident(file) < 1 << 20
    assert torch.equal(given, NUMBERS)


def resident(file: Path) -> int:
    """Bytes of a mapped file that are in this process's memory."""
    _, _, told = Path("/proc/self/smaps").read_text().partition(str(file))
    return 1024 * int(told.partition("Rss:")[2].split()[0])


@pytest.mark.parametrize("count", [1000, 262_145, 300_001, 3 << 19, 5_000_003])
@pytest.mark.parametrize("offset", [0, 3])
def test_tensors_of_any_size_are_moved_whole(count: int, offset: int) -> None:
    given = torch.arange(count + offset, dtype=torch.int32)[offset:].view(1, -1)
    made = moved_to_huge_pages(given)
    assert made.shape == given.shape
    assert torch.equal(made, given)
    assert (made.data_ptr() == given.data_ptr()) == (given.nbytes < 1 << 20)
