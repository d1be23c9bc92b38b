"""A decoder layer of Llama's form in a compiled step on CUDA: norms, activation and sums in the kernels of its products.

Of such a layer a compiler makes two kernels for norms and sums and one for the gated activation, each of which takes about
as long to start and to end as it computes. Here what the layer's quantized products are given is what goes into the norm
or the activation, and the sum with the residual stream is made where a product ends: five kernels fewer to wait for.
All else, and what a hook or an adapter would have to see, is the stock layer's own way.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from wina_calib.runtime import group_operator
from wina_calib.runtime.derived import is_watched
from wina_calib.runtime.fast_path import token_attention
from wina_calib.runtime.fast_path.blocks import ShortAttention, ShortMLP
from wina_calib.runtime.fast_path.norms import Norm
from wina_calib.runtime.forward_pass import here
from wina_calib.runtime.quantized import QuantizedLinear

# Where kernels compute what is around a product.
DEVICES = ("cuda",)


def traced(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The output (..., width) of a layer, of `layers.ShortLayer`, that is being traced; None where it goes the stock way."""
    now = getattr(here, "current", None)
    if now is None or len(args) != 1 or "hidden_states" in kwargs:
        return None
    (x,), form = args, layer.form
    attn, mlp = getattr(layer, form.attention), getattr(layer, form.mlp)
    norms = getattr(layer, form.norm), getattr(layer, form.mlp_norm)
    if x.device.type not in DEVICES or not isinstance(attn, ShortAttention) or not isinstance(mlp, ShortMLP):
        return None
    if mlp.parts.gelu or not all(map(_is_known, norms, (x, x))):
        return None
    first, second = _number(attn, attn.parts.inputs, x), _number(attn, (attn.parts.output,), x)
    third, fourth = _number(mlp, mlp.parts.inputs, x), _number(mlp, (mlp.parts.output,), x)
    if first is None or second is None or third is None or fourth is None or is_watched(attn) or is_watched(mlp):
        return None
    heads = group_operator.step(first, x, norms[0].weight, norms[0].variance_epsilon)
    attended = token_attention.traced(attn, heads, kwargs, form.cache)
    if attended is not None:
        x = group_operator.step(second, attended, None, 0.0, added=x)
    else:
        now.ready, now.waiting = (first, heads), (second, x)
        x = attn(hidden_states=x, **kwargs)[0]
    gated = group_operator.step(third, x, norms[1].weight, norms[1].variance_epsilon)
    return group_operator.step(fourth, gated, None, 0.0, gated=True, added=x)


def _is_known(norm: Any, x: Tensor) -> bool:
    """Whether a norm is ours, of x's dtype, and no hook sees it."""
    return type(norm) is Norm and norm.weight.dim() == 1 and norm.weight.dtype == x.dtype and not is_watched(norm)


def _number(block: Any, names: tuple[str, ...], x: Tensor) -> int | None:
    """The number of the group of a block's projections, which they make up in their order; None where it cannot serve."""
    members = [getattr(block, name) for name in names]
    if any(type(member) is not QuantizedLinear or is_watched(member) for member in members):
        return None
    number, start = members[0].number, 0
    for member in members:
        if member.number != number or member.start != start or member.packed_dtype != x.dtype:
            return None
        start += member.out_features
    return number if group_operator.serves(number, x) else None
