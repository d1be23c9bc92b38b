"""Where and how a calibration computes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from wina_calib.common.devices import keep_in_memory
from wina_calib.common.distributed import ALONE, Ranks


@dataclass(frozen=True)
class Compute:
    """Where and how a calibration computes.

    Attributes:
        device: compute device.
        dtype: compute dtype.
        micro_batch: blocks computed together.
        ranks: the processes that share the micro-batches.
        spill: folder for hidden states that do not fit in memory, or None to keep all in memory.
    """

    device: torch.device
    dtype: torch.dtype
    micro_batch: int = 1
    ranks: Ranks = ALONE
    spill: Path | None = None

    def keeps(self, states: int, nbytes: int) -> bool:
        """Whether so many hidden states of `nbytes` bytes each stay in memory."""
        return keep_in_memory(self.device, states, nbytes)

    def spill_for(self, states: int, nbytes: int) -> Path | None:
        """Folder for so many hidden states of `nbytes` bytes each; None where they stay in memory."""
        return None if self.keeps(states, nbytes) else self.spill

    def holding(self, states: int, nbytes: int) -> Compute:
        """The same, for work that holds so many hidden states of `nbytes` bytes each at a time."""
        return replace(self, spill=self.spill_for(states, nbytes))
