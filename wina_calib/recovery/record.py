"""What came of a training's steps, and which weights are the better ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor

from wina_calib.errors import NumericError

MAX_SKIPPED = 8


@dataclass(frozen=True)
class Trained:
    """What a training came to."""

    steps: int  # done
    skipped: int  # of these, without effect as they were not a number
    seconds: float  # they took, those of earlier runs too
    held_out: dict[int, list[float]]  # divergence on held-out text at each sparsity, by step
    best: int  # the step whose weights were kept
    share: float = 1.0  # how much of the way from the first weights to those was kept
    kept: list[float] = field(default_factory=list)  # divergence on held-out text that those have
    losses: list[float] = field(default_factory=list)  # divergence of every step since the run was last begun


@dataclass
class Log:
    """What came of the steps: looked at some at a time."""

    losses: list[float]
    skipped: int
    in_a_row: int = 0
    waiting: list[Tensor] = field(default_factory=list)

    def look(self, engine: Accelerator, rate: float) -> None:
        """Take what is waiting, (divergence, whether it was a number) of a step each.

        Raises:
            NumericError: too many steps in a row were not a number.
        """
        if not self.waiting:
            return
        averages = engine.reduce(torch.stack(self.waiting), "mean").tolist()
        self.waiting.clear()
        for loss, fine in averages:
            self.losses.append(loss if fine else math.nan)
            self.skipped += not fine
            self.in_a_row = 0 if fine else self.in_a_row + 1
            if self.in_a_row >= MAX_SKIPPED:
                raise NumericError(
                    f"{self.in_a_row} steps in a row were not a number. Give a lower --lr than {rate:g}."
                )


def merit(losses: Sequence[float], before: Sequence[float]) -> float:
    """Mean share of its divergence that each sparsity is left with; infinite where one has more than before."""
    shares = [loss / start if start > 0 else 1.0 for loss, start in zip(losses, before, strict=True)]
    return sum(shares) / len(shares) if max(shares) <= 1 else math.inf
