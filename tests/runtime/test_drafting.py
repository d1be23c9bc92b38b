"""A calibrated model drafts for its dense original: the dense model's text, and what was kept of the draft is told."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

import wina_calib
from wina_calib.cli import main
from wina_calib.errors import UsageError
from wina_calib.runtime import drafting
from wina_calib.runtime.generate import generate

PROMPT = "the weather of that day"


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory, llama: Path, text: Path) -> Path:
    folder = tmp_path_factory.mktemp("draft") / "int4"
    options: dict[str, Any] = {"samples": 64, "seq_len": 128, "grid": (0.5,), "budget": "uniform", "sparsity": 0.4}
    wina_calib.calibrate(llama, folder, data=str(text), transform="none", bits=4, group_size=32, **options)
    return folder


def dense_text(folder: Path, new: int, **options: Any) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    return tokenizer.decode(
        model.generate(**inputs, max_new_tokens=new, pad_token_id=3, **options)[0], skip_special_tokens=True
    )


def test_the_text_is_the_dense_models(llama: Path, calibrated: Path, int4: Path) -> None:
    expected = dense_text(llama, 40, do_sample=False)
    for draft in (calibrated, int4):
        done = generate(draft, PROMPT, new=40, draft_for=llama)
        assert done.text == expected
        assert done.drafted is not None and done.kept is not None
        assert 0 < done.kept <= done.drafted
        assert done.tokens_per_second is not None
    alone = generate(int4, PROMPT, new=40)
    assert alone.text != expected
    assert alone.drafted is alone.kept is None


def test_a_draft_that_is_the_model_is_kept_whole(llama: Path, calibrated: Path) -> None:
    done = generate(calibrated, PROMPT, new=31, sparsity=0.0, draft_for=llama)
    assert done.drafted == done.kept
    assert done.text == dense_text(llama, 31, do_sample=False)
    assert done.tokens == 31


def test_drawing_follows_the_dense_model(llama: Path, int4: Path) -> None:
    texts = {generate(int4, PROMPT, new=12, sample=True, seed=seed, draft_for=llama).text for seed in range(3)}
    assert len(texts) > 1


def test_the_draft_is_left_as_it_was(llama: Path, calibrated: Path) -> None:
    model = wina_calib.load(calibrated)
    dense = AutoModelForCausalLM.from_pretrained(llama)
    before = model.generation_config.to_dict()
    with drafting.drafting(dense, model, 3):
        assert model.generation_config.num_assistant_tokens == drafting.AHEAD
    assert model.generation_config.to_dict() == before
    assert not dense._forward_pre_hooks


def test_what_was_kept_is_told(llama: Path, calibrated: Path) -> None:
    given = ["generate", str(calibrated), PROMPT, "--new", "9", "--sparsity", "0", "--draft-for", str(llama), "--json"]
    ran = CliRunner().invoke(main, given)
    done = json.loads(ran.stdout)
    assert done["kept"] == done["drafted"] > 0
    assert f"{done['kept']} of {done['drafted']} drafted tokens kept (100%)" in ran.stderr


def test_bases_that_cannot_be_drafted_for_are_refused(llama: Path, calibrated: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is calibrated itself. --draft-for takes the dense model"):
        generate(calibrated, PROMPT, draft_for=calibrated)
    other = shutil.copytree(llama, tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["nothing"])
    tokenizer.save_pretrained(other)
    with pytest.raises(UsageError, match="has other tokens than the draft"):
        generate(calibrated, PROMPT, draft_for=other)
    tiny.save("llama", tmp_path / "wide", vocab_size=384)
    with pytest.raises(UsageError, match="320 tokens, not 384"):
        generate(calibrated, PROMPT, draft_for=tmp_path / "wide")
