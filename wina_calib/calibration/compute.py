"""Where and how a calibration computes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from wina_calib.common.devices import keep_in_memory
from wina_calib.common.distributed import ALONE, Ranks


@dataclass(frozen=True)
class Compute:
    """Where and how a calibration computes."""

    device: torch.device  # compute device
    dtype: torch.dtype  # compute dtype
    micro_batch: int = 1  # blocks computed together
    ranks: Ranks = ALONE  # the processes that share the micro-batches
    spill: Path | None = None  # folder for hidden states that do not fit in memory, or None to keep all in memory

    def keeps(self, states: int, nbytes: int) -> bool:
        """Whether so many hidden states of `nbytes` bytes each stay in memory."""
        return keep_in_memory(self.device, states, nbytes)

    def holding(self, states: int, nbytes: int) -> Compute:
        """The same, for work that holds so many hidden states of `nbytes` bytes each at a time."""
        return replace(self, spill=None if self.keeps(states, nbytes) else self.spill)
