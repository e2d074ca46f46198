"""One connection of the journal, and the queue of appends that it commits next.

Everything that waits when a commit is over goes into the next one, for all runs of the writer, as
one statement (`store/append.py`). An answer that was lost, or that says that rows are missing, is
settled by asking the heads: an append is in the journal, or another epoch is, or it is sent again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import date
from typing import Protocol
from uuid import UUID

from app.journal.errors import HeadDiverged, JournalClosed, JournalRejected, KeyTaken, LeaseLost
from app.journal.frames import Frame
from app.kit import failpoints
from app.kit.metrics import Metrics
from app.store.append import HeadMove, append_batch, is_missing_partition, is_out_of_time
from app.store.database import REFUSED, TRANSIENT, HotConnection
from app.store.heads import HeadRow, event_body, read_heads, run_of_key

log = logging.getLogger("flexrun.journal")

BATCH_RUNS_MAX = 128
BATCH_BYTES_MAX = 8 << 20
"""Event bodies and blobs of a batch: what a slow disk takes within a statement's time limit."""

RECONNECT_DELAY_S = 0.05
RECONNECT_DELAY_MAX_S = 1.0


class FrameSink(Protocol):
    """Where frames go once they are durable: the feed."""

    def publish(self, run_id: UUID, frames: list[Frame]) -> None: ...


@dataclass(slots=True)
class Pending:
    """One run's waiting append: merged from one or more `record` calls."""

    move: HeadMove
    frames: list[Frame]
    size: int
    waiters: list[asyncio.Future[None]] = field(default_factory=list)
    settled: bool = False


