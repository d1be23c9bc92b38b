"""Which files a piece of work opens."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def opened_files(name: str) -> Iterator[list[str]]:
    """Paths of the files of a name that are opened inside, each time that one is."""
    seen: list[str] = []
    listening = [True]

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if listening and event == "open" and isinstance(arguments[0], str | Path) and Path(arguments[0]).name == name:
            seen.append(str(arguments[0]))

    sys.addaudithook(hear)  # cannot be taken away again
    try:
        yield seen
    finally:
        listening.clear()
