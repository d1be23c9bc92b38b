"""Tasks out of files: read, refused, and solved as their likelihoods say."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch.nn.functional import log_softmax

from wina_calib.errors import UsageError
from wina_calib.recovery.tasks import Item, accuracy, read_tasks


def written(folder: Path, *rows: object) -> Path:
    path = folder / "tasks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_items_of_both_kinds_are_read(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        {"query": "Why?", "choices": ["so", "thus"], "gold": 1},
        {"context": "once upon a", "continuation": "time"},
    )
    choice, continuation = read_tasks(path, 0)
    assert choice == Item("Why?\nAnswer:", (" so", " thus"), 1)
    assert continuation == Item("once upon a", (" time",), 0)
    assert read_tasks(path, 1) == (choice,)


@pytest.mark.parametrize(
    "row",
    [
        {"query": "Why?"},
        {"query": "Why?", "choices": ["so"], "gold": 0},
        {"query": "Why?", "choices": ["so", "thus"], "gold": 2},
        {"query": "Why?", "choices": 3, "gold": 0},
        [],
        7,
    ],
)
def test_a_line_that_is_no_task_is_named(tmp_path: Path, row: object) -> None:
    with pytest.raises(UsageError, match=r"tasks.jsonl, line 1: no task\. Expected JSON"):
        read_tasks(written(tmp_path, row), 0)


def test_a_file_that_is_not_there_or_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_tasks(tmp_path / "none.jsonl", 0)
    with pytest.raises(UsageError, match="are empty"):
        read_tasks(written(tmp_path), 0)


def test_the_likeliest_choice_counts() -> None:
    model, tokenizer = tiny.make("llama"), tiny.tokenizer()
    context, choices = "a short text\nAnswer:", (" about", " the weather", " of that day")

    def likelihood(choice: str) -> float:
        start, ids = len(tokenizer(context).input_ids), tokenizer(context + choice).input_ids
        with torch.no_grad():
            chances = log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
        return sum(float(chances[place - 1, ids[place]]) for place in range(start, len(ids)))

    best = max(range(3), key=lambda n: likelihood(choices[n]))
    items = [Item(context, choices, gold) for gold in range(3)]
    assert [accuracy(model, tokenizer, [item]) for item in items] == [float(gold == best) for gold in range(3)]
    assert accuracy(model, tokenizer, items) == pytest.approx(1 / 3)


def test_a_continuation_is_to_be_the_likeliest_throughout() -> None:
    model = tiny.make("llama")

    def numbers(text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[int(token) for token in text.split()])

    ids = [1, 20, 30]
    with torch.no_grad():
        for _ in range(3):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    likeliest = " ".join(map(str, ids[3:]))
    other = " ".join(map(str, [*ids[3:5], ids[5] + 1]))
    items = [Item("1 20 30", (f" {text}",), 0) for text in (likeliest, other)]
    assert [accuracy(model, numbers, [item]) for item in items] == [1.0, 0.0]
