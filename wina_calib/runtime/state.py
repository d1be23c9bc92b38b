"""What all sites of one loaded model share: the policy, and what is known of the current forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


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
        kernels: `auto` lets a fast kernel serve a site, `reference` always uses the masked dense product.
        dense: compute everything densely.
        dense_rows: (batch, seq) bool, rows of this forward pass that are never masked; None when there are none.
        counts: kept and dropped inputs by (layer, site), where counting is on.
        stale: weights were moved, cast or replaced, or the sparsity changed: their storage must be looked at again.
        sites: all sites, in order.
    """

    prefill: str = "sparse"
    kernels: str = "auto"
    dense: bool = False
    dense_rows: Tensor | None = None
    all_dense: bool = False
    counts: dict[tuple[int, str], SiteCount] | None = field(default=None, repr=False)
    stale: bool = True
    sites: list[Any] = field(default_factory=list, repr=False)

    def begin(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note at the start of the decoder's forward pass which of its rows are never masked."""
        if not torch.compiler.is_compiling():  # first, so that a compiled step has no guard on what follows
            self.refresh()
        self.all_dense, self.dense_rows = self.dense, None
        if self.dense:
            return
        tokens = args[0] if args else kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs.get("inputs_embeds")
        if tokens is None or not _cache_is_empty(kwargs.get("past_key_values"), tokens.shape[1]):
            return
        if self.prefill == "dense":
            self.all_dense = True
            return
        self.dense_rows = _first_tokens(tokens, kwargs.get("attention_mask"))

    def refresh(self) -> None:
        """Look at the weights' storage again where something changed."""
        if self.stale:
            self.stale = False
            with torch.no_grad():
                for site in self.sites:
                    site.pack()

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
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2 and attention_mask.shape[1] == seq:
        first = attention_mask.to(tokens.device).ne(0).int().argmax(dim=1)
        return position == first.unsqueeze(1)
    return (position == 0).expand(batch, seq)
