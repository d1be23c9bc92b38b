"""How long work says how it goes on: one protocol, what is announced before the work, and the time that is left."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

RECENT, HALF_LIFE = 60.0, 240.0  # seconds after which the pace that was seen counts half: of a phase, and of all work
PIECE, PIECES = 10.0, 256  # seconds of a piece of work, at least, and how many are kept


@dataclass(frozen=True)
class Part:
    """A phase of the work to come.

    Attributes:
        name: what `Progress.phase` will call it.
        steps: its steps.
        cost: what it takes beside the other parts, in any unit that all of them share.
        at_most: seconds after which it ends, whatever is done.
    """

    name: str
    steps: int
    cost: float = 1.0
    at_most: float = math.inf


@dataclass(frozen=True)
class Estimate:
    """Predicted cost of some work; what is not known of it is 0.

    Attributes:
        parts: its phases in order.
        memory_bytes: peak resident memory.
        hidden_bytes: hidden states, in memory or on disk.
        disk_bytes: of all files at most while the work lasts: the checkpoint, the state and the hidden states beside it.
        kept_bytes: of the checkpoint's weights, which stay.
        tokens: calibration tokens.
        passes: forward passes over these tokens.
        flops: floating-point operations of all passes.
        notes: what the user should know, such as fewer blocks than asked.
    """

    parts: tuple[Part, ...] = ()
    memory_bytes: int = 0
    hidden_bytes: int = 0
    disk_bytes: int = 0
    kept_bytes: int = 0
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
    """Seconds a unit of work, from pieces of it, of which late ones count most.

    Other programs may take the processor or give it back, and hit one kind of work harder than another: the median of the
    pieces, weighted by their work, follows the first and leaves single pieces aside.
    """

    def __init__(self) -> None:
        self._pieces: list[tuple[float, float, float]] = []  # when it ended, seconds, work
        self._open = False

    def saw(self, now: float, seconds: float, work: float) -> None:
        """So much work took so long; short pieces that follow each other are one."""
        if self._open and self._pieces[-1][1] < PIECE:
            _, before, had = self._pieces.pop()
            seconds, work = before + seconds, had + work
        self._pieces = [*self._pieces[1 - PIECES :], (now, seconds, work)]
        self._open = True

    def other(self) -> None:
        """What follows is work of another kind."""
        self._open = False

    def each(self, now: float) -> float | None:
        """Seconds a unit; None where nothing was seen."""
        rates = sorted((seconds / work, work * 0.5 ** ((now - at) / HALF_LIFE)) for at, seconds, work in self._pieces)
        half = sum(weight for _, weight in rates) / 2
        for rate, weight in rates:
            half -= weight
            if half <= 0:
                return rate
        return None


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
        self._pace = Pace()  # of a unit of cost
        self._seconds = self._steps_seen = 0.0  # of the phase without its first step, late ones counting most

    def phase(self, name: str, steps: int, now: float) -> None:
        """A phase begins of which `steps` steps are left."""
        if self._steps:  # its first step has its own beginnings: they count now, where they are a small share
            self._see(now, self._first - self._begun + now - self._last, min(1 + self._steps - self._done, self._steps))
            self._over += self._cost(self._steps)
        self._pace.other()
        index = next((i for i, part in enumerate(self._parts) if part.name == name), None)
        if index is None:
            self._now = Part(name, steps, 0.0 if self._total else 1.0)
        else:
            self._now = self._parts[index]
            self._over += sum(part.cost for part in self._parts[:index])  # what comes before it is there already
            del self._parts[: index + 1]
        self._steps, self._done = steps, 0
        self._seconds = self._steps_seen = 0.0
        self._begun = self._first = self._last = now
        self._over += self._now.cost - self._cost(steps)

    def step(self, now: float) -> None:
        """A step of the phase is done."""
        if self._done == 0:
            self._first = now
        elif self._done < self._steps:
            seconds = now - self._last
            kept = 0.5 ** (seconds / RECENT)
            self._seconds, self._steps_seen = kept * self._seconds + seconds, kept * self._steps_seen + 1
            self._see(now, seconds, 1)
        self._last, self._done = now, min(self._done + 1, self._steps)

    @property
    def share(self) -> float:
        """How much of the work is done, 0 to 1."""
        total = self._total or self._now.cost
        before = self._over if self._total else 0.0
        return min(1.0, (before + self._cost(self._done)) / total) if total else 0.0

    def seconds_left(self, now: float) -> float | None:
        """Seconds to the end; None while nothing is known: until two steps are done, as the first one has its own beginnings."""
        unit = self._pace.each(now)
        if self._steps_seen:
            step = self._seconds / self._steps_seen
        elif unit is not None:
            step = self._cost(1) * unit
        else:
            return None
        here = min(step * (self._steps - self._done) - (now - self._last), self._now.at_most - (now - self._begun))
        return max(here, 0.0) + sum(min(part.cost * (unit or 0.0), part.at_most) for part in self._parts)

    def _see(self, now: float, seconds: float, steps: int) -> None:
        """So many steps of the phase under way took so long; one that is not in the plan says nothing of those that are."""
        if self._now.cost:
            self._pace.saw(now, seconds, self._cost(steps))

    def _cost(self, steps: int) -> float:
        """Cost of so many steps of the phase under way."""
        return self._now.cost * steps / max(self._now.steps, self._steps, 1)
