"""A progress listener that keeps what it hears."""

from __future__ import annotations

from wina_calib.common.progress import Estimate, Silent


class Heard(Silent):
    """Keeps the plan, every phase with the steps that it was announced with, its steps, and notes."""

    def __init__(self) -> None:
        self.estimate = Estimate()
        self.phases: list[tuple[str, int]] = []
        self.done: list[int] = []
        self.lines: list[str] = []
        self.notes: list[str] = []

    def planned(self, estimate: Estimate) -> None:
        self.estimate = estimate

    def phase(self, name: str, steps: int) -> None:
        self.phases.append((name, steps))
        self.done.append(0)

    def step(self, note: str) -> None:
        self.done[-1] += 1
        self.lines.append(note)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def check(self) -> None:
        """The phases were those of the plan, in order, with as many steps; each took as many as announced."""
        assert self.phases == [(part.name, part.steps) for part in self.estimate.parts]
        assert self.done == [steps for _, steps in self.phases]
        assert all(part.cost > 0 for part in self.estimate.parts)
