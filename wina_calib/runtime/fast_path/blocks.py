"""Attention and MLP blocks of a sparse model: one token on a CPU in a few calls.

A token of a small model is hundreds of operators and calls in Python between products of megabytes, each of which finds its
code gone from the caches; together they take a third of the time. A block whose class is seen to compute what is known
here gets a class derived from it: one row goes through C where something is dropped, without gradients, hooks or a
compiler, and all else is the stock block's own way.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu
from torch.nn.modules import module as torch_modules

from wina_calib.model.architecture import Layer, Site
from wina_calib.runtime.caches import cache_name
from wina_calib.runtime.derived import Derived, derive, is_watched
from wina_calib.runtime.fast_path import attention
from wina_calib.runtime.fast_path.norms import Norm
from wina_calib.runtime.fast_path.token_attention import has_more, turned
from wina_calib.runtime.kernels import native, native_build
from wina_calib.runtime.kernels.native import Row
from wina_calib.runtime.modules import SparseLinear
from wina_calib.runtime.packed import PackedGroup
from wina_calib.runtime.quantized import QuantizedLinear
from wina_calib.runtime.quantized_group import QuantizedGroup
from wina_calib.runtime.state import RuntimeState

logger = logging.getLogger(__name__)

# Classes of projections whose groups may have a product of one row in C.
PROJECTIONS = (SparseLinear, QuantizedLinear)
# Names of the norms of a query's and a key's head.
NORMS = ("q_norm", "k_norm")
# What blocks are probed with: an epsilon, and a number that those would show which cut off what is large.
EPSILON, LARGE = 1e-6, 1000.0


@dataclass(frozen=True)
class Parts:
    """Names of a block's children: projections of its input, and the one of its output."""

    inputs: tuple[str, ...]  # of one mask group, side by side
    output: str  # of another
    others: tuple[tuple[str, type[nn.Module]], ...]  # the other children and their classes
    heads: tuple[int, int] = (0, 0)  # query heads and key heads of attention
    norms: tuple[str, ...] = ()  # which of these are the norms of a query's and a key's head, or none
    gelu: bool = False  # whether an MLP's gate goes through GELU's approximation by tanh, else through SiLU


class Short(Derived):
    """Stands before a stock block's class in one that is made of both."""

    parts: Parts

    def _rows(self, x: Tensor) -> tuple[Row, Row] | None:
        """The products of input and output, where all that is wanted is their masked result for one row x (..., in)."""
        parts, stock = self.parts, cast(Any, type(self).__bases__[1])
        children: dict[str, Any] = self._modules
        inputs, output = [children[name] for name in parts.inputs], children[parts.output]
        if any(type(module) not in PROJECTIONS for module in (*inputs, output)):
            return None
        first: PackedGroup | QuantizedGroup | None = inputs[0].packed
        second: PackedGroup | QuantizedGroup | None = output.packed
        if first is None or second is None or first.row is None or second.row is None:
            return None
        now = inputs[0].site.state.now()
        if not first.is_short(now) or not first.masks_row(x):
            return None
        if any(module.packed is not first for module in inputs) or second.dtype is not first.dtype:
            return None
        if second.rotation is not None or stock.forward is not self.known[0]:
            return None
        if any(type(children[name]) is not kind for name, kind in parts.others):
            return None
        if torch_modules._has_any_global_hook() or any(map(is_watched, children.values())):
            return None
        if now.watch is not None:
            inputs[0].site.note_row(inputs[0], x, now)
        return first.row, second.row


class ShortAttention(Short):
    """Attention of Llama's form: heads turned by rotary embedding, a cache, torch's attention."""

    config: Any
    head_dim: int
    layer_idx: int
    scaling: float

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Outputs (batch, rows, width), and what else the stock block returns."""
        if not (args or self.training or torch.compiler.is_compiling() or torch.is_grad_enabled()):
            y = self._short(**kwargs)
            if y is not None:
                return y, None
        return super().forward(*args, **kwargs)

    def _short(
        self,
        hidden_states: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        **others: Any,
    ) -> Tensor | None:
        x, cache = hidden_states, past_key_values if cache is None else cache
        if x is None or x.shape[1] != 1 or position_embeddings is None or cache is None:
            return None
        if self.config._attn_implementation != attention.NAME:
            return None
        if has_more(others):
            return None
        size = self.head_dim
        if any(t.numel() != size or t.dtype is not x.dtype or not t.is_contiguous() for t in position_embeddings):
            return None
        rows = self._rows(x)
        if rows is None:
            return None
        first, second = rows
        norms: list[Any] = [self._modules[name] for name in self.parts.norms]
        weights = [norm.weight for norm in norms]
        epsilons = {norm.variance_epsilon for norm in norms} or {0.0}
        if len(epsilons) > 1 or any(
            w.dtype is not x.dtype or w.shape != (size,) or not w.is_contiguous() for w in weights
        ):
            return None
        heads, key_heads = self.parts.heads
        y = native.turned(first, x, *position_embeddings, self.parts.heads, weights, epsilons.pop())
        y = y.view(1, -1, 1, size)
        query, key, value = y.split_with_sizes((heads, key_heads, key_heads), dim=1)
        key, value = cache.update(key, value, self.layer_idx)
        if attention.computes_in_c(query, key, value, attention_mask):
            out = native.attend(query, key, value, attention_mask, self.scaling)
        else:
            out, _ = attention.attention_forward(self, query, key, value, attention_mask, scaling=self.scaling)
        return second(out.reshape(*x.shape[:-1], -1))


class ShortMLP(Short):
    """A gated MLP: the activation of gate, times up, goes down."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Outputs (..., width) for x (..., width)."""
        if len(args) == 1 and not (kwargs or torch.compiler.is_compiling() or torch.is_grad_enabled()):
            (x,) = args
            rows = self._rows(x) if x.shape[-2:-1] == (1,) else None
            if rows is not None:
                return native.gated(*rows, x, gelu=self.parts.gelu)
        return super().forward(*args, **kwargs)


