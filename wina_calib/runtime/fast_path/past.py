"""Keys and values of transformers' caches as memory that C reads and adds a token to.

A static cache has room for all tokens. A dynamic one is joined with each new token, a copy of it all; here its tensors become
views of memory that has room for some more. To all others they are tensors of the same shape and contents: a cache that was
cropped, reordered, copied or filled by somebody else has other tensors, and gets memory of its own at the next token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from wina_calib.runtime.kernels.layers import Past

# Places that a dynamic cache gets in advance: so many, or this share of what it holds.
SPARE, SPARE_SHARE = 64, 8


@dataclass
class _Held:
    """A layer's keys and values as they were last seen; `room` (2, 1, key heads, places, size) holds a dynamic one's, and
    `counter` () counts a static one's places.
    """

    keys: Tensor
    values: Tensor
    room: Tensor | None
    counter: Tensor | None = None

    def is_of(self, layer: Any) -> bool:
        """Whether a layer still has these: C has their addresses."""
        own = layer.keys is self.keys and layer.values is self.values
        return own and (self.counter is None or layer.cumulative_length is self.counter)


class Caches:
    """One cache, ready to be handed to C.

    Attributes:
        past: what C knows of each layer.
        length: places of each, the new one among them.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = list(layers)
        self.past = (Past * len(self.layers))()
        self.length = 0
        self._held: list[_Held | None] = [None] * len(self.layers)

    def prepare(self, shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> bool:
        """Be ready for one more token, with key heads and their size of each layer; False where a cache is of another kind."""
        lengths = set()
        for i, (layer, shape) in enumerate(zip(self.layers, shapes, strict=True)):
            keys, held = layer.keys, self._held[i]
            if held is None or not held.is_of(layer):
                if not _serves(layer, shape, dtype):
                    return False
                held = self._held[i] = self._take(i, layer)
            if held.room is None:
                lengths.add(keys.shape[2])
                continue
            filled = keys.shape[2]
            if filled == held.room.shape[3]:
                held = self._held[i] = self._take(i, layer)
            self.past[i].filled = filled
            lengths.add(filled + 1)
        self.length = lengths.pop() if lengths else 0
        return not lengths and self.filled() < self.length

    def filled(self) -> int:
        """Places that are filled."""
        counter = getattr(self.layers[0], "cumulative_length", None)
        return self.length - 1 if counter is None else int(counter)

    def added(self) -> None:
        """Let the layers show the token that C has added."""
        for layer, held in zip(self.layers, self._held, strict=True):
            assert held is not None
            if held.room is not None:
                layer.keys, layer.values = held.keys, held.values = held.room.narrow(3, 0, self.length).unbind()

    def take_back(self, first: int) -> None:
        """Undo `added` in the layers from `first` on."""
        for layer, held in zip(self.layers[first:], self._held[first:], strict=True):
            assert held is not None
            if held.room is None:
                layer.cumulative_length.sub_(1)
            else:
                layer.keys, layer.values = layer.keys[:, :, :-1], layer.values[:, :, :-1]

    def _take(self, i: int, layer: Any) -> _Held:
        """Point at a layer's tensors, which for a dynamic one are moved to where there is room."""
        if type(layer) is StaticLayer:
            self.past[i].hold(layer.keys, layer.values)
            self.past[i].counter = layer.cumulative_length.data_ptr()
            return _Held(layer.keys, layer.values, None, layer.cumulative_length)
        filled = layer.keys.shape[2]
        _, heads, _, size = layer.keys.shape
        places = filled + max(SPARE, filled // SPARE_SHARE)
        room = torch.empty(2, 1, heads, places, size, dtype=layer.keys.dtype, device="cpu")
        now = room.narrow(3, 0, filled)
        now[0], now[1] = layer.keys, layer.values
        layer.keys, layer.values = now.unbind()
        self.past[i].hold(*room.unbind())
        return _Held(layer.keys, layer.values, room)


_known: WeakKeyDictionary[Any, Caches] = WeakKeyDictionary()


def caches_of(past: Any, count: int) -> Caches | None:
    """The layers of a cache of transformers; None for another kind, number of layers, or one that is moved in and out."""
    if type(past) not in (DynamicCache, StaticCache) or past.offloading or len(past.layers) != count:
        return None
    caches = _known.get(past)
    if caches is None or caches.layers != past.layers:
        kinds: set[Any] = {type(layer) for layer in past.layers}
        if not all(map(_is_known, kinds)):
            return None
        caches = _known[past] = Caches(past.layers)
    return caches


def _serves(layer: Any, shape: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether a layer holds the keys and values of one sequence in the expected form."""
    heads, size = shape
    for tensor in (layer.keys, layer.values):
        if type(tensor) is not Tensor or not tensor.is_cpu or tensor.dtype is not dtype or tensor.ndim != 4:
            return False
        batch, own_heads, length, own_size = tensor.shape
        if (batch, own_heads, own_size) != (1, heads, size) or not length or tensor.stride(3) != 1:
            return False
    if layer.keys.shape != layer.values.shape:
        return False
    counter = getattr(layer, "cumulative_length", None)
    return counter is None or (counter.dtype is torch.int64 and counter.is_cpu and counter.numel() == 1)


@cache
def _is_known(kind: Any) -> bool:
    """Whether a class of layers adds tokens as it is done here, seen on a small one."""
    if kind not in (DynamicLayer, StaticLayer):
        return False
    tokens = torch.arange(24.0).view(1, 2, 3, 4)
    layer: Any = DynamicLayer() if kind is DynamicLayer else StaticLayer(max_cache_len=5)
    with torch.inference_mode(False), torch.no_grad():
        layer.update(tokens[:, :, :2], -tokens[:, :, :2])
        layer.update(tokens[:, :, 2:], -tokens[:, :, 2:])
        if kind is StaticLayer and (
            layer.cumulative_length.dtype is not torch.int64 or int(layer.cumulative_length) != 3
        ):
            return False
        kept = layer.keys[:, :, :3], layer.values[:, :, :3]
        same = torch.equal(kept[0], tokens) and torch.equal(kept[1], -tokens)
        return same and layer.keys.shape[2] == (3 if kind is DynamicLayer else 5)
