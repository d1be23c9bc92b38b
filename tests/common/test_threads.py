"""Items are read one ahead, in order, and no more of them are alive than two."""

import threading
import weakref

import pytest

from wina_calib.common.threads import read_ahead


class Item:
    """Something that can be seen to be gone."""


def test_in_order_with_the_next_one_read_meanwhile_and_two_alive() -> None:
    alive: weakref.WeakSet[Item] = weakref.WeakSet()
    begun = {number: threading.Event() for number in (3, 1, 4)}
    most = 0

    def read(number: int) -> Item:
        nonlocal most
        begun[number].set()
        item = Item()
        alive.add(item)
        most = max(most, len(alive))
        return item

    seen = []
    for number, item in read_ahead(read, (3, 1, 4)):
        seen.append(number)
        following = {3: 1, 1: 4}.get(number)
        assert following is None or begun[following].wait(10)
        assert item in alive
        del item
    assert seen == [3, 1, 4]
    assert most == 2
    assert not alive


def test_nothing_to_read() -> None:
    assert list(read_ahead(lambda number: number, ())) == []


def test_an_error_is_the_callers_and_what_comes_after_it_is_not_read() -> None:
    read = []

    def fail(number: int) -> int:
        read.append(number)
        if number == 2:
            raise OSError("gone")
        return number

    with pytest.raises(OSError, match="gone"):
        for _ in read_ahead(fail, (1, 2, 3, 4)):
            pass
    assert read == [1, 2]
