"""How far a sparse model's predictions are from the dense one's: the divergence that is trained on, some rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]
ROWS_TIMES_VOCABULARY = 1 << 27  # logits at a time


def rows_of(vocabulary: int) -> int:
    """Rows whose logits are computed together."""
    return max(16, ROWS_TIMES_VOCABULARY // vocabulary)


def divergence(student: Tensor, teacher: Tensor, student_head: Head, teacher_head: Head, rows: int) -> Tensor:
    """Sum over tokens of KL(teacher || student), in nats.

    Logits are computed for some rows at a time and again in the backward pass, so that those of one part are in memory.

    Args:
        student: (batch, seq, hidden) the sparse decoder's output.
        teacher: (batch, seq, hidden) the dense one's.
        student_head: from outputs (1, rows, hidden) to logits (1, rows, vocabulary).
        teacher_head: the same for the dense model.
        rows: rows at a time.
    """

    def part(some: Tensor, target: Tensor) -> Tensor:
        return kl_div(log_softmax(student_head(some[None])[0].float(), -1), target, reduction="sum", log_target=True)

    total = student.new_zeros((), dtype=torch.float32)
    both = zip(student.flatten(0, 1).split(rows), teacher.flatten(0, 1).split(rows), strict=True)
    for some, dense in both:
        with torch.no_grad():
            target = log_softmax(teacher_head(dense[None])[0].float(), -1)
        if torch.is_grad_enabled():
            total = total + checkpoint(part, some, target, use_reentrant=False)
        else:
            total = total + part(some, target)
    return total


@dataclass(frozen=True)
class Quality:
    """A sparse model against the dense one on some text.

    Attributes:
        dense_ppl: perplexity of the dense model.
        ppl: of the sparse one.
        kl: mean KL divergence from the dense prediction, nats a token.
        top1_agreement: share of tokens where both predict the same next token.
        tokens: predicted tokens.
    """

    dense_ppl: float
    ppl: float
    kl: float
    top1_agreement: float
    tokens: int

    @property
    def rise(self) -> float:
        """Perplexity over the dense model's, minus one."""
        return self.ppl / self.dense_ppl - 1


@torch.no_grad()
def sums(student: Tensor, teacher: Tensor, labels: Tensor, student_head: Head, teacher_head: Head, rows: int) -> Tensor:
    """Sums over tokens, float64 (4,): dense loss, sparse loss, divergence, agreement.

    Args:
        student: (1, seq, hidden) the sparse decoder's output for tokens but the last.
        teacher: the same of the dense model.
        labels: (seq,) the tokens that come next.
        student_head: as for `divergence`.
        teacher_head: as for `divergence`.
        rows: rows at a time.
    """
    out = torch.zeros(4, dtype=torch.float64)
    for s, t, target in zip(student[0].split(rows), teacher[0].split(rows), labels.split(rows), strict=True):
        q, p = log_softmax(student_head(s[None])[0].float(), -1), log_softmax(teacher_head(t[None])[0].float(), -1)
        parts = [
            -p.gather(1, target[:, None]).double().sum(),
            -q.gather(1, target[:, None]).double().sum(),
            kl_div(q, p, reduction="none", log_target=True).double().sum(),
            (p.argmax(-1) == q.argmax(-1)).double().sum(),
        ]
        out += torch.stack(parts).cpu()
    return out
