"""What a decoder looks like: sites, norms, fused layouts, biases. Found by structure, never by class name.

A *site* is one input vector and the projections that read it. Every linear weight of every decoder layer must belong to a
site; anything else is refused by name, so that nothing is skipped silently.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from wina_calib.errors import UnsupportedModel

SITES = ("attn_in", "attn_out", "mlp_in", "mlp_out")
SUPPORTED = (
    "Llama 2/3, Mistral, Qwen2/2.5, Qwen3, Phi-3/Phi-4, Gemma 2/3 (text), OLMo 2 and models of the same structure"
)

# The block that owns a site, and the projection names that may make it up: separate first, fused second.
_ROLES: dict[str, tuple[str, tuple[tuple[str, ...], ...]]] = {
    "attn_in": ("attention", (("q_proj", "k_proj", "v_proj"), ("qkv_proj",))),
    "attn_out": ("attention", (("o_proj",),)),
    "mlp_in": ("mlp", (("gate_proj", "up_proj"), ("gate_up_proj",))),
    "mlp_out": ("mlp", (("down_proj",),)),
}
# The projection that a block is found by.
_OUTPUTS = {"attention": "o_proj", "mlp": "down_proj"}
# Norms a decoder layer may hold, by the set of their names: (before attention, before the MLP, after a block).
_FIRST, _SECOND, _BEFORE_MLP = "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm"
_AFTER = (_SECOND, "post_feedforward_layernorm")
_NORM_LAYOUTS: dict[frozenset[str], tuple[str | None, str | None, tuple[str, ...]]] = {
    frozenset({_FIRST, _SECOND}): (_FIRST, _SECOND, ()),
    frozenset({_FIRST, _BEFORE_MLP, *_AFTER}): (_FIRST, _BEFORE_MLP, _AFTER),
    frozenset(_AFTER): (None, None, _AFTER),
}


@dataclass(frozen=True)
class Projection:
    """One linear weight of shape (out_features, in_features). `module` is its path inside the decoder layer."""

    name: str
    module: str
    in_features: int
    out_features: int
    bias: bool


@dataclass(frozen=True)
class Site:
    """One input vector of `width` elements and the projections that read it."""

    name: str
    projections: tuple[Projection, ...]

    @property
    def width(self) -> int:
        """Number of inputs that a mask decides about."""
        return self.projections[0].in_features

    @property
    def out_features(self) -> int:
        """Outputs of all projections together."""
        return sum(p.out_features for p in self.projections)

    @property
    def weights(self) -> int:
        """Elements of all projections' weights."""
        return self.width * self.out_features


@dataclass(frozen=True)
class Norm:
    """An RMSNorm: `module` is its path, `gain` says whether its weight w scales by `w` or by `1+w`."""

    module: str
    gain: str


@dataclass(frozen=True)
class Layer:
    """One decoder layer. Paths are relative to it; `prefix` ("model.layers.3.") makes them absolute.

    `others` are its parameters that belong neither to a site nor to a norm of the residual stream.
    """

    index: int
    prefix: str
    sites: tuple[Site, ...]
    attention: str
    mlp: str
    attn_norm: Norm | None
    mlp_norm: Norm | None
    post_norms: tuple[Norm, ...]
    heads: int
    kv_heads: int
    head_dim: int
    others: tuple[str, ...] = ()

    @property
    def small(self) -> tuple[str, ...]:
        """Paths of all its parameters that are no site's weights: gains of norms, biases, others."""
        norms = (n for n in (self.attn_norm, self.mlp_norm, *self.post_norms) if n is not None)
        biases = (f"{p.module}.bias" for site in self.sites for p in site.projections if p.bias)
        return (*(f"{norm.module}.weight" for norm in norms), *biases, *self.others)

    def site(self, name: str) -> Site:
        """Return the site called `name` (one of `SITES`)."""
        return self.sites[SITES.index(name)]


@dataclass(frozen=True)
class Architecture:
    """A whole causal language model, as far as calibration needs to know it."""

    model_type: str
    layers: tuple[Layer, ...]
    layers_path: str
    hidden_size: int
    vocab_size: int
    embed: str
    final_norm: Norm
    lm_head: str
    lm_head_bias: bool
    tied: bool

    @property
    def sites(self) -> Iterator[tuple[Layer, Site]]:
        """All (layer, site) pairs in order."""
        return ((layer, site) for layer in self.layers for site in layer.sites)

    @property
    def ends(self) -> tuple[str, ...]:
        """Names of all parameters outside of the layers: the embedding's, the final norm's, lm_head's where it is not tied."""
        head = [] if self.tied else [f"{self.lm_head}.weight"]
        bias = [f"{self.lm_head}.bias"] if self.lm_head_bias else []
        return (f"{self.embed}.weight", f"{self.final_norm.module}.weight", *head, *bias)

    @property
    def layer_weights(self) -> int:
        """Elements of the largest decoder layer's sites."""
        return max(sum(site.weights for site in layer.sites) for layer in self.layers)

    @property
    def width(self) -> int:
        """Of the widest site, or of the residual stream where that is wider."""
        return max(self.hidden_size, *(site.width for _, site in self.sites))


