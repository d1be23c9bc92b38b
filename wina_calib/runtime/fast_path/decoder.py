"""A decoder of a sparse model: one token on a CPU goes through it without its own code, where that was seen to do no more.

What transformers does around the layers of one token, the mask of a cache, settings looked up and a call for each layer, takes a
while beside weights of 4 bits, as all of its code comes from memory again with every token. So a decoder is watched while
it computes a token by itself. Where it gave its layers just what its embedding and its rotary embedding give for that
token, with a mask that hides nothing, and returned the norm of what the last of them gave, that is what is done for the
tokens after it, for as long as its modules and settings stay as they are. What hooks would see, other masks, caches and
arguments, and everything that `layers` leaves to the stock layers are left to the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as torch_modules
from transformers.utils import ModelOutput

from wina_calib.errors import UsageError
from wina_calib.runtime.caches import cache_name
from wina_calib.runtime.derived import Derived, derive, is_watched
from wina_calib.runtime.fast_path import layers
from wina_calib.runtime.fast_path.norms import Norm
from wina_calib.runtime.forward_pass import Pass, here

# Settings by which a decoder's masks hide places, or its output has more in it.
_NARROWING = ("sliding_window", "attention_chunk_size", "output_attentions", "output_hidden_states")
_KNOWN = frozenset({"input_ids", "attention_mask", "position_ids", "use_cache"})


@dataclass(frozen=True)
class Names:
    """Of a decoder's children and of the argument that its cache is."""

    embed: str
    rotary: str
    norm: str
    cache: str


@dataclass(frozen=True)
class Seen:
    """A decoder that was seen to do no more for a token than is known, and what it consisted of then.

    Attributes:
        forward: of its stock class.
        children: its modules.
        settings: what its config holds.
        kind: class of its output.
        field: of the output, which holds the cache.
    """

    forward: Any
    children: dict[str, Any]
    settings: dict[str, Any]
    kind: type[ModelOutput]
    field: str

    def holds(self, decoder: ShortDecoder) -> bool:
        """Whether nothing has changed."""
        same = decoder._modules == self.children and decoder.config.__dict__ == self.settings
        return same and _stock_forward(decoder) is self.forward