def shorten(layer: nn.Module, described: Layer) -> None:
    """Give attention and MLP of a decoder layer their short way, where its blocks are of a form that is known."""
    attn, mlp = layer.get_submodule(described.attention), layer.get_submodule(described.mlp)
    norms = NORMS if all(type(attn._modules.get(name)) is Norm for name in NORMS) else ()
    heads = described.heads, described.kv_heads
    parts = _parts(attn, described.site("attn_in"), described.site("attn_out"), heads=heads, norms=norms)
    if matches(_computes_attention, attn, parts):
        _derive(attn, ShortAttention, parts)
    for uses_gelu in (False, True):
        parts = _parts(mlp, described.site("mlp_in"), described.site("mlp_out"), gelu=uses_gelu)
        if matches(_computes_mlp, mlp, parts):
            _derive(mlp, ShortMLP, parts)
            break


def _parts(block: nn.Module, inputs: Site, output: Site, **more: Any) -> Parts:
    names, name = tuple(p.name for p in inputs.projections), output.projections[0].name
    others = ((n, type(child)) for n, child in block.named_children() if n not in names and n != name)
    return Parts(names, name, tuple(others), **more)


def _derive(block: nn.Module, mixin: type[Short], parts: Parts) -> None:
    derive(block, mixin)
    block.__dict__["parts"] = parts


class _Given(nn.Module):
    """A projection that returns what is given, or its input."""

    def __init__(self, output: Tensor | None = None) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> Tensor:
        return x if self.output is None else self.output


class _Past:
    """A cache that holds keys and values (1, key heads, length, size) of one layer."""

    def __init__(self, layer: int, keys: Tensor, values: Tensor) -> None:
        self.layer, self.keys, self.values = layer, keys, values

    def update(self, key: Tensor, value: Tensor, layer: int, **_: Any) -> tuple[Tensor, Tensor]:
        if layer != self.layer:
            raise ValueError(f"layer {layer} is asked for, not {self.layer}")
        return torch.cat([self.keys, key], 2), torch.cat([self.values, value], 2)


def matches(computes: Any, stock: nn.Module, form: Any) -> bool:
    """Whether a block or layer computes the known form to the bit, in every dtype."""
    try:
        with torch.no_grad():
            return all(computes(stock, form, dtype) for dtype in native_build.DTYPES)
    except Exception:  # anybody's code, which may want more than is given here
        logger.debug("%s is not shortened", type(stock).__name__, exc_info=True)
        return False


def _probe(stock: nn.Module, parts: Parts, outputs: Sequence[Tensor]) -> nn.Module:
    """The block with projections that give `outputs` (1, 1, n), side by side where it has one for them all."""
    given = outputs if len(parts.inputs) == len(outputs) else [torch.cat(tuple(outputs), -1)]
    probe = copy.copy(stock)
    probe.training = False
    projections = dict(zip(parts.inputs, map(_Given, given), strict=True)) | {parts.output: _Given()}
    probe._modules = stock._modules | projections
    for name in parts.norms:
        width = stock.get_submodule(name).get_parameter("weight").numel()
        weight = torch.linspace(0.5, 2.0, width, device="cpu", dtype=outputs[0].dtype)
        probe._modules[name] = Norm(nn.Parameter(weight), EPSILON, RuntimeState())
    return probe


def _random(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator("cpu").manual_seed(0)
    return [torch.randn(shape, generator=generator, device="cpu").mul_(3).to(dtype) for shape in shapes]


def _computes_mlp(stock: nn.Module, parts: Parts, dtype: torch.dtype) -> bool:
    gate, up = _random(dtype, (1, 1, 64), (1, 1, 64))
    up[..., 0] = LARGE
    y = _probe(stock, parts, (gate, up))(gate)
    return torch.equal(y, (gelu(gate, approximate="tanh") if parts.gelu else silu(gate)) * up)


def _computes_attention(stock: Any, parts: Parts, dtype: torch.dtype) -> bool:
    (heads, key_heads), size = parts.heads, stock.head_dim
    shapes = [(1, 1, count * size) for count in (heads, key_heads, key_heads)]
    outputs = _random(dtype, *shapes)
    outputs[2][..., 0] = LARGE
    past = _Past(stock.layer_idx, *_random(dtype, (1, key_heads, 3, size), (1, key_heads, 3, size)))
    turns = _random(dtype, (1, 1, size), (1, 1, size))
    probe = _probe(stock, parts, outputs)
    given = {cache_name(type(stock).forward): past}
    y, weights = probe(hidden_states=turns[0], position_embeddings=tuple(turns), attention_mask=None, **given)
    query, key, value = (t.view(1, 1, -1, size) for t in outputs)
    if parts.norms:
        query, key = (probe.get_submodule(name)(t) for name, t in zip(parts.norms, (query, key), strict=True))
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    keys, values = past.update(turned(key, *turns), value, stock.layer_idx)
    expected, _ = attention.attention_forward(probe, turned(query, *turns), keys, values, None, scaling=stock.scaling)
    return weights is None and torch.equal(y, expected.reshape(1, 1, -1))
