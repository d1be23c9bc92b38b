"""Calibration of every family: closed-loop thresholds hold in the loaded model, sparsity 0 is the dense model."""

import json
import re
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner
from conftest import SHARED, needs_shared
from transformers import AutoModelForCausalLM

import wina_calib
from wina_calib.checkpoint import open_checkpoint
from wina_calib.cli import main
from wina_calib.corpus import load_blocks
from wina_calib.errors import CorpusError, ModelFolderError, NumericError, OutputError, UnsupportedModel, UsageError
from wina_calib.runtime.load import runtime_state
from wina_calib.shards import Shards, ShardWriter

SMALL = {"samples": 64, "seq_len": 128, "budget": "uniform"}


def achieved(folder: Path, text: Path, sparsity: float, samples: int = 64) -> dict[tuple[int, str], float]:
    """Site sparsities of a checkpoint on text, first tokens left out of the average."""
    model = wina_calib.load(folder, sparsity)
    blocks = load_blocks([str(text)], tiny.tokenizer(), samples=samples, seq_len=128, seed=0, min_tokens=1)
    with runtime_state(model).counting() as counts, torch.no_grad():
        for ids in blocks.ids.split(8):
            model(ids, use_cache=False)
    return {key: count.sparsity * 128 / 127 for key, count in counts.items()}


