"""One pass fits thresholds and quantizes."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

import wina_calib
from wina_calib.calibration.compute import Compute
from wina_calib.calibration.layer_stream import LayerStream
from wina_calib.checkpoint.base_model import find_base
from wina_calib.checkpoint.card_text import made_text
from wina_calib.checkpoint.dequantized import open_weights
from wina_calib.checkpoint.evaluation_file import save_evaluation
from wina_calib.checkpoint.export_dense import export_dense
from wina_calib.checkpoint.format import stored_cells
from wina_calib.checkpoint.reader import open_checkpoint
from wina_calib.checkpoint.verdict import Verdict
from wina_calib.common.text import percent
from wina_calib.errors import CheckpointError, RuntimeLoadError, UsageError
from wina_calib.masks.score import column_norms
from wina_calib.quantization.formats import WeightFormat
from wina_calib.quantization.scales import quantize_nearest
from wina_calib.runtime.quantized import QuantizedLinear
from wina_calib.serving.plan import Options, make_plan
from wina_calib.studies.answers import answers

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


def test_sites_may_stay_in_16_bits(llama: Path, text: Path, tmp_path: Path) -> None:
    """Attention, and the first layer's MLP inputs: stored and computed as they are; all that counts bits counts 16."""
    patterns = ("layers.*.attn_*", "layers.0.mlp_in")
    settings = SMALL | {"transform": "none", "sparsity": 0.4, "grid": (0.25,), "keep_16_bit": patterns}
    wina_calib.calibrate(llama, tmp_path / "q", data=str(text), **settings)
    opened = open_checkpoint(tmp_path / "q")
    opened.verify_weights()
    kept = set(opened.settings.modules_to_not_convert)
    assert {name.rpartition(".")[2] for name in kept if "attn" in name} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert {name for name in kept if "mlp" in name} == {f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up")}
    base, source, model = open_weights(llama), open_weights(tmp_path / "q"), wina_calib.load(tmp_path / "q")
    bits = total = 0.0
    for layer, site in opened.architecture.sites:
        for p in site.projections:
            name = f"{layer.prefix}{p.module}"
            assert torch.equal(source.load(f"{name}.weight"), base.load(f"{name}.weight")) == (name in kept)
            assert isinstance(model.get_submodule(name), QuantizedLinear) == (name not in kept)
            assert torch.equal(model.get_submodule(name).weight, source.load(f"{name}.weight"))
            bits += p.in_features * p.out_features * (16 if name in kept else 4.625)
            total += p.in_features * p.out_features
    assert stored_cells(opened.architecture, opened.settings).bits_read_at(0.0) == pytest.approx(bits / total, rel=0.01)
    found = wina_calib.evaluate(tmp_path / "q", data=str(text), tokens=2048)
    assert found.bits_stored == pytest.approx(bits / total, rel=0.01)
    assert found.bits_read == pytest.approx(0.6 * bits / total, rel=0.05)
    assert f"{len(kept)} projections 16 bits" in (tmp_path / "q" / "README.md").read_text()
    ids = torch.tensor([[1, 40, 50, 60, 70, 80]])
    model.save_pretrained(tmp_path / "saved")
    export_dense(tmp_path / "q", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    with torch.no_grad():
        assert torch.equal(wina_calib.load(tmp_path / "saved")(ids).logits, model(ids).logits)
        wina_calib.set_sparsity(model, 0.0)
        assert torch.allclose(dense(ids).logits, model(ids).logits, atol=1e-4)
        wina_calib.set_sparsity(model, 0.4)
        options = {"max_new_tokens": 6, "pad_token_id": 3, "eos_token_id": None, "do_sample": False}
        assert torch.equal(*(model.generate(ids, use_cache=cached, **options) for cached in (True, False)))
    with pytest.raises(RuntimeLoadError, match="vLLM serves checkpoints of one kind"):
        make_plan(tmp_path / "q", Options())
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    names = config["quantization_config"]["modules_to_not_convert"]
    for wrong in (names[1:], [*names, "lm_head"], [*names, "model.layers.1.mlp.up_proj"]):
        config["quantization_config"]["modules_to_not_convert"] = wrong
        (tmp_path / "q" / "config.json").write_text(json.dumps(config))
        for use in (open_checkpoint, wina_calib.load):
            with pytest.raises(CheckpointError, match="modules_to_not_convert names"):
                use(tmp_path / "q")


def test_what_is_told_of_sites_in_16_bits_is_counted_site_by_site(llama: Path, text: Path, tmp_path: Path) -> None:
    """Where the sites in 16 bits drop another share than the others, the average bits of a weight tell too much or too little."""
    options = SMALL | {"transform": "none", "sparsity": 0.4, "grid": (0.4,), "keep_16_bit": "layers.*.mlp_*"}
    bounds = {"max": "layers.*.mlp_*=0.2"}
    wina_calib.calibrate(llama, tmp_path / "q", data=str(text), **options | bounds)
    opened = open_checkpoint(tmp_path / "q")
    cells = stored_cells(opened.architecture, opened.settings)
    read, bits = cells.read_fraction_at(opened.sparsities(0.4)), cells.bits_read_at(opened.sparsities(0.4))
    assert read > 1.05 * cells.read_fraction_at(0.4)
    verdict = Verdict.from_facts(opened.settings.provenance)
    assert verdict is not None
    assert (verdict.read_fraction, verdict.speedup) == pytest.approx((read, 1 / read), rel=0.03)
    card = (tmp_path / "q" / "README.md").read_text()
    assert f"| read fraction expected | {percent(read)} with lm_head |" in card
    assert f"| bits read a decoder weight | {bits:.2f} |" in card
    rows = {row[0]: row[1] for row in answers(opened)[2].rows}
    assert rows["40 %"] == percent(read, 0)
    found = wina_calib.evaluate(tmp_path / "q", data=str(text), tokens=2048)
    save_evaluation(tmp_path / "q", found.to_dict())
    card = made_text(opened, find_base(opened.settings), "q")
    assert f"| bits read a decoder weight | {found.bits_read:.2f} |" in card


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_16_bit": "layers.*.attn"}, "--keep-16-bit: .*no site 'attn'; did you mean"),
        ({"keep_16_bit": "*"}, "--keep-16-bit leaves nothing to quantize"),
        ({"keep_16_bit": "layers.0.*", "bits": 0}, "keep-16-bit has no meaning without --bits"),
        ({"group_size": 32, "bits": 0}, "group-size has no meaning without --bits 4"),
        ({"group_size": 32, "bits": 8}, "group-size has no meaning without --bits 4"),
        ({"symmetric": True, "bits": 8}, "symmetric has no meaning without --bits 4"),
        ({"keep_head": True, "bits": 0}, "keep-head has no meaning without --bits"),
    ],
)
def test_what_cannot_be_left_is_refused(
    options: dict[str, Any], message: str, llama: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        wina_calib.calibrate(llama, tmp_path / "q", transform="none", data=str(text), **SMALL | options)
    assert list(tmp_path.iterdir()) == []


def test_spilled_it_is_the_same(llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = SMALL | {"transform": "none", "sparsity": 0.4, "grid": (0.25,), "data": str(text)}
    wina_calib.calibrate(llama, tmp_path / "a", **options)
    monkeypatch.setattr(Compute, "keeps", lambda *_: False)
    spilled: list[bool] = []
    real = LayerStream.store
    monkeypatch.setattr(LayerStream, "store", lambda self: spilled.append(self.spill is not None) or real(self))
    wina_calib.calibrate(llama, tmp_path / "b", **options)
    assert any(spilled)
    for file in (tmp_path / "a").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_an_evaluation_says_the_bits_that_are_read(llama: Path, text: Path, tmp_path: Path) -> None:
    wina_calib.calibrate(llama, tmp_path / "q", transform="none", data=str(text), sparsity=0.4, grid=(0.4,), **SMALL)
    found = wina_calib.evaluate(tmp_path / "q", data=str(text), tokens=2048)
    # Groups of 32 with zeros, 2 bits of a byte of zeros unused where groups are odd in number: 4.625 bits and a little.
    assert found.bits_read == pytest.approx(4.64 * (1 - found.model_sparsity), rel=0.01)
    assert found.read_fraction_decoder < 0.25
    (card,) = (path.read_text() for path in (tmp_path / "q").glob("README.md"))
    assert "int4 in groups of 32 outputs, with zeros, lm_head 8 bits" in card
    assert "without wina_calib it does not load" in card
