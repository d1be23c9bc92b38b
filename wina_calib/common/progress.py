"""How a calibration says how it goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Progress(Protocol):
    """Hears how a calibration goes on."""

    def planned(self, estimate: Estimate) -> None:
        """The work to come, before it begins."""

    def phase(self, name: str, steps: int) -> None:
        """A phase of `steps` steps begins."""

    def step(self, note: str) -> None:
        """One step of the phase is done."""

    def note(self, text: str) -> None:
        """Something that the user should know."""


class Silent:
    """Reports nothing."""

    def planned(self, estimate: Estimate) -> None:
        """Ignore the estimate."""

    def phase(self, name: str, steps: int) -> None:
        """Ignore the phase."""

    def step(self, note: str) -> None:
        """Ignore the step."""

    def note(self, text: str) -> None:
        """Ignore the note."""


@dataclass(frozen=True)
class Estimate:
    """Predicted cost.

    Attributes:
        memory_bytes: peak resident memory.
        hidden_bytes: hidden states, in memory or on disk.
        disk_bytes: size of the checkpoint, and at most of the state and the hidden states beside it while the work lasts.
        tokens: calibration tokens.
        passes: forward passes over these tokens.
        flops: floating-point operations of all passes.
        notes: what the user should know, such as fewer blocks than asked.
    """

    memory_bytes: int
    hidden_bytes: int
    disk_bytes: int
    tokens: int
    passes: float
    flops: float
    notes: tuple[str, ...] = ()


def human_bytes(count: float) -> str:
    """`1234567` -> `1.2 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
