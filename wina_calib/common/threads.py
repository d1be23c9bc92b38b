"""Reading the next item while the current one is worked on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def read_ahead(read: Callable[[int], T], order: Sequence[int]) -> Iterator[tuple[int, T]]:
    """Read items one after another in a thread, one ahead of the caller.

    Args:
        read: reads the item of a number.
        order: the numbers.

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
