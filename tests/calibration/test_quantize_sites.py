"""One pass fits thresholds and quantizes."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

import wina_calib
from wina_calib.checkpoint.dequantized import open_weights
from wina_calib.checkpoint.reader import open_checkpoint
from wina_calib.masks.score import column_norms
from wina_calib.quantization.formats import WeightFormat
from wina_calib.quantization.scales import quantize_nearest

SMALL: dict[str, Any] = {"samples": 64, "seq_len": 128, "budget": "uniform", "bits": 4, "group_size": 32}


def test_a_plain_int4_checkpoint_beats_rounding(llama: Path, text: Path, tmp_path: Path) -> None:
    """`--bits 4 --sparsity 0`: thresholds are fitted all the same, and outputs are nearer than those of nearest codes."""
    wina_calib.calibrate(llama, tmp_path / "q", transform="none", data=str(text), sparsity=0, grid=(0.5,), **SMALL)
    settings = open_checkpoint(tmp_path / "q").settings
    assert (settings.sparsity, settings.anchors) == (0, (0.5,))
    ids = tiny.tokenizer()(text.read_text()[40_000:50_000], return_tensors="pt").input_ids[:, :512].view(4, 128)
    base = AutoModelForCausalLM.from_pretrained(llama)
    rounded = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        for module in rounded.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(quantize_nearest(module.weight.t(), WeightFormat(4, 32)).dequantize().t())
        expected = base.model(ids).last_hidden_state
        model = wina_calib.load(tmp_path / "q")
        ours, nearest = (m.model(ids).last_hidden_state - expected for m in (model, rounded))
        assert ours.norm() < 0.9 * nearest.norm()
        wina_calib.set_sparsity(model, 0.5)
        assert (model.model(ids).last_hidden_state - expected).norm() > ours.norm()


@pytest.mark.parametrize(
    "options",
    [
        {"masks": "per-projection"},
        {"select": "topk"},
        {"transform": "stacked"},
        {"score": "teal"},
        {"budget": "global"},
    ],
    ids=str,
)
def test_every_kind_of_mask_goes_with_quantized_weights(
    options: dict[str, Any], llama: Path, text: Path, tmp_path: Path
) -> None:
    values = SMALL | {"transform": "none", "sparsity": 0.4, "grid": (0.25,)} | options
    wina_calib.calibrate(llama, tmp_path / "q", data=str(text), **values)
    opened = open_checkpoint(tmp_path / "q")
    opened.verify_weights()
    source = open_weights(tmp_path / "q")
    for layer, site in opened.architecture.sites:
        norms = opened.site(layer, site).norms
        for group in opened.settings.rule.groups(site):
            fresh = column_norms([source.load(f"{layer.prefix}{p.module}.weight") for p in group.projections])
            assert torch.equal(norms[group.name], torch.ones_like(fresh) if options.get("score") == "teal" else fresh)
    ids = tiny.tokenizer()(text.read_text()[:20_000], return_tensors="pt").input_ids[:, :1024].view(8, 128)
    model = wina_calib.load(tmp_path / "q")
    with wina_calib.runtime.load.runtime_state(model).counting() as counts, torch.no_grad():
        model(ids)
    dropped, seen = (sum(getattr(count, name) for count in counts.values()) for name in ("dropped", "seen"))
    assert dropped / seen == pytest.approx(0.4, abs=0.02)
    facts = opened.settings.provenance.get("prediction")
    assert (facts is not None) == (options.get("budget") == "global")
    assert facts is None or facts["quantized_rise"] >= 0


def test_an_evaluation_says_the_bits_that_are_read(llama: Path, text: Path, tmp_path: Path) -> None:
    wina_calib.calibrate(llama, tmp_path / "q", transform="none", data=str(text), sparsity=0.4, grid=(0.4,), **SMALL)
    found = wina_calib.evaluate(tmp_path / "q", data=str(text), tokens=2048)
    # Groups of 32 with zeros, 2 bits of a byte of zeros unused where groups are odd in number: 4.625 bits and a little.
    assert found.bits_read == pytest.approx(4.64 * (1 - found.model_sparsity), rel=0.01)
    assert found.read_fraction_decoder < 0.25
    (card,) = (path.read_text() for path in (tmp_path / "q").glob("README.md"))
    assert "int4 in groups of 32 outputs, with zeros, lm_head 8 bits" in card
    assert "without wina_calib it does not load" in card
