"""Decoder layers of a sparse model: one token on a CPU goes through all of them in one call.

The first layer of a pass computes for all, and those after it hand out what belongs to them, each where it is given just what
was counted on: the output of the one before, the same mask, rotary embedding and cache. Where one is given something else, the
tokens that were added to the caches of this layer and the rest are taken back, and they compute in their own way; so does
everything that `blocks` leaves to the stock blocks. A layer is part of this where its class is seen to compute Llama's form.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from operator import attrgetter, contains
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from wina_calib.errors import UsageError
from wina_calib.model.architecture import Layer
from wina_calib.runtime.caches import cache_name
from wina_calib.runtime.decoder import Recomputed
from wina_calib.runtime.derived import derive
from wina_calib.runtime.fast_path import attention, past, step
from wina_calib.runtime.fast_path.ahead import Ahead
from wina_calib.runtime.fast_path.blocks import PROJECTIONS, ShortAttention, ShortMLP, matches
from wina_calib.runtime.fast_path.norms import Norm
from wina_calib.runtime.fast_path.token_attention import has_more
from wina_calib.runtime.forward_pass import Pass, here
from wina_calib.runtime.kernels.layers import LayerParts, Layers
from wina_calib.runtime.quantized_group import QuantizedGroup

logger = logging.getLogger(__name__)

# Places from which torch's attention saves more than one call does, where several query heads share a key head.
MAX_LENGTH = 2048
_EPSILON, _SCALING = attrgetter("variance_epsilon"), attrgetter("scaling")


@dataclass(frozen=True)
class Form:
    """Names of a layer's children: attention, the norm before it, MLP, the norm before that; and of its cache's argument."""

    attention: str
    norm: str
    mlp: str
    mlp_norm: str
    cache: str


class ShortLayer(Recomputed):
    """Stands before the class of a decoder layer of Llama's form."""

    form: Form

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock class; what was computed ahead is handed out without more ado, as nobody looks on."""
        if not torch.compiler.is_compiling():
            now: Pass | None = getattr(here, "current", None)
            if now is not None and now.ahead is not None:
                y = now.ahead.hand_out(self, args, kwargs)
                if y is not None:
                    return y
        return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Outputs (batch, rows, width), as the stock layer."""
        if not (self.training or torch.is_grad_enabled()):
            y = step.traced(self, args, kwargs) if torch.compiler.is_compiling() else _ahead(self, args, kwargs)
            if y is not None:
                return y
        return super().forward(*args, **kwargs)


class Plan:
    """All layers of a model as one call, and what must still be so for it to be what they compute.

    Attributes:
        decoder: what their decoder was seen to do besides, see `decoder.Seen`; None as long as it was not.
    """

    def __init__(self, layers: Sequence[ShortLayer]) -> None:
        self.layers = list(layers)
        self.decoder: Any = None
        self.form = layers[0].form
        self.attentions: list[Any] = [layer._modules[layer.form.attention] for layer in layers]
        self.norms = list(_norms(layers))
        self.modules = [module for layer in layers for module in _computing(layer)]
        self.dropping = [*self.attentions, *(m for m in self.modules if isinstance(m, nn.Dropout))]
        self.parents = [m._modules for m in self.modules if m._modules]
        self.hooks = [h for m in self.modules for h in (m._forward_hooks, m._forward_pre_hooks)]
        self.own = [m.__dict__ for m in self.modules]
        self.projections: list[Any] = [m for m in self.modules if isinstance(m, PROJECTIONS)]
        self.groups: list[Any] = list(dict.fromkeys(m.packed for m in self.projections))
        self.quantized = all(isinstance(group, QuantizedGroup) for group in self.groups)
        self.derived: dict[Any, Any] = {
            type(m): m for m in self.modules if isinstance(m, ShortLayer | ShortAttention | ShortMLP)
        }
        self.configs = list({id(a.config): a.config for a in self.attentions}.values())
        self.shapes = [(a.parts.heads[1], a.head_dim) for a in self.attentions]
        self.grouped = any(a.parts.heads[0] != a.parts.heads[1] for a in self.attentions)
        self.call = Layers([_parts(layer) for layer in layers])
        self._children = [dict(children) for children in self.parents]
        self._made_of, self._packed, self._packs = self._now(), self._products(), -1

    def holds(self, packs: int) -> bool:
        """Whether modules, weights and settings still are those that the call was made of; `packs` as of the state.

        Asked at every token, when whatever is looked at has to come from memory again: loops are in C where they can be.
        """
        if self.parents != self._children or self._now() != self._made_of:
            return False
        if packs != self._packs:
            if self._products() != self._packed:
                return False
            self._packs = packs
        return True

    def is_seen(self) -> bool:
        """Whether hooks see the calls of a module, or one computes something else by now."""
        if any(self.hooks) or torch_modules._has_any_global_hook():
            return True
        if any(map(contains, self.own, repeat("forward"))) or any(m.training for m in self.dropping):
            return True
        return any(kind.__bases__[1].forward is not module.known[0] for kind, module in self.derived.items())

    def serves(self, now: Pass) -> bool:
        """Whether in this pass one row of which nothing but the result is wanted may go this way."""
        if not now.served or now.dense or now.dense_rows is not None or now.watch is not None:
            return False
        return now.drops or self.quantized

    def _now(self) -> list[Any]:
        """What the call depends on, in things that are cheap to compare, but for the products."""
        facts: list[Any] = list(map(type, self.modules))
        facts += [norm._parameters["weight"].data_ptr() for norm in self.norms]
        facts += map(_EPSILON, self.norms)
        facts += map(_SCALING, self.attentions)
        return facts

    def _products(self) -> list[int]:
        """The products of the projections, which change where the state packs weights again."""
        return [*(id(m.packed) for m in self.projections), *(id(group.row) for group in self.groups)]


