"""The runs that this process drives: one task a run, a bound on how many, and a backlog.

A submitted run starts at once when there is room (it is born claimed); otherwise it waits here and
is claimed by compare-and-set inside its first append. What waits here is durable: should the
process die, any worker finds the run in the queue.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from uuid import UUID

from app.orchestrator.loop import Drive, drive_run
from app.orchestrator.run import DrivenRun

log = logging.getLogger("flexrun.runner")


class Runner:
    """Drives up to `runs_max` runs at once."""

    def __init__(self, drive: Drive, *, runs_max: int, backlog_max: int = 10_000) -> None:
        self.drive = drive
        self._runs_max = runs_max
        self._backlog_max = backlog_max
        self._driven: dict[UUID, tuple[DrivenRun, asyncio.Task[None]]] = {}
        self._backlog: deque[Callable[[], DrivenRun]] = deque()
        self.accepting = True
        self.handed_off: set[UUID] = set()  # queued runs that this process will drive itself
        self.on_free: Callable[[], None] = lambda: None

    @property
    def room(self) -> int:
        """How many more runs may start now."""
        return self._runs_max - len(self._driven) if self.accepting else 0

    @property
    def driven(self) -> int:
        return len(self._driven)

    def drives(self, run_id: UUID) -> bool:
        return run_id in self._driven

    def start(self, run: DrivenRun) -> None:
        """Drive the run in a task of its own."""
        run_id = run.handle.run_id
        task = asyncio.create_task(drive_run(run, self.drive))
        self._driven[run_id] = (run, task)
        task.add_done_callback(lambda _: self._ended(run_id))

    def hand_off(self, run_id: UUID, make: Callable[[], DrivenRun]) -> None:
        """Drive a run that is queued already, when there is room. `make` builds it then."""
        if self.room > 0:
            self.start(make())
        elif len(self._backlog) < self._backlog_max:
            self._backlog.append(make)
        else:
            self.handed_off.discard(run_id)  # too many wait here: any worker may claim it

    def _ended(self, run_id: UUID) -> None:
        was_full = self.room <= 0
        self._driven.pop(run_id, None)
        self.handed_off.discard(run_id)
        while self._backlog and self.room > 0:
            self.start(self._backlog.popleft()())
        if was_full and self.room > 0:
            self.on_free()

    async def drain(self, grace_s: float) -> None:
        """Start nothing new, give running calls `grace_s` to end, then let go of what is left.

        A run that is let go keeps its journal as it is: the next worker takes it up from there.
        """
        self.accepting = False
        self._backlog.clear()
        self.handed_off.clear()
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
