"""What a pass computes: a prompt or what follows it, and which of its rows are the first of their sequences.

That is known by the sequence, not by the pass: attention masks and positions count from the sequence's first token, in
whatever pieces it comes. Where they contradict the cache, nothing tells what the pass is, which is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from wina_calib.errors import UsageError
from wina_calib.runtime.caches import cache_of, is_paged

# Attributes of a cache: how long it was when each of its sequences had had its first token; where the prompt ends so far.
BEGUN, PROMPT_END = "_wina_begun", "_wina_prompt_end"


def tokens_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Token ids (batch, seq) or their embeddings (batch, seq, hidden) of a forward pass."""
    tokens = args[0] if args else kwargs.get("input_ids")
    return kwargs.get("inputs_embeds") if tokens is None else tokens


class Rows:
    """The rows of one pass, by the arguments of its decoder.

    Raises:
        UsageError: nothing tells what the pass is.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.tokens = tokens_of(args, kwargs)
        self.cache = cache_of(args, kwargs)
        self.mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        self.positions = args[2] if len(args) > 2 else kwargs.get("position_ids")
        self.count = 0 if self.tokens is None else int(self.tokens.shape[1])

    def fill_prompt(self) -> bool:
        """Whether they fill an empty cache, or go on with a prompt that comes in pieces. Notes how far the prompt is."""
        if self.cache is None or is_paged(self.cache):
            return self.cache is None and not self._contradiction()
        past = self._past()
        if isinstance(past, Tensor):  # in a compiled step
            return self.count > 1
        if past and (self.count == 1 or getattr(self.cache, PROMPT_END, None) != past):
            if not torch.compiler.is_compiling():
                self.cache.__dict__.pop(PROMPT_END, None)
            return False
        if not torch.compiler.is_compiling():
            setattr(self.cache, PROMPT_END, past + self.count)
        return True

    def first(self) -> Tensor | None:
        """Rows that are the first of their sequence, (batch, seq) bool; None where there are none."""
        if self.tokens is None:
            return None
        if is_paged(self.cache):
            return None if self.positions is None else self.positions.eq(0).reshape(self.tokens.shape[:2])
        if self.cache is None:
            self._contradiction()
            return self._at(0)
        past = self._past()
        if isinstance(past, Tensor):
            return self._at(past) if self.count > 1 else None
        if torch.compiler.is_compiling():
            return self._at(past) if past == 0 or self.count > 1 else None
        if past and (self.mask is None or past >= getattr(self.cache, BEGUN, past + 1)):
            return None
        rows = self._at(past)
        begun = self._all_begun(past)
        setattr(self.cache, BEGUN, past + (self.count if begun else self.count + 1))
        # A decode step is faster without them.
        return rows if past == 0 or self.count > 1 or (rows is not None and bool(rows.any())) else None

    def _past(self) -> int | Tensor:
        """Tokens in the cache. A static cache keeps its length on the device; a compiled step does not wait for it."""
        length: int | Tensor = self.cache.get_seq_length()
        if isinstance(length, Tensor) and not torch.compiler.is_compiling():
            return int(length)
        return length

    def _at(self, past: int | Tensor) -> Tensor | None:
        """`first` where the cache holds `past` tokens."""
        assert self.tokens is not None
        batch, seq = self.tokens.shape[:2]
        place = torch.arange(seq, device=self.tokens.device) + past
        mask = _tensor(self.mask)
        if mask is not None and mask.dim() == 2 and (isinstance(past, Tensor) or mask.shape[1] >= past + seq):
            mask = mask.to(place.device)
            first = mask.ne(0).int().argmax(dim=1, keepdim=True)  # 0 where all is padding
            return (place == first) & mask.ne(0).any(dim=1, keepdim=True)
        if mask is not None and mask.dim() == 4 and mask.shape[2] == seq:
            return self._of_prepared(mask, past)
        if isinstance(past, int) and past:
            return None
        return (place == 0).expand(batch, seq) | self._restarts(seq)

    def _restarts(self, seq: int) -> Tensor:
        """Rows (batch or 1, seq) where the positions of several sequences in one row start anew."""
        assert self.tokens is not None
        again = torch.zeros(1, seq, dtype=torch.bool, device=self.tokens.device)
        if self.cache is not None or not isinstance(self.positions, Tensor) or self.positions.dim() != 2 or seq == 1:
            return again
        return self.positions.eq(0).to(self.tokens.device)

    def _of_prepared(self, mask: Tensor, past: int | Tensor) -> Tensor:
        """By a prepared mask (batch, heads, seq, keys): of a prompt the first row that may attend to itself, as its key
        stands at its own position; later, one that sees a single key, its own.
        """
        assert self.tokens is not None
        batch, seq = self.tokens.shape[:2]
        seen = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0].eq(0)
        if isinstance(past, int) and past == 0 and seq <= mask.shape[3]:
            real = seen[:, :, :seq].diagonal(dim1=1, dim2=2)
            place = torch.arange(seq, device=real.device)
            rows = (place == real.int().argmax(dim=1, keepdim=True)) & real
        else:
            rows = seen.sum(-1).eq(1)
        return rows.to(self.tokens.device).expand(batch, seq)

    def _all_begun(self, past: int) -> bool:
        """Whether after this pass each sequence has had its first token, as far as the mask says."""
        mask = _tensor(self.mask)
        if mask is None:
            return True
        if mask.dim() == 2:
            return bool(mask[:, : past + self.count].ne(0).any(dim=1).all())
        return False

    def _contradiction(self) -> bool:
        """Raise where a pass without a cache says that it comes after other tokens. False otherwise."""
        mask, positions = _tensor(self.mask), self.positions
        wide = mask is not None and mask.dim() == 2 and mask.shape[1] > self.count > 0
        if not wide and self.count == 1 and isinstance(positions, Tensor) and not torch.compiler.is_compiling():
            wide = bool(positions.max() > 0)
        if wide:
            raise UsageError(
                f"A forward pass of {self.count} token(s) says that others come before, and has no cache of transformers "
                "that holds them: nothing tells whether it is a prompt. Hand on the cache, or the whole text."
            )
        return False


def _tensor(mask: Any) -> Tensor | None:
    """An attention mask that is a tensor; of one for each attention type, that which sees most."""
    if isinstance(mask, Mapping):
        mask = next((m for m in (mask.get("full_attention"), *mask.values()) if isinstance(m, Tensor)), None)
    return mask if isinstance(mask, Tensor) else None
