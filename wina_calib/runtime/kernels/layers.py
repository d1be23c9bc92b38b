"""One token through all decoder layers in one call into C (`layers.c`)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wina_calib.runtime.kernels.native import Row, threads_for
from wina_calib.runtime.kernels.native_build import functions


class _Heads(ctypes.Structure):
    _fields_ = (
        ("queries", ctypes.c_int64),
        ("keys", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("query_norm", ctypes.c_void_p),
        ("key_norm", ctypes.c_void_p),
        ("epsilon", ctypes.c_float),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("attn_in", "attn_out", "mlp_in", "mlp_out", "norm", "mlp_norm")),
        ("heads", _Heads),
        *((name, ctypes.c_float) for name in ("epsilon", "mlp_epsilon", "scale")),
        ("gelu", ctypes.c_int32),
    )


class Past(ctypes.Structure):
    """Where the keys and values (1, key heads, length, size) of a layer lie, and how many places are filled.

    `counter`, where it is not null, is a number of 64 bits that says so instead, and that the call counts on.
    """

    _fields_ = (
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("key_head", "key_place", "value_head", "value_place", "filled")),
        ("counter", ctypes.c_void_p),
    )

    def hold(self, keys: Tensor, values: Tensor) -> None:
        """Point at keys and values (1, key heads, length, size), whose heads' numbers are contiguous."""
        self.keys, self.values = keys.data_ptr(), values.data_ptr()
        self.key_head, self.key_place = keys.stride()[1:3]
        self.value_head, self.value_place = values.stride()[1:3]


@dataclass(frozen=True)
class LayerParts:
    """What a decoder layer of Llama's form consists of.

    Attributes:
        rows: products of `attn_in`, `attn_out`, `mlp_in` and `mlp_out`.
        norms: weights (width,) of the norms before attention and MLP.
        epsilons: of these.
        heads: of queries and of keys.
        size: numbers of a head.
        head_norms: weights (size,) of the norms of a query's and of a key's head, or none.
        head_epsilon: of these.
        scale: of attention's scores.
        gelu: whether the MLP's gate goes through GELU's approximation by tanh, else through SiLU.
    """

    rows: tuple[Row, Row, Row, Row]
    norms: tuple[Tensor, Tensor]
    epsilons: tuple[float, float]
    heads: tuple[int, int]
    size: int
    head_norms: tuple[Tensor, ...]
    head_epsilon: float
    scale: float
    gelu: bool

    def fits(self, width: int, dtype: torch.dtype) -> bool:
        """Whether the parts go together, from a residual stream of this width and dtype to the same."""
        attn_in, attn_out, mlp_in, mlp_out = self.rows
        (queries, keys), size = self.heads, self.size
        weights = [*((w, width) for w in self.norms), *((w, size) for w in self.head_norms)]
        return (
            all(row.dtype is dtype for row in self.rows)
            and all(w.dtype is dtype and w.shape == (n,) and w.is_contiguous() and w.is_cpu for w, n in weights)
            and len(self.head_norms) in (0, 2)
            and queries % keys == 0
            and (attn_in.width, attn_in.out) == (width, (queries + 2 * keys) * size)
            and (attn_out.width, attn_out.out) == (queries * size, width)
            and (mlp_in.width, mlp_in.out) == (width, 2 * mlp_out.width)
            and mlp_out.out == width
        )


class Layers:
    """Decoder layers with all that stays the same from token to token ready.

    Args:
        parts: of each layer. Their tensors and products are kept.

    Raises:
        ValueError: parts do not go together.
    """

    def __init__(self, parts: Sequence[LayerParts]) -> None:
        first = parts[0].rows[0]
        self.parts, self.width, self.dtype = tuple(parts), first.width, first.dtype
        for i, part in enumerate(parts):
            if not part.fits(self.width, self.dtype):
                raise ValueError(f"the parts of layer {i} do not go together for {self.width} numbers of {self.dtype}")
        self.structs = (_Layer * len(parts))(*map(_struct, parts))
        self.address = ctypes.addressof(self.structs)
        self.function = functions("layers")[self.dtype]
        self.weights = max(row.width * row.out for part in parts for row in part.rows)

    def __call__(
        self,
        x: Tensor,
        cosine: Tensor,
        sine: Tensor,
        seen: Tensor | None,
        past: ctypes.Array[Past],
        length: int,
        norm: Tensor | None = None,
        epsilon: float = 0.0,
    ) -> tuple[Tensor, ...]:
        """What each layer gives for one token, which is added to the cache.

        Args:
            x: (1, 1, width), contiguous.
            cosine: size numbers of x's dtype, contiguous, of the rotary embedding.
            sine: likewise.
            seen: bool, length numbers, contiguous: places that are attended to; None is all.
            past: a layer's cache each, with room for `length` places, the new one among them.
            length: of the cache.
            norm: weights (width,) of x's dtype, contiguous, of an RMSNorm of what the last layer gives; None is without.
            epsilon: of it.

        Returns:
            (1, 1, width) for each layer, and the norm of the last one's; the same for any number of threads.

        Raises:
            MemoryError: there is none.
            ValueError: a cache is full.
        """
        count = len(self.parts)
        hidden = torch.empty(count + (norm is not None), 1, 1, self.width, dtype=self.dtype, device="cpu")
        places = (t if t is None else t.data_ptr() for t in (x, hidden, cosine, sine, seen, norm))
        threads = threads_for(self.weights)
        failed = self.function(self.address, ctypes.addressof(past), count, *places, epsilon, length, threads)
        if failed == 1:
            raise MemoryError(f"no memory for a token's heads and the scores of {length} places")
        if failed:
            raise ValueError(f"a cache of {length} places is full")
        rows: tuple[Tensor, ...] = hidden.unbind()
        return rows


def _struct(part: LayerParts) -> _Layer:
    sites = (row.address for row in part.rows)
    norms = (weight.data_ptr() for weight in part.norms)
    head_norms = (weight.data_ptr() for weight in part.head_norms) if part.head_norms else (None, None)
    heads = _Heads(*part.heads, part.size, *head_norms, part.head_epsilon)
    return _Layer(*sites, *norms, heads, *part.epsilons, part.scale, part.gelu)
