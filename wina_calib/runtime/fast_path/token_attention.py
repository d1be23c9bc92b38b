"""A token of a compiled step from the product of its queries, keys and values to what goes into the next product.

Between the two a compiler has rotary embedding, two writes into the cache and attention, three or four kernels that each take
about as long to start and to end as they compute. Here they are one operator (`kernels.attention_cuda`), for a static
cache of transformers' and blocks that `blocks` knows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from wina_calib.runtime.derived import is_watched
from wina_calib.runtime.fast_path import attention
from wina_calib.runtime.fast_path.norms import Norm
from wina_calib.runtime.kernels import attention_cuda

# What decoder layers pass to attention that needs none of it.
UNUSED = frozenset({"position_ids", "use_cache", "cache_position", "output_hidden_states"})


def has_more(kwargs: Mapping[str, Any], known: Collection[str] = ()) -> bool:
    """Whether a layer or its attention gets something that matters besides what is known."""
    return any(
        name not in known and name not in UNUSED and value is not None and value is not False
        for name, value in kwargs.items()
    )


def traced(block: Any, heads: Tensor, kwargs: Mapping[str, Any], cache_name: str) -> Tensor | None:
    """What attention makes of its products `heads` (1, 1, n), which a layer is traced with; None where it goes the stock way.

    Args:
        block: `ShortAttention`, none of whose children is watched.
        heads: queries, keys and values side by side.
        kwargs: of the layer.
        cache_name: which of them is the cache.
    """
    turns, mask = kwargs.get("position_embeddings"), kwargs.get("attention_mask")
    cache: Any = kwargs.get(cache_name)
    if has_more(kwargs, ("position_embeddings", "attention_mask", cache_name)):
        return None
    if turns is None or type(cache) is not StaticCache or block.config._attn_implementation != attention.NAME:
        return None
    layer, size, (count, key_heads) = cache.layers[block.layer_idx], block.head_dim, block.parts.heads
    if type(layer) is not StaticLayer or not layer.is_initialized:
        return None
    held, places = (1, key_heads, layer.max_cache_len, size), layer.max_cache_len
    if tuple(layer.keys.shape) != held or tuple(layer.values.shape) != held:
        return None
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != (1, 1, 1, places)):
        return None
    same = (*turns, layer.keys, layer.values)
    if any(t.dtype != heads.dtype or t.device != heads.device for t in same) or any(t.numel() != size for t in turns):
        return None
    if not _serves(heads, size, count, key_heads):
        return None
    norms: list[Any] = [getattr(block, name) for name in block.parts.norms]
    if any(type(norm) is not Norm or norm.weight.dtype != heads.dtype or is_watched(norm) for norm in norms):
        return None
    if len({norm.variance_epsilon for norm in norms}) > 1:
        return None
    gains = [norm.weight for norm in norms] or [None, None]
    epsilon = norms[0].variance_epsilon if norms else 0.0
    out: Tensor = torch.ops.wina_calib.attend_token(
        heads, *turns, *gains, layer.keys, layer.values, layer.cumulative_length, mask, epsilon, block.scaling
    )
    layer.cumulative_length.add_(1)
    return out


def _serves(heads: Tensor, size: int, count: int, key_heads: int) -> bool:
    """Whether the kernel computes this, as far as a trace can tell."""
    if heads.device.type != "cuda" or not attention_cuda.serves(heads.dtype, size, count, key_heads):
        return False
    return bool(attention_cuda.available(heads.device.index))


def turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding of x (..., size), of which the first half turns with the second."""
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-second, first], dim=-1) * sine


def by_operators(
    heads: Tensor,
    cosine: Tensor,
    sine: Tensor,
    query_gain: Tensor | None,
    key_gain: Tensor | None,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    mask: Tensor | None,
    epsilon: float,
    scale: float,
) -> Tensor:
    """`attention_cuda.attend` by torch's operators: its definition."""
    _, key_heads, length, size = keys.shape
    parts = heads.view(1, -1, 1, size)
    query, key, value = parts.split_with_sizes((parts.shape[1] - 2 * key_heads, key_heads, key_heads), dim=1)
    if query_gain is not None and key_gain is not None:
        query, key = _normed(query, query_gain, epsilon), _normed(key, key_gain, epsilon)
    cosine, sine = cosine.reshape(size), sine.reshape(size)
    query, key = turned(query, cosine, sine), turned(key, cosine, sine)
    keys.index_copy_(2, position.reshape(1), key)
    values.index_copy_(2, position.reshape(1), value)
    place = torch.arange(length, device=keys.device)
    seen = place <= position
    if mask is not None:
        seen &= mask.reshape(length) | (place == position)
    out = scaled_dot_product_attention(
        query, keys, values, attn_mask=seen[None, None, None], scale=scale, enable_gqa=True
    )
    return out.reshape(1, 1, -1)


def _normed(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    unit = x.float()
    unit = unit * torch.rsqrt(unit.pow(2).mean(-1, keepdim=True) + epsilon)
    return gain * unit.to(x.dtype)


def _attend_token(*given: Any) -> Tensor:
    by_kernel = given[0].device.type == "cuda" and attention_cuda.reads(*given[:9])
    return attention_cuda.attend(*given) if by_kernel else by_operators(*given)


def _shape_of(
    heads: Tensor, cosine: Tensor, sine: Tensor, query_gain: Any, key_gain: Any, keys: Tensor, *_: Any
) -> Tensor:
    return heads.new_empty(1, 1, heads.numel() - 2 * keys.shape[1] * keys.shape[3])


_library = torch.library.Library("wina_calib", "FRAGMENT")
_library.define(
    "attend_token(Tensor heads, Tensor cosine, Tensor sine, Tensor? query_gain, Tensor? key_gain, Tensor(a!) keys, "
    "Tensor(b!) values, Tensor position, Tensor? mask, float epsilon, float scale) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)
_library.impl("attend_token", _attend_token, "CompositeExplicitAutograd")
torch.library.register_fake("wina_calib::attend_token", _shape_of, lib=_library)
