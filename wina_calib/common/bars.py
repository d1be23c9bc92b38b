"""Progress for people: one bar for all the work on a terminal, and a line now and then in a file or a log."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from wina_calib.common.printable import MAX_LINE, PrintableStream
from wina_calib.common.progress import SILENT, Counted, Estimate, Forecast, Progress
from wina_calib.common.text import human_bytes, human_time

Hearing = Progress | Callable[[int, int], object] | bool | None  # what a public function takes as `progress`
EVERY = 30.0  # seconds between two lines, where nobody looks on
_FORM = "{percentage:3.0f}%|{bar:24}| {desc}"


class Bars:
    """Progress on standard error; a context manager, so that the bar ends when the work does.

    Args:
        stream: where to write; standard error by default.
        clock: seconds, for the time that is left.
    """

    def __init__(self, stream: IO[str] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        given = sys.stderr if stream is None else stream
        self._stream = given if isinstance(given, PrintableStream) else PrintableStream(given, MAX_LINE)
        self._clock, self._start = clock, clock()
        self._shown = self._start  # when the last line was written
        self._forecast, self._name, self._step = Forecast(()), "", ""
        self._promised = False
        self._bar: Any = None

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._bar is not None:
            if kind is None:
                self._bar.n = self._bar.total
                self._bar.set_description_str(f"done in {human_time(self._clock() - self._start)}")
            self._bar.close()
            self._bar = None

    def planned(self, estimate: Estimate) -> None:
        """Print what the work will take, as far as it is known before it begins."""
        self._forecast = Forecast(estimate.parts)
        if estimate.tokens:
            work = f", work worth {estimate.passes:.0f} forward passes over them ({estimate.flops / 1e12:,.1f} TFLOP)"
            self.write(
                f"plan: {estimate.tokens:,} tokens{work if estimate.passes else ''}"
                + (f", about {human_bytes(estimate.memory_bytes)} of memory" if estimate.memory_bytes else "")
                + (f", {human_bytes(estimate.disk_bytes)} on disk" if estimate.disk_bytes else "")
                + (f", of which {human_bytes(estimate.kept_bytes)} stay" if estimate.kept_bytes else "")
            )
        for line in estimate.notes:
            self.note(line)

    def phase(self, name: str, steps: int) -> None:
        """Begin a phase."""
        self._name, self._step = name, ""
        self._forecast.phase(name, steps, self._clock())
        if self._bar is None and self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=1000, file=self._stream, leave=True, ascii="NO_COLOR" in os.environ, bar_format=_FORM, miniters=0
            )
        self._show()

    def step(self, note: str) -> None:
        """Advance."""
        self._step = note
        self._forecast.step(self._clock())
        left = self._forecast.seconds_left(self._clock())
        if left is not None and not self._promised and left + self._passed > EVERY:
            self.write(f"about {human_time(left + self._passed)} in all, by the first steps")
        self._promised = self._promised or left is not None
        self._show()

    def note(self, text: str) -> None:
        """Print a line."""
        self.write(f"note: {text}")

    def write(self, line: str) -> None:
        """Print a line as it is, above the bar."""
        if self._bar is not None:
            self._bar.clear()
        self._stream.write(f"{line}\n")
        self._stream.flush()
        if self._bar is not None:
            self._bar.refresh()

    @property
    def _passed(self) -> float:
        return self._clock() - self._start

    def _show(self) -> None:
        """Bring the bar up to date, or write a line if the last one is `EVERY` seconds old."""
        now = self._clock()
        left = self._forecast.seconds_left(now)
        rest = "" if left is None else f", {human_time(left)} left"
        if self._bar is not None:
            self._bar.n = int(1000 * self._forecast.share)
            self._bar.set_description_str(f"{self._name}{rest}  {self._step}".rstrip())
        elif now - self._shown >= EVERY:
            self._shown = now
            step = f": {self._step}" if self._step else ""
            self.write(f"{human_time(now - self._start)}, {self._forecast.share:.0%} done{rest}; {self._name}{step}")


@contextmanager
def hearing(progress: Hearing) -> Iterator[Progress]:
    """What the `progress` of a public function stands for, for as long as the function works.

    Args:
        progress: True is a bar on standard error, None or False nothing; a function is told the steps done and the steps in
            all of each phase.
    """
    if progress is True:
        with Bars() as bars:
            yield bars
    elif progress is None or progress is False:
        yield SILENT
    elif callable(progress):
        yield Counted(progress)
    else:
        yield progress
