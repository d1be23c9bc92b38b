"""Weights are turned as a loader copies them, whole or in parts, and nothing else is."""

import pytest
import torch
from torch import Tensor

from wina_calib.runtime.kernels import cpu
from wina_calib.serving.loading import turning


def load_merged(weight: Tensor, loaded: list[Tensor]) -> None:
    """As vLLM loads projections side by side, each a part of what is in the file."""
    start = 0
    for part in loaded:
        own = part.narrow(0, 0, 24)
        weight.narrow(0, start, 24).copy_(own)
        start += 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inputs", [slice(None), slice(8, 41)])
def test_what_a_loader_copies_is_turned(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, inputs: slice) -> None:
    loaded = [torch.randn(30, 48)[:, inputs], torch.randn(30, 48).to(dtype)[:, inputs]]
    weight = cpu.empty_columns(48, loaded[0].shape[1], dtype).t()
    turned = []
    fill = cpu.fill_columns
    monkeypatch.setattr(cpu, "fill_columns", lambda columns, given: turned.append(given.shape) or fill(columns, given))
    assert turning(load_merged)(weight, loaded) is None
    assert turned == [(24, loaded[0].shape[1])] * 2
    assert torch.equal(weight, torch.cat([part[:24].to(dtype) for part in loaded]))
    assert weight.t().is_contiguous()


def test_other_copies_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "fill_columns", None)
    given, made = torch.randn(6, 5), torch.empty(6, 5)
    assert turning(lambda: made.copy_(given))() is made
    assert torch.equal(made, given)
    norm = torch.empty(6)
    turning(norm.copy_)(given[:, 0])
    assert torch.equal(norm, given[:, 0])


def test_what_has_another_shape_is_torchs() -> None:
    weight = cpu.empty_columns(24, 5, torch.float32).t()
    row = torch.randn(1, 5)
    turning(weight.copy_)(row)
    assert torch.equal(weight, row.expand(24, 5))
    with pytest.raises(RuntimeError, match="must match"):
        turning(weight.copy_)(torch.randn(25, 5))
