"""Stops forked runs at moments that lie within them, on fast machines and slow ones alike.

A run writes a byte to a pipe for every file that it opens, renames, links or removes. The one who watches stops it after a
number of these, or a little later, between two.
"""

import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

_TOUCHES = ("open", "os.", "shutil.", "fcntl.")
_STOPPED = 130  # exit status of a run that SIGINT has stopped


@dataclass(frozen=True)
class Run:
    """A run in a fork of this process, which spares it the seconds of its imports."""

    process: int
    touches: int  # the end of the pipe to read

    @classmethod
    def begin(cls, work: Callable[[], object]) -> "Run":
        reading, writing = os.pipe()
        if process := os.fork():
            os.close(writing)
            return cls(process, reading)
        try:
            os.close(reading)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
            sys.addaudithook(lambda event, _: event.startswith(_TOUCHES) and os.write(writing, b"."))
            work()
            os._exit(0)
        except KeyboardInterrupt:
            os._exit(_STOPPED)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)

    def see(self, count: int) -> int:
        """Wait for so many touches or the end; how many there were."""
        seen = 0
        while seen < count and (new := os.read(self.touches, min(count - seen, 1 << 16))):
            seen += len(new)
        return seen

    def end(self) -> int:
        """Exit status; that of one ended by a signal is minus the signal."""
        status = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        os.close(self.touches)
        return status


class Killer:
    """Runs work, the first time to its end, to know how long it is."""

    def __init__(self, work: Callable[[], object], rng: random.Random) -> None:
        self.rng = rng
        start = time.monotonic()
        run = Run.begin(work)
        self.touches = run.see(sys.maxsize)
        assert run.end() == 0
        self.seconds = time.monotonic() - start

    def stop(self, work: Callable[[], object], sig: signal.Signals) -> bool:
        """Begin work and stop it at a random moment; whether it was stopped, or was through before. It may not fail."""
        run = Run.begin(work)
        run.see(self.rng.randint(1, self.touches * 9 // 10))
        time.sleep(self.rng.choice([0.0, self.rng.uniform(0.0, 0.1)]) * self.seconds)
        os.kill(run.process, sig)
        status = run.end()
        assert status in (0, -sig if sig == signal.SIGKILL else _STOPPED), status
        return status != 0