def shorten(layer: nn.Module, described: Layer) -> None:
    """Let a decoder layer whose blocks are shortened take part, where it is of a form that is known."""
    attn, mlp = layer._modules.get(described.attention), layer._modules.get(described.mlp)
    if (
        not isinstance(attn, ShortAttention)
        or not isinstance(mlp, ShortMLP)
        or not hasattr(layer, "gradient_checkpointing")
    ):
        return
    norms = [name for name, child in layer.named_children() if type(child) is Norm]
    known = {described.attention, described.mlp, "wina", *norms}
    if len(norms) != 2 or any(n not in known and type(m) is not nn.Dropout for n, m in layer.named_children()):
        return
    try:
        name = cache_name(type(layer).forward)
    except UsageError:
        return
    for first, second in (norms, norms[::-1]):
        form = Form(described.attention, first, described.mlp, second, name)
        if matches(_computes, layer, form):
            derive(layer, ShortLayer)
            layer.__dict__["form"] = form
            return


def finish(now: Pass) -> None:
    """End what a pass has computed ahead."""
    if now.ahead is not None:
        now.ahead.finish()
        now.ahead = None


def _ahead(layer: ShortLayer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The output of a layer that was computed ahead; None where it has to compute itself."""
    now: Pass | None = getattr(here, "current", None)
    if now is None or now.layers is None:
        return None
    if now.ahead is None:
        now.ahead = _begin(layer, args, kwargs, now)
    handed: Tensor | None = None if now.ahead is None else now.ahead.hand_out(layer, args, kwargs)
    if handed is None:
        finish(now)
        now.layers = None  # the layers that follow need not ask
    return handed


def plan_for(now: Pass) -> Plan | None:
    """The plan of a pass in which one row of which nothing but the result is wanted may go through all layers in one call."""
    plan = _plan_of(now)
    if plan is None or not plan.serves(now) or plan.is_seen():
        return None
    if any(config._attn_implementation != attention.NAME for config in plan.configs):
        return None
    return plan


def caches_for(plan: Plan, held: Any) -> past.Caches | None:
    """A cache with room for one more token of a plan; None where C cannot add to it."""
    caches = past.caches_of(held, len(plan.layers))
    if caches is None or not caches.prepare(plan.shapes, plan.call.dtype):
        return None
    return None if plan.grouped and caches.filled() >= MAX_LENGTH else caches


def fits(plan: Plan, x: Any, turns: Any) -> bool:
    """Whether a plan takes x as a token (1, 1, width), and what its heads are turned by."""
    if type(x) is not Tensor or x.shape != (1, 1, plan.call.width) or not _is_held(x, plan):
        return False
    size = plan.shapes[0][1]
    if not isinstance(turns, tuple) or len(turns) != 2:
        return False
    return all(t.numel() == size and _is_held(t, plan) for t in turns)


def _is_held(x: Tensor, plan: Plan) -> bool:
    return x.dtype is plan.call.dtype and x.is_cpu and x.is_contiguous()


def _begin(layer: ShortLayer, args: tuple[Any, ...], kwargs: Mapping[str, Any], now: Pass) -> Ahead | None:
    """Compute a token for all layers, if this is the first and nothing but the result is wanted."""
    if len(args) != 1 or type(args[0]) is not Tensor or args[0].shape[:2] != (1, 1):
        return None
    plan = plan_for(now)
    if plan is None or plan.layers[0] is not layer:
        return None
    given: dict[str, Any] = {
        name: kwargs.get(name) for name in ("position_embeddings", "attention_mask", plan.form.cache)
    }
    turns, mask, held = given.values()
    (x,) = args
    if not fits(plan, x, turns) or has_more(kwargs, given):
        return None
    caches = caches_for(plan, held)
    if caches is None:
        return None
    if mask is not None and (
        mask.dtype is not torch.bool or mask.numel() != caches.length or not mask.is_contiguous() or not mask.is_cpu
    ):
        return None
    with torch.inference_mode(False):  # what counts its changes
        outputs = plan.call(x, turns[0], turns[1], mask, caches.past, caches.length)
    caches.added()
    return Ahead(plan.layers, (x, *outputs), kwargs, given, caches)


def _plan_of(now: Pass) -> Plan | None:
    """The plan of a pass's layers, made again where something has changed; None where they cannot be one call."""
    state = now.state
    if state.plan is False:
        return None
    if state.plan is None or not state.plan.holds(state.packs):
        state.plan = _plan(list(now.layers)) or False
    known: Plan | None = state.plan or None
    return known


def _plan(layers: Sequence[Any]) -> Plan | None:
    if not layers or not all(isinstance(layer, ShortLayer) for layer in layers) or len({a.form for a in layers}) != 1:
        return None
    try:
        plan = Plan(layers)
    except (
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
    ) as error:  # modules that something else was put in place of
        logger.debug("layers are not one call: %s", error)
        return None
    return plan if len({size for _, size in plan.shapes}) == 1 else None


def _parts(layer: ShortLayer) -> LayerParts:
    """What a layer is made of.

    Raises:
        ValueError: a projection was replaced, or has no product in C.
    """
    attn: Any = layer._modules[layer.form.attention]
    mlp: Any = layer._modules[layer.form.mlp]
    rows = []
    for block in (attn, mlp):
        parts = block.parts
        if any(type(block._modules[name]) is not kind for name, kind in parts.others):
            raise ValueError(f"a part of {type(block).__name__} was replaced")
        for names in (parts.inputs, (parts.output,)):
            members: list[Any] = [block._modules[name] for name in names]
            group = members[0].packed if type(members[0]) in PROJECTIONS else None
            if group is None or group.row is None or group.rotation is not None:
                raise ValueError(f"{names[0]} has no product in C")
            if any(type(member) not in PROJECTIONS or member.packed is not group for member in members):
                raise ValueError(f"{' and '.join(names)} are not one product")
            rows.append(group.row)
    head_norms: list[Any] = [attn._modules[name] for name in attn.parts.norms]
    epsilons = {norm.variance_epsilon for norm in head_norms} or {0.0}
    if len(epsilons) != 1:
        raise ValueError("the norms of queries and keys differ")
    norms: list[Any] = [layer._modules[name] for name in (layer.form.norm, layer.form.mlp_norm)]
    weights = [norm.weight.detach() for norm in (*norms, *head_norms)]
    return LayerParts(
        rows=(rows[0], rows[1], rows[2], rows[3]),
        norms=(weights[0], weights[1]),
        epsilons=(float(norms[0].variance_epsilon), float(norms[1].variance_epsilon)),
        heads=attn.parts.heads,
        size=attn.head_dim,
        head_norms=tuple(weights[2:]),
        head_epsilon=float(epsilons.pop()),
        scale=float(attn.scaling),
        gelu=mlp.parts.gelu,
    )


def _computing(layer: ShortLayer) -> Iterator[nn.Module]:
    """A layer and all of its parts that compute, without what calibration stored."""
    yield layer
    for name, child in layer._modules.items():
        if child is not None and name != "wina":
            yield from child.modules()


def _norms(layers: Sequence[ShortLayer]) -> Iterator[Any]:
    for layer in layers:
        attn: Any = layer._modules[layer.form.attention]
        yield from (layer._modules[name] for name in (layer.form.norm, layer.form.mlp_norm))
        yield from (attn._modules[name] for name in attn.parts.norms)


def _computes(layer: nn.Module, form: Form, dtype: torch.dtype) -> bool:
    """Whether a layer computes the known form, and hands on what it is given."""
    generator = torch.Generator("cpu").manual_seed(0)
    x, a, b, c, d = torch.randn(5, 1, 1, 64, generator=generator, device="cpu").mul_(3).to(dtype)
    probe = copy.copy(layer)
    probe.training = False
    attn = _Stand(b, returns=2)
    stands = {form.norm: _Stand(a), form.attention: attn, form.mlp_norm: _Stand(c), form.mlp: _Stand(d)}
    probe._modules = layer._modules | stands
    given = {"position_embeddings": (a, b), "attention_mask": c, form.cache: object()}
    y = probe(x, position_ids=None, use_cache=True, **given)
    if type(y) is not Tensor or any(attn.given.get(name) is not value for name, value in given.items()):
        return False
    middle = x + (x * a) * b
    return torch.equal(y, middle + (middle * c) * d)


class _Stand(nn.Module):
    """Multiplies its input, and remembers what else it was given; returns a tuple of so many where that is not one."""

    def __init__(self, by: Tensor, returns: int = 1) -> None:
        super().__init__()
        self.by, self.returns = by, returns
        self.given: dict[str, Any] = {}

    def forward(self, hidden_states: Tensor, **given: Any) -> Any:
        self.given = given
        y = hidden_states * self.by
        return y if self.returns == 1 else (y, *[None] * (self.returns - 1))
