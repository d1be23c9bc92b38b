"""What all sites of one loaded model share: the policy, and what is known of the current forward pass."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from wina_calib.runtime import group_operator
from wina_calib.runtime.caches import cache_of
from wina_calib.runtime.patches import late_stop


@dataclass
class SiteCount:
    """Inputs seen and dropped at one site."""

    seen: int = 0
    dropped: int = 0

    @property
    def sparsity(self) -> float:
        """Share of inputs dropped."""
        return self.dropped / self.seen if self.seen else 0.0


@dataclass
class RuntimeState:
    """State of one sparse model.

    Attributes:
        prefill: whether rows that fill an empty cache are masked (`sparse`) or computed densely (`dense`).
        first_token: whether the first row of each sequence is computed densely (`dense`) or masked (`sparse`).
        kernels: `auto` lets a fast kernel serve a site, `reference` always uses the masked dense product.
        dense: compute everything densely.
        dense_rows: (batch, seq) bool, rows of this forward pass that are never masked; None when there are none.
        counts: kept and dropped inputs by (layer, site), where counting is on.
        masks: whether the sparsity that is set drops anything.
        stale: weights were moved, cast or replaced, or the sparsity changed: their storage must be looked at again.
        sites: all sites, in order.
        number: of this state among all in the process.
    """

    prefill: str = "sparse"
    first_token: str = "dense"
    kernels: str = "auto"
    dense: bool = False
    dense_rows: Tensor | None = None
    all_dense: bool = False
    counts: dict[tuple[int, str], SiteCount] | None = field(default=None, repr=False)
    masks: bool = False
    stale: bool = True
    sites: list[Any] = field(default_factory=list, repr=False)
    number: int = field(default_factory=group_operator.new_owner, repr=False)

    def __setstate__(self, values: dict[str, Any]) -> None:
        """A copy is a state of its own, whose weights get numbers of their own."""
        self.__dict__.update(values, number=group_operator.new_owner(), stale=True)

    @property
    def drops(self) -> bool:
        """Whether this forward pass drops inputs, by the fast kernels: what it computes may then differ in last bits."""
        return self.masks and self.kernels == "auto" and not self.all_dense

    def begin(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note at the start of the decoder's forward pass which of its rows are never masked."""
        if not torch.compiler.is_compiling():  # first, so that a compiled step has no guard on what follows
            self._look(args, kwargs)
            self.refresh()
        self._note(args, kwargs)
        served = self.kernels == "auto" and self.counts is None and self.dense_rows is None
        group_operator.current.owner = self.number
        group_operator.current.mode = "" if not served else "dense" if self.all_dense else "sparse"

    def _look(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Before a prompt, look whether weights were replaced without notice, as merging an adapter may do."""
        tokens = _tokens(args, kwargs)
        late_stop.mark(cache_of(args, kwargs), tokens)
        if not self.stale and (tokens is None or tokens.shape[1] > 1):
            self.stale = any(site.is_replaced() for site in self.sites)

    def _note(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.all_dense, self.dense_rows = self.dense, None
        if self.dense:
            return
        tokens = _tokens(args, kwargs)
        if tokens is None or not _cache_is_empty(cache_of(args, kwargs), tokens.shape[1]):
            return
        if self.prefill == "dense":
            self.all_dense = True
            return
        if self.first_token == "dense":
            self.dense_rows = _first_tokens(tokens, kwargs.get("attention_mask"))

    def refresh(self) -> None:
        """Look at the weights' storage again where something changed."""
        if self.stale:
            self.stale = False
            # Weights that are made in inference mode could not be trained or loaded later.
            with torch.inference_mode(False), torch.no_grad():
                for site in self.sites:
                    site.pack()
            self.masks = any(site.asked != 0 for site in self.sites)  # nan: thresholds without a sparsity

    @contextmanager
    def counting(self) -> Iterator[dict[tuple[int, str], SiteCount]]:
        """Count kept and dropped inputs at every site for the length of the context."""
        self.counts = {}
        try:
            yield self.counts
        finally:
            self.counts = None

    @contextmanager
    def densely(self) -> Iterator[None]:
        """Compute everything densely for the length of the context."""
        before, self.dense = self.dense, True
        try:
            yield
        finally:
            self.dense = before


def copied(module: nn.Module, memo: dict[int, Any], neighbour: object, **alone: Any) -> Any:
    """`__deepcopy__` of a module that refers to a `neighbour` in its model.

    Copied by itself, as an adapter does with what it trains, it keeps to the same neighbour and has the attributes `alone`.
    """
    kept = module.__getstate__()
    if not memo:
        memo[id(neighbour)] = neighbour
        kept |= alone
    made = memo[id(module)] = type(module).__new__(type(module))
    made.__dict__.update(copy.deepcopy(kept, memo))
    return made


def _tokens(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Token ids (batch, seq) or their embeddings (batch, seq, hidden) of a forward pass."""
    tokens = args[0] if args else kwargs.get("input_ids")
    return kwargs.get("inputs_embeds") if tokens is None else tokens


def _cache_is_empty(cache: Any, rows: int) -> bool:
    """Whether the cache holds no token yet.

    A static cache keeps its length on the device. Inside a compiled step with one row it is taken to hold tokens:
    generation compiles decode steps only.
    """
    if cache is None:
        return True
    length = cache.get_seq_length()
    if not isinstance(length, Tensor):
        return bool(length == 0)
    if torch.compiler.is_compiling():
        return rows > 1
    return int(length) == 0


def _first_tokens(tokens: Tensor, attention_mask: Any) -> Tensor:
    """The first row of each sequence that is not padding: (batch, seq) bool."""
    batch, seq = tokens.shape[:2]
    position = torch.arange(seq, device=tokens.device)
    real = _real_rows(attention_mask, seq)
    if real is None:
        return (position == 0).expand(batch, seq)
    return position == real.to(tokens.device).int().argmax(dim=1, keepdim=True)


def _real_rows(attention_mask: Any, seq: int) -> Tensor | None:
    """Rows that are not padding, (batch or 1, seq) bool; None where the mask does not say.

    A row of a prepared mask (batch, heads, seq, keys) is real where it may attend to itself: its key stands at its own
    position, as the cache is empty. A mask for each attention type says the same in each.
    """
    if isinstance(attention_mask, dict):
        attention_mask = next((m for m in attention_mask.values() if isinstance(m, Tensor)), None)
    if not isinstance(attention_mask, Tensor):
        return None
    if attention_mask.dim() == 2 and attention_mask.shape[1] == seq:
        return attention_mask.ne(0)
    if attention_mask.dim() == 4 and attention_mask.shape[2] == seq <= attention_mask.shape[3]:
        own = attention_mask[:, 0, :, :seq].diagonal(dim1=1, dim2=2)
        return own if own.dtype == torch.bool else own.eq(0)
    return None
