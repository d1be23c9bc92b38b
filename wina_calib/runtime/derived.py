"""Classes made of one of ours, or several, and a stock one, which modules of a sparse model get in place of the stock one.

To all who look at names they are the stock class; copied and pickled by what they are made of.
"""

from __future__ import annotations

from typing import Any

from torch import nn


class Derived(nn.Module):
    """Stands before a stock class; `known` holds the stock class's forward as it was then."""

    known: tuple[Any, ...]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copied and pickled by name of the classes that it is made of."""
        state: Any = super().__getstate__  # torch has no types for it
        made_of: list[type] = [type(self)]
        while made_of[-1] in _made.values():
            made_of += made_of.pop().__bases__
        return _empty, tuple(made_of), state()


_made: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def both(mixin: type[Derived], stock: type[nn.Module]) -> type[nn.Module]:
    """The class of both, made once."""
    if (mixin, stock) not in _made:
        names = {"__module__": stock.__module__, "__doc__": stock.__doc__, "known": (stock.forward,)}
        _made[mixin, stock] = type(stock.__name__, (mixin, stock), names)
    return _made[mixin, stock]


def is_watched(module: nn.Module | None) -> bool:
    """Whether hooks see a module's calls, or it computes something of its own."""
    if module is None:
        return False
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def derive(module: nn.Module, mixin: type[Derived]) -> None:
    """Let a module be of both classes."""
    module.__class__ = both(mixin, type(module))


def _empty(*made_of: Any) -> nn.Module:
    *mixins, made = made_of
    for mixin in reversed(mixins):
        made = both(mixin, made)
    empty: nn.Module = made.__new__(made)
    return empty
