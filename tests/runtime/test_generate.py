"""Prompts by chat templates, and what is said of how they are answered."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoTokenizer

from wina_calib.cli import main
from wina_calib.errors import UsageError
from wina_calib.model.locate import load_tokenizer
from wina_calib.runtime.generate import Generated, chat_inputs, generate
from wina_calib.runtime.load import load_opened

TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
TEMPLATE = TURNS + "{% if add_generation_prompt %}<assistant>{% endif %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}" + TEMPLATE


def with_template(calibrated: Path, folder: Path, template: str = TEMPLATE) -> Path:
    shutil.copytree(calibrated, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def ids(folder: Path, text: str) -> list[int]:
    return AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False).input_ids


def seen(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The ids of every pass through an embedding."""
    found: list[list[int]] = []
    plain = torch.nn.Embedding.forward
    monkeypatch.setattr(
        torch.nn.Embedding, "forward", lambda self, x: found.append(x.flatten().tolist()) or plain(self, x)
    )
    return found


@pytest.mark.parametrize(
    ("flags", "prompt"),
    [
        ({}, "<user>the weather\n<assistant>"),
        ({"system": "be brief"}, "<system>be brief\n<user>the weather\n<assistant>"),
        ({"raw": True}, "<s>the weather"),
    ],
)
def test_the_model_reads_the_prompt_by_its_template(
    calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict, prompt: str
) -> None:
    folder = with_template(calibrated, tmp_path / "chat")
    read = seen(monkeypatch)
    done = generate(folder, "the weather", new=4, **flags)
    assert read[0] == ids(folder, prompt)
    assert done.chat is not flags.get("raw", False)
    assert done.prompt_tokens == len(read[0])
    assert done.text.startswith("the weather") is not done.chat  # of a chat the answer alone


def test_what_is_shown_on_the_way_is_the_text(calibrated: Path, tmp_path: Path) -> None:
    for folder in (calibrated, with_template(calibrated, tmp_path / "chat")):
        pieces: list[str] = []
        done = generate(folder, "a short text", new=12, show=pieces.append)
        assert "".join(pieces) == done.text
        assert len(pieces) > 1


def test_speed_and_length_are_told(calibrated: Path) -> None:
    done = generate(calibrated, "a short text", new=6)
    assert done.tokens <= 6
    assert done.ended is (done.tokens < 6)
    assert done.tokens_per_second is not None and done.tokens_per_second > 0
    assert generate(calibrated, "a short text", new=1).tokens_per_second is None
    said = CliRunner().invoke(main, ["generate", str(calibrated), "a short text", "--new", "6"]).stderr
    assert f"{done.prompt_tokens} tokens read, {done.tokens} written, " in said
    assert "tokens/s" in said
    assert ("--new N lets it write more" in said) is not done.ended


def test_the_dtype_is_the_asked_one(calibrated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[torch.dtype] = []

    def load(*args: Any, **kwargs: Any) -> torch.nn.Module:
        model = load_opened(*args, **kwargs)
        loaded.append(model.dtype)
        return model

    monkeypatch.setattr("wina_calib.runtime.generate.load_opened", load)
    for name in ("bfloat16", "float32"):
        assert (
            CliRunner().invoke(main, ["generate", str(calibrated), "x", "--new", "2", "--dtype", name]).exit_code == 0
        )
    assert loaded == [torch.bfloat16, torch.float32]


def test_json_has_the_text_and_how_it_was_made(calibrated: Path, tmp_path: Path) -> None:
    folder = with_template(calibrated, tmp_path / "chat")
    done = CliRunner().invoke(main, ["generate", str(folder), "the weather", "--new", "3", "--json"])
    found = json.loads(done.stdout)
    assert set(found) == {"prompt", *Generated.__dataclass_fields__}
    assert found["prompt"] == "the weather" and found["chat"] is True


@pytest.mark.parametrize("template", [None, NO_SYSTEM])
def test_a_system_turn_that_has_no_place_is_refused(calibrated: Path, tmp_path: Path, template: str | None) -> None:
    folder = calibrated if template is None else with_template(calibrated, tmp_path / "chat", template)
    with pytest.raises(UsageError, match="needs a chat template" if template is None else "no system role here"):
        generate(folder, "the weather", system="be brief")


@pytest.mark.parametrize("flags", [[], ["--system", "\udcff"]])
def test_a_prompt_in_another_encoding_is_told(flags: list[str], calibrated: Path, tmp_path: Path) -> None:
    folder = with_template(calibrated, tmp_path / "s")
    done = CliRunner().invoke(main, ["generate", str(folder), "the weather" if flags else "caf\udce9", *flags])
    assert (done.exit_code, done.stdout) == (2, "")
    what, at = ("system's turn", 1) if flags else ("prompt", 4)
    assert done.stderr == f"Error: the {what} is no UTF-8 text, from character {at} on. Convert it.\n"


def test_a_template_that_fails_is_told() -> None:
    class Broken:
        def apply_chat_template(self, *args: object, **kwargs: object) -> None:
            raise ZeroDivisionError("by nothing")

    with pytest.raises(UsageError, match="by nothing.*--raw"):
        chat_inputs(Broken(), "hello")


def test_a_tokenizer_that_makes_no_mask_reads_all_tokens(calibrated: Path, tmp_path: Path) -> None:
    folder = with_template(calibrated, tmp_path / "chat")
    tokenizer = load_tokenizer(folder)
    whole = chat_inputs(tokenizer, "the weather")
    tokenizer.model_input_names = ["input_ids"]
    made = chat_inputs(tokenizer, "the weather")
    assert all(torch.equal(made[name], whole[name]) for name in ("input_ids", "attention_mask"))
