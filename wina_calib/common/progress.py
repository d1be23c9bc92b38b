"""How long work says how it goes on: one protocol, what is announced before the work, and the time that is left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


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


class Forecast:
    """How much of some work is done and how long the rest takes: from its plan, corrected by what was seen so far.

    Times are seconds on any clock. A phase that is not in the plan counts for nothing beside those that are; without a plan
    the phase under way is all.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = list(parts)
        self._total = sum(part.cost for part in parts)
        self._over = self._timed = self._took = 0.0  # cost of what is over, of what of it took time here, and that time
        self._now, self._left = Part("", 0, 0.0), 0
        self._times: list[float] = []

    def phase(self, name: str, steps: int, now: float) -> None:
        """A phase begins of which `steps` steps are left."""
        if self._times:
            cost = self._now.cost * self._left / max(self._now.steps, self._left, 1)
            self._over, self._timed, self._took = (
                self._over + cost, self._timed + cost, self._took + now - self._times[0]
            )  # fmt: skip
        index = next((i for i, part in enumerate(self._parts) if part.name == name), None)
        if index is None:
            self._now = Part(name, steps, 0.0 if self._total else 1.0)
        else:
            self._now = self._parts[index]
            self._over += sum(part.cost for part in self._parts[:index])  # what comes before it is there already
            del self._parts[: index + 1]
        self._left, self._times = steps, [now]
        self._over += self._now.cost * (1 - steps / max(self._now.steps, steps, 1))

    def step(self, now: float) -> None:
        """A step of the phase is done."""
        self._times.append(now)

    @property
    def share(self) -> float:
        """How much of the work is done, 0 to 1."""
        total = self._total or self._now.cost
        before = self._over if self._total else 0.0
        return min(1.0, (before + self._cost(self._done)) / total) if total else 0.0

    def seconds_left(self, now: float) -> float | None:
        """Seconds to the end; None while nothing is known: until two steps are done, as the first one has its own beginnings."""
        done, later = self._done, sum(part.cost for part in self._parts)
        if done >= 2:
            each = (self._times[done] - self._times[1]) / (done - 1)
            phase = max(each * (self._left - done) - (now - self._times[done]), 0.0)
            timed, took = self._timed + self._cost(done), self._took + each * done
        elif self._timed:
            timed, took = self._timed, self._took
            phase = max(self._cost(self._left) * took / timed - (now - self._times[0]), 0.0)
        else:
            return None
        return phase + (later * took / timed if later and timed else 0.0)

    @property
    def _done(self) -> int:
        return min(len(self._times) - 1, self._left) if self._times else 0

    def _cost(self, steps: int) -> float:
        """Cost of so many steps of the phase under way."""
        return self._now.cost * steps / max(self._now.steps, self._left, 1)
