"""Several processes at one run, as torchrun starts them: who is who, agreement, and errors that all hear of.

Processes exchange words, never pixels or values: these go to files in the run's folder, which all of them see.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from vitprobe.errors import UserError
from vitprobe.runs.torchrun import launched

Result = TypeVar("Result")

# How long the first to finish wait for the last. A process that dies is noticed at once, by its connection.
PATIENCE = timedelta(days=1)
POLL_SECONDS = 0.02  # a wait inside torch would keep SIGTERM from being heard
BROKEN = "another process of this run ended before its work was done; the same command with --resume goes on"


class World:
    """The processes of a run; alone, everything here costs nothing.

    Attributes:
        rank: this process, from 0, which alone prints and writes manifest and summary.
        size: how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None, store: Any = None) -> None:
        self.rank, self.size = rank, size
        self._group, self._store = group, store

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """What every process gave, by rank; each must call this.

        Raises:
            UserError: where a process has ended.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        try:
            ready = dist.all_reduce(torch.zeros(1), group=self._group, async_op=True)
            assert ready is not None
            while not ready.is_completed():
                time.sleep(POLL_SECONDS)
            ready.wait()
            dist.all_gather_object(values, value, group=self._group)
        except RuntimeError:  # the other end of a connection is gone
            raise UserError(BROKEN) from None
        return values

    def together(self, work: Callable[[], Result]) -> Result:
        """What `work` gives in this process, once it has gone well in all; one's user error is raised in all.

        Raises:
            UserError: the first process's that has one.
        """
        if self.size == 1:
            return work()
        result, error = None, None
        try:
            result = work()
        except UserError as caught:
            error = caught
        for rank, failed in enumerate(self.gather(error)):
            if failed is not None:  # of process 0 as it is: most often all have the same
                raise failed if rank == 0 else UserError(f"process {rank} of {self.size}: {failed}")
        return result  # type: ignore[return-value]

    def on_first(self, work: Callable[[], Result]) -> Result:
        """What `work` gives in process 0, in all."""
        return self.gather(self.together(lambda: work() if self.first else None))[0]

    def may_speak(self) -> bool:
        """Whether this process prints the run's error: the first that asks does."""
        if self._store is None:
            return self.first
        try:
            return self._store.add("vitprobe/spoken", 1) == 1
        except RuntimeError:  # the store went down with its process
            return True


_current: World | None = None


@contextmanager
def joined(distributed: bool) -> Iterator[World]:
    """The world that this process belongs to; of itself alone without `distributed`, or where nobody launched more.

    A process group that is there already is used and left alone. SIGTERM, by which torchrun ends the processes that are
    left when one has died, becomes a UserError.
    """
    global _current
    if _current is not None or not distributed or not launched():
        yield _current if _current is not None and distributed else World()
        return
    ours = not dist.is_initialized()
    store = None
    if ours:
        store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        store = PrefixStore("vitprobe", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    _current = World(dist.get_rank(), dist.get_world_size(), group, store)
    try:
        with _terminated_as_error(ours):
            yield _current
    finally:
        _current = None
        dist.destroy_process_group(None if ours else group)


@contextmanager
def _terminated_as_error(wanted: bool) -> Iterator[None]:
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise UserError(BROKEN)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