class ShortDecoder(Derived):
    """Stands before the class of a decoder, behind the one that begins passes."""

    names: Names
    config: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock class."""
        if args or torch.compiler.is_compiling() or torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        now: Pass | None = getattr(here, "current", None)
        token = None if now is None else _Token.of(self, kwargs)
        if now is None or token is None:
            return super().forward(**kwargs)
        out = token.compute(now)
        if out is None:
            out = super().forward(**kwargs)
            token.observe(now, out)
        return out


class _Token:
    """A token that a decoder is given, and nothing but its output is asked for."""

    def __init__(self, decoder: ShortDecoder, kwargs: Mapping[str, Any]) -> None:
        self.decoder, self.cache = decoder, kwargs[decoder.names.cache]
        self.ids, self.mask, self.position = (kwargs.get(n) for n in ("input_ids", "attention_mask", "position_ids"))

    @staticmethod
    def of(decoder: ShortDecoder, kwargs: Mapping[str, Any]) -> _Token | None:
        """None where a decoder is given anything else."""
        ids, name = kwargs.get("input_ids"), decoder.names.cache
        if type(ids) is not Tensor or ids.shape != (1, 1) or not ids.is_cpu or kwargs.get(name) is None:
            return None
        use = kwargs.get("use_cache")
        if not (getattr(decoder.config, "use_cache", False) if use is None else use) or decoder.training:
            return None
        further = {n: v for n, v in kwargs.items() if n not in _KNOWN and n != name}
        if further.pop("return_dict", None) is not None or any(
            v is not None and v is not False for v in further.values()
        ):
            return None
        return _Token(decoder, kwargs)

    def compute(self, now: Pass) -> ModelOutput | None:
        """The decoder's output; None where it has to compute itself."""
        decoder, plan = self.decoder, layers.plan_for(now)
        seen: Seen | None = None if plan is None else plan.decoder
        if plan is None or seen is None:
            return None
        if not seen.holds(decoder) or plan.layers != list(now.layers):
            plan.decoder = None
            return None
        norm: Any = decoder._modules[decoder.names.norm]
        caches = layers.caches_for(plan, self.cache)
        if caches is None or not _is_plain(norm, plan):
            return None
        filled = caches.filled()
        if self._hides(filled):
            return None
        x, turns = self._enter(filled)
        if not layers.fits(plan, x, turns):
            return None
        weight = norm.weight.detach()
        with torch.inference_mode(False):
            *_, out = plan.call(x, *turns, None, caches.past, filled + 1, weight, norm.variance_epsilon)
        caches.added()
        return seen.kind(**{"last_hidden_state": out, seen.field: self.cache})

    def observe(self, now: Pass, out: Any) -> None:
        """Look at what the decoder did, where it went through its layers in one call."""
        decoder, ahead, plan = self.decoder, now.ahead, now.state.plan
        if ahead is None or not ahead.is_over() or any(getattr(decoder.config, name, None) for name in _NARROWING):
            return
        if not plan or plan.layers is not ahead.layers or _stock_forward(decoder) is not _known_forward(decoder):
            return
        children: dict[str, Any] = decoder._modules
        norm, embed, rotary = (children[n] for n in (decoder.names.norm, decoder.names.embed, decoder.names.rotary))
        if not _is_plain(norm, plan) or is_watched(embed) or is_watched(rotary) or not isinstance(out, ModelOutput):
            return
        kept = {name: value for name, value in out.items() if value is not None}
        field = next((name for name, value in kept.items() if value is self.cache), "")
        filled = int(self.cache.get_seq_length()) - 1
        if kept.keys() != {"last_hidden_state", field} or self._hides(filled):
            return
        mask, turns = ahead.given["attention_mask"], ahead.given["position_embeddings"]
        if mask is not None and not torch.equal(mask.flatten(), torch.arange(mask.numel()) <= filled):
            return
        x, own = self._enter(filled)
        if not x.any() or not torch.equal(x, ahead.inputs[0]) or not all(map(torch.equal, own, turns)):
            return  # zeros are the same whatever they are scaled by
        if torch.equal(out.last_hidden_state, norm(ahead.inputs[-1])):
            settings = dict(decoder.config.__dict__)
            plan.decoder = Seen(_stock_forward(decoder), dict(children), settings, type(out), field)

    def _enter(self, filled: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """What the first layer gets, and all get for a token's place."""
        names, children = self.decoder.names, self.decoder._modules
        embed: Any = children[names.embed]
        rotary: Any = children[names.rotary]
        x = embed(self.ids)
        return x, rotary(x, torch.full((1, 1), filled) if self.position is None else self.position)

    def _hides(self, filled: int) -> bool:
        """Whether the mask that was given may hide a place, or is of another kind."""
        mask = self.mask
        if mask is None:
            return False
        return (
            type(mask) is not Tensor
            or mask.shape != (1, filled + 1)
            or mask.is_floating_point()
            or not bool(mask.all())
        )


def shorten(decoder: Any, embed: str, norm: str) -> None:
    """Let a decoder with these children take part, where its layers do and it has one rotary embedding for all.

    Args:
        decoder: with a `config`.
        embed: name of its embedding.
        norm: of its last norm.
    """
    rotary = [name for name in decoder._modules if name.startswith("rotary")]
    try:
        name = cache_name(decoder.forward)
    except UsageError:
        return
    if len(rotary) == 1 and {embed, norm} <= decoder._modules.keys() and hasattr(decoder, "config"):
        derive(decoder, ShortDecoder)
        decoder.__dict__["names"] = Names(embed, rotary[0], norm, name)


def _stock_forward(decoder: ShortDecoder) -> Any:
    """The forward pass behind ours."""
    bound: Any = super(ShortDecoder, decoder).forward
    return bound.__func__


def _known_forward(decoder: ShortDecoder) -> Any:
    """The same as it was when the model was loaded."""
    return next(vars(kind)["known"][0] for kind in type(decoder).__mro__ if ShortDecoder in kind.__bases__)


def _is_plain(norm: Any, plan: Any) -> bool:
    """Whether a norm is what C computes, and nobody looks on."""
    if type(norm) is not Norm or is_watched(norm) or torch_modules._has_any_global_hook():
        return False
    weight, call = norm.weight, plan.call
    return weight.dtype is call.dtype and weight.numel() == call.width and weight.is_contiguous() and weight.is_cpu
