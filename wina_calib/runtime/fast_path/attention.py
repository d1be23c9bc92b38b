"""Attention of one token, for a model with fewer key heads than query heads: on the cache as it lies.

A compiled step with a static cache writes out a copy of the keys and values for every query head, of all places of the
cache, before torch's attention reads them: five kernels a layer that take as long as a small product. Here one program a
key head reads its part of the cache once for all its query heads. On a CPU, compiled or not, the query heads of a key head
are rows of one query to torch's attention, which in 16 bits takes up to 17 times as long with a head for each.
Where a block of a sparse model is shortened (`blocks`), C computes it if it is fast for that many places.
All else is torch's own attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from wina_calib.runtime.kernels import cuda

# As transformers knows it, and what it stands in for.
NAME = "wina_sdpa"
STOCK = "sdpa"
DTYPES = (torch.bfloat16, torch.float16)
HEAD_SIZES = (32, 64, 128, 256)
# Places from which torch's attention of several query heads a key head is faster on a CPU.
MAX_LENGTH_IN_C = 256


def serves(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether the kernel computes this: one 16-bit query a sequence, heads of a common size, a mask of what is seen."""
    batch, heads, rows, size = query.shape
    if rows != 1 or query.dtype not in DTYPES or query.device.type != "cuda" or not cuda.available():
        return False
    if key.shape != value.shape or key.dtype != query.dtype or size != key.shape[-1] or size not in HEAD_SIZES:
        return False
    if heads % key.shape[1] or torch.is_grad_enabled():
        return False
    return mask is None or (mask.dtype == torch.bool and mask.shape == (batch, 1, 1, key.shape[2]))


def packs(query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    """Whether the query heads of a key head can be rows of one query: one token on a CPU, a mask that is theirs all."""
    heads, rows = query.shape[1:3]
    if not query.is_cpu or rows != 1 or heads == key.shape[1] or heads % key.shape[1]:
        return False
    return mask is None or mask.shape[1] == 1


def computes_in_c(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether C serves one query (1, heads, 1, size) on a CPU, contiguous, with what a cache holds, and is fast for it."""
    _, heads, _, size = query.shape
    length = key.shape[2]
    if length > MAX_LENGTH_IN_C and (heads != key.shape[1] or query.dtype == torch.float32):
        return False
    if not key.dtype == value.dtype == query.dtype or not key.device == value.device == query.device:
        return False
    if key.shape != value.shape or key.shape[0] != 1 or key.shape[3] != size or heads % key.shape[1]:
        return False
    if key.stride(3) != 1 or value.stride(3) != 1:
        return False
    return mask is None or (
        mask.dtype == torch.bool and mask.numel() == length and mask.is_contiguous() and mask.is_cpu
    )


def attend_packed(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """(batch, 1, heads, size) from query (batch, heads, 1, size), and key and value (batch, key heads, length, size)."""
    batch, heads, _, size = query.shape
    rows = query.reshape(batch, key.shape[1], -1, size)
    out = scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scale)
    return out.reshape(batch, 1, heads, out.shape[-1])


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface: query (batch, heads, rows, size) to (batch, rows, heads, size)."""
    plain = not dropout and all(kwargs.get(name) is None for name in ("position_bias", "softcap", "s_aux", "cache"))
    if plain and packs(query, key, attention_mask):
        return attend_packed(query, key, value, attention_mask, scaling), None
    if plain and torch.compiler.is_compiling() and serves(query, key, value, attention_mask):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out: Tensor = torch.ops.wina_calib.attend(query, key, value, attention_mask, scale)
        return out, None
    attended: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )
    return attended


def prefer(model: PreTrainedModel) -> None:
    """Let a model that uses torch's attention decode with this one."""
    if model.config._attn_implementation == STOCK:
        model.config._attn_implementation = NAME


# At once: a pickled model comes with the name, wherever it is loaded.
ALL_ATTENTION_FUNCTIONS.register(NAME, attention_forward)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[STOCK])

_library = torch.library.Library("wina_calib", "FRAGMENT")
_library.define(
    "attend(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
_library.impl("attend", cuda.attend, "CUDA")


def _shape_of(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    batch, heads, rows, size = query.shape
    return query.new_empty(batch, rows, heads, size)


torch.library.register_fake("wina_calib::attend", _shape_of, lib=_library)
