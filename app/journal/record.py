"""The only door to disk for run state: fenced appends, committed in groups.

A driver stamps events (`RunHandle.stamp`), and `Journal.record` makes them durable. Each of the
few writers (`writer.py`) commits whatever queued up while its last commit was under way, for all
runs of the process, in one statement. A run belongs to one writer, so its appends stay in order;
appends of one run that wait together become one. Frames go to the feed after the commit, never
before.

`record` returns when the append is durable, or raises:
    LeaseLost         another epoch holds the run: stop, never write to it again
    JournalRejected   the database refuses the data: the run can only be failed
    KeyTaken          a new run's idempotency key already belongs to another run
    HeadDiverged      the head is where neither we nor a taker can have put it: stop loudly
    JournalClosed     the process is shutting down; the append was not sent
Transient errors are retried inside. Cancelling the caller never withdraws a queued append.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import date
from uuid import UUID

from app.domain.event_json import encode_event
from app.domain.events import Event
from app.domain.run import RunStatus
from app.journal.frames import Frame, frame_of
from app.journal.writer import FrameSink, Pending, Writer
from app.kit.ids import run_day
from app.kit.metrics import Metrics
from app.kit.rfc3339 import to_datetime
from app.store.append import HeadMove, NewRun
from app.store.database import HotConnection


@dataclass(slots=True)
class RunHandle:
    """The right to append to a run: its fence `(epoch, seq)` as this process knows it.

    `seq` is the last seq that was stamped; `recorded_seq` the last that is durable. Who holds a
    handle is the only writer of the run in this process.
    """

    run_id: UUID
    epoch: int
    seq: int
    trace_id: str
    last_ts: int = 0
    recorded_seq: int = 0
    recorded_epoch: int = 0
    day: date = field(init=False)
    text_id: str = field(init=False)

    def __post_init__(self) -> None:
        self.day = run_day(self.run_id)
        self.text_id = str(self.run_id)

    def stamp(self, events: list[Event], now_ms: int) -> None:
        """Number the events and give them their time, never below the run's previous one."""
        ts = max(now_ms, self.last_ts)
        for event in events:
            self.seq += 1
            event.seq = self.seq
            event.ts = ts
        self.last_ts = ts

    def rewind(self, seq: int) -> None:
        """Forget stamped events that will never be written: the next one follows `seq`."""
        self.seq = self.recorded_seq = seq


@dataclass(slots=True)
class Append:
    """What one append writes besides events. `owner` None gives the run back.

    `is_progress`: something arrived for the run, so the workers it lost before do not count.
    """

    events: list[Event]
    status: RunStatus
    owner: str | None
    wake_at: int | None = None
    new_run: NewRun | None = None
    plans: list[tuple[int, str]] = field(default_factory=list)
    snapshots: list[tuple[int, str]] = field(default_factory=list)
    blobs: list[tuple[str, bytes]] = field(default_factory=list)
    signals: list[tuple[UUID, str]] = field(default_factory=list)
    transitions: list[tuple[str, str, int, str, float]] = field(default_factory=list)
    is_progress: bool = False

    @property
    def is_parking(self) -> bool:
        """It gives an unfinished run back."""
        return self.owner is None and not self.status.is_terminal

    @property
    def has_rows(self) -> bool:
        """Whether there is anything to write: rows, or that the run is given back."""
        return bool(self.events or self.signals or self.new_run) or self.owner is None


class Journal:
    """The writers of this process. `commits` counts statements that were sent and succeeded."""

    def __init__(
        self,
        connect: Callable[[], Awaitable[HotConnection]],
        feed: FrameSink,
        make_partitions: Callable[[HotConnection, set[date]], Awaitable[None]],
        *,
        after_commit: Callable[[], None] = lambda: None,
        writers: int = 2,
        metrics: Metrics | None = None,
    ) -> None:
        counted = metrics or Metrics()
        self._writers = [
            Writer(connect, feed, make_partitions, after_commit, counted) for _ in range(writers)
        ]

    @property
    def commits(self) -> int:
        return sum(writer.commits for writer in self._writers)

    async def start(self) -> None:
        for writer in self._writers:
            await writer.start()

    async def close(self) -> None:
        """Commit what is queued, then stop. What can not be committed raises for its callers."""
        await asyncio.gather(*(writer.close() for writer in self._writers))

    def record(self, handle: RunHandle, append: Append) -> asyncio.Future[None]:
        """Queue an append whose events are stamped; the future resolves when it is durable."""
        frames: list[Frame] = []
        rows: list[tuple[int, str, str | None, int | None, str, str]] = []
        size = sum([len(blob) for _, blob in append.blobs])
        for event in append.events:
            body = encode_event(event, handle.text_id, handle.trace_id)
            size += len(body)
            frames.append(frame_of(event.seq, event.type, event.node_id, event.level, body))
            rows.append(
                (event.seq, event.type, event.node_id, event.attempt, event.level, body.decode())
            )
        move = HeadMove(
            run_id=handle.run_id,
            run_day=handle.day,
            epoch=handle.recorded_epoch,
            seq=handle.recorded_seq,
            new_epoch=handle.epoch,
            new_seq=handle.seq,
            status=append.status,
            owner=append.owner,
            wake_at=None if append.wake_at is None else to_datetime(append.wake_at),
            new_run=append.new_run,
            events=rows,
            plans=append.plans,
            snapshots=append.snapshots,
            blobs=append.blobs,
            signals=append.signals,
            transitions=append.transitions,
            is_progress=append.is_progress,
        )
        handle.recorded_epoch, handle.recorded_seq = handle.epoch, handle.seq
        writer = self._writers[handle.run_id.int % len(self._writers)]
        return writer.enqueue(Pending(move, frames, size))
