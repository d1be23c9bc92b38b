"""How long work says how it goes on: one protocol, what is announced before the work, and the time that is left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

HALF_LIFE = 60.0  # seconds after which what was seen of the pace counts half


@dataclass(frozen=True)
class Part:
    """A phase of the work to come.

    Attributes:
        name: what `Progress.phase` will call it.
        steps: its steps.
        cost: what it takes beside the other parts, in any unit that all of them share.
    """

    name: str
    steps: int
    cost: float = 1.0


@dataclass(frozen=True)
class Estimate:
    """Predicted cost of some work; what is not known of it is 0.

    Attributes:
        parts: its phases in order.
        memory_bytes: peak resident memory.
        hidden_bytes: hidden states, in memory or on disk.
        disk_bytes: size of the checkpoint, and at most of the state and the hidden states beside it while the work lasts.
        tokens: calibration tokens.
        passes: forward passes over these tokens.
        flops: floating-point operations of all passes.
        notes: what the user should know, such as fewer blocks than asked.
    """

    parts: tuple[Part, ...] = ()
    memory_bytes: int = 0
    hidden_bytes: int = 0
    disk_bytes: int = 0
    tokens: int = 0
    passes: float = 0.0
    flops: float = 0.0
    notes: tuple[str, ...] = ()


class Progress(Protocol):
    """Hears how work goes on."""

    def planned(self, estimate: Estimate) -> None:
        """The work to come, before it begins."""

    def phase(self, name: str, steps: int) -> None:
        """A phase begins, of which `steps` steps are left; fewer than planned where it goes on with saved work."""

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


SILENT: Progress = Silent()


class Counted(Silent):
    """Tells a plain function how many steps of a phase are done, and how many it has."""

    def __init__(self, tell: Callable[[int, int], object]) -> None:
        self._tell, self._done, self._steps = tell, 0, 0

    def phase(self, name: str, steps: int) -> None:
        """Count from the beginning."""
        self._done, self._steps = 0, steps

    def step(self, note: str) -> None:
        """Count one more."""
        self._done += 1
        self._tell(self._done, self._steps)


class Ticking(Silent):
    """Passes everything on, and does something more after each step."""

    def __init__(self, report: Progress, tick: Callable[[], object]) -> None:
        self._report, self._tick = report, tick

    def phase(self, name: str, steps: int) -> None:
        """Pass it on."""
        self._report.phase(name, steps)

    def step(self, note: str) -> None:
        """Pass it on, and tick."""
        self._report.step(note)
        self._tick()

    def note(self, text: str) -> None:
        """Pass it on."""
        self._report.note(text)


class Within(Silent):
    """Some work with phases of its own as one phase of other work: of `STEPS` steps, however many it has itself.

    Args:
        outer: hears of that phase, which begins here.
        name: its name there.
    """

    STEPS = 100

    def __init__(self, outer: Progress, name: str) -> None:
        self._outer, self._name, self._told = outer, name, 0
        self._forecast = Forecast(())
        outer.phase(name, self.STEPS)

    def planned(self, estimate: Estimate) -> None:
        """Take the plan of the inner work; the outer one is told already."""
        self._forecast = Forecast(estimate.parts)

    def phase(self, name: str, steps: int) -> None:
        """Begin a phase of the inner work."""
        self._forecast.phase(name, steps, 0.0)

    def step(self, note: str) -> None:
        """Take the outer phase as far as the inner work is."""
        self._forecast.step(0.0)
        for _ in range(min(self.STEPS, int(self._forecast.share * self.STEPS)) - self._told):
            self._told += 1
            self._outer.step(note)

    def note(self, text: str) -> None:
        """Hand a note on."""
        self._outer.note(f"{self._name}: {text}")


class Pace:
    """Seconds a unit of work, what was seen lately counting most, as other programs may take the processor or give it back."""

    def __init__(self) -> None:
        self._seconds = self._work = 0.0

    def saw(self, seconds: float, work: float) -> None:
        """So much work took so long."""
        kept = 0.5 ** (seconds / HALF_LIFE)
        self._seconds, self._work = kept * self._seconds + seconds, kept * self._work + work

    @property
    def each(self) -> float | None:
        """Seconds a unit; None where none was seen."""
        return self._seconds / self._work if self._work else None


class Forecast:
    """How much of some work is done and how long the rest takes: from its plan, corrected by what was seen so far.

    Times are seconds on any clock. A phase that is not in the plan counts for nothing beside those that are; without a plan
    the phase under way is all.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = list(parts)
        self._total = sum(part.cost for part in parts)
        self._over = 0.0  # cost of what is over, or was there already
        self._now, self._steps, self._done = Part("", 0, 0.0), 0, 0
        self._begun = self._first = self._last = 0.0  # when the phase began, its first step ended, and its last one
        self._whole, self._phase = Pace(), Pace()  # a unit of cost, and a step of the phase

    def phase(self, name: str, steps: int, now: float) -> None:
        """A phase begins of which `steps` steps are left."""
        if self._steps:  # its first step has its own beginnings: they count now, where they are a small share
            self._see(self._first - self._begun + now - self._last, min(1 + self._steps - self._done, self._steps))
            self._over += self._cost(self._steps)
        index = next((i for i, part in enumerate(self._parts) if part.name == name), None)
        if index is None:
            self._now = Part(name, steps, 0.0 if self._total else 1.0)
        else:
            self._now = self._parts[index]
            self._over += sum(part.cost for part in self._parts[:index])  # what comes before it is there already
            del self._parts[: index + 1]
        self._steps, self._done, self._phase = steps, 0, Pace()
        self._begun = self._first = self._last = now
        self._over += self._now.cost - self._cost(steps)

    def step(self, now: float) -> None:
        """A step of the phase is done."""
        if self._done == 0:
            self._first = now
        elif self._done < self._steps:
            self._phase.saw(now - self._last, 1.0)
            self._see(now - self._last, 1)
        self._last, self._done = now, min(self._done + 1, self._steps)

    @property
    def share(self) -> float:
        """How much of the work is done, 0 to 1."""
        total = self._total or self._now.cost
        before = self._over if self._total else 0.0
        return min(1.0, (before + self._cost(self._done)) / total) if total else 0.0

    def seconds_left(self, now: float) -> float | None:
        """Seconds to the end; None while nothing is known: until two steps are done, as the first one has its own beginnings."""
        step, unit = self._phase.each, self._whole.each
        if step is None and unit is None:
            return None
        if step is None:
            step = self._cost(1) * (unit or 0.0)
        later = sum(part.cost for part in self._parts) * (unit or 0.0)
        return max(step * (self._steps - self._done) - (now - self._last), 0.0) + later

    def _see(self, seconds: float, steps: int) -> None:
        """So many steps of the phase under way took so long; one that is not in the plan says nothing of those that are."""
        if self._now.cost:
            self._whole.saw(seconds, self._cost(steps))

    def _cost(self, steps: int) -> float:
        """Cost of so many steps of the phase under way."""
        return self._now.cost * steps / max(self._now.steps, self._steps, 1)
