"""How a calibration says how it goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from wina_calib.calibration.cost import Estimate


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