@dataclass(frozen=True)
class MaskGroup:
    """The projections of one site that share one mask, one norm and one threshold. `name` is `shared` or a projection."""

    name: str
    site: str
    projections: tuple[Projection, ...]

    @property
    def key(self) -> str:
        """Name inside a layer: `attn_in.shared`, `mlp_in.gate_proj`."""
        return f"{self.site}.{self.name}"


def mask_groups(site: Site, masks: str) -> tuple[MaskGroup, ...]:
    """Split a site into mask groups: one with `masks="shared"`, one a projection with `masks="per-projection"`."""
    if masks == "shared":
        return (MaskGroup("shared", site.name, site.projections),)
    return tuple(MaskGroup(p.name, site.name, (p,)) for p in site.projections)


def describe(model: PreTrainedModel) -> Architecture:
    """Describe a decoder-only model by its structure; the weights may be on the meta device.

    Raises:
        UnsupportedModel: a part of the model has no role here; the message names the module.
    """
    config = model.config
    refuse_encoder_decoder(config)
    base_name, base, layers = _decoder(model)
    head = model.get_output_embeddings()
    embed = model.get_input_embeddings()
    if not isinstance(head, nn.Linear) or not isinstance(embed, nn.Embedding):
        raise UnsupportedModel(f"{type(model).__name__} has no plain embedding and lm_head. Supported: {SUPPORTED}.")
    norms = [name for name, child in base.named_children() if _is_norm(child)]
    if len(norms) != 1:
        raise UnsupportedModel(f"expected one final norm in {base_name!r}, found {norms or 'none'}.")
    names = {id(module): name for name, module in model.named_modules()}
    layers_path = names[id(layers)]
    described = tuple(_layer(child, i, f"{layers_path}.{i}.", config) for i, child in enumerate(layers))
    _refuse_unclaimed(model, layers_path, {names[id(embed)], names[id(head)], f"{base_name}.{norms[0]}"})
    return Architecture(
        model_type=config.model_type,
        layers=described,
        layers_path=layers_path,
        hidden_size=embed.embedding_dim,
        vocab_size=embed.num_embeddings,
        embed=names[id(embed)],
        final_norm=Norm(f"{base_name}.{norms[0]}", _gain(base.get_submodule(norms[0]), f"{base_name}.{norms[0]}")),
        lm_head=names[id(head)],
        lm_head_bias=head.bias is not None,
        tied=bool(getattr(config, "tie_word_embeddings", False)),
    )


def refuse_encoder_decoder(config: PreTrainedConfig) -> None:
    """Raise UnsupportedModel for the config of a model that is no decoder alone."""
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"model_type {config.model_type!r} is an encoder-decoder model. Supported: {SUPPORTED}.")


def _decoder(model: PreTrainedModel) -> tuple[str, nn.Module, nn.ModuleList]:
    base_name = model.base_model_prefix
    base = getattr(model, base_name, None)
    lists = [m for n, m in base.named_children() if isinstance(m, nn.ModuleList)] if isinstance(base, nn.Module) else []
    if base is None or len(lists) != 1:
        raise UnsupportedModel(
            f"{type(model).__name__} has no single list of decoder layers under {base_name!r}. Supported: {SUPPORTED}."
        )
    return base_name, base, lists[0]


