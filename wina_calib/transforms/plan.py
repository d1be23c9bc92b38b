"""What a transform is made of, where it is exact, and what it costs at run time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wina_calib.choices import TRANSFORMS
from wina_calib.errors import TransformError, UsageError
from wina_calib.model.architecture import Architecture, Layer, MaskGroup, Norm

_ALIASES = {"residual": "global", "residual+head": "global+head", "head+global": "global+head"}
# The sites that read a norm's output (or the raw residual stream): the only ones a residual or site rotation reaches.
INPUT_SITES = ("attn_in", "mlp_in")
# The paper uses column norms on these projections only, the ones whose columns its rotation makes orthogonal.
_PAPER_PROJECTIONS = ("k_proj", "qkv_proj", "gate_proj", "gate_up_proj")


@dataclass(frozen=True)
class Plan:
    """A resolved transform: which rotations it fits."""

    name: str  # the resolved name, never "auto" and never an alias
    residual: bool = False  # one rotation of the whole residual stream, absorbed in the weights
    heads: bool = False  # one rotation a key/value head, absorbed in the weights
    sites: tuple[str, ...] = ()  # sites whose input is rotated at run time, a (width, width) matrix each in every layer

    @property
    def is_free(self) -> bool:
        """Whether nothing is left to do at run time, so that plain transformers runs the result as a dense model."""
        return not self.sites


_PLANS = {
    "none": Plan("none"),
    "paper": Plan("paper", sites=INPUT_SITES),
    "stacked": Plan("stacked", sites=INPUT_SITES),
    "global": Plan("global", residual=True),
    "head": Plan("head", heads=True),
    "global+head": Plan("global+head", residual=True, heads=True),
}
# `auto` takes the first of these that is exact.
_FREE_BEST_FIRST = ("global+head", "global", "head", "none")


@dataclass(frozen=True)
class Rotations:
    """Fitted orthogonal matrices, all float64; row vectors are rotated from the right."""

    residual: Tensor | None = None  # (d, d) with h' = h @ residual for every hidden state h, or None
    # for each layer (kv_heads, head_dim, head_dim) with v' = v @ heads[layer][kv_head], or None
    heads: tuple[Tensor, ...] | None = None
    # (layer, site) -> (width, width) matrix Q applied at run time, x' = x @ Q
    sites: Mapping[tuple[int, str], Tensor] = field(default_factory=dict)


def plan(name: str, arch: Architecture) -> Plan:
    """Resolve a transform's name for a model; "auto" becomes the best one that is free at run time and exact here.

    Raises:
        UsageError: no transform has this name.
        TransformError: the transform would change the model's outputs; the message gives the reason and the remedy.
    """
    canonical = _canonical(name)
    if canonical == "auto":
        return next(_PLANS[free] for free in _FREE_BEST_FIRST if reason_not_exact(free, arch) is None)
    reason = reason_not_exact(canonical, arch)
    if reason is not None:
        raise TransformError(
            f"transform {canonical!r} is not exact on {arch.model_type}: {reason}. "
            f"Use --transform auto, which takes {plan('auto', arch).name!r} here, or 'stacked' or 'none'."
        )
    return _PLANS[canonical]


def reason_not_exact(name: str, arch: Architecture) -> str | None:
    """Say why a transform would change the outputs of this model; None where it is exact ("auto" and "none" always)."""
    canonical = _canonical(name)
    if canonical == "auto":
        return None
    wanted = _PLANS[canonical]
    for layer in arch.layers:
        if wanted.residual and (reason := _residual_obstacle(layer)) is not None:
            return reason
        if wanted.heads and (reason := _head_obstacle(layer)) is not None:
            return reason
    return None


def uses_norm(name: str, group: MaskGroup) -> bool:
    """Whether a mask group's score multiplies `abs(x)` by the column norm (True) or is the magnitude alone (False).

    Every transform uses norms everywhere, except `paper` with a mask for each projection: there only the projections
    that its rotation orthogonalises have them (arXiv 2505.19427, section 3.3).
    """
    if _canonical(name) != "paper" or len(group.projections) > 1:
        return True
    return group.projections[0].name in _PAPER_PROJECTIONS


def run_time_weights(name: str, arch: Architecture) -> int:
    """Elements of all run-time matrices, read for every token: to be added to the decoder weights read."""
    sites = plan(name, arch).sites
    return sum(layer.site(site).width ** 2 for layer in arch.layers for site in sites)


def is_uniform(weight: Tensor) -> bool:
    """Whether all elements are equal, so that scaling by them commutes with a rotation."""
    return bool((weight == weight[0]).all())


def norm_gain(norm: Norm, weight: Tensor) -> Tensor:
    """The float64 factor (d,) by which an RMSNorm with this stored weight scales each channel."""
    return weight.double() + 1.0 if norm.gain == "1+w" else weight.double()


def unit_weight(norm: Norm, weight: Tensor) -> Tensor:
    """The stored weight (d,) that makes the gain one everywhere."""
    return torch.zeros_like(weight) if norm.gain == "1+w" else torch.ones_like(weight)


def _canonical(name: str) -> str:
    canonical = _ALIASES.get(name, name)
    if canonical not in TRANSFORMS:
        raise UsageError(f"unknown transform {name!r}: choose one of {', '.join(TRANSFORMS)} (residual means global).")
    return canonical


def _residual_obstacle(layer: Layer) -> str | None:
    if layer.post_norms:
        names = ", ".join(norm.module for norm in layer.post_norms)
        return (
            f"{names} of layer {layer.index} scales a block's output channel by channel before it joins the residual "
            "stream, and such a gain does not commute with a rotation"
        )
    if layer.attn_norm is None or layer.mlp_norm is None:
        return f"a block of layer {layer.index} reads the residual stream without a norm"
    loose = [name for name in layer.others if not name.startswith((f"{layer.attention}.", f"{layer.mlp}."))]
    if loose:
        return f"{', '.join(loose)} of layer {layer.index} may scale the residual stream channel by channel"
    return None


def _head_obstacle(layer: Layer) -> str | None:
    widths = {p.name: p.out_features for p in layer.site("attn_in").projections}
    query, value = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
    expected = {"q_proj": query, "k_proj": value, "v_proj": value, "qkv_proj": query + 2 * value}
    for name, width in widths.items():
        if width != expected[name]:
            return (
                f"{name} of layer {layer.index} has {width} outputs, not the {expected[name]} of {layer.heads} query "
                f"and {layer.kv_heads} key/value heads of {layer.head_dim}: values reach o_proj by more than averaging"
            )
    if layer.site("attn_out").width != query or layer.heads % layer.kv_heads:
        return f"o_proj of layer {layer.index} does not read {layer.heads} heads of {layer.head_dim}"
    kept = (layer.attention + ".q", layer.attention + ".k")  # what queries and keys go through does not touch values
    between = [n for n in layer.others if n.startswith(f"{layer.attention}.") and not n.startswith(kept)]
    if between:
        return f"{', '.join(between)} of layer {layer.index} may change values between v_proj and o_proj"
    return None
