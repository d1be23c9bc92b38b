"""What all sites of one loaded model share: the policy, by which each forward pass is made."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from wina_calib.errors import UsageError
from wina_calib.runtime import group_operator
from wina_calib.runtime.caches import cache_of
from wina_calib.runtime.first_tokens import Rows, tokens_of
from wina_calib.runtime.forward_pass import CHANGED, Gate, Pass, Repeats, here, in_backward, may_be_computed_again
from wina_calib.runtime.patches import late_stop
from wina_calib.runtime.watch import Watch


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
    """State of one sparse model: what is the same for all of its passes until somebody changes it."""

    prefill: str = "sparse"  # whether rows that fill an empty cache are masked (`sparse`) or computed densely (`dense`)
    # whether the first row of each sequence is computed densely (`dense`) or masked (`sparse`)
    first_token: str = "dense"
    kernels: str = "auto"  # `auto` lets a fast kernel serve a site, `reference` always uses the masked dense product
    dense: bool = False  # compute everything densely
    masks: bool = False  # whether the sparsity that is set drops anything
    # weights were moved, cast or replaced, or the sparsity changed: their storage must be looked at again
    stale: bool = True
    revision: int = 0  # counts how often thresholds were set
    packs: int = 0  # counts how often the weights' storage was looked at
    sites: list[Any] = field(default_factory=list, repr=False)  # all sites, in order
    watch: Watch | None = field(default=None, repr=False)  # samples what decode steps drop, until it has seen enough
    gate: Gate = field(default_factory=Gate, repr=False)  # keeps passes and changes of the model apart
    repeats: Repeats = field(default_factory=Repeats, repr=False)  # passes that a backward pass may compute again
    # what a thread asked for by `counting` and `densely`
    local: threading.local = field(default_factory=threading.local, repr=False)
    number: int = field(default_factory=group_operator.new_owner, repr=False)  # of this state among all in the process
    # how a token goes through all layers in one call, see `fast_path.layers`; False where it cannot
    plan: Any = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to threads, and what holds addresses."""
        return {name: value for name, value in self.__dict__.items() if name not in ("gate", "local", "plan")}

    def __setstate__(self, values: dict[str, Any]) -> None:
        """A copy is a state of its own, whose weights get numbers of their own."""
        own = {
            "gate": Gate(),
            "local": threading.local(),
            "number": group_operator.new_owner(),
            "stale": True,
            "plan": None,
        }
        self.__dict__.update(values | own)

    def begin(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Pass | None:
        """Begin a pass of the decoder with these arguments in this thread; the pass before, for `end`."""
        compiling = torch.compiler.is_compiling()
        if not compiling:  # first, so that a compiled step has no guard on what follows
            self._look(args, kwargs)
            self.refresh()
        before: Pass | None = getattr(here, "current", None)
        made = self._pass(Rows(args, kwargs), compiling=compiling)
        if not compiling:
            self.gate.enter()
            made.gated, made.revision = True, self.revision
        here.current = made  # only now: a wait at the gate may be broken off
        return before

    def look_for_repeats(self, tokens: Tensor) -> None:
        """Hold a pass of the whole decoder that is computed again in a backward pass to the one that it repeats.

        Raises:
            UsageError: what decides what is dropped was changed in between.
        """
        now: Pass = here.current
        terms = (now.revision, now.dense, self.prefill, self.first_token, self.kernels)
        if not in_backward():
            if may_be_computed_again():
                self.repeats.note(tokens, terms)
            return
        if not self.repeats.agree(tokens, terms):
            raise UsageError(CHANGED)
        now.counts = None if now.counts is None else {}

    def end(self, before: Pass | None) -> None:
        """End this thread's pass."""
        ended, here.current = here.current, before
        if ended.ahead is not None:
            ended.ahead.finish()
        if ended.gated:
            self.gate.leave()
        if ended.watch is not None and ended.watch.has_seen_enough():
            self.watch = None

    def now(self) -> Pass:
        """The pass that this thread computes; for a module that is called alone, one like a decode step.

        Raises:
            UsageError: a layer is computed again in a backward pass, and nothing tells which pass it belongs to.
        """
        current: Pass | None = getattr(here, "current", None)
        if current is not None and current.state is self:
            return current
        if not torch.compiler.is_compiling() and in_backward():
            raise UsageError(
                "A layer of a sparse model is computed again in a backward pass, and nothing tells which forward pass it "
                "belongs to. Use the checkpointing of transformers (gradient_checkpointing), which hands that on."
            )
        dense, counts = self._asked()
        return Pass(self, kernels=self.kernels, dense=dense, masks=self.masks, counts=counts, revision=self.revision)

    def _pass(self, rows: Rows, *, compiling: bool) -> Pass:
        dense, counts = self._asked()
        first, watch = None, None if dense or compiling else self.watch
        if not dense and self.prefill == "dense":
            dense = rows.fill_prompt()
        if not dense and self.first_token == "dense":
            first = rows.first()
        # What a compiled step does not use is not asked for, so that it has no guard on it.
        masks = not compiling and self.masks
        if watch is not None and (rows.count != 1 or not self.masks or counts is not None or torch.is_grad_enabled()):
            watch = None
        return Pass(self, kernels=self.kernels, dense=dense, masks=masks, dense_rows=first, counts=counts, watch=watch)

    def _asked(self) -> tuple[bool, dict[tuple[int, str], SiteCount] | None]:
        """Whether everything is to be computed densely in this thread, and where its inputs are counted."""
        dense = bool(self.dense or getattr(self.local, "dense", False))
        return dense, None if dense else getattr(self.local, "counts", None)

    def _look(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Before a prompt, look whether weights were replaced without notice, as merging an adapter may do."""
        tokens = tokens_of(args, kwargs)
        late_stop.mark(cache_of(args, kwargs), tokens)
        if not self.stale and (tokens is None or tokens.shape[1] > 1):
            self.stale = any(site.is_replaced() for site in self.sites)
            self.plan = self.plan or None  # what stood in its way may be gone

    def refresh(self) -> None:
        """Look at the weights' storage again where something changed."""
        if not self.stale:
            return
        with self.gate.alone():
            if self.stale:  # no other thread was first
                # Weights that are made in inference mode could not be trained or loaded later.
                with torch.inference_mode(False), torch.no_grad():
                    for site in self.sites:
                        site.pack()
                self.packs += 1
                self.masks = any(site.asked != 0 for site in self.sites)  # nan: thresholds without a sparsity
                self.stale = False

    @contextmanager
    def changing(self) -> Iterator[None]:
        """For the length of the context no pass runs, as thresholds are set; then the storage is looked at again."""
        with self.gate.alone():
            yield
            self.refresh()

    @contextmanager
    def counting(self) -> Iterator[dict[tuple[int, str], SiteCount]]:
        """Count kept and dropped inputs at every site of this thread's passes for the length of the context."""
        counts: dict[tuple[int, str], SiteCount] = {}
        with self._asking("counts", counts):
            yield counts

    @contextmanager
    def densely(self) -> Iterator[None]:
        """Compute everything densely in this thread for the length of the context."""
        with self._asking("dense", True):
            yield

    @contextmanager
    def _asking(self, name: str, value: Any) -> Iterator[None]:
        before = getattr(self.local, name, None)
        setattr(self.local, name, value)
        try:
            yield
        finally:
            setattr(self.local, name, before)


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
