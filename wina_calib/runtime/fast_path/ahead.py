"""A token that went through all layers of a model in one call: each layer hands out what belongs to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any

from torch import Tensor, nn

from wina_calib.runtime.fast_path import past
from wina_calib.runtime.fast_path.token_attention import has_more


class Ahead:
    """A token that was computed for all layers of a pass, some of which have handed out their part.

    Args:
        layers: of the pass.
        inputs: of each layer, and the output of the last; views of one tensor but for the first.
        kwargs: what the first layer was given besides.
        given: what of these matters.
        caches: that a token was added to.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        inputs: Sequence[Tensor],
        kwargs: Mapping[str, Any],
        given: Mapping[str, Any],
        caches: past.Caches,
    ) -> None:
        self.layers, self.inputs, self.given, self.caches = layers, inputs, given, caches
        self.names, self.values = tuple(kwargs), tuple(kwargs.values())
        self.version = inputs[-1]._version  # of all outputs, which count their changes together
        self.place = 0

    def hand_out(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        """The output of the next layer; None where another one is asked, or it is given something else than was counted on."""
        i, inputs = self.place, self.inputs
        if i + 1 >= len(inputs) or layer is not self.layers[i] or len(args) != 1 or args[0] is not inputs[i]:
            return None
        if inputs[i + 1]._version != self.version or not self._is_given(kwargs):
            return None
        self.place = i + 1
        return inputs[i + 1]

    def _is_given(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether a layer gets what the first one got, or what comes to the same."""
        if tuple(kwargs) == self.names and all(map(is_, kwargs.values(), self.values)):
            return True
        return not has_more(kwargs, self.given) and all(kwargs.get(name) is value for name, value in self.given.items())

    def is_over(self) -> bool:
        """Whether all layers have handed out their part."""
        return self.place + 1 == len(self.inputs)

    def finish(self) -> None:
        """Take back what was added for layers that were not asked."""
        if not self.is_over():
            self.caches.take_back(self.place)
