"""`generate` looks at new tokens one step late where a sparse model decodes on CUDA, so that the device never waits.

Before every step transformers asks whether the last token ended the text, and the device is idle until the answer has
come and the next step has been started: a fifth of the time of a token. transformers can ask one step later and undo
the step that was one too many, but does so only on devices it names. Here its rule is extended to caches that a sparse
model fills on CUDA; whatever else it asks stays. Tokens are the same; a sampled text that ended with an end token has
drawn once more from the random generator.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.generation import utils

REASON = "before every step the device waits until transformers has seen whether the last token ended the text"
VERSIONS = "transformers whose DeferredStopCheck.is_supported takes what PARAMETERS names: 5.17 to 5.24"
ELSEWHERE = "the rule of transformers stays: each step waits for the last token"
# The attribute that a cache is known by, and a device for which transformers looks late.
MARK = "_wina_sparse"
LATE = torch.device("mps")
PARAMETERS = ["device", "cache", "cache_is_returned", "is_assistant"]


def install() -> None:
    """Extend the rule of transformers; once, and only where it is the one that is known."""
    check: Any = getattr(utils, "DeferredStopCheck", None)
    rule = getattr(check, "is_supported", None)
    if rule is None or hasattr(rule, MARK) or list(inspect.signature(rule).parameters) != PARAMETERS:
        return

    def is_supported(device: torch.device, cache: Any, *args: Any, **kwargs: Any) -> bool:
        sparse = device.type == "cuda" and getattr(cache, MARK, False)
        return any(rule(place, cache, *args, **kwargs) for place in ([device, LATE] if sparse else [device]))

    setattr(is_supported, MARK, True)
    check.is_supported = staticmethod(is_supported)


def mark(cache: Any, tokens: Tensor | None) -> None:
    """Note that a sparse model fills this cache, if it does so on CUDA."""
    if cache is not None and tokens is not None and tokens.device.type == "cuda":
        setattr(cache, MARK, True)
