"""Traces as a reading of the journal: a run that came to rest here is told as spans, off the path.

A tracer is a sink of frames beside the feed. On the path of a run it only keeps the frames, in
bounded memory. Once a second the runs whose end this process wrote go to an exporter, in a thread
of its own, with the trace context from their rows; events that are not at hand (the run was taken
over, or memory was short) are read from the journal. The one process that wrote the last event of
a run exports it, so a run is exported once. Everything is best effort: an exporter that is slow or
away costs traces, which are counted, and nothing else. Nor does one that is well take more than its
share of a core: a batch is followed by a rest as long as its work asks for.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from uuid import UUID

from app.domain.errors import FlexrunError
from app.domain.events import EventType
from app.journal.feed import RESTING_EVENTS
from app.journal.frames import Frame, body_of, decode_event
from app.kit.metrics import Metrics
from app.kit.side_thread import SideThread
from app.kit.waiting import wait_at_most
from app.ports import RunTrace, TraceExporter
from app.store.events import EventReader

log = logging.getLogger("flexrun.tracer")

EVERY_S = 1.0
RUNS_AT_ONCE = 32
RUNS_WAITING_MAX = 2_000
RUNS_UNDER_WAY_MAX = 10_000
BYTES_MAX = 64 * 1024 * 1024
PAGE_ROWS = 1_000
LEAVING_S = 2.0
"""How long a process that leaves waits for its last traces."""
CLOSING_S = 0.2
"""How long it waits for an exporter that was given up already to let go."""


@dataclass(slots=True)
class _Rested:
    """A run at rest, up to `seq`; `frames` may be incomplete."""

    run_id: UUID
    seq: int
    frames: list[Frame]


@dataclass(frozen=True, slots=True)
class TraceLimits:
    """`sample`: the share of the traces that is exported, chosen by trace id (0 to 1). `cpu_max`:
    the share of one core that an exporter may take."""

    sample: float = 1.0
    cpu_max: float = 0.05


class Tracer:
    """Feeds one exporter."""

    def __init__(
        self, reader: EventReader, exporter: TraceExporter, metrics: Metrics, limits: TraceLimits
    ) -> None:
        self._reader = reader
        self._exporter = exporter
        self._counted = metrics.traced_runs
        self._limits = limits
        self._under_way: dict[UUID, list[Frame]] = {}
        self._rested: deque[_Rested] = deque()
        self._bytes = 0
        self._closing = asyncio.Event()
        self._thread = SideThread("tracer")
        self._task = asyncio.create_task(self._export_for_ever(), name="tracer")

    def publish(self, run_id: UUID, frames: list[Frame]) -> None:
        """Keep durable frames until their run rests. On the path of every append: no more here."""
        if not frames:
            return
        kept = self._under_way.get(run_id)
        if kept is None:
            kept = self._under_way[run_id] = []
        kept += frames
        for frame in frames:
            self._bytes += len(frame.data)
        if frames[-1].type in RESTING_EVENTS:
            del self._under_way[run_id]
            self._rest(_Rested(run_id, frames[-1].seq, kept))
        elif self._bytes > BYTES_MAX or len(self._under_way) > RUNS_UNDER_WAY_MAX:
            self._forget_oldest()

    def _rest(self, run: _Rested) -> None:
        if len(self._rested) >= RUNS_WAITING_MAX:
            self._forget(run.frames)
            self._counted["dropped"] += 1
            return
        if self._bytes > BYTES_MAX:
            self._forget(run.frames)
            run.frames = []
        self._rested.append(run)

    def _forget_oldest(self) -> None:
        """The journal still has what we let go of: it is read when the run rests."""
        self._forget(self._under_way.pop(next(iter(self._under_way))))

    def _forget(self, frames: list[Frame]) -> None:
        self._bytes -= sum([len(frame.data) for frame in frames])

    async def aclose(self) -> None:
        """Export what rests, for as long as a process that leaves may take, then stop."""
        self._closing.set()
        _, late = await asyncio.wait([self._task], timeout=LEAVING_S)
        self._thread.stop()
        closer = SideThread("tracer-close")  # the other one may be in an export that hangs
        closing = asyncio.ensure_future(closer.run(self._exporter.close))
        _, also_late = await asyncio.wait([closing], timeout=CLOSING_S if late else LEAVING_S)
        closer.stop()
        for task in (*late, *also_late):
            task.cancel()
        await asyncio.gather(self._task, closing, return_exceptions=True)

    # --- off the path -----------------------------------------------------------------------------

    async def _export_for_ever(self) -> None:
        is_last = False
        while not is_last:
            is_last = await wait_at_most(self._closing, EVERY_S)
            while self._rested:
                count = min(len(self._rested), RUNS_AT_ONCE)
                worked_s = await self._export_and_count(
                    [self._rested.popleft() for _ in range(count)]
                )
                await wait_at_most(self._closing, worked_s * (1 / self._limits.cpu_max - 1))

    async def _export_and_count(self, runs: list[_Rested]) -> float:
        """Seconds of CPU that it took. Whatever goes wrong, the next runs are traced."""
        outcome, worked_s = "failed", 0.0
        sampled: list[tuple[_Rested, str]] = [(run, "") for run in runs]
        try:
            contexts = await self._reader.traceparents([run.run_id for run in runs])
            sampled = [(run, contexts.get(run.run_id, "")) for run in runs]
            sampled = [found for found in sampled if is_sampled(found[1], self._limits.sample)]
            if sampled:
                arrived, worked_s = await self._export(sampled)
                outcome = "exported" if arrived else "failed"
        except FlexrunError as error:
            log.warning("%d runs are not traced: %s", len(sampled), error.code)
        except Exception:
            log.exception("%d runs are not traced", len(sampled))
        self._counted["unsampled"] += len(runs) - len(sampled)
        self._counted[outcome] += len(sampled)
        for run in runs:
            self._forget(run.frames)
        return worked_s

    async def _export(self, runs: list[tuple[_Rested, str]]) -> tuple[bool, float]:
        """Whether they arrived, and the seconds of CPU that it took."""
        found = [(run, context, await self._bodies_of(run)) for run, context in runs]
        return await self._thread.run(partial(_export, self._exporter, found))

    async def _bodies_of(self, run: _Rested) -> list[bytes]:
        """All events up to where the run rests; from the journal when any is not at hand."""
        if len(run.frames) == run.seq:
            return [body_of(frame) for frame in run.frames]
        bodies: list[bytes] = []
        while len(bodies) < run.seq:
            limit = min(PAGE_ROWS, run.seq - len(bodies))
            rows = await self._reader.page(run.run_id, len(bodies), limit)
            if not rows:
                break  # retention was faster
            bodies += [row.body.encode() for row in rows]
        return bodies


def _export(
    exporter: TraceExporter, found: list[tuple[_Rested, str, list[bytes]]]
) -> tuple[bool, float]:
    """In the thread: read the events and hand them over. Whether they arrived, and CPU seconds."""
    began = time.thread_time()
    arrived = exporter.export([_trace_of(*one) for one in found])
    return arrived, time.thread_time() - began


def _trace_of(run: _Rested, traceparent: str, bodies: list[bytes]) -> RunTrace:
    events = [decode_event(body) for body in bodies]
    rests = [event.seq for event in events[:-1] if event.type is EventType.RUN_PAUSED]
    return RunTrace(str(run.run_id), traceparent, events, told_seq=rests[-1] if rests else 0)


def is_sampled(traceparent: str, share: float) -> bool:
    """Whether a trace is exported: the caller did not decline, and its id is among the share.

    By the lower 64 bits of the trace id, as `TraceIdRatioBased` of OpenTelemetry decides, so that
    all services with the same share keep the same traces.
    """
    parts = traceparent.split("-")
    if len(parts) != 4:
        return False
    _, trace_id, _, flags = parts
    return int(flags, 16) & 1 == 1 and int(trace_id[16:], 16) < int(share * 2**64)
