"""A look at the first decode steps of a loaded model: do they drop what its thresholds are set for?

What is wrong with decoding shows in nothing but its speed: a step that drops too little is right, and slow. So a few steps
are sampled, and one line says if what they drop is far from what was asked for. After that nothing is looked at.
"""

from __future__ import annotations

import logging
import threading

from torch import Tensor

logger = logging.getLogger(__name__)

# Decode steps that are looked at. One of them may be a prompt of one token, which drops nothing.
STEPS = 8
# How far off is far: so much of what was asked for, and at least so much.
SHARE, LEAST = 0.25, 0.1


class Watch:
    """Sums what is dropped in the passes that it is part of.

    It has seen enough after so many `steps`.
    """

    def __init__(self, steps: float = STEPS) -> None:
        self._left, self._lock = steps, threading.Lock()
        self._seen = 0.0
        self._asked = 0.0
        self._dropped: float | Tensor = 0.0

    def __deepcopy__(self, memo: object) -> Watch:
        """A copy looks for itself."""
        return Watch()

    def __reduce__(self) -> tuple[type[Watch], tuple[()]]:
        return Watch, ()

    def note(self, asked: float, inputs: int, dropped: Tensor | None, outputs: int) -> None:
        """What one mask did.

        Args:
            asked: sparsity that its threshold is set for; NaN where that is not known.
            inputs: how many it was made for.
            dropped: () how many of them it dropped; None is none.
            outputs: how many outputs each of them reaches.
        """
        if asked != asked:
            return
        with self._lock:
            self._seen += inputs * outputs
            self._asked += asked * inputs * outputs
            if dropped is not None:  # added where it is, so that a device need not wait
                share = dropped.double() * outputs
                earlier = self._dropped
                self._dropped = share + (earlier.to(share.device) if isinstance(earlier, Tensor) else earlier)

    @property
    def share(self) -> float:
        """Of all inputs those that were dropped, weighted by the outputs that they reach; 0 where none were seen."""
        with self._lock:
            return float(self._dropped) / self._seen if self._seen else 0.0

    def has_seen_enough(self) -> bool:
        """Whether the pass that has ended was the last one; if it was, says so where what was dropped is far off."""
        with self._lock:
            self._left -= 1
            if self._left > 0 or not self._seen:
                return self._left <= 0
            dropped, asked = float(self._dropped) / self._seen, self._asked / self._seen
            last, self._seen = self._left == 0, 0.0
        if last and is_far(dropped, asked):
            logger.warning("%s", warning(dropped, asked))
        return True


def is_far(dropped: float, asked: float) -> bool:
    """Whether a sparsity is far from the one that was asked for."""
    return abs(dropped - asked) > max(LEAST, SHARE * asked)


def warning(dropped: float, asked: float) -> str:
    """One line about a sparsity that is far off."""
    return (
        f"decoding drops {dropped:.0%} of the inputs where {asked:.0%} were asked for: the text is unlike that of the "
        "calibration, or this transformers is not one that wina_calib was tested with (`wina-calib info`)."
    )
