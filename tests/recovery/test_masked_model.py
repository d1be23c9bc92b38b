"""Masks while a model trains: constant in the backward pass, with thresholds that follow what is seen."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from wina_calib.checkpoint.export_dense import export_dense
from wina_calib.checkpoint.reader import open_checkpoint
from wina_calib.masks.mask import mask_inputs
from wina_calib.recovery.masked_model import Masked, MaskedModel, _cuts, _sampled
from wina_calib.recovery.models import load_plain

IDS = torch.randint(4, 300, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def masked(calibrated: Path, tmp_path: Path) -> tuple[PreTrainedModel, MaskedModel]:
    export_dense(calibrated, tmp_path / "dense")
    model = load_plain(tmp_path / "dense", torch.device("cpu"), torch.float32)
    masks = MaskedModel(model, open_checkpoint(calibrated), (0.5,))
    masks.sparsity, masks.follows = 0.5, True
    return model, masks


def thresholds(masks: MaskedModel) -> dict[str, float]:
    return {name: float(cut) for name, cut in masks.state().items() if "@" in name}


def test_what_is_kept_has_a_gradient_and_what_is_dropped_has_none() -> None:
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    norm, cut, rows = torch.linspace(0.5, 2, 8), torch.tensor(0.8), torch.zeros(2, 5, dtype=torch.bool)
    rows[:, 0] = True
    found = Masked.apply(x, norm, cut, "wina", rows, x.dtype)
    expected = mask_inputs(x.detach(), norm, cut, "wina", rows)
    assert torch.equal(found, expected)
    outer = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(2))
    found.backward(outer)
    assert torch.equal(x.grad, torch.where(expected != 0, outer, 0))


def test_masks_are_those_of_the_dtype_that_the_product_takes() -> None:
    x = torch.randn(1, 50, 8, generator=torch.Generator().manual_seed(1))
    norm, cut = torch.ones(8), torch.tensor(1.0)
    found = Masked.apply(x, norm, cut, "wina", None, torch.bfloat16)
    assert torch.equal(found, mask_inputs(x.bfloat16(), norm, cut, "wina"))


@pytest.mark.parametrize("rows", [8192, 8191, 100])
def test_a_sample_sees_every_column(rows: int) -> None:
    columns = torch.arange(576.0).expand(rows, 576)
    values, norms = _sampled(columns, torch.arange(576.0))
    assert torch.equal(values, norms)
    counts = values.bincount(minlength=576) if not values.is_floating_point() else values.long().bincount(minlength=576)
    assert int(counts.max()) - int(counts.min()) <= 1
    assert len(values) <= 4 * 16_384


def test_cuts_drop_the_share_that_is_asked() -> None:
    seen = [torch.rand(1000, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    for found, cut, share in zip(seen, _cuts(seen, (0.2, 0.5, 0.9)), (0.2, 0.5, 0.9), strict=True):
        assert float((found <= cut).float().mean()) == pytest.approx(share, abs=0.002)


def test_thresholds_follow_what_is_seen(masked: tuple[PreTrainedModel, MaskedModel]) -> None:
    model, masks = masked
    before = thresholds(masks)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight.mul_(3.0)  # all scores of attn_in are three times as high
        for _ in range(40):
            model(IDS)
            masks.follow()
    moved = {name: cut / before[name] for name, cut in thresholds(masks).items() if "attn_in" in name}
    assert moved
    assert all(2 < share < 4 for share in moved.values())


def test_what_is_no_number_moves_no_threshold(masked: tuple[PreTrainedModel, MaskedModel]) -> None:
    model, masks = masked
    before = thresholds(masks)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.fill_(torch.nan)
        model(IDS)
        masks.follow()
    assert {name: cut for name, cut in thresholds(masks).items() if "layers.0.attn_in" in name} == {
        name: cut for name, cut in before.items() if "layers.0.attn_in" in name
    }
    assert all(torch.isfinite(torch.tensor(list(thresholds(masks).values()))))
