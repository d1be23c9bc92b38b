"""Conversations are read by the model's chat template; rows without a text are counted."""

import json
import math
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

import wina_calib
from wina_calib.corpus.blocks import load_blocks
from wina_calib.corpus.chat import Conversation, render
from wina_calib.corpus.sources import documents
from wina_calib.errors import CorpusError
from wina_calib.studies.diagnose import diagnose
from wina_calib.studies.evaluate import evaluate

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if loop.index0 % 2 != (m.role == 'assistant') %}"
    "{{ raise_exception('turns') }}{% endif %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
)
USER, BOT = {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}


def tokenizer(template: str | None = TEMPLATE) -> Any:
    """The tests' tokenizer, with a template that takes user and assistant by turns."""
    made = tiny.tokenizer()
    made.chat_template = template
    return made


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("turns", "text"),
    [
        ([USER, BOT], "<user>Hi.\n<assistant>Hello.\n"),
        ([{"role": "system", "content": "Be brief."}, USER, BOT], "<user>Be brief.\n\nHi.\n<assistant>Hello.\n"),
        ([BOT, USER, USER, BOT], "<user>Hi.\n\nHi.\n<assistant>Hello.\n"),
        ([{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}], "<user>Hi.\n<assistant>Hello.\n"),
        ([USER, {"role": "assistant", "content": None, "tool_calls": []}], "<user>Hi.\n<assistant>\n"),
        ([{"role": "user", "content": ["Hi.", {"type": "text", "text": "You?"}]}], "<user>Hi.\nYou?\n"),
        (
            [{"role": "user", "content": [{"type": "image", "url": "x"}, {"type": "text", "text": "This?"}]}],
            "<user>This?\n",
        ),
        ([None, {"role": "user", "content": [None, {"type": "text", "text": "Hi."}]}], "<user>Hi.\n"),
    ],
)
def test_rows_of_messages_are_rendered_by_the_template(tmp_path: Path, turns: list[Any], text: str) -> None:
    (document,) = documents(f"{jsonl(tmp_path / 'a.jsonl', [{'messages': turns}])}:messages")
    assert render(document, tokenizer()) == text
    assert render(document, tokenizer(None)) == document
    assert list(documents(str(tmp_path / "a.jsonl"))) == [document]  # where there is no field `text`


def test_what_no_template_takes_stays_as_it_is() -> None:
    document = Conversation([USER, BOT])
    assert render(document, tokenizer("{{ raise_exception('no') }}")) == "user: Hi.\nassistant: Hello."
    assert render("plain", tokenizer()) == "plain"


@given(
    st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": st.text()})
    )
)
def test_any_conversation_is_rendered_with_all_that_users_and_assistants_say(turns: list[dict[str, str]]) -> None:
    text = render(Conversation(turns), tokenizer())
    started = False
    for turn in turns:
        started = started or turn["role"] != "assistant"
        if started:
            assert turn["content"].encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace") in text


def test_other_contents_are_refused(tmp_path: Path) -> None:
    for content, held in ((3, "a value"), ([None, 3], "a list with a value"), ({"text": "no"}, "a value")):
        file = jsonl(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": content}]}])
        with pytest.raises(
            CorpusError,
            match=rf"line 1, field 'messages': a message holds {held} of type .* expected text, or a list of parts",
        ):
            list(documents(f"{file}:messages"))


# --- rows without a text --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "empty",
    [
        {"text": None},
        {"text": math.nan},
        {"text": "  "},
        {},
        {"n": 1},
        None,
        {"messages": []},
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_without_a_text_are_counted(tmp_path: Path, empty: Any, kind: str) -> None:
    rows = [{"text": "some words of no importance " * 30}] * 6
    rows[4:4] = [empty, empty]
    file = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        jsonl(file, rows)
    else:
        texts = [text if isinstance(text := (row or {}).get("text"), str) else None for row in rows]
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), file)
    blocks = load_blocks([str(file)], tiny.tokenizer(), samples=8, seq_len=64, seed=0, min_tokens=1)
    assert blocks.notes == (f"data {str(file)!r}: 2 of 8 rows held no text",)


