"""Calibration of every family: closed-loop thresholds hold in the loaded model, sparsity 0 is the dense model."""

import json
import re
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner
from shared import SHARED, needs_shared
from transformers import AutoModelForCausalLM, AutoTokenizer

import wina_calib
from wina_calib.checkpoint.reader import open_checkpoint
from wina_calib.cli import main
from wina_calib.common.progress import Silent
from wina_calib.corpus.blocks import load_blocks
from wina_calib.errors import ModelFolderError
from wina_calib.model.locate import demo_folder
from wina_calib.runtime.load import runtime_state
from wina_calib.studies.evaluate import dense_states, evaluation_blocks, measure

SMALL = {"samples": 64, "seq_len": 128, "budget": "uniform", "sparsity": 0.5, "grid": (0.25, 0.5, 0.65)}


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
    assert "lm_head no longer shares the embeddings' weights" in done.stderr
    assert re.match(r"plan: [\d,]+ tokens, .* about [\d.]+ [kMG]B of memory, ", done.stderr)  # before all else
    assert json.loads((tmp_path / "s" / "config.json").read_text())["tie_word_embeddings"] is False


def test_progress_tells_the_worst_site_of_each_layer(tmp_path: Path, llama: Path, text: Path) -> None:
    """And blocks are cut to the model's context."""

    told: list[str] = []

    class Listening(Silent):
        def step(self, note: str) -> None:
            told.append(note)

    options = SMALL | {"seq_len": 2048, "samples": 32}
    result = wina_calib.calibrate(
        llama, tmp_path / "s", transform="none", data=str(text), progress=Listening(), **options
    )
    fits = [
        note
        for note in told
        if re.fullmatch(r"layer [123]: own output off by \d+% at most \((attn|mlp)_(in|out), at 65% sparsity\)", note)
    ]
    assert len(fits) == 3
    errors = {n: t[-1] for n, t in open_checkpoint(tmp_path / "s").tensors.items() if n.endswith(".error")}
    for layer, note in enumerate(fits):
        site = max((n for n in errors if f".{layer}.wina" in n), key=lambda n: float(errors[n]))
        assert f"off by {float(errors[site]):.0%} at most ({site.split('.')[-2]}, at 65% sparsity)" in note
    assert result.settings.provenance["seq_len"] == 256


@pytest.mark.parametrize("score", ["teal", "weight", "random"])
def test_other_scores(score: str, tmp_path: Path, llama: Path, text: Path) -> None:
    wina_calib.calibrate(llama, tmp_path / "s", transform="none", score=score, data=str(text), **SMALL)
    for key, value in achieved(tmp_path / "s", text, 0.5).items():
        assert value == pytest.approx(0.5, abs=0.02 if score != "teal" else 0.003), key


@pytest.mark.parametrize("budget", ["uniform", "global"])
def test_micro_batches_do_not_change_the_result_beyond_rounding(
    budget: str, tmp_path: Path, llama: Path, text: Path
) -> None:
    """Site sparsities that are chosen by curves, and the curves, too."""
    options, tables = SMALL | {"budget": budget, "data": str(text), "samples": 32, "seq_len": 256}, []
    for batch in (1, 3, 8):
        folder = tmp_path / str(batch)
        wina_calib.calibrate(llama, folder, transform="none", micro_batch=batch, **options)
        tables.append(open_checkpoint(folder).tensors)
    for other in tables[1:]:
        for name, value in tables[0].items():
            assert torch.allclose(other[name], value, rtol=5e-3, atol=1e-6), name
    assert (budget == "global") == any(name.endswith(".curve") for name in tables[0])


def test_same_inputs_give_the_same_bytes(tmp_path: Path, llama: Path, text: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        wina_calib.calibrate(llama, tmp_path / name / "s", data=str(text), **SMALL)
    files = sorted(p.name for p in (tmp_path / "a" / "s").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "b" / "s").iterdir())
    for name in files:
        assert (tmp_path / "a" / "s" / name).read_bytes() == (tmp_path / "b" / "s" / name).read_bytes(), name


