"""The next item, or a value, while other work goes on."""

from __future__ import annotations

import atexit
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar
from weakref import WeakSet

T = TypeVar("T")
ENDING = threading.Event()  # set when the process ends: long work in the background looks at it between its steps
_PATIENCE = 0.5  # seconds that the end of the process waits for such work
_working: WeakSet[threading.Thread] = WeakSet()


def read_ahead(read: Callable[[int], T], order: Sequence[int]) -> Iterator[tuple[int, T]]:
    """Read items one after another in a thread, one ahead of the caller.

    Yields:
        A number and its item, which is not kept here: with a caller that drops it before asking for the next, there are at
        most two at a time.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
    reading: deque[Future[T]] = deque(pool.submit(read, number) for number in order[:1])
    try:
        for place, number in enumerate(order):
            items = [reading.popleft().result()]
            reading.extend(pool.submit(read, following) for following in order[place + 1 : place + 2])
            yield number, items.pop()
    finally:
        pool.shutdown(cancel_futures=True)


class Background:
    """A value that is computed in a thread of its own, which ends with the process."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        _working.add(self._thread)
        self._thread.start()

    def __call__(self) -> Any:
        """The value; waits for it, and raises what the work has raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._result

    def _run(self, work: Callable[[], Any]) -> None:
        try:
            self._result = work()
        except BaseException as error:
            self._error = error


@atexit.register
def _end() -> None:
    """Let work in the background come to its next step: a thread that is ended inside of torch aborts the process."""
    ENDING.set()
    last = time.monotonic() + _PATIENCE
    for thread in list(_working):
        thread.join(max(0.0, last - time.monotonic()))
