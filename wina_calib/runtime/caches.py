"""Keys and values of a forward pass, found among its arguments by what they are: transformers renames the argument.

Up to 5.23 it is `past_key_values`, from 5.24 on `cache`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from wina_calib.errors import UsageError

NAMES = ("cache", "past_key_values")


def cache_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The cache that a forward pass was given, transformers' or the paged one of its `generate_batch`; None without one.

    Raises:
        UsageError: something of another kind stands where a cache belongs, so that nothing tells what the pass is.
    """
    for value in (*kwargs.values(), *args):
        if isinstance(value, Cache) or is_paged(value):
            return value
    for name in NAMES:
        value = kwargs.get(name)
        if value is not None:
            raise UsageError(
                f"{name} is a {type(value).__name__}; expected a cache of transformers. Without one a sparse model cannot "
                "tell a prompt from what is decoded after it."
            )
    return None


def is_paged(cache: Any) -> bool:
    """Whether it holds keys and values of several requests at once, as `generate_batch` does."""
    if cache is None or isinstance(cache, Cache | Tensor):
        return False
    made_in = sys.modules.get("transformers.generation.continuous_batching.cache")  # where one can have been made
    return made_in is not None and isinstance(cache, made_in.PagedAttentionCache)


def cache_name(forward: Callable[..., Any]) -> str:
    """Name of the argument by which a model, layer or attention block takes its cache.

    Raises:
        UsageError: it has none of the known names.
    """
    # A class of a model's own code may hand on what it is given as it comes: the class below it says what that is.
    classes = type(getattr(forward, "__self__", None)).__mro__
    for known in (forward, *(base.forward for base in classes if hasattr(base, "forward"))):
        for name in NAMES:
            if name in inspect.signature(known).parameters:
                return name
    raise UsageError(
        f"{getattr(forward, '__qualname__', forward)} takes its cache by none of the known names ({', '.join(NAMES)}). "
        "See pyproject.toml for the versions of transformers that are supported."
    )