def test_asked_sparsity_is_met_on_the_demo_model(demo_sparse: Path) -> None:
    """The model sparsity holds within 0.01 on the built-in text's held-out part, within 0.02 between the anchors."""
    found = wina_calib.evaluate(demo_sparse, sparsity=0.4, tokens=4096)
    assert found.model_sparsity == pytest.approx(0.4, abs=0.01)
    assert found.warnings == ()
    model = wina_calib.load(demo_sparse)
    blocks = evaluation_blocks((), AutoTokenizer.from_pretrained(demo_sparse), 4096, 512)
    dense = dense_states(model, blocks.ids)
    for asked, limit in ((0.25, 0.01), (0.33, 0.02), (0.5, 0.01), (0.58, 0.02), (0.65, 0.01)):
        wina_calib.set_sparsity(model, asked)
        assert measure(model, blocks, dense=dense).model_sparsity == pytest.approx(asked, abs=limit)


def test_a_transformed_model_in_bfloat16_keeps_its_perplexity_at_sparsity_0(demo_sparse: Path) -> None:
    """Stored and computed in bfloat16; a sum over 16 blocks, whose rounding alone is far below the limit."""
    assert "global" in open_checkpoint(demo_sparse).settings.transform
    tokenizer = AutoTokenizer.from_pretrained(demo_folder())
    ids = load_blocks(("builtin:heldout",), tokenizer, samples=16, seq_len=256, seed=0, min_tokens=0).ids
    with torch.no_grad():
        dense, turned = (
            float(model(ids, labels=ids).loss)
            for model in (
                AutoModelForCausalLM.from_pretrained(demo_folder(), dtype=torch.bfloat16),
                wina_calib.load(demo_sparse, 0.0, dtype=torch.bfloat16),
            )
        )
    assert turned != dense
    assert turned == pytest.approx(dense, abs=0.01)  # of the loss, which is 1 % of perplexity


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
        sparsity=0.5,
    )
    heldout = str(SHARED / "text" / "heldout.jsonl")
    for asked in (0.25, 0.4, 0.5, 0.65):
        found = wina_calib.evaluate(tmp_path / "s", sparsity=asked, data=heldout, tokens=24_576)
        assert found.model_sparsity == pytest.approx(asked, abs=0.01)
        assert found.warnings == ()
    for between in (0.33, 0.58):
        found = wina_calib.evaluate(tmp_path / "s", sparsity=between, data=heldout, tokens=8192)
        assert found.model_sparsity == pytest.approx(between, abs=0.02)


@needs_shared
@pytest.mark.slow
def test_a_model_of_other_people(tmp_path: Path) -> None:
    """A Llama 2 in float32 with a context of 512 tokens, with the default options but for the amount of text."""
    settings = wina_calib.calibrate(
        SHARED / "models" / "stories260K", tmp_path / "s", samples=48, sparsity=0.5, grid=(0.25, 0.5, 0.65)
    ).settings
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


def test_a_tokenizer_of_a_larger_model_is_named(tmp_path: Path, text: Path) -> None:
    tiny.save("llama", tmp_path / "m", vocab_size=200)
    with pytest.raises(ModelFolderError, match=r"the tokenizer makes token \d+, the model has 200"):
        wina_calib.calibrate(tmp_path / "m", tmp_path / "s", data=str(text), **SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_perplexity_beyond_all_numbers_is_json(tmp_path: Path, text: Path) -> None:
    model = tiny.save("llama", tmp_path / "m")
    with torch.no_grad():
        model.lm_head.weight.mul_(3e3)
    model.save_pretrained(tmp_path / "m", max_shard_size="60KB")
    wina_calib.calibrate(tmp_path / "m", tmp_path / "s", data=str(text), transform="none", **SMALL)
    json.loads((tmp_path / "s" / "config.json").read_text(), parse_constant=pytest.fail)
