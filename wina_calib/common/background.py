"""A value that is computed while other work goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class Background:
    """A value that is computed in a thread of its own, which ends with the process."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
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