def _layer(layer: nn.Module, index: int, prefix: str, config: PreTrainedConfig) -> Layer:
    blocks = {kind: _block_with(layer, prefix, name) for kind, name in _OUTPUTS.items()}
    sites = tuple(_site(layer, prefix, name, blocks) for name in SITES)
    claimed = {p.module for site in sites for p in site.projections}
    for path, module in layer.named_modules():
        own = [name for name, p in module.named_parameters(recurse=False) if p.ndim > 1]
        if own and path not in claimed:
            raise UnsupportedModel(
                f"{prefix}{path} ({type(module).__name__}, {', '.join(own)}) belongs to no site: experts, adapters and "
                f"quantized or unusual projections are not supported. Supported: {SUPPORTED}."
            )
    norms = {name: child for name, child in layer.named_children() if _is_norm(child)}
    layout = _NORM_LAYOUTS.get(frozenset(norms))
    if layout is None:
        raise UnsupportedModel(f"{prefix[:-1]} has norms {sorted(norms)}, a layout that is not known. {SUPPORTED}.")
    gains = {name: Norm(name, _gain(child, prefix + name)) for name, child in norms.items()}
    attn_norm, mlp_norm, post = layout
    known = (*(f"{module}." for module in claimed), *(f"{name}." for name in norms))
    heads = int(config.num_attention_heads)
    head_dim = int(getattr(layer.get_submodule(blocks["attention"]), "head_dim", 0)) or sites[1].width // heads
    return Layer(
        index=index,
        prefix=prefix,
        sites=sites,
        attention=blocks["attention"],
        mlp=blocks["mlp"],
        attn_norm=gains[attn_norm] if attn_norm else None,
        mlp_norm=gains[mlp_norm] if mlp_norm else None,
        post_norms=tuple(gains[name] for name in post),
        heads=heads,
        kv_heads=(sites[0].out_features - heads * head_dim) // (2 * head_dim),
        head_dim=head_dim,
        others=tuple(name for name, _ in layer.named_parameters() if not name.startswith(known)),
    )


def _block_with(layer: nn.Module, prefix: str, name: str) -> str:
    blocks = [path for path, module in layer.named_children() if hasattr(module, name)]
    if len(blocks) == 1:
        return blocks[0]
    if blocks:
        raise UnsupportedModel(
            f"{prefix[:-1]} has {name} in {len(blocks)} blocks: {', '.join(blocks)}. Supported: {SUPPORTED}."
        )
    odd = [
        f"{prefix}{path} ({type(module).__name__})"
        for path, module in layer.named_children()
        if any(p.ndim > 1 for p in module.parameters())
        and not any(hasattr(module, known) for known in _OUTPUTS.values())
    ]
    raise UnsupportedModel(
        f"{', '.join(odd) or f'{prefix[:-1]} ({type(layer).__name__})'} has no {name}: mixtures of experts and unusual "
        f"blocks are not supported. Supported: {SUPPORTED}."
    )


def _site(layer: nn.Module, prefix: str, name: str, blocks: dict[str, str]) -> Site:
    kind, layouts = _ROLES[name]
    block = layer.get_submodule(blocks[kind])
    for layout in layouts:
        if all(hasattr(block, p) for p in layout):
            break
    else:
        wanted = " or ".join("+".join(layout) for layout in layouts)
        raise UnsupportedModel(f"{prefix}{blocks[kind]} has no {wanted}. Supported: {SUPPORTED}.")
    projections = []
    for p in layout:
        module = getattr(block, p)
        if not isinstance(module, nn.Linear) or module.weight.ndim != 2:
            raise UnsupportedModel(f"{prefix}{blocks[kind]}.{p} is {type(module).__name__}, not a linear layer.")
        projections.append(
            Projection(p, f"{blocks[kind]}.{p}", module.in_features, module.out_features, module.bias is not None)
        )
    return Site(name, tuple(projections))


def _is_norm(module: nn.Module) -> bool:
    parameters = dict(module.named_parameters())
    if parameters.keys() != {"weight"} or isinstance(module, nn.Linear):
        return False
    shape = parameters["weight"].shape
    return len(shape) == 1 or (len(shape) == 2 and shape[0] == 1)  # (1, hidden): a checkpoint's with run-time matrices


def _gain(norm: nn.Module, path: str) -> str:
    """Find how an RMSNorm uses its weight by running a copy of it on a vector of ones with weight 0."""
    probe = copy.deepcopy(norm).to_empty(device="cpu").float()
    with torch.no_grad():
        weight = next(probe.parameters())
        if not weight.numel():
            raise UnsupportedModel(f"{path} has a width of 0, by config.json. Correct it, or download the model again.")
        ones = torch.ones(1, weight.numel(), device="cpu")
        weight.zero_()
        at_zero = float(probe(ones).abs().max())
        weight.fill_(1.0)
        at_one = float(probe(ones).abs().max())
    if at_zero == 0.0 and abs(at_one - 1.0) < 1e-2:
        return "w"
    if abs(at_zero - 1.0) < 1e-2 and abs(at_one - 2.0) < 2e-2:
        return "1+w"
    raise UnsupportedModel(
        f"{path} ({type(norm).__name__}) is not an RMSNorm: gain {at_zero:.3g} at 0, {at_one:.3g} at 1."
    )


def _refuse_unclaimed(model: nn.Module, layers_path: str, claimed: set[str]) -> None:
    for path, module in model.named_modules():
        if path.startswith(f"{layers_path}.") or path in claimed:
            continue
        if any(True for _ in module.parameters(recurse=False)):
            raise UnsupportedModel(f"{path or type(model).__name__} holds weights without a known role. {SUPPORTED}.")
