"""What belongs to one forward pass lives in that pass, and no longer.

A decoder begins a pass and ends it (`decoder.Decoder`): it makes a `Pass`, which says what is dropped in it and holds the
products that projections share, and puts it in `here`, where this thread's modules find it. So

- threads that share a model each see their own pass; what a model keeps for all of them, storage and thresholds, changes
  only while no pass runs (`Gate`);
- a pass within a pass, of the same model or of another, gives the outer one back;
- a layer that is computed again in a backward pass gets the pass that it belonged to: where transformers checkpoints a
  layer, the pass travels with the layer's arguments (`decoder.Recomputed`), and comes back as `Pass.again`. If the
  thresholds are others by then, or the layer is computed again by something that does not hand its arguments on, that is
  an error, as the gradient would be another function's;
- a whole decoder that is computed again begins a pass anew, and is held to the one it had for the same tokens (`Repeats`);
- a module that is called alone, in no pass, drops inputs as a decode step does.

A compiled step makes its pass while it is traced: what is asked of it there are constants and guards.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

# `here.current` is the pass that this thread computes, or None. Torch's compiler knows this class and no derived one.
here = threading.local()
CHANGED = (
    "The sparsity was changed between a forward pass and its backward pass, which computes layers again: the gradient would be "
    "of neither. Change it after the backward pass, or turn gradient checkpointing off."
)


class Pass:
    """One forward pass of one model.

    Attributes:
        state: of the model.
        owner: number of that state.
        dense: nothing is dropped.
        dense_rows: (batch, seq) bool, rows that are never masked; None where there are none.
        counts: where inputs are counted, by (layer, site).
        watch: samples what decode steps drop; None nearly always.
        revision: of the thresholds that it began with.
        kernels: `auto` or `reference`.
        served: packed weights may compute it.
        drops: it drops inputs, and what it computes may differ in last bits from the stock modules' results.
        short: so may one row of which nothing but the result is wanted.
        operator: how a compiled step multiplies, `sparse` or `dense`; empty where its operator cannot serve.
        x: input whose products are in `out`.
        group: the mask group that they belong to, or its number.
        out: what all projections of the group give.
        gated: whether changes of the model wait for it.
        layers: of its decoder, while a token may still be computed for all of them by the first.
        ahead: what was computed so, see `fast_path.ahead`.
        ready: number of a group and its outputs, which its projections shall hand out whatever they are given.
        waiting: number of a group and what its outputs shall be added to.
    """

    def __init__(
        self,
        state: Any,
        *,
        kernels: str,
        dense: bool,
        masks: bool,
        dense_rows: Tensor | None = None,
        counts: Any = None,
        revision: int = 0,
        watch: Any = None,
    ) -> None:
        self.state, self.owner = state, state.number
        self.kernels, self.dense, self.dense_rows = kernels, dense, dense_rows
        self.counts, self.watch, self.revision = counts, watch, revision
        auto = kernels == "auto"
        self.served = auto and counts is None
        self.drops = auto and masks and not dense
        self.short = self.drops and self.served and dense_rows is None
        self.operator = "" if not self.served or dense_rows is not None else "dense" if dense else "sparse"
        self.x: Tensor | None = None
        self.group: Any = None
        self.out: Any = None
        self.gated = False
        self.layers: Any = None
        self.ahead: Any = None
        self.ready: tuple[int, Tensor] | None = None
        self.waiting: tuple[int, Tensor] | None = None

    def again(self) -> Pass:
        """The same pass for a layer that is computed again: with products of its own, and counted into nothing."""
        return Pass(
            self.state,
            kernels=self.kernels,
            dense=self.dense,
            masks=self.drops,
            dense_rows=self.dense_rows,
            counts=None if self.counts is None else {},
            revision=self.revision,
        )


def in_backward() -> bool:
    """Whether this thread computes a backward pass. Torch has no public question for it; False where it has none at all."""
    ask = getattr(torch._C, "_current_graph_task_id", None)
    return ask is not None and ask() != -1


def may_be_computed_again() -> bool:
    """Whether torch's checkpointing may run here: it hooks what is saved for a backward pass, or lets nothing be saved.

    Torch has no public question for its hooks; True where it has none at all.
    """
    ask = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return not torch.is_grad_enabled() or ask is None or ask(True) is not None


class Repeats:
    """Passes of a whole decoder that a backward pass may compute again, by the tokens that they were given."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], tuple[StorageWeakRef, set[tuple[object, ...]]]] = {}
        self._last: tuple[object, ...] | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Repeats], tuple[()]]:
        return Repeats, ()  # a copy has had no passes

    def note(self, tokens: Tensor, terms: tuple[object, ...]) -> None:
        """A pass over some tokens begins on some terms. It is forgotten with the tokens' memory."""
        place = StorageWeakRef(tokens.untyped_storage())
        with self._lock:
            self._known = {key: known for key, known in self._known.items() if not known[0].expired()}
            self._known.setdefault(_key(place, tokens), (place, set()))[1].add(terms)
            self._last = terms

    def agree(self, tokens: Tensor, terms: tuple[object, ...]) -> bool:
        """Whether a pass over these tokens that is computed again had the same terms; of unknown tokens, the last pass's."""
        with self._lock:
            known = self._known.pop(_key(StorageWeakRef(tokens.untyped_storage()), tokens), None)
            had = known[1] if known is not None else {self._last} if self._last is not None else {terms}
        return had == {terms}


def _key(place: StorageWeakRef, tokens: Tensor) -> tuple[Any, ...]:
    return (place.cdata, tokens.storage_offset(), tokens.shape)


class Gate:
    """Passes of several threads go side by side; a change of the model waits until none runs, and they wait for it."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._inside: dict[int, int] = {}  # passes by thread
        self._alone: int | None = None  # thread that changes the model, or waits for it

    def enter(self) -> None:
        """A pass begins in this thread."""
        me = threading.get_ident()
        with self._changed:
            depth = self._inside.get(me, 0)
            while not depth and self._alone not in (None, me):
                self._changed.wait()
            self._inside[me] = depth + 1

    def leave(self) -> None:
        """A pass of this thread has ended."""
        me = threading.get_ident()
        with self._changed:
            depth = self._inside.pop(me) - 1
            if depth:
                self._inside[me] = depth
            elif self._alone is not None:
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """For the length of the context no other thread computes a pass."""
        me = threading.get_ident()
        with self._changed:
            while self._alone not in (None, me):
                self._changed.wait()
            outer, self._alone = self._alone, me
            try:
                while self._inside.keys() - {me}:
                    self._changed.wait()
            except BaseException:
                self._release(outer)
                raise
        try:
            yield
        finally:
            with self._changed:
                self._release(outer)

    def _release(self, outer: int | None) -> None:
        self._alone = outer
        self._changed.notify_all()
