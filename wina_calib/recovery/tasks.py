"""Tasks out of files, solved by likelihood: which choice a model finds likeliest, or whether it goes on as the text does."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel

from wina_calib.calibration.layer_stream import Head
from wina_calib.errors import UsageError

TOGETHER = 1 << 13  # tokens at a time, in sequences of one length


@dataclass(frozen=True)
class Item:
    """One question: of the texts that may follow `context` the one at `gold` is right; a single one is to be the likeliest."""

    context: str
    choices: tuple[str, ...]
    gold: int


def read_tasks(path: Path, most: int) -> tuple[Item, ...]:
    """The items of a file of JSON lines, at most so many; 0 is all.

    Raises:
        UsageError: it cannot be read, or a line is no item.
    """
    try:
        lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"tasks {path} cannot be read ({error}). Give a file of JSON lines.") from error
    if not lines:
        raise UsageError(f"tasks {path} are empty. Give a file of JSON lines.")
    return tuple(_item(path, number, line) for number, line in enumerate(lines[: most or None], 1))


def _item(path: Path, number: int, line: str) -> Item:
    try:
        row = json.loads(line)
        if "continuation" in row:
            return Item(str(row["context"]), (" " + str(row["continuation"]).strip(),), 0)
        choices, gold = tuple(f" {choice}" for choice in row["choices"]), int(row["gold"])
        if len(choices) > 1 and 0 <= gold < len(choices):
            return Item(f"{row['query']}\nAnswer:", choices, gold)
    except (ValueError, KeyError, TypeError):
        pass
    raise UsageError(
        f"{path}, line {number}: no task. Expected JSON with query, choices (two or more) and gold (the right one's number), or "
        "with context and continuation."
    )


@dataclass(frozen=True)
class _Case:
    """A choice as tokens: the whole, and where the choice begins."""

    tokens: tuple[int, ...]
    start: int


@torch.no_grad()
def accuracy(model: PreTrainedModel, tokenizer: Any, items: Sequence[Item]) -> float:
    """Share of items that a model solves."""
    cases = [_case(tokenizer, item.context, choice) for item in items for choice in item.choices]
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, case in enumerate(cases):
        by_length[len(case.tokens)].append(index)
    likelihood, greedy = [0.0] * len(cases), [False] * len(cases)
    for length, indices in sorted(by_length.items()):
        step = max(1, TOGETHER // length)
        for part in (indices[first : first + step] for first in range(0, len(indices), step)):
            ids = torch.tensor([cases[i].tokens for i in part], device=model.device)
            for i, sums in zip(part, _sums(model, ids, [cases[i].start for i in part]), strict=True):
                likelihood[i], greedy[i] = sums
    right, first = 0, 0
    for item in items:
        last = first + len(item.choices)
        best = max(range(first, last), key=likelihood.__getitem__) - first
        right += greedy[first] if len(item.choices) == 1 else best == item.gold
        first = last
    return right / len(items)


def _case(tokenizer: Any, context: str, choice: str) -> _Case:
    start = len(tokenizer(context).input_ids)
    tokens = tuple(tokenizer(context + choice).input_ids)
    return _Case(tokens, max(1, min(start, len(tokens) - 1)))


def _sums(model: PreTrainedModel, ids: Tensor, starts: Sequence[int]) -> list[tuple[float, bool]]:
    """For sequences (batch, seq), log-likelihood of what comes from each start on, and whether it is the likeliest throughout."""
    states = model.get_decoder()(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    head, sums = Head(model, model.get_decoder()), []
    for row, tokens, start in zip(states, ids, starts, strict=True):
        chance, labels = log_softmax(head(row[None, start - 1 :])[0].float(), -1), tokens[start:, None]
        sums.append(torch.stack([chance.gather(1, labels).sum(), (chance.argmax(-1) == labels[:, 0]).all().float()]))
    return [(total, bool(all_likeliest)) for total, all_likeliest in torch.stack(sums).tolist()]