def test_where_no_row_has_a_text_the_first_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"line 1: there is no field 'text'; found body\."):
        list(documents(str(jsonl(tmp_path / "a.jsonl", [{"body": "x"}] * 3))))
    with pytest.raises(CorpusError, match=r"line 2: field 'text' holds a value of type int"):
        list(documents(str(jsonl(tmp_path / "a.jsonl", [{"text": None}, {"text": 3}]))))
    with pytest.raises(CorpusError, match=r"line 1: field 'messages' holds no text; expected text, or"):
        list(documents(str(jsonl(tmp_path / "a.jsonl", [{"messages": []}, {"messages": [USER | {"content": None}]}]))))
    pyarrow.parquet.write_table(
        pyarrow.table({"text": [None, None]}, schema=pyarrow.schema([("text", "string")])), tmp_path / "a.parquet"
    )
    with pytest.raises(CorpusError, match=r"a\.parquet, row 1: field 'text' holds nothing \(null\)"):
        list(documents(str(tmp_path / "a.parquet")))


def test_rows_of_a_stream_without_the_field_are_not_read_for_ever(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    jsonl(file, [{"body": "x"}] * 1000)
    with file.open("a") as more:
        more.write("this is no JSON\n")
    with pytest.raises(CorpusError, match="line 1: there is no field 'text'"):
        list(documents(str(file)))


# --- the built-in conversations, and who is told what ------------------------------------------------------------


def test_builtin_conversations() -> None:
    found = {part: list(documents(f"builtin:{part}")) for part in ("chat", "heldout:chat")}
    assert len(found["chat"]) > 200
    assert len(found["heldout:chat"]) > 50
    for conversations in found.values():
        assert all(isinstance(c, Conversation) for c in conversations)
        for turns in (c.turns for c in conversations):
            spoken = [turn["role"] for turn in turns if turn["role"] != "system"]
            assert spoken == ["user", "assistant"] * (len(spoken) // 2)
            assert all(turn["content"].strip() for turn in turns)
    assert any(len(c.turns) > 5 for c in found["chat"])
    answers = {turn["content"] for c in found["chat"] for turn in c.turns if len(turn["content"]) > 200}
    assert not answers & {turn["content"] for c in found["heldout:chat"] for turn in c.turns}


def chat_model(folder: Path) -> Path:
    tiny.save("llama", folder)
    tokenizer("{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}").save_pretrained(folder)
    return folder


class Notes:
    """Hears what a calibration says."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def planned(self, estimate: Any) -> None: ...

    def phase(self, name: str, steps: int) -> None: ...

    def step(self, line: str = "") -> None: ...

    def note(self, text: str) -> None:
        self.told.append(text)


OPTIONS = {"budget": "uniform", "samples": 80, "seq_len": 128, "grid": (0.5,), "transform": "none"}


def test_a_chat_model_is_calibrated_on_conversations(tmp_path: Path) -> None:
    model, notes = chat_model(tmp_path / "m"), Notes()
    result = wina_calib.calibrate(model, tmp_path / "out", progress=notes, **OPTIONS)
    assert result.settings.provenance["data"] == ["builtin:chat", "builtin"]
    assert not any("chat template" in note or "perplexity" in note for note in notes.told)
    held_out = ("builtin:heldout:chat", "builtin:heldout")
    assert result.settings.provenance["base_ppl_data"] == list(held_out)
    assert result.verdict.data == held_out
    assert evaluate(tmp_path / "out", tokens=512).data == held_out
    assert evaluate(tmp_path / "out", data="builtin:heldout", tokens=512).data == ("builtin:heldout",)
    found = diagnose(tmp_path / "out", what=["texts"], amounts=(1,), tokens=256)
    assert found.data == held_out
    assert found.texts


def test_plain_text_is_given_by_its_name(tmp_path: Path) -> None:
    result = wina_calib.calibrate(chat_model(tmp_path / "m"), tmp_path / "out", data="builtin", **OPTIONS)
    assert result.settings.provenance["data"] == ["builtin"]


def test_a_chat_model_on_plain_text_alone_is_told_so(tmp_path: Path, text: Path) -> None:
    model, notes = chat_model(tmp_path / "m"), Notes()
    wina_calib.calibrate(model, tmp_path / "out", data=str(text), progress=notes, **OPTIONS)
    (told,) = (note for note in notes.told if "chat template" in note)
    assert "builtin:chat" in told


def test_a_model_that_predicts_none_of_the_text_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights beside the wrong tokenizer calibrate without an error, and every figure is of nothing."""
    monkeypatch.setattr("wina_calib.calibration.phases.PUZZLED", 2.0)
    notes = Notes()
    result = wina_calib.calibrate(chat_model(tmp_path / "m"), tmp_path / "out", progress=notes, **OPTIONS)
    (told,) = (note for note in notes.told if "tokenizer belong together" in note)
    assert f"{result.settings.provenance['base_ppl']:,.0f}: it predicts none of that text" in told
