"""Runs that came to rest here, with all their events: what readings of whole runs begin with.

A sink of frames beside the feed. On the path of a run it only keeps the frames, in bounded memory.
Events that are not at hand (the run was taken over, or memory was short) are read from the journal.
The one process that wrote the last event of a run has it here, so whoever reads from here tells
each run once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

from app.journal.feed import RESTING_EVENTS
from app.journal.frames import Frame, body_of
from app.store.events import EventReader

RUNS_WAITING_MAX = 2_000
RUNS_UNDER_WAY_MAX = 10_000
BYTES_MAX = 64 * 1024 * 1024
PAGE_ROWS = 1_000

Body = tuple[str, bytes]
"""The type of an event, and the event as JSON."""


@dataclass(slots=True)
class RestedRun:
    """A run at rest, up to `seq`; `frames` may be incomplete."""

    run_id: UUID
    seq: int
    frames: list[Frame]


class RestedRuns:
    """The frames of one reading. `drop` is told of a run for which there was no room."""

    def __init__(self, reader: EventReader, drop: Callable[[RestedRun], None]) -> None:
        self._reader = reader
        self._drop = drop
        self._waiting: deque[RestedRun] = deque()
        self.under_way: dict[UUID, list[Frame]] = {}
        self.bytes_kept = 0

    def publish(self, run_id: UUID, frames: list[Frame]) -> None:
        """Keep durable frames until their run rests. On the path of every append: no more here."""
        begin = 0
        for end, frame in enumerate(frames, 1):
            self.bytes_kept += len(frame.data)
            if frame.type in RESTING_EVENTS:
                kept = self.under_way.pop(run_id, [])
                self._rest(RestedRun(run_id, frame.seq, kept + frames[begin:end]))
                begin = end
        if begin < len(frames):
            self.under_way.setdefault(run_id, []).extend(frames[begin:])
            if self.bytes_kept > BYTES_MAX or len(self.under_way) > RUNS_UNDER_WAY_MAX:
                self._forget_oldest()

    def _rest(self, run: RestedRun) -> None:
        if len(self._waiting) >= RUNS_WAITING_MAX:
            self._forget(run.frames)
            self._drop(run)
            return
        if self.bytes_kept > BYTES_MAX:
            self._forget(run.frames)
            run.frames = []
        self._waiting.append(run)

    def _forget_oldest(self) -> None:
        """The journal still has what we let go of: it is read when the run rests."""
        self._forget(self.under_way.pop(next(iter(self.under_way))))

    def _forget(self, frames: list[Frame]) -> None:
        self.bytes_kept -= sum([len(frame.data) for frame in frames])

    def take(self, most: int) -> list[RestedRun]:
        """The runs that rest longest, none when nobody does. They stay in memory until `done`."""
        return [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]

    def done(self, runs: list[RestedRun]) -> None:
        """These were read, or given up."""
        for run in runs:
            self._forget(run.frames)

    async def bodies_of(self, run: RestedRun) -> list[Body]:
        """All events up to where the run rests; from the journal when any is not at hand."""
        if len(run.frames) == run.seq:
            return [(frame.type, body_of(frame)) for frame in run.frames]
        bodies: list[Body] = []
        while len(bodies) < run.seq:
            left = min(PAGE_ROWS, run.seq - len(bodies))
            rows = await self._reader.page(run.run_id, len(bodies), left)
            if not rows:  # the day was pruned meanwhile
                break
            bodies += [(row.type, row.body.encode()) for row in rows]
        return bodies
