"""A sparse checkpoint against the dense model it was made from, on some texts and tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from wina_calib.calibration.layer_stream import Head
from wina_calib.calibration.likelihood import Quality, quality_sums
from wina_calib.common.progress import Progress
from wina_calib.recovery.loss import rows_of
from wina_calib.recovery.tasks import Item, accuracy
from wina_calib.runtime.load import choose_sparsity, load, set_prefill

TOGETHER = 1 << 13  # tokens computed together
DENSE = 0.0  # the sparsity that stands for the dense model in tables of tasks


@torch.no_grad()
def measure(
    folder: Path,
    teacher: PreTrainedModel,
    tokenizer: Any,
    sparsities: tuple[float, ...],
    texts: Mapping[str, Tensor],
    tasks: Mapping[str, Sequence[Item]],
    report: Progress,
) -> tuple[dict[str, dict[float, Quality]], dict[str, dict[float, float]]]:
    """Quality of a checkpoint at some model sparsities, prompts masked too.

    `teacher` is the dense model; texts are tokens (sequences, seq) by kind, tasks items by name.

    Returns:
        Quality by kind and sparsity; accuracy by task and sparsity, the dense model's at 0.
    """
    device = teacher.device
    dtype = torch.float32 if device.type == "cpu" else "auto"
    student = load(folder, dtype=dtype, device_map=None if device.type == "cpu" else device)
    set_prefill(student, "sparse")
    qualities, solved = {}, {}
    for kind, ids in texts.items():
        qualities[kind] = _qualities(student, teacher, sparsities, ids)
        report.step(kind)
    for name, items in tasks.items():
        solved[name] = {DENSE: accuracy(teacher, tokenizer, items)}
        for sparsity in sparsities:
            choose_sparsity(student, sparsity)
            solved[name][sparsity] = accuracy(student, tokenizer, items)
        report.step(name)
    return qualities, solved


def _qualities(
    student: PreTrainedModel, teacher: PreTrainedModel, sparsities: tuple[float, ...], ids: Tensor
) -> dict[float, Quality]:
    heads = Head(student, student.get_decoder()), Head(teacher, teacher.get_decoder())
    rows = rows_of(teacher.config.get_text_config().vocab_size)
    totals = {s: torch.zeros(4, dtype=torch.float64) for s in sparsities}
    for some in ids.split(max(1, TOGETHER // ids.shape[1])):
        some = some.to(teacher.device)
        dense = _states(teacher, some)
        for sparsity in sparsities:
            choose_sparsity(student, sparsity)
            totals[sparsity] += quality_sums(_states(student, some), dense, some[:, 1:].flatten(), *heads, rows)
    tokens = ids.shape[0] * (ids.shape[1] - 1)
    return {sparsity: Quality.of(total, tokens) for sparsity, total in totals.items()}


def _states(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The decoder's output (tokens, hidden) for all tokens but each sequence's last."""
    states: Tensor = model.get_decoder()(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    return states.flatten(0, 1)
