"""Following runs: frames from memory while they are fresh, from the journal otherwise.

A stream is a cursor, not a queue. Every followed run has one `Channel` with a ring of its newest
frames; any number of streams read it at their own pace and page from the journal when they fell
behind. The committer pushes frames in (`Feed.publish`); runs that another process drives are
looked after by one tailer, which asks for what is new in all of them at once, on a wake-up or every
500 ms. The ring takes a frame only if its seq follows the last one, so whoever comes second with
the same rows changes nothing.

Deltas, the texts that calls say while they are under way, have a ring of their own beside it. They
are in no journal: who is too late for one goes without.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

from app.domain.errors import FlexrunError
from app.domain.events import TERMINAL_EVENTS, EventType, Level
from app.journal.delta_ring import DeltaRing, PlacedDelta
from app.journal.frames import Frame, delta_frame, frame_of, written_at
from app.kit.clock import now_ms
from app.kit.metrics import Metrics
from app.kit.waiting import wait_at_most
from app.ports import Delta
from app.store.events import EventReader, Tail

log = logging.getLogger("flexrun.feed")

RESTING_EVENTS = TERMINAL_EVENTS | {EventType.RUN_PAUSED}
RING_FRAMES_MAX = 1_024
RING_BYTES_MAX = 4 * 1024 * 1024
PAGE_ROWS_MAX = 1_000
PAGE_BYTES_MAX = 256 * 1024
TAILS_MAX = 32  # runs that are read at once, each up to the bytes of a page
POLL_S = 0.5
DELTA = "delta"
"""What deltas are called in a filter of types."""
_ENDS_SPEECH = frozenset(
    {
        EventType.LLM_RESPONSE,
        EventType.NODE_DONE,
        EventType.NODE_FAILED,
        EventType.NODE_RETRY,
        EventType.NODE_BLOCKED,
        EventType.NODE_SKIPPED,
    }
)


@dataclass(frozen=True, slots=True)
class Filter:
    """Which frames a reader wants; an empty set wants all. The terminal event passes always.

    A delta is of the type `delta`, of its node, and of the level INFO.
    """

    types: frozenset[str] = frozenset()
    nodes: frozenset[str] = frozenset()
    levels: frozenset[str] = frozenset()

    @property
    def is_open(self) -> bool:
        return not (self.types or self.nodes or self.levels)

    def passes(self, frame: Frame) -> bool:
        if frame.is_terminal:
            return True
        return (
            (not self.types or frame.type in self.types)
            and (not self.nodes or frame.node_id in self.nodes)
            and (not self.levels or frame.level in self.levels)
        )

    @property
    def takes_deltas(self) -> bool:
        """Whether deltas can pass at all."""
        return (not self.types or DELTA in self.types) and (
            not self.levels or Level.INFO in self.levels
        )

    def passes_delta(self, delta: PlacedDelta) -> bool:
        """Only asked where `takes_deltas`."""
        return not self.nodes or delta.node_id in self.nodes


class Channel:
    """The newest frames of one followed run. `last` is the seq of the newest frame seen."""

    __slots__ = (
        "_bytes",
        "_joined",
        "_waiters",
        "deltas",
        "ended",
        "followers",
        "frames",
        "is_live",
        "last",
        "listeners",
        "run_id",
    )

    def __init__(self, run_id: UUID, last: int) -> None:
        self.run_id = run_id
        self.last = last
        self.frames: list[Frame] = []
        self.deltas: DeltaRing | None = None  # made for the first one: most runs say nothing
        self.ended = False
        self.followers = 0
        self.listeners = 0  # those of the followers who take deltas
        self.is_live = False  # up to date once: what comes now is new, not read late
        self._waiters: dict[asyncio.Future[bool], None] = {}
        self._bytes = 0
        self._joined: tuple[int, int, bytes] | None = None

    def push(self, frames: list[Frame]) -> bool:
        """Take frames that follow `last`. False: there is a gap, page from the journal."""
        if frames and frames[0].seq > self.last + 1:
            return False
        fresh = [frame for frame in frames if frame.seq > self.last]
        if not fresh:
            return True
        self._trim(len(fresh))
        self.frames += fresh
        self._bytes += sum([len(frame.data) for frame in fresh])
        self.last = fresh[-1].seq
        self.ended = fresh[-1].is_terminal
        self._joined = None
        self.wake()
        return True

    def tell(self, delta: Delta) -> None:
        """Place a delta behind all events that are known here or were when it was said."""
        if self.ended or self._is_late(delta):
            return
        if self.deltas is None:
            self.deltas = DeltaRing()
        after = max(delta.seq, self.last)
        self.deltas.push(PlacedDelta(after, delta.node_id, delta_frame(delta)))
        if after == self.last:
            self.wake()

    def _is_late(self, delta: Delta) -> bool:
        """Whether the text has ended already: from other processes events may come first."""
        for frame in reversed(self.frames):
            if frame.seq <= delta.seq:
                return False
            if frame.type == EventType.RUN_RECOVERED or (
                frame.node_id == delta.node_id and frame.type in _ENDS_SPEECH
            ):
                return True
        return delta.seq < self.last - len(self.frames)  # what came between is not known here

    def _trim(self, room: int) -> None:
        """Make room for new frames: the ring is bounded in number and in bytes."""
        drop = 0
        while drop < len(self.frames) and (
            self._bytes > RING_BYTES_MAX or len(self.frames) - drop + room > RING_FRAMES_MAX
        ):
            self._bytes -= len(self.frames[drop].data)
            drop += 1
        del self.frames[:drop]

    @property
    def rests(self) -> bool:
        """Nothing more comes by itself: the run ended, or waits for a human."""
        return bool(self.frames) and self.frames[-1].type in RESTING_EVENTS

    def skip_to(self, seq: int) -> None:
        """The rows up to `seq` do not exist any more: whoever reads them must learn that."""
        self.frames.clear()
        self._bytes = 0
        self.last = seq
        self.wake()

    def after(self, cursor: int) -> list[Frame] | None:
        """Frames behind the cursor; None when the ring does not reach back that far."""
        behind = self.last - cursor
        if behind <= 0:
            return []
        if behind > len(self.frames):
            return None
        return self.frames[-behind:]

    def joined_after(self, cursor: int) -> bytes | None:
        """The same as bytes. Streams that wait together share one join."""
        if self._joined is not None and self._joined[0] == cursor and self._joined[1] == self.last:
            return self._joined[2]
        frames = self.after(cursor)
        if frames is None:
            return None
        data = b"".join([frame.data for frame in frames])
        self._joined = (cursor, self.last, data)
        return data

    def wait(self) -> asyncio.Future[bool]:
        """Resolves to True when something new is there."""
        waiter: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiters[waiter] = None
        return waiter

    def forget(self, waiter: asyncio.Future[bool]) -> None:
        """A stream that stopped waiting for another reason: a heartbeat, or it left."""
        self._waiters.pop(waiter, None)

    def wake(self) -> None:
        waiters, self._waiters = self._waiters, {}
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(True)


class Feed:
    """All followed runs of this process, and the tailer that keeps foreign ones fresh."""

    def __init__(self, reader: EventReader, metrics: Metrics | None = None) -> None:
        self._reader = reader
        self.metrics = metrics or Metrics()
        self._channels: dict[UUID, Channel] = {}
        self._nudge = asyncio.Event()
        self.readers = 0
        self.listeners = 0
        self.on_listener: Callable[[], None] = lambda: None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._tail(), name="feed-tailer")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def publish(self, run_id: UUID, frames: list[Frame]) -> None:
        """Frames that are durable now. Runs that nobody follows cost one dictionary look-up."""
        channel = self._channels.get(run_id)
        if channel is not None and not channel.push(frames):
            self._nudge.set()

    def tell(self, delta: Delta) -> None:
        """Text that is said just now, for the streams that follow its run, if there are any."""
        channel = self._channels.get(delta.run_id)
        if channel is not None and channel.listeners:
            channel.tell(delta)

    def has_listeners(self, run_id: UUID) -> bool:
        """Whether a stream of this process takes the deltas of a run."""
        channel = self._channels.get(run_id)
        return channel is not None and channel.listeners > 0

    def nudge(self) -> None:
        """Something was committed by another process: look at the heads now."""
        self._nudge.set()

    def wake_all(self) -> None:
        """Make every stream look up, because the process is draining."""
        for channel in self._channels.values():
            channel.wake()

    def enter(self, run_id: UUID, last: int, *, listens: bool = False) -> Channel:
        """The channel of a run, from now on kept fresh. `last` is a seq the reader knows of.

        Who `listens` takes deltas, too, and says so again when it leaves.
        """
        channel = self._channels.get(run_id)
        if channel is None:
            channel = self._channels[run_id] = Channel(run_id, last)
        channel.followers += 1
        self.readers += 1
        if listens:
            channel.listeners += 1
            self.listeners += 1
            self.on_listener()
        return channel

    def leave(self, channel: Channel, *, listens: bool = False) -> None:
        """A reader is gone; the last one takes the channel with it."""
        channel.followers -= 1
        self.readers -= 1
        if listens:
            channel.listeners -= 1
            self.listeners -= 1
        if channel.followers == 0:
            del self._channels[channel.run_id]

    async def page(self, channel: Channel, after: int) -> list[Frame]:
        """Some stored frames behind `after`, bounded; the ring takes what is new to it."""
        tail = (await self._tails({channel.run_id: after})).get(channel.run_id)
        frames = [] if tail is None else _frames_of(tail)
        channel.push(frames)
        return frames

    async def _tail(self) -> None:
        """Bring every channel that is behind its head up to date, for ever."""
        while True:
            await wait_at_most(self._nudge, POLL_S)
            self._nudge.clear()
            try:
                await self._catch_up()
            except FlexrunError as error:
                log.warning("following runs is delayed: %s", error.detail)
            except Exception:
                # All streams of foreign runs hang on this task: it must outlive whatever it meets.
                log.exception("following runs failed")
                await asyncio.sleep(POLL_S)

    async def _catch_up(self) -> None:
        while asked := {r: c for r, c in self._channels.items() if not c.ended}:
            tails = await self._tails({run_id: channel.last for run_id, channel in asked.items()})
            for run_id, tail in tails.items():
                self._take(asked[run_id], tail)
            if len(tails) < TAILS_MAX and all(asked[r].last >= t.head for r, t in tails.items()):
                for channel in asked.values():
                    channel.is_live = True
                return

    async def _tails(self, after: dict[UUID, int]) -> dict[UUID, Tail]:
        return await self._reader.tails(
            after, runs_max=TAILS_MAX, rows_max=PAGE_ROWS_MAX, bytes_max=PAGE_BYTES_MAX
        )

    def _take(self, channel: Channel, tail: Tail) -> None:
        frames, known = _frames_of(tail), channel.last
        channel.push(frames)
        if not frames or frames[0].seq > channel.last + 1:
            # Retention took the rows. The streams find the gap when they page themselves.
            channel.skip_to(tail.head)
        elif channel.is_live and channel.last > known:
            fresh = next(frame for frame in frames if frame.seq > known)
            self.metrics.wake_latency.observe(max(now_ms() - written_at(fresh), 0) / 1000)


def _frames_of(tail: Tail) -> list[Frame]:
    return [frame_of(r.seq, r.type, r.node_id, r.level, r.body.encode()) for r in tail.rows]
