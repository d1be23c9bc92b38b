"""How far a sparse model's predictions are from the dense one's: the divergence that is trained on, some rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

Head = Callable[[Tensor], Tensor]
ROWS_TIMES_VOCABULARY = 1 << 27  # logits at a time


def rows_of(vocabulary: int) -> int:
    """Rows whose logits are computed together."""
    return max(16, ROWS_TIMES_VOCABULARY // vocabulary)


class _Divergence(torch.autograd.Function):
    """The sum, with its gradient at the student's outputs computed at once: no logits are kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, student_head: Head, teacher_head: Head, rows: int
    ) -> Tensor:
        """The sum of KL(teacher || student) over rows (n, hidden)."""
        wanted = bool(ctx.needs_input_grad[0])
        total, gradients = torch.zeros((), device=student.device), []
        for some, dense in zip(student.split(rows), teacher.split(rows), strict=True):
            target = log_softmax(teacher_head(dense[None])[0].float(), -1)
            with torch.set_grad_enabled(wanted):
                leaf = some.detach().requires_grad_(wanted)
                logits = student_head(leaf[None])[0]
            log_q = log_softmax(logits.detach().float(), -1)
            chance = target.exp()
            total += target.sub_(log_q).mul_(chance).sum()
            if wanted:
                gradients += torch.autograd.grad(logits, leaf, log_q.exp_().sub_(chance).to(logits.dtype))
        ctx.gradient = torch.cat(gradients) if wanted else None
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        """The gradient at the student's outputs; there is no other."""
        return ctx.gradient * outer[0], None, None, None, None


def divergence(student: Tensor, teacher: Tensor, student_head: Head, teacher_head: Head, rows: int) -> Tensor:
    """Sum over tokens of KL(teacher || student), in nats. Gradients go to the student's outputs, not into its head.

    Args:
        student: (batch, seq, hidden) the sparse decoder's output.
        teacher: (batch, seq, hidden) the dense one's.
        student_head: from outputs (1, rows, hidden) to logits (1, rows, vocabulary).
        teacher_head: the same for the dense model.
        rows: rows whose logits are in memory at a time.
    """
    apply: Any = _Divergence.apply  # torch does not type it
    total: Tensor = apply(student.flatten(0, 1), teacher.flatten(0, 1), student_head, teacher_head, rows)
    return total
