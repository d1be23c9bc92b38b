"""What the passes count, and what they are said to take."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wina_calib.calibration import fit_layer
from wina_calib.masks.rule import MaskRule


@pytest.mark.parametrize(("seq_len", "blocks"), [(17, 64), (128, 64), (2048, 2)])
def test_of_long_texts_rows_are_counted_evenly(seq_len: int, blocks: int) -> None:
    every = 40
    stream: Any = SimpleNamespace(tokens=every * fit_layer.COUNTED_TOKENS)
    masked: Any = SimpleNamespace(rule=MaskRule())
    places = torch.arange(seq_len, dtype=torch.float32).expand(blocks, seq_len).unsqueeze(-1)
    counted = fit_layer.counted_rows(stream, masked, places)
    assert blocks * (seq_len - 1) / every <= counted.numel() <= 1.1 * blocks * (seq_len - 1) / every
    # First tokens are dense: places are 1 to seq_len - 1, and early ones are not preferred.
    assert counted.min() >= 1
    assert float(counted.mean()) == pytest.approx(seq_len / 2, rel=0.25)


def test_all_rows_of_a_short_text_are_counted() -> None:
    stream: Any = SimpleNamespace(tokens=2 * fit_layer.COUNTED_TOKENS - 1)
    masked: Any = SimpleNamespace(rule=MaskRule(first_token="sparse"))
    x = torch.randn(2, 5, 3)
    assert torch.equal(fit_layer.counted_rows(stream, masked, x), x)
