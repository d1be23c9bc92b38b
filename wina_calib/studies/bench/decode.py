"""Decoding through a model's own forward with a static cache, dense and sparse in turn."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from wina_calib.common.progress import SILENT, Estimate, Part, Progress
from wina_calib.runtime.caches import cache_name
from wina_calib.runtime.load import choose_sparsity, runtime_state, sparse_sites
from wina_calib.runtime.patches import compile_guards
from wina_calib.runtime.watch import Watch, is_far, warning
from wina_calib.studies.bench.instruments import PeakMemory, onednn, onednn_pays, seconds
from wina_calib.studies.bench.models import Pair

logger = logging.getLogger(__name__)

WARM_STEPS = 4
COUNTED_STEPS = 16
CHUNK = 4


@dataclass
class Session:
    """A model with its cache, ready to decode the tokens `ids` (1, prompt + new)."""

    model: PreTrainedModel  # dense or sparse
    ids: Tensor  # prompt and what is decoded after it
    prompt: int  # tokens of the prompt
    cache: StaticCache  # keys and values of all tokens, of fixed size
    forward: Callable[..., Any]  # the model, compiled or not, for one token
    position: int = 0
    onednn: bool = True  # whether tokens are computed with oneDNN's products, on a CPU

    def __post_init__(self) -> None:
        self.given = {cache_name(self.model.forward): self.cache}

    def prefill(self) -> None:
        """Empty the cache and run the prompt."""
        self.cache.reset()
        prompt = self.ids[:, : self.prompt]
        self.model(input_ids=prompt, use_cache=True, logits_to_keep=1, **self.given).logits.argmax(-1)
        self.position = self.prompt

    def step(self) -> None:
        """Run one token and choose the next, as `generate` does: among logits in float32."""
        token = self.ids[:, self.position : self.position + 1]
        self.forward(input_ids=token, use_cache=True, **self.given).logits[:, -1].float().argmax(-1)
        self.position += 1

    def steps(self, count: int) -> None:
        """Run several tokens."""
        with nullcontext() if self.onednn else onednn(False):
            for _ in range(count):
                self.step()

    def cache_tensors(self) -> tuple[Tensor, ...]:
        """Keys and values of all layers."""
        return tuple(t for layer in self.cache.layers for t in (layer.keys, layer.values))


def session(model: PreTrainedModel, ids: Tensor, prompt: int, *, compiled: bool) -> Session:
    """Make a session; a compiled one decodes as `generate(cache_implementation="static")` does on a GPU."""
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1])
    forward = compile_guards.compiled_call(model) if compiled else model.__call__
    return Session(model, ids, prompt, cache, forward)


@dataclass
class Variant:
    """One row of the comparison: a session, and how its model is set before it runs."""

    session: Session  # dense or sparse
    sparsity: float | None  # of a sparse model; None for the dense one
    memory: PeakMemory  # what runs add
    # a sparse model that computes everything, with one product a site: the dense model with the sparse one's other
    # advantages
    merged: bool = False
    step_ms: list[float] = field(default_factory=list)  # time of a token, one a chunk
    prefill_ms: list[float] = field(default_factory=list)  # time of the prompt, one a round

    def select(self) -> None:
        """Make the model ready, storage included, before time is taken."""
        if self.merged or self.sparsity is not None:
            runtime_state(self.session.model).dense = self.merged
        if self.sparsity is not None:
            choose_sparsity(self.session.model, self.sparsity)

    def prefill(self) -> None:
        """Run the prompt and note its time."""
        with self.memory.watching():
            self.prefill_ms.append(1e3 * seconds(self.session.prefill, self.memory.device))

    def decode(self, count: int) -> None:
        """Run tokens and note the time of one."""
        self.step_ms.append(1e3 * seconds(lambda: self.session.steps(count), self.memory.device) / count)


def make_variants(
    pair: Pair, sparsities: Sequence[float], ids: Tensor, prompt: int, *, compiled: bool
) -> list[list[Variant]]:
    """The dense model and the sparse one at each sparsity, in groups whose chunks can be interleaved.

    Uncompiled, every variant has a cache of its own and all are one group. A compiled model is tied to the addresses
    of one cache, so its variants take turns round by round; there the merged dense variant is the last. On a CPU, for
    which transformers has no way to compile by default, the dense model is compiled as the sparse one is.
    """
    device = ids.device
    with_onednn = _onednn_pays(session(pair.dense, ids, prompt, compiled=False))
    if compiled:
        if device.type == "cpu":
            compile_guards.prefer(pair.dense)
        dense, sparse = (session(m, ids, prompt, compiled=True) for m in (pair.dense, pair.sparse))
        alone = [Variant(dense, None, PeakMemory(device))]
        alone += [Variant(sparse, s, PeakMemory(device)) for s in sparsities]
        dense.onednn = sparse.onednn = with_onednn
        return [[variant] for variant in (*alone, Variant(sparse, None, PeakMemory(device), merged=True))]
    variants = [Variant(session(pair.dense, ids, prompt, compiled=False), None, PeakMemory(device))]
    variants += [Variant(session(pair.sparse, ids, prompt, compiled=False), s, PeakMemory(device)) for s in sparsities]
    for variant in variants:
        variant.session.onednn = with_onednn
    return [variants]


@torch.no_grad()
def _onednn_pays(dense: Session) -> bool:
    """Which products serve the dense model best: those that it is compared with, and that all variants use."""

    def run() -> None:
        dense.cache.reset()
        dense.position = 0
        dense.steps(min(CHUNK, dense.ids.shape[1]))

    weight = dense.model.get_input_embeddings().weight
    return onednn_pays(run, dense.ids.device, weight.dtype)


def measure(groups: Sequence[Sequence[Variant]], *, new: int, rounds: int, progress: Progress = SILENT) -> None:
    """Run all variants in turn, `rounds` times, after a warm-up that is not counted."""
    variants = [variant for group in groups for variant in group]
    warm = Part("warm up", len(variants), len(variants) * min(WARM_STEPS, new))
    rest = Part("time rounds", rounds * len(groups), len(variants) * rounds * new)
    progress.planned(Estimate((warm, rest)))
    progress.phase(warm.name, warm.steps)
    with torch.no_grad():
        for variant in variants:
            variant.select()
            variant.session.prefill()
            with variant.memory.watching():
                variant.session.steps(min(WARM_STEPS, new))
            progress.step("warm")
        progress.phase(rest.name, rest.steps)
        for turn in range(rounds):
            for group in groups:
                _round(group, new, turn)
                progress.step(f"round {turn + 1} of {rounds}")


def _round(group: Sequence[Variant], new: int, turn: int) -> None:
    """Prompt, then chunks of tokens; the variants take turns, and who starts changes."""
    order = [*group[turn % len(group) :], *group[: turn % len(group)]]
    for variant in order:
        variant.select()
        variant.prefill()
    chunk = new if len(group) == 1 else min(CHUNK, new)
    for start in range(0, new, chunk):
        count = min(chunk, new - start)
        for variant in order:
            variant.select()
            variant.decode(count)


def achieved(pair: Pair, sparsity: float, ids: Tensor, prompt: int) -> float:
    """Model sparsity of decoded tokens at the thresholds for `sparsity`."""
    choose_sparsity(pair.sparse, sparsity)
    run = session(pair.sparse, ids, prompt, compiled=False)
    pair.state.watch = seen = Watch(math.inf)
    with torch.no_grad():
        run.prefill()
        run.steps(min(COUNTED_STEPS, ids.shape[1] - prompt))
    pair.state.watch = None  # this has looked at more than it would
    return seen.share


def warn_of_far(asked: Sequence[float], dropped: Sequence[float]) -> None:
    """One line where decoded tokens drop far from what was asked for, about the first sparsity of which that holds."""
    far = next(((f, a) for f, a in zip(dropped, asked, strict=True) if is_far(f, a)), None)
    if far is not None:
        logger.warning("%s", warning(*far))


def fixed_cost(variant: Variant, prompt: int, new: int) -> float:
    """Milliseconds a token of a sparse model whose sites drop all inputs: what is left is lm_head and all that is no product."""
    run = variant.session
    variant.select()
    states = [site.group(group.name) for site in sparse_sites(run.model) for group in site.groups]
    with torch.no_grad():
        run.prefill()
        for state in states:
            state.threshold.fill_(torch.inf)
        times = [1e3 * seconds(run.step, run.ids.device) for _ in range(min(COUNTED_STEPS, new))]
    variant.select()
    return statistics.median(times)
