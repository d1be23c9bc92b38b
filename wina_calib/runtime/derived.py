"""Classes made of one of ours and a stock one, which modules of a sparse model get in place of the stock one.

To all who look at names they are the stock class; copied and pickled by the two classes.
"""

from __future__ import annotations

from typing import Any

from torch import nn


class Derived(nn.Module):
    """Stands before a stock class; `known` holds the stock class's forward as it was then."""

    known: tuple[Any, ...]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copied and pickled by name of the two classes."""
        state: Any = super().__getstate__  # torch has no types for it
        return _empty, type(self).__bases__, state()


_made: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def both(mixin: type[Derived], stock: type[nn.Module]) -> type[nn.Module]:
    """The class of both, made once."""
    if (mixin, stock) not in _made:
        names = {"__module__": stock.__module__, "__doc__": stock.__doc__, "known": (stock.forward,)}
        _made[mixin, stock] = type(stock.__name__, (mixin, stock), names)
    return _made[mixin, stock]


def derive(module: nn.Module, mixin: type[Derived]) -> None:
    """Let a module be of both classes."""
    module.__class__ = both(mixin, type(module))


def _empty(mixin: type[Derived], stock: type[nn.Module]) -> nn.Module:
    made = both(mixin, stock)
    return made.__new__(made)
