"""The runs that this process drives: one task a run, a bound on how many, and a backlog.

A submitted run starts at once when there is room (it is born claimed); otherwise it waits here and
is claimed by compare-and-set inside its first append. What waits here is durable: should the
process die, any worker finds the run in the queue.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from uuid import UUID

from app.domain.signals import Signal
from app.orchestrator.loop import Drive, drive_run
from app.orchestrator.run import DrivenRun

log = logging.getLogger("flexrun.runner")

BACKLOG_MAX = 10_000
BACKLOG_BYTES_MAX = 16 << 20
"""Of envelopes as they were sent; parsed they take several times as much."""


class _Backlog:
    """Queued runs that this process holds in memory, ready to be driven, the oldest first.

    It spares them the way through the database. What does not fit is claimed from there.
    """

    def __init__(self) -> None:
        self._waiting: OrderedDict[UUID, tuple[Callable[[], DrivenRun], int]] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def has_room(self) -> bool:
        return len(self._waiting) < BACKLOG_MAX and self._bytes < BACKLOG_BYTES_MAX

    def add(self, run_id: UUID, make: Callable[[], DrivenRun], size: int) -> None:
        self._waiting[run_id] = (make, size)
        self._bytes += size

    def take(self, run_id: UUID) -> Callable[[], DrivenRun] | None:
        make, size = self._waiting.pop(run_id, (None, 0))
        self._bytes -= size
        return make

    def take_first(self) -> tuple[UUID, Callable[[], DrivenRun]]:
        run_id, (make, size) = self._waiting.popitem(last=False)
        self._bytes -= size
        return run_id, make

    def clear(self) -> None:
        self._waiting.clear()
        self._bytes = 0


class Runner:
    """Drives up to `runs_max` runs at once; with 0 it drives none, and other processes do."""

    def __init__(self, drive: Drive, *, runs_max: int) -> None:
        self.drive = drive
        self.runs_max = runs_max
        self._driven: dict[UUID, tuple[DrivenRun, asyncio.Task[None]]] = {}
        self._backlog = _Backlog()
        self.accepting = True
        self.handed_off: set[UUID] = set()  # queued runs that this process will drive itself

    @property
    def room(self) -> int:
        """How many more runs may start now."""
        return self.runs_max - len(self._driven) if self.accepting else 0

    @property
    def driven(self) -> int:
        return len(self._driven)

    def drives(self, run_id: UUID) -> bool:
        return run_id in self._driven

    def start(self, run: DrivenRun) -> None:
        """Drive the run in a task of its own.

        One that was handed off stays so until it ends: before its first append it is still queued,
        and the worker of this very process could claim it away.
        """
        run_id = run.handle.run_id
        if (earlier := self._driven.get(run_id)) is not None:
            if earlier[0].handle.epoch > run.handle.epoch:
                return  # it took long to load, and was claimed again in the meantime
            earlier[1].cancel()  # of an older epoch: somebody else held the run in between
        task = asyncio.create_task(drive_run(run, self.drive))
        self._driven[run_id] = (run, task)
        task.add_done_callback(partial(self._ended, run_id))

    def hand_off(self, run_id: UUID, make: Callable[[], DrivenRun], size: int) -> None:
        """Drive a run that is queued already, when there is room. `make` builds it then.

        `size`: bytes of its envelope.
        """
        if self.room > 0:
            self.start(make())
        elif self.runs_max and self._backlog.has_room:
            self._backlog.add(run_id, make, size)
        else:
            self.handed_off.discard(run_id)  # not for us: any worker may claim it

    def deliver(self, signal: Signal) -> None:
        """Give a signal to the loop of its run, once, however often it is found.

        A run of the backlog is started for it although there is no room: a cancel or a pause ends
        or parks it before it calls anything.
        """
        if (driven := self._driven.get(signal.run_id)) is not None:
            driven[0].receive(signal)
        elif (
            signal.run_id in self.handed_off
            and (make := self._backlog.take(signal.run_id)) is not None
        ):
            run = make()
            run.receive(signal)
            self.start(run)

    def is_suspect(self, run_id: UUID) -> bool:
        """Whether the run is driven here, lost workers before and has made no progress since."""
        driven = self._driven.get(run_id)
        return driven is not None and driven[0].takes > 0

    def _ended(self, run_id: UUID, task: asyncio.Task[None]) -> None:
        was_full = self.room <= 0
        if run_id in self._driven and self._driven[run_id][1] is task:
            del self._driven[run_id]
            self.handed_off.discard(run_id)
        while self._backlog and self.room > 0:
            waiting_id, make = self._backlog.take_first()
            if waiting_id in self.handed_off and waiting_id not in self._driven:
                self.start(make())  # else it was claimed or started in the meantime
        if was_full and self.room > 0:
            self.drive.nudge_worker()

    async def drain(self, grace_s: float) -> None:
        """Give every run back: at once when no call of it is under way, else when that has ended.

        A call has `grace_s` for it. A run that is let go after that keeps its journal as it is: the
        next worker takes it up from there.
        """
        self.accepting = False
        self.drive.is_leaving = True
        self._backlog.clear()
        self.handed_off.clear()
        for run, _ in self._driven.values():
            run.inbox.poke()
        tasks = [task for _, task in self._driven.values()]
        if tasks:
            await asyncio.wait(tasks, timeout=grace_s)
        await self.abandon()

    async def abandon(self) -> None:
        """Stop driving everything at once, without another write."""
        tasks = [task for _, task in self._driven.values() if not task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
