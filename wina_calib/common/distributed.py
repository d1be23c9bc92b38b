"""Several processes that share one calibration, started by `torchrun`; alone, everything here does nothing.

Every process takes a contiguous run of the micro-batches. What they count is added as integers, and floating-point sums are
gathered by micro-batch and added in the order of the micro-batches, as one process adds them: the result is the same to the
bit for any number of processes. Everything goes by gloo, through the memory of the CPU: it is little, and gloo says when
another process has died, where NCCL would wait on the device for good.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from wina_calib.errors import RankError

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # between two signs of life of another process
_WORKING, _DONE, _FAILED = 1, 0, -1


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the work."""

    rank: int = 0  # number of this process; the first one writes and reports
    size: int = 1  # number of processes
    store: Any = None  # where processes leave each other messages, beside the collective operations

    @property
    def is_first(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of `count` micro-batches are this process's: a contiguous run. The first process always has one."""
        return range(-(-count * self.rank // self.size), -(-count * (self.rank + 1) // self.size))

    def owner(self, item: int, count: int) -> int:
        """Which process has an item of `count` that are shared."""
        return next(r for r in range(self.size) if item in Ranks(r, self.size).share(count))

    def add(self, counts: Tensor) -> None:
        """Add integer counts over all processes, in place."""
        if self.size > 1:
            here = counts.cpu()
            with _together():
                dist.all_reduce(here)
            counts.copy_(here)

    def gather(self, mine: Sequence[T]) -> list[T]:
        """Everything that the processes have, small and on the CPU, in the order of the processes."""
        if self.size == 1:
            return list(mine)
        gathered: list[Any] = [None] * self.size
        with _together():
            dist.all_gather_object(gathered, list(mine))
        return [item for part in gathered for item in part]

    def from_first(self, value: T) -> T:
        """The first process's value, small and on the CPU."""
        if self.size == 1:
            return value
        box = [value]
        with _together():
            dist.broadcast_object_list(box, 0)
        return box[0]

    def from_owner(self, value: Tensor, owner: int) -> Tensor:
        """One process's tensor in all; the others give one of the same shape and dtype, which is overwritten."""
        if self.size > 1:
            here = value.cpu().contiguous()
            with _together():
                dist.broadcast(here.view(torch.uint8), owner)
            value.copy_(here)
        return value

    def agree(self, work: Callable[[], T]) -> T:
        """Do something in every process; where it fails in one, it fails in all.

        Raises:
            RankError: it failed in another process, which says why.
        """
        if self.size == 1:
            return work()
        failure: Exception | None = None
        results: list[T] = []
        try:
            results.append(work())
        except Exception as error:
            failure = error
        failed = [rank for rank, fine in enumerate(self.gather([failure is None])) if not fine]
        if failed:
            raise failure if failure is not None and failed[0] == self.rank else _stopped(told=True)
        return results[0]

    def first(self, work: Callable[[Callable[[], None]], T]) -> T:
        """Do something in the first process and give its small result to all.

        Args:
            work: called with a function that it calls now and then, so that the others know that it lives.

        Raises:
            RankError: it failed in the first process, which says why.
        """
        if self.size == 1:
            return work(lambda: None)
        if not self.is_first:
            signal: int = _WORKING
            while signal == _WORKING:
                signal = self.from_first(signal)
            if signal == _FAILED:
                raise _stopped(told=True)
            return self.from_first(cast("T", None))
        try:
            result = work(lambda: None if self.from_first(_WORKING) else None)
        except RankError:
            raise
        except Exception:
            self.from_first(_FAILED)
            raise
        self.from_first(_DONE)
        return self.from_first(result)

    def speaks(self, error: BaseException) -> bool:
        """Whether this process is the one that says what went wrong: the first whose own error it is, or the first of all."""
        if self.store is None:
            return True
        consequence = isinstance(error, RankError | KeyboardInterrupt)
        if consequence and (not self.is_first or getattr(error, "told", False)):
            return False
        try:
            return bool(self.store.add("wina-failure", 1) == 1)
        except RuntimeError:  # the process that keeps the store has ended
            return self.is_first


ALONE = Ranks()


@contextmanager
def shared_ranks(backend: str = "gloo") -> Iterator[Ranks]:
    """The processes that `torchrun` has started, connected for the length of the context; alone without it.

    Raises:
        RankError: the others cannot be reached.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ or dist.is_initialized():
        yield ALONE
        return
    with _together():
        store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
        dist.init_process_group(backend, store=PrefixStore("wina", store), rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        yield Ranks(rank, size, store)
    except BaseException:
        _abandon()
        raise
    dist.destroy_process_group()


def _abandon() -> None:
    """Leave the others without waiting for them, of which one may have died.

    A request to end that comes meanwhile, as torchrun sends it, does not take the place of the error on its way. Nor
    does a torch that has no such function: this process ends anyway.
    """
    with suppress(Exception, KeyboardInterrupt):
        distributed_c10d._abort_process_group()


def local_device() -> str:
    """The CUDA device that is this process's own among those of one machine."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "cuda"


@contextmanager
def _together() -> Iterator[None]:
    """Say in one sentence that another process has ended."""
    try:
        yield
    except RuntimeError as error:
        raise _stopped() from error


def _stopped(*, told: bool = False) -> RankError:
    error = RankError("another process of this job has stopped, so all do.")
    error.told = told
    return error