class Writer:
    """One connection and the queue of appends that it will commit next."""

    def __init__(
        self,
        connect: Callable[[], Awaitable[HotConnection]],
        feed: FrameSink,
        make_partitions: Callable[[HotConnection, set[date]], Awaitable[None]],
        after_commit: Callable[[], None],
        metrics: Metrics,
    ) -> None:
        self._connect = connect
        self._after_commit = after_commit
        self._metrics = metrics
        self._feed = feed
        self._make_partitions = make_partitions
        self._connection: HotConnection | None = None
        self._queue: dict[UUID, Pending] = {}
        self._wake = asyncio.Event()
        self._closing = False
        self._task: asyncio.Task[None] | None = None
        self.commits = 0

    async def start(self) -> None:
        self._connection = await self._connect()
        self._task = asyncio.create_task(self._run(), name="journal-writer")

    async def close(self) -> None:
        self._closing = True
        self._wake.set()
        if self._task is not None:
            try:
                async with asyncio.timeout(5):
                    await self._task
            except TimeoutError:
                log.error("the journal could not be written before shutdown")
        for pending in self._queue.values():
            _fail(pending, JournalClosed("shutting down"))
        if self._connection is not None and not self._connection.is_closed():
            await self._connection.close(timeout=2)

    def enqueue(self, pending: Pending) -> asyncio.Future[None]:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._closing:
            waiter.set_exception(JournalClosed("shutting down"))
            return waiter
        queued = self._queue.get(pending.move.run_id)
        if queued is None:
            self._queue[pending.move.run_id] = queued = pending
        else:
            _merge(queued, pending)
        queued.waiters.append(waiter)
        self._wake.set()
        return waiter

    async def _run(self) -> None:
        while True:
            if not self._queue:
                if self._closing:
                    return
                self._wake.clear()
                await self._wake.wait()
                continue
            batch = self._take_batch()
            try:
                await self._commit(batch)
            except Exception as error:  # a writer that died would hang every run of the process
                log.exception("a batch failed in an unforeseen way")
                for pending in batch:
                    if not pending.settled:
                        _fail(pending, HeadDiverged(f"unforeseen: {type(error).__name__}"))

    def _take_batch(self) -> list[Pending]:
        """Who waits longest, as many as one statement can carry in its time: one run at least."""
        batch: list[Pending] = []
        size = 0
        for pending in self._queue.values():
            size += pending.size
            if batch and (len(batch) == BATCH_RUNS_MAX or size > BATCH_BYTES_MAX):
                break
            batch.append(pending)
        for pending in batch:
            del self._queue[pending.move.run_id]
        return batch

    async def _commit(self, batch: list[Pending]) -> None:
        """Send the batch until every append in it is durable or has failed."""
        delay = RECONNECT_DELAY_S
        while batch:
            try:
                landed = await self._send(batch)
                asked = [p for p in batch if p.move.run_id not in landed]
                heads = await self._heads_of(asked) if asked else {}
            except TRANSIENT as error:
                log.warning("the journal is out of reach (%s), trying again", type(error).__name__)
                batch = await self._after_lost_answer(batch, delay)
                if is_out_of_time(error) and len(batch) > 1:
                    await self._commit_one_by_one(batch)  # together they may never land
                    return
                delay = min(delay * 2, RECONNECT_DELAY_MAX_S)
                continue
            except REFUSED as error:
                batch = await self._after_refusal(batch, error)
                continue
            batch = await self._settle(asked, heads)

    async def _commit_one_by_one(self, batch: list[Pending]) -> None:
        for pending in batch:
            await self._commit([pending])

    async def _send(self, batch: list[Pending]) -> set[UUID]:
        """One statement. What landed is published and its callers go on."""
        connection = self._connection
        if connection is None or connection.is_closed():
            self._connection = connection = await self._session()
        failpoints.hit("commit.before_send")
        landed = await append_batch(connection, [pending.move for pending in batch])
        failpoints.hit("commit.after_durable")
        self.commits += 1
        self._metrics.flush_runs.observe(len(landed))
        self._metrics.flush_events.observe(sum([len(pending.frames) for pending in batch]))
        self._after_commit()
        for pending in batch:
            if pending.move.run_id in landed:
                self._succeed(pending)
        return landed

    async def _session(self) -> HotConnection:
        """A new session. That there is none says nothing about the batch that waits for it."""
        try:
            return await self._connect()
        except (TimeoutError, *REFUSED) as error:
            log.warning("the journal gets no session (%s)", type(error).__name__)
            raise ConnectionError("no session") from error

    def _succeed(self, pending: Pending) -> None:
        failpoints.hit("publish.before")
        self._feed.publish(pending.move.run_id, pending.frames)
        failpoints.hit("publish.after")
        events = self._metrics.events
        for frame in pending.frames:
            events[frame.type] += 1
        for _, _, _, kind, _ in pending.move.transitions:
            self._metrics.breaker_transitions[kind] += 1
        pending.settled = True
        for waiter in pending.waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def _heads_of(self, batch: list[Pending]) -> dict[UUID, HeadRow]:
        assert self._connection is not None
        return await read_heads(self._connection, [pending.move.run_id for pending in batch])

    async def _settle(self, asked: list[Pending], heads: dict[UUID, HeadRow]) -> list[Pending]:
        """Zero rows is a question, not an answer: ask the head. Returns what must be sent again."""
        again: list[Pending] = []
        for pending in asked:
            move, head = pending.move, heads.get(pending.move.run_id)
            if head is None:
                if not await self._key_taken(pending):
                    again.append(pending)
            elif await self._was_committed(pending, head):
                self._succeed(pending)
            elif head.epoch != move.epoch:
                if move.epoch == 0:  # never ours: another worker was first to claim it
                    log.info("run %s was claimed from the queue elsewhere", move.run_id)
                else:
                    self._metrics.stale_writes += 1
                _fail(pending, LeaseLost(f"epoch {head.epoch}, ours was {move.epoch}"))
            elif head.seq == move.seq and move.new_run is None:
                again.append(pending)
            else:
                log.critical("head of run %s is at %s, ours at %s", move.run_id, head, move.seq)
                _fail(pending, HeadDiverged(f"head at seq {head.seq}, expected {move.seq}"))
        return again

    async def _was_committed(self, pending: Pending, head: HeadRow) -> bool:
        """Whether this very append is in the journal: head and last event are ours.

        The owner as well: another worker may have claimed the run under the same epoch, from the
        queue, and have written the same event in the same millisecond.
        """
        move = pending.move
        ours = (move.new_epoch, move.new_seq, move.owner)
        if (head.epoch, head.seq, head.owner) != ours or not move.events:
            return False
        assert self._connection is not None
        stored = await event_body(self._connection, move.run_day, move.run_id, move.new_seq)
        return stored == move.events[-1][-1]

    async def _key_taken(self, pending: Pending) -> bool:
        new_run = pending.move.new_run
        if new_run is None or new_run.idempotency is None:
            return False
        assert self._connection is not None
        route, key, _ = new_run.idempotency
        taken = await run_of_key(self._connection, new_run.tenant_id, route, key)
        if taken is None:
            return False
        _fail(pending, KeyTaken(key))
        return True

    async def _after_lost_answer(self, batch: list[Pending], delay: float) -> list[Pending]:
        """The statement may or may not have been committed. Reconnect, then ask every head."""
        while not self._closing:
            self._drop_connection()
            await asyncio.sleep(delay)
            try:
                self._connection = await self._connect()
                unsettled = [pending for pending in batch if not pending.settled]
                return await self._settle(unsettled, await self._heads_of(unsettled))
            except (*TRANSIENT, *REFUSED):
                delay = min(delay * 2, RECONNECT_DELAY_MAX_S)
        for pending in batch:
            if not pending.settled:
                _fail(pending, JournalClosed("shutting down"))
        return []

    def _drop_connection(self) -> None:
        """Whatever state it is in after an error: a new one is cheap and in a known state."""
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None

    async def _after_refusal(self, batch: list[Pending], error: Exception) -> list[Pending]:
        """The database refused the data: find the culprit by sending run by run."""
        if is_missing_partition(error):
            assert self._connection is not None
            await self._make_partitions(self._connection, {p.move.run_day for p in batch})
            return batch
        if len(batch) > 1:
            log.warning("a batch was refused (%s), sending run by run", type(error).__name__)
            await self._commit_one_by_one(batch)
            return []
        log.error("an append of run %s was refused: %s", batch[0].move.run_id, type(error).__name__)
        _fail(batch[0], JournalRejected(type(error).__name__))
        return []


def _merge(queued: Pending, later: Pending) -> None:
    """Two waiting appends of one run become one: the first `(epoch, seq)`, the last of the rest."""
    move, more = queued.move, later.move
    move.new_epoch, move.new_seq = more.new_epoch, more.new_seq
    move.status, move.owner, move.wake_at = more.status, more.owner, more.wake_at
    move.events += more.events
    move.plans += more.plans
    move.snapshots += more.snapshots
    move.blobs += more.blobs
    move.signals += more.signals
    move.transitions += more.transitions
    move.is_progress |= more.is_progress
    queued.frames += later.frames
    queued.size += later.size


def _fail(pending: Pending, error: Exception) -> None:
    pending.settled = True
    for waiter in pending.waiters:
        if not waiter.done():
            waiter.set_exception(error)
