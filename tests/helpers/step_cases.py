"""Tiny sparse models, decode steps of theirs, and the passes that no shortcut of a decode step may take."""

from collections.abc import Iterator
from typing import Any

import tiny
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import wina_calib
from wina_calib.budgets.count import count_cells
from wina_calib.model.architecture import describe
from wina_calib.quantization.formats import WeightFormat
from wina_calib.runtime.load import runtime_state
from wina_calib.studies.bench.models import Pair, fit

IDS = torch.randint(4, 300, (1, 40), generator=torch.Generator().manual_seed(1))
PROMPT = 12


@torch.no_grad()
def sparse(family: str = "llama", form: WeightFormat | None = None, dtype: Any = torch.float32, **changes: Any) -> Any:
    """A tiny model whose thresholds drop half of the inputs, with random codes where it is quantized."""
    dense, model = (tiny.make(family, dtype=dtype, **changes) for _ in range(2))
    fit(Pair(family, dense, model, count_cells(describe(dense), "none"), False, None), (0.5,), IDS, 1, form)
    runtime_state(model).watch = None
    return model


@torch.no_grad()
def filled(model: Any, count: int = PROMPT, cache: Any = None) -> Any:
    """A cache after a prompt."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    model(IDS[:, :count], **tiny.given(cache))
    return cache


@torch.no_grad()
def step(model: nn.Module, cache: Any = None, *, count: int = 1, start: int = PROMPT, **kwargs: Any) -> Tensor:
    """Logits of tokens after a prompt, each alone."""
    cache = filled(model) if cache is None else cache
    found = [model(IDS[:, i : i + 1], **tiny.given(cache), **kwargs).logits for i in range(start, start + count)]
    return torch.cat(found, dim=1)


def close(a: Tensor, b: Tensor, limit: float = 1e-5) -> bool:
    """Whether they differ by rounding alone."""
    return float((a - b).norm() / b.norm()) < limit


def passes_of_another_kind(model: Any) -> Iterator[str]:
    """Does one pass after another that is no decode step of one token with half of its inputs dropped; says which it was."""
    state, token = runtime_state(model), IDS[:, :1]
    with torch.no_grad():
        model(IDS)
        yield "a prompt"
        model(token)
        yield "a token without a cache"
        model(token, **tiny.given(DynamicCache(config=model.config)))
        yield "a first token, which is dense"
        both = DynamicCache(config=model.config)
        model(IDS[:, :4].expand(2, 4), **tiny.given(both))
        model(token.expand(2, 1), **tiny.given(both))
        yield "two sequences"
    model(token, **tiny.given(filled(model)))
    yield "a token with gradients"
    with state.counting():
        step(model)
    yield "a step that is counted"
    with state.densely():
        step(model)
    yield "a step that is dense for once"
    state.kernels = "reference"
    step(model)
    state.kernels = "auto"
    yield "a step by the reference"
    wina_calib.set_sparsity(model, 0.0)
    step(model)
    wina_calib.set_sparsity(model, 0.5)
    yield "a step at sparsity 0"
