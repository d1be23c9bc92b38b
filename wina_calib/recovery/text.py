"""What a recovery trains on: text as it was given, that of the calibration, or what the dense model writes itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from wina_calib.checkpoint.local_paths import data_here
from wina_calib.checkpoint.reader import Checkpoint
from wina_calib.corpus.blocks import data_for, load_blocks
from wina_calib.corpus.sources import check_spec
from wina_calib.errors import CorpusError, WinaError
from wina_calib.recovery.options import SELF, RecoverOptions

HELD_OUT_SHARE, HELD_OUT_MOST = 20, 16  # one sequence of so many is held out, at most so many
WRITTEN = 512  # sequences that the dense model writes at most, and at a time
WRITTEN_TOGETHER = 32


def training_text(
    chosen: RecoverOptions, opened: Checkpoint, tokenizer: Any, teacher: PreTrainedModel
) -> tuple[Tensor, Tensor]:
    """Sequences to train on, and held-out ones of the same kind, (sequences, seq) each.

    Raises:
        CorpusError: there is too little text.
    """
    count = max(2, chosen.tokens // chosen.seq_len)
    seq_len = min(chosen.seq_len, int(getattr(teacher.config, "max_position_embeddings", chosen.seq_len)))
    if chosen.data == (SELF,):
        ids = _written(teacher, tokenizer, min(count, WRITTEN), seq_len, chosen.seed)
    else:
        data = data_for(tokenizer, data_of(chosen, opened))
        ids = load_blocks(data, tokenizer, samples=count, seq_len=seq_len, seed=chosen.seed, min_tokens=2 * seq_len).ids
    held = min(HELD_OUT_MOST, max(1, len(ids) // HELD_OUT_SHARE))
    if len(ids) <= held:
        raise CorpusError(
            f"only {len(ids)} sequences of {seq_len} tokens; at least 2 are needed. Give more text with --data."
        )
    return ids[:-held], ids[-held:]


def data_of(chosen: RecoverOptions, opened: Checkpoint) -> tuple[str, ...]:
    """Text as given, else the calibration's where it can be had by the name that the checkpoint has; else none."""
    if chosen.data and chosen.data != (SELF,):
        return chosen.data
    names = data_here(opened.settings.provenance)
    try:
        for name in names:
            check_spec(name)
    except WinaError:
        return ()
    return names


@torch.no_grad()
def _written(teacher: PreTrainedModel, tokenizer: Any, count: int, seq_len: int, seed: int) -> Tensor:
    """Text that the dense model writes, sampled from its start token: (count, seq_len)."""
    start = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), 0)
    torch.manual_seed(seed)
    rows = []
    for first in range(0, count, WRITTEN_TOGETHER):
        begin = torch.full((min(WRITTEN_TOGETHER, count - first), 1), start, device=teacher.device)
        out = teacher.generate(
            begin,
            attention_mask=torch.ones_like(begin),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            max_new_tokens=seq_len - 1,
            min_new_tokens=seq_len - 1,
            pad_token_id=start,
        )
        rows.append(out.cpu())
    return torch.cat(rows)
