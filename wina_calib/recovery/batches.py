"""Which tokens a step trains on: the same text again and again, but cut in other places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_EPOCH = 1 << 20  # sets the generators of epochs apart


@dataclass(frozen=True)
class Batches:
    """Text for steps. What a step takes depends on its number alone."""

    ids: Tensor  # (sequences, seq) the text
    batch: int  # sequences a step
    seed: int  # of all choices

    def rows(self, step: int) -> Tensor:
        """The tokens (batch, seq) of a step: all sequences once in a random order, then all again in another."""
        places = range(step * self.batch, (step + 1) * self.batch)
        count = len(self.ids)
        epochs = {p // count: (self._cut(p // count), self._order(p // count)) for p in places}
        return torch.stack([text[order[p % count]] for p in places for text, order in [epochs[p // count]]])

    def _cut(self, epoch: int) -> Tensor:
        """The text, after the first time cut into sequences elsewhere; a first token that all have stays where it is."""
        if epoch == 0:
            return self.ids
        first = 1 if bool((self.ids[:, 0] == self.ids[0, 0]).all()) and self.ids.shape[1] > 1 else 0
        body = self.ids[:, first:]
        shift = int(
            torch.randint(body.numel(), (), generator=torch.Generator().manual_seed(self.seed * _EPOCH - epoch))
        )
        return torch.cat([self.ids[:, :first], body.flatten().roll(shift).view_as(body)], dim=1)

    def _order(self, epoch: int) -> Sequence[int]:
        generator = torch.Generator().manual_seed(self.seed * _EPOCH + epoch)
        order: list[int] = torch.randperm(len(self.ids), generator=generator).tolist()
        return order
