"""Which rows of a step are computed densely. A step holds tokens of many requests, some of their prompts cut in chunks."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor


def open_rows(starts: Tensor, lengths: Tensor, count: int, *, first: bool, prompts: bool) -> Tensor | None:
    """Rows that are never masked.

    A request's first token is here just where it has no more tokens than are computed now, in whatever chunks its prompt
    comes: what is found in a prefix cache, or is computed again after a preemption, counts by its position.

    Args:
        starts: (requests + 1,) first row of each request, and the row after the last.
        lengths: (requests, or more) tokens of each request after this step.
        count: rows of the step.
        first: first tokens are dense.
        prompts: so is everything of a request of which more than one token is computed now.

    Returns:
        (count,) bool; None where no row is dense.
    """
    now = starts.diff()
    rows = torch.zeros(count, dtype=torch.bool, device=starts.device)
    if first:
        begins = (now > 0) & (lengths[: now.numel()] == now)
        rows[starts[:-1][begins].long()] = True
    if prompts:
        many = torch.repeat_interleave(now > 1, now.clamp(min=0).long())
        rows[: many.numel()] |= many
    return rows if bool(rows.any()) else None


def open_rows_now(count: int, *, first: bool, prompts: bool) -> Tensor | None:
    """`open_rows` of the step that vLLM computes now, found once for all linear layers; None while it warms up.

    Raises:
        RuntimeError: the attention says nothing of the requests.
    """
    requests = requests_now() if first or prompts else None
    if requests is None:
        return None
    known = _contexts().get_forward_context().additional_kwargs
    key = "wina_prompt_rows" if prompts else "wina_first_rows"
    if key not in known:
        known[key] = open_rows(*requests, count, first=first, prompts=prompts)
    rows: Tensor | None = known[key]
    if rows is not None and rows.shape[0] != count:
        raise RuntimeError(f"a linear layer is given {count} rows of a step of {rows.shape[0]}")
    return rows


def requests_now() -> tuple[Tensor, Tensor] | None:
    """First rows (requests + 1,) and lengths of the requests of the step that vLLM computes now; None while it warms up.

    Raises:
        RuntimeError: the attention says nothing of them.
    """
    if not _contexts().is_forward_context_available():
        return None
    metadata = _contexts().get_forward_context().attn_metadata
    return _requests(metadata) if metadata else None


@cache
def _contexts() -> ModuleType:
    """Where vLLM keeps what belongs to a step."""
    return import_module("vllm.forward_context")


def _requests(metadata: object) -> tuple[Tensor, Tensor]:
    known = metadata.values() if isinstance(metadata, dict) else ()
    for request in known:
        starts, lengths = getattr(request, "query_start_loc", None), getattr(request, "seq_lens", None)
        if isinstance(starts, Tensor) and isinstance(lengths, Tensor):
            return starts, lengths
    raise RuntimeError("the attention layers of this model do not tell vLLM's requests apart: no first token is known")