@pytest.mark.parametrize("masks", ["shared", "per-projection"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_closed_loop_by_site_holds_in_the_loaded_model(family: str, masks: str, tmp_path: Path, text: Path) -> None:
    dense = tiny.save(family, tmp_path / "m")
    wina_calib.calibrate(tmp_path / "m", tmp_path / "s", transform="none", data=str(text), masks=masks, **SMALL)
    for anchor in (0.25, 0.5, 0.65):
        found = achieved(tmp_path / "s", text, anchor)
        assert len(found) == 12
        for key, value in found.items():
            assert value == pytest.approx(anchor, abs=0.003), key
    ids = torch.randint(4, 300, (2, 20))
    sparse = wina_calib.load(tmp_path / "s")
    with torch.no_grad():
        assert not torch.equal(sparse(ids).logits, dense(ids).logits)
        assert wina_calib.set_sparsity(sparse, 0.0) == 0.0
        assert torch.equal(sparse(ids).logits, dense(ids).logits)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_default_transform_keeps_the_dense_model(family: str, tmp_path: Path, text: Path) -> None:
    dense = tiny.save(family, tmp_path / "m", tie_word_embeddings=True)
    result = wina_calib.calibrate(tmp_path / "m", tmp_path / "s", data=str(text), **SMALL)
    assert result.settings.transform != "auto"
    ids = torch.randint(4, 300, (2, 20))
    with torch.no_grad():
        expected = dense(ids).logits
        found = wina_calib.load(tmp_path / "s", 0.0)(ids).logits
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_untied_embeddings_are_named(tmp_path: Path, text: Path) -> None:
    tiny.save("llama", tmp_path / "m", tie_word_embeddings=True)
    args = f"calibrate {tmp_path / 'm'} -o {tmp_path / 's'} --data {text} --transform global --budget uniform"
    done = CliRunner().invoke(main, [*args.split(), *["--samples", "64", "--seq-len", "128", "--grid", "0.5"]])
    assert done.exit_code == 0, done.stderr
    assert "lm_head has weights of its own now" in done.stderr
    assert re.match(r"plan: [\d,]+ tokens, .* about [\d.]+ [kMG]B of memory, ", done.stderr)  # before all else
    assert json.loads((tmp_path / "s" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("score", ["teal", "weight", "random"])
def test_other_scores(score: str, tmp_path: Path, llama: Path, text: Path) -> None:
    wina_calib.calibrate(llama, tmp_path / "s", transform="none", score=score, data=str(text), **SMALL)
    for key, value in achieved(tmp_path / "s", text, 0.5).items():
        assert value == pytest.approx(0.5, abs=0.02 if score != "teal" else 0.003), key


def test_micro_batches_do_not_change_the_result_beyond_rounding(tmp_path: Path, llama: Path, text: Path) -> None:
    tables = []
    for batch in (1, 3, 8):
        folder = tmp_path / str(batch)
        wina_calib.calibrate(llama, folder, transform="none", data=str(text), micro_batch=batch, **SMALL)
        tables.append(open_checkpoint(folder).tensors)
    for other in tables[1:]:
        for name, value in tables[0].items():
            assert torch.allclose(other[name], value, rtol=5e-3, atol=1e-6), name


def test_same_inputs_give_the_same_bytes(tmp_path: Path, llama: Path, text: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        wina_calib.calibrate(llama, tmp_path / name / "s", data=str(text), **SMALL)
    files = sorted(p.name for p in (tmp_path / "a" / "s").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "b" / "s").iterdir())
    for name in files:
        assert (tmp_path / "a" / "s" / name).read_bytes() == (tmp_path / "b" / "s" / name).read_bytes(), name


def test_asked_sparsity_is_met_on_the_demo_model(tmp_path: Path) -> None:
    """Calibrated on a little of the built-in text, the model sparsity holds within 0.01 on its held-out part."""
    wina_calib.calibrate("demo", tmp_path / "s", samples=32, seq_len=512)
    for asked in (0.25, 0.4, 0.5, 0.65):
        found = wina_calib.evaluate(tmp_path / "s", sparsity=asked, tokens=8192)
        assert found.model_sparsity == pytest.approx(asked, abs=0.01)
        assert found.warnings == ()
    for between in (0.33, 0.58):
        found = wina_calib.evaluate(tmp_path / "s", sparsity=between, tokens=4096)
        assert found.model_sparsity == pytest.approx(between, abs=0.02)


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize("model", ["demo", "ref-llama-14m"])
def test_asked_sparsity_is_met_on_held_out_text(model: str, tmp_path: Path) -> None:
    """Calibrated on one half of a collection of texts, the model sparsity holds within 0.01 on the other."""
    path = model if model == "demo" else SHARED / "models" / model
    wina_calib.calibrate(
        path,
        tmp_path / "s",
        grid=(0.25, 0.5, 0.65),
        data=str(SHARED / "text" / "calibration.jsonl"),
        samples=64,
        seq_len=1024,
    )
    heldout = str(SHARED / "text" / "heldout.jsonl")
    for asked in (0.25, 0.4, 0.5, 0.65):
        found = wina_calib.evaluate(tmp_path / "s", sparsity=asked, data=heldout, tokens=24_576)
        assert found.model_sparsity == pytest.approx(asked, abs=0.01)
        assert found.warnings == ()


@needs_shared
@pytest.mark.slow
def test_a_model_of_other_people(tmp_path: Path) -> None:
    """A Llama 2 in float32 with a context of 512 tokens, with the default options but for the amount of text."""
    settings = wina_calib.calibrate(SHARED / "models" / "stories260K", tmp_path / "s", samples=48).settings
    assert (settings.transform, settings.provenance["seq_len"]) == ("global+head", 512)
    for asked in (0.4, 0.5, 0.65):
        found = wina_calib.evaluate(tmp_path / "s", sparsity=asked, tokens=16_384)
        assert found.model_sparsity == pytest.approx(asked, abs=0.01)
    model = AutoModelForCausalLM.from_pretrained(SHARED / "models" / "stories260K")
    ids = torch.randint(4, 500, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            wina_calib.load(tmp_path / "s", 0.0)(ids).logits, model(ids).logits, atol=1e-3, rtol=1e-3
        )


def test_base_perplexity_is_stored(calibrated: Path) -> None:
    provenance = open_checkpoint(calibrated).settings.provenance
    assert provenance["base_ppl"] > 1
    assert provenance["base_ppl_data"] == ["builtin:heldout"]
    assert provenance["blocks"] == 80


# --- bad input: one clear message, nothing written -------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_sparsity_out_of_range(sparsity: float, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="sparsity"):
        wina_calib.calibrate("demo", tmp_path / "s", sparsity=sparsity)
    assert list(tmp_path.iterdir()) == []


def test_unknown_options_and_choices(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown option sparsty"):
        wina_calib.calibrate("demo", tmp_path / "s", sparsty=0.5)
    with pytest.raises(UsageError, match="score is 'wine'"):
        wina_calib.calibrate("demo", tmp_path / "s", score="wine")


def test_folder_without_config_or_weights(tmp_path: Path, text: Path) -> None:
    (tmp_path / "m").mkdir()
    with pytest.raises(ModelFolderError, match="config.json"):
        wina_calib.calibrate(tmp_path / "m", tmp_path / "s", data=str(text))
    tiny.save("llama", tmp_path / "m")
    for file in (tmp_path / "m").glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(wina_calib.WinaError, match="safetensors"):
        wina_calib.calibrate(tmp_path / "m", tmp_path / "s", data=str(text))
    assert not (tmp_path / "s").exists()


def _rewrite(folder: Path, name: str, change: object) -> None:
    """Replace one tensor of a sharded model."""
    shards = Shards.open(folder)
    file = shards[name].file
    tensors = {n: shards.load(n) for n, info in shards.items() if info.file == file}
    tensors[name] = change(tensors[name])
    with ShardWriter(file, {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}, {"format": "pt"}) as writer:
        for n, t in tensors.items():
            writer.write(n, t)


def test_damaged_weights(tmp_path: Path, text: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    tiny.save("llama", tmp_path / "m")
    _rewrite(tmp_path / "m", name, lambda t: t[:-1].clone())
    with pytest.raises(ModelFolderError, match=f"{name} is"):
        wina_calib.calibrate(tmp_path / "m", tmp_path / "s", data=str(text), **SMALL)
    tiny.save("llama", tmp_path / "m")

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        tensor[3, 4] = float("nan")
        return tensor

    _rewrite(tmp_path / "m", name, poison)
    with pytest.raises(NumericError, match=f"{name} holds 1 NaN"):
        wina_calib.calibrate(tmp_path / "m", tmp_path / "s", data=str(text), **SMALL)
    _rewrite(tmp_path / "m", name, lambda t: t.nan_to_num(float("inf")))
    with pytest.raises(NumericError, match=f"{name} holds 1 NaN or infinite"):
        wina_calib.calibrate(tmp_path / "m", tmp_path / "s", data=str(text), **SMALL)
    shard = Shards.open(tmp_path / "m")[name].file
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(wina_calib.WinaError, match=shard.name):
        wina_calib.calibrate(tmp_path / "m", tmp_path / "s", data=str(text), **SMALL)
    shard.unlink()
    with pytest.raises(wina_calib.WinaError, match=shard.name):
        wina_calib.calibrate(tmp_path / "m", tmp_path / "s", data=str(text), **SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_activations_that_overflow_name_the_site(tmp_path: Path, text: Path) -> None:
    tiny.save("llama", tmp_path / "m")
    _rewrite(tmp_path / "m", "model.layers.1.mlp.up_proj.weight", lambda t: t * 1e38)
    with pytest.raises(NumericError, match="layer 1, mlp_"):
        wina_calib.calibrate(tmp_path / "m", tmp_path / "s", data=str(text), transform="none", **SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_calibrated_and_quantized_models_are_refused(calibrated: Path, tmp_path: Path, text: Path) -> None:
    with pytest.raises(ModelFolderError, match="calibrated already"):
        wina_calib.calibrate(calibrated, tmp_path / "s", data=str(text))
    tiny.save("llama", tmp_path / "m")
    config = (tmp_path / "m" / "config.json").read_text()
    (tmp_path / "m" / "config.json").write_text(
        config.replace("{", '{"quantization_config": {"quant_method": "gptq", "bits": 4},', 1)
    )
    with pytest.raises(UnsupportedModel, match="quantized"):
        wina_calib.calibrate(tmp_path / "m", tmp_path / "s", data=str(text))


def test_short_corpus_and_missing_tokenizer(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(CorpusError, match="8,000"):
        wina_calib.calibrate(llama, tmp_path / "s", data=str(tmp_path / "short.txt"))
    tiny.make("llama").save_pretrained(tmp_path / "m")
    with pytest.raises(ModelFolderError, match="tokenizer"):
        wina_calib.calibrate(tmp_path / "m", tmp_path / "s")


def test_output_exists_or_cannot_be_written(tmp_path: Path, calibrated: Path) -> None:
    with pytest.raises(OutputError, match="--overwrite"):
        wina_calib.calibrate("demo", calibrated)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        wina_calib.calibrate("demo", tmp_path / "file", overwrite=True)
    with pytest.raises(OutputError, match="does not exist"):
        wina_calib.calibrate("demo", tmp_path / "no" / "where")


def test_a_head_of_its_own_in_a_tied_model_is_noticed(tmp_path: Path, text: Path) -> None:
    tiny.save("llama", tmp_path / "m")
    config = (tmp_path / "m" / "config.json").read_text()
    (tmp_path / "m" / "config.json").write_text(
        config.replace('"tie_word_embeddings": false', '"tie_word_embeddings": true')
    )
    with pytest.raises(ModelFolderError, match=r"lm_head\.weight differs"):
        wina_calib.calibrate(tmp_path / "m", tmp_path / "s", data=str(text), **SMALL)
