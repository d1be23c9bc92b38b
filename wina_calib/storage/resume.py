"""Finished work on disk, so that a calibration that was stopped goes on where it was.

The folder holds `job.json`, which says what the work is, and a folder for each phase:

    PHASE/state.json          the last save: steps done, small values, names of the files below
    PHASE/0003.safetensors    tensors that are new since the save before
    PHASE/0003.passing.safetensors    tensors that count until the next save only
    PHASE/0003/NAME.7         micro-batch 7 of a store of hidden states, raw bytes

`state.json` is replaced in one step when all the others are on disk, so a save counts whole or not at all.

A step is saved where the time since the last save is at least `PATIENCE` times what that save took: saving costs at most 5 %
of the time. What has not changed since the last save, or is on disk already, is linked instead of written.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from wina_calib.common.atomic import sync_file, sync_folder, write_file
from wina_calib.common.distributed import ALONE, Ranks
from wina_calib.common.own_folder import make_own, refuse_foreign, remove
from wina_calib.common.progress import Progress, Silent
from wina_calib.errors import OutputError, StateError
from wina_calib.storage.hidden_states import HiddenStates
from wina_calib.storage.resume_files import FULL, JOB, STATE, check_same, encode, is_useful, read_record, readable

T = TypeVar("T")
Stores = Mapping[str, HiddenStates] | Callable[[], Mapping[str, HiddenStates]]
PATIENCE = 20.0
_EMPTY: Mapping[str, Any] = {
    "step": 0, "finished": False, "values": {}, "serial": 0, "tensors": [], "passing": [], "stores": {},
}  # fmt: skip
_PASSING = ".passing.safetensors"


class Done(Protocol):
    """Says that a step is done; see `Phase.each`."""

    def __call__(
        self,
        text: str,
        *,
        tensors: Mapping[str, Tensor] | None = None,
        passing: Mapping[str, Tensor] | None = None,
        values: Mapping[str, Any] | None = None,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        """Save if it is time to, and report."""


@dataclass
class RunState:
    """The folder of one calibration; without a folder nothing is kept."""

    folder: Path | None = None  # where to keep finished work
    identity: Callable[[], Mapping[str, Any]] = dict  # gives what the work is, once it is needed; see `identity.py`
    ranks: Ranks = ALONE  # the processes that share the work; all of them see the folder
    report: Progress = field(default_factory=Silent)  # hears of a save that did not fit on the disk
    saved: float = -1.0  # when the last save ended, and how long it took
    took: float = 0.0
    waited: float = 0.0  # for the identity, once: no part of what a save takes

    def phase(self, name: str, *, ranks: Ranks | None = None) -> Phase:
        """Open a phase: what was saved of it, and the way to save more. `ranks` are those that take part in it."""
        return Phase(self, None if self.folder is None else self.folder / name, self.ranks if ranks is None else ranks)

    def due(self) -> bool:
        """Whether enough time has passed since the last save."""
        return self.saved < 0 or time.monotonic() - self.saved >= PATIENCE * self.took

    def begin(self) -> None:
        """Say what the work is, before anything of it counts."""
        assert self.folder is not None
        if not (self.folder / JOB).exists():
            start = time.monotonic()
            known = self.identity()
            self.waited = time.monotonic() - start
            write_file(self.folder / JOB, encode(known))

    @property
    def useful(self) -> bool:
        """Whether anything is saved."""
        return self.folder is not None and is_useful(self.folder)


class Phase:
    """What is saved of one phase.

    Attributes:
        done_items: items done at the last save.
        finished: whether the phase is done.
        values: small things that JSON can hold, of the last save.
    """

    def __init__(self, run_state: RunState, folder: Path | None, ranks: Ranks) -> None:
        self._run_state, self._folder, self._ranks = run_state, folder, ranks
        self._pending: dict[str, Tensor] = {}
        # The first process alone looks at the disk and decides for all where they go on.
        self._take(ranks.first(lambda _: _saved(folder)))

    @property
    def is_saved(self) -> bool:
        """Whether what is done may be found by a later run."""
        return self._folder is not None

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that were saved."""
        tensors: dict[str, Tensor] = {}
        for name in (*self._files, *self._passing):
            assert self._folder is not None
            with readable(self._folder):
                tensors |= load_file(self._folder / name)
        return tensors

    def has(self, store: str) -> bool:
        """Whether a store of this name was saved."""
        return store in self._stores

    def restore(self, name: str, store: HiddenStates, blocks: Mapping[int, int]) -> None:
        """Fill a store with its micro-batches as they were saved; `blocks` says which, and the blocks of each."""
        assert self._folder is not None
        with readable(self._folder):
            meta = self._stores[name]
            for index, count in blocks.items():
                path = self._folder / f"{self._serial:04d}" / f"{name}.{index}"
                store.read_from(index, path, getattr(torch, meta["dtype"]), (count, *meta["block"]))

    def each(
        self,
        items: Callable[[int], Iterable[T]],
        stores: Stores,
        blocks: Mapping[int, int],
        progress: Progress,
        *,
        more: Stores | None = None,
        begun: int | None = None,
    ) -> Iterator[tuple[T, Done]]:
        """Go through the steps that are left: restore, then for each item work, save and say so.

        Args:
            items: the items after so many steps.
            stores: what the steps need of those before: restored first, saved after each step. A function where it changes.
            blocks: which micro-batches they have, and the blocks of each.
            progress: hears of every step.
            more: stores that are saved as well, and that somebody else restores.
            begun: steps done, where more are than were saved.

        Yields:
            An item, and the function to call when its work is done: with a line for people, and what `save` takes beside
            the stores.
        """
        if self.done_items:
            for name, store in _now(stores).items():
                self.restore(name, store, blocks)
        first = self.done_items if begun is None else begun
        for number, item in enumerate(items(first), first + 1):

            def done(text: str, *, number: int = number, **parts: Any) -> None:
                self.save(number, stores={**_now(stores), **_now(more or {})}, **parts)
                progress.step(text)

            yield item, done

    def save(
        self,
        done_items: int,
        *,
        tensors: Mapping[str, Tensor] | None = None,
        passing: Mapping[str, Tensor] | Callable[[], Mapping[str, Tensor]] | None = None,
        values: Mapping[str, Any] | None = None,
        stores: Mapping[str, HiddenStates] | None = None,
        prepare: Callable[[], None] | None = None,
        finished: bool = False,
    ) -> None:
        """Save if it is time to.

        Args:
            done_items: items done.
            tensors: what is new since the last call; kept until it is saved.
            passing: what counts until the next save only; a function where it takes time to say.
            values: all small values.
            stores: all stores that the next steps need.
            prepare: called before a save, to force to disk what it relies on.
            finished: the phase is done, so it is always saved.
        """
        if self._folder is None:
            return
        self._pending |= tensors or {}
        if not self._ranks.from_first(finished or self._run_state.due()):
            return
        start = time.monotonic()
        serial = self._serial + 1
        passing = passing() if callable(passing) else passing
        new = {f"{serial:04d}.safetensors": self._pending, f"{serial:04d}{_PASSING}": dict(passing or {})}
        new = {name: held for name, held in new.items() if held} if self._ranks.is_first else {}
        state = {
            "step": done_items,
            "finished": finished,
            "values": dict(values or {}),
            "serial": serial,
            "tensors": self._files + [name for name in new if not name.endswith(_PASSING)],
            "passing": [name for name in new if name.endswith(_PASSING)],
            "stores": {name: _form(store) for name, store in (stores or {}).items()} if self._ranks.is_first else {},
        }
        if self._write(self._ranks.from_first(state), new, stores or {}, prepare):
            self._pending.clear()
        elif self._ranks.is_first:
            self._run_state.report.note(
                f"the disk is too full to save the state of this run in {self._run_state.folder}"
            )
        self._run_state.saved = time.monotonic()
        self._run_state.took = self._run_state.saved - start - self._run_state.waited
        self._run_state.waited = 0.0

    def finish(self, **parts: Any) -> None:
        """Save the phase's result; arguments as for `save`."""
        self.save(self.done_items, finished=True, **parts)

    def forget(self) -> None:
        """Drop all that was saved of the phase."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._take(_EMPTY)

    def _take(self, state: Mapping[str, Any]) -> None:
        try:
            self.done_items, self.finished = int(state["step"]), bool(state["finished"])
            self.values: dict[str, Any] = dict(state["values"])
            self._serial, self._files = int(state["serial"]), [str(name) for name in state["tensors"]]
            self._passing = [str(name) for name in state["passing"]]
            self._stores: dict[str, dict[str, Any]] = dict(state["stores"])
        except (KeyError, TypeError, ValueError) as error:
            raise StateError(f"{self._folder} is damaged: {error!r}. Add --restart to start over.") from error

    def _write(
        self,
        state: Mapping[str, Any],
        new: Mapping[str, Mapping[str, Tensor]],
        stores: Mapping[str, HiddenStates],
        prepare: Callable[[], None] | None,
    ) -> bool:
        """Write a save, which counts with its last step; whether there was room for it.

        `new` are the tensors of the files that are new, of the first process alone.
        """
        assert self._folder is not None
        first, place = self._ranks.is_first, self._folder / f"{state['serial']:04d}"
        old = self._folder / f"{self._serial:04d}"
        passed = self._passing
        fits = self._where_it_fits(lambda: self._begin(place) if first else None)
        fits = fits and self._where_it_fits(lambda: self._put(place, new, stores, prepare))
        fits = fits and self._where_it_fits(lambda: write_file(place.parent / STATE, encode(state)) if first else None)
        if fits:
            self._take(state)
        if first:
            shutil.rmtree(old if fits else place, ignore_errors=True)
            for name in passed if fits else new:
                (self._folder / name).unlink(missing_ok=True)
        return fits

    def _begin(self, place: Path) -> None:
        self._run_state.begin()
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)

    def _put(
        self,
        place: Path,
        new: Mapping[str, Mapping[str, Tensor]],
        stores: Mapping[str, HiddenStates],
        prepare: Callable[[], None] | None,
    ) -> None:
        if prepare is not None:
            prepare()
        for name, store in stores.items():
            for index in store.indices:
                store.write_to(index, place / f"{name}.{index}")
        for file, tensors in new.items():
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, place.parent / file)
            sync_file(place.parent / file)
        sync_folder(place)
        sync_folder(place.parent)

    def _where_it_fits(self, work: Callable[[], None]) -> bool:
        """Do a part of a save; whether the disk had room for it in all processes."""
        fits = True
        try:
            work()
        except (OSError, OutputError, SafetensorError) as error:
            cause = error.__cause__ if isinstance(error, OutputError) else error
            # The safetensors library has an error of its own, with the system's in its text.
            if getattr(cause, "errno", None) not in FULL and "No space left" not in str(cause):
                raise
            fits = False
        return all(self._ranks.gather([fits]))


def _now(stores: Stores) -> Mapping[str, HiddenStates]:
    return stores() if callable(stores) else stores


def _saved(folder: Path | None) -> Mapping[str, Any]:
    return _EMPTY if folder is None or not (folder / STATE).exists() else read_record(folder / STATE)


NOT_SAVED = RunState().phase("nothing")


def open_run_state(
    folder: Path,
    identity: Callable[[], Mapping[str, Any]],
    *,
    restart: bool = False,
    ranks: Ranks = ALONE,
    report: Progress | None = None,
) -> RunState:
    """Open the folder of a calibration, to go on with it or to begin.

    Args:
        folder: where finished work is kept.
        identity: says what the work is: a nested dictionary of plain values.
        restart: drop what is there.
        ranks: the processes that share the work; the first one alone looks at the folder here.
        report: hears where it goes on.

    Raises:
        StateError: what is there is of other work; the message says what differs.
        OutputError: what is there is not one's own.
    """
    report = report or Silent()
    if ranks.is_first:
        if not restart:
            refuse_foreign(folder)
        if restart or not is_useful(folder):
            remove(folder)
        else:
            check_same(folder, identity())
            report.note(f"going on with the run that was stopped; its state is in {folder}")
        make_own(folder)
    return RunState(folder, identity, ranks, report)


def _form(store: HiddenStates) -> dict[str, Any]:
    dtype, block = store.form
    return {"dtype": str(dtype).removeprefix("torch."), "block": list(block)}
