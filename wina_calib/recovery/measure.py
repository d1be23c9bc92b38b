"""A sparse checkpoint against the dense model it was made from, on some text."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from wina_calib.calibration.layer_stream import Head
from wina_calib.calibration.likelihood import perplexity
from wina_calib.recovery.loss import Quality, rows_of, sums
from wina_calib.runtime.load import choose_sparsity, load


@torch.no_grad()
def measure(folder: Path, teacher: PreTrainedModel, sparsities: tuple[float, ...], ids: Tensor) -> dict[float, Quality]:
    """Quality of a checkpoint at some model sparsities.

    Args:
        folder: the checkpoint.
        teacher: the dense model.
        sparsities: in [0, 1).
        ids: (sequences, seq) text.
    """
    device = teacher.device
    dtype = torch.float32 if device.type == "cpu" else "auto"
    student = load(folder, dtype=dtype, device_map=None if device.type == "cpu" else device)
    heads = Head(student, student.get_decoder()), Head(teacher, teacher.get_decoder())
    rows = rows_of(teacher.config.get_text_config().vocab_size)
    totals = {s: torch.zeros(4, dtype=torch.float64) for s in sparsities}
    for row in ids.to(device):
        dense = teacher.get_decoder()(input_ids=row[None, :-1], use_cache=False).last_hidden_state
        for sparsity in sparsities:
            choose_sparsity(student, sparsity)
            sparse = student.get_decoder()(input_ids=row[None, :-1], use_cache=False).last_hidden_state
            totals[sparsity] += sums(sparse, dense, row[1:], *heads, rows)
    tokens = ids.shape[0] * (ids.shape[1] - 1)
    out = {}
    for sparsity, total in totals.items():
        dense_loss, loss, kl, agreement = (total / tokens).tolist()
        out[sparsity] = Quality(perplexity(dense_loss), perplexity(loss), kl, agreement, tokens)
    return out
