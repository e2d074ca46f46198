"""Traces as a reading of the journal: a run that came to rest here is told as spans, off the path.

Once a second the runs that came to rest here (`rested.py`) go to an exporter, in a thread of its
own, with the trace context from their rows. Everything is best effort: an exporter that is slow or
away costs traces, which are counted, and nothing else. Nor does one that is well take more than its
share of a core: a batch is followed by a rest as long as its work asks for.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from functools import partial
from uuid import UUID

from app.domain.errors import FlexrunError
from app.journal.frames import Frame, decode_event
from app.journal.rested import Body, RestedRun, RestedRuns, told_before
from app.kit.metrics import Metrics
from app.kit.side_thread import SideThread
from app.kit.waiting import wait_at_most
from app.ports import RunTrace, TraceExporter
from app.store.events import EventReader

log = logging.getLogger("flexrun.tracer")

EVERY_S = 1.0
RUNS_AT_ONCE = 32
LEAVING_S = 2.0
"""How long a process that leaves waits for its last traces."""
CLOSING_S = 0.2
"""How long it waits for an exporter that was given up already to let go."""


@dataclass(frozen=True, slots=True)
class TraceLimits:
    """`sample`: the share of the traces that is exported, chosen by trace id (0 to 1). `cpu_max`:
    the share of one core that an exporter may take."""

    sample: float = 1.0
    cpu_max: float = 0.04


class Tracer:
    """Feeds one exporter."""

    def __init__(
        self, reader: EventReader, exporter: TraceExporter, metrics: Metrics, limits: TraceLimits
    ) -> None:
        self._reader = reader
        self._exporter = exporter
        self._counted = metrics.traced_runs
        self._limits = limits
        self.runs = RestedRuns(reader, self._drop)
        self._closing = asyncio.Event()
        self._thread = SideThread("tracer")
        self._task = asyncio.create_task(self._export_for_ever(), name="tracer")

    def publish(self, run_id: UUID, frames: list[Frame]) -> None:
        """Keep durable frames until their run rests. On the path of every append: no more here."""
        self.runs.publish(run_id, frames)

    def _drop(self, _run: RestedRun) -> None:
        self._counted["dropped"] += 1

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
            while runs := self.runs.take(RUNS_AT_ONCE):
                worked_s = await self._export_and_count(runs)
                await wait_at_most(self._closing, worked_s * (1 / self._limits.cpu_max - 1))

    async def _export_and_count(self, runs: list[RestedRun]) -> float:
        """Seconds of CPU that it took. Whatever goes wrong, the next runs are traced."""
        outcome, worked_s = "failed", 0.0
        sampled: list[tuple[RestedRun, str]] = [(run, "") for run in runs]
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
        self.runs.done(runs)
        return worked_s

    async def _export(self, runs: list[tuple[RestedRun, str]]) -> tuple[bool, float]:
        """Whether they arrived, and the seconds of CPU that it took."""
        found = [(run, context, await self.runs.bodies_of(run)) for run, context in runs]
        return await self._thread.run(partial(_export, self._exporter, found))


def _export(
    exporter: TraceExporter, found: list[tuple[RestedRun, str, list[Body]]]
) -> tuple[bool, float]:
    """In the thread: read the events and hand them over. Whether they arrived, and CPU seconds."""
    began = time.thread_time()
    arrived = exporter.export([_trace_of(*one) for one in found])
    return arrived, time.thread_time() - began


def _trace_of(run: RestedRun, traceparent: str, bodies: list[Body]) -> RunTrace:
    events = [decode_event(body) for _, body in bodies]
    return RunTrace(str(run.run_id), traceparent, events, told_seq=told_before(events))


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
