"""Traces as a reading of the journal: a run that came to rest here is told as spans, off the path.

Once a second the runs that came to rest here (`rested.py`) go to an exporter, in a thread of its
own, with the trace context from their rows. Everything is best effort: an exporter that is slow or
away costs traces, which are counted, and nothing else. Nor does one that is well take more than its
share of a core from a service that is busy (`Pace`).
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
CORE_IN_USE = 0.6
"""A service that uses less of a core than this, exporters and all, is not busy."""
REST_S = 0.25
"""How long a rest lasts before it is asked again whether the service is still busy."""
SEEN_S = 0.001
"""A shorter rest does not show it, and is not taken."""


@dataclass(frozen=True, slots=True)
class TraceLimits:
    """`sample`: the share of the traces that is exported, chosen by trace id (0 to 1). `cpu_share`:
    the share of one core that an exporter may take of a service that is busy."""

    sample: float = 1.0
    cpu_share: float = 0.01


class Pace:
    """How long an exporter rests after a batch.

    The loop and the exporters share one core, as Python has it. Up to `CORE_IN_USE` of it in all an
    exporter takes what it needs, so that a service with time to spare traces every run; above that,
    `cpu_share` is all that it takes. How busy the service is shows while the exporter rests.
    """

    def __init__(self, cpu_share: float) -> None:
        self._cpu_share = cpu_share
        self._share = max(cpu_share, CORE_IN_USE)
        self._owed_s = 0.0
        self._since = 0.0, 0.0

    def worked(self, worked_s: float) -> None:
        """A batch took so many seconds of CPU, and the rest begins."""
        self._owed_s += worked_s
        self._since = time.monotonic(), time.process_time()

    def rest_s(self) -> float:
        """Seconds to wait before asking again; 0 when the next batch may go."""
        wall_s, cpu_s = self._since
        self._since = time.monotonic(), time.process_time()
        rested_s = self._since[0] - wall_s
        if rested_s >= SEEN_S:
            busy = (self._since[1] - cpu_s) / rested_s
            self._share = max(self._cpu_share, CORE_IN_USE - busy)
        per_work = max(1 / self._share - 1, 1e-9)
        self._owed_s = max(self._owed_s - rested_s / per_work, 0.0)
        rest_s = self._owed_s * per_work
        return min(rest_s, REST_S) if rest_s >= SEEN_S else 0.0  # what is less stays owed


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
        is_last, pace = False, Pace(self._limits.cpu_share)
        while not is_last:
            is_last = await wait_at_most(self._closing, EVERY_S)
            while runs := self.runs.take(RUNS_AT_ONCE):
                pace.worked(await self._export_and_count(runs))
                while (rest_s := pace.rest_s()) and not self._closing.is_set():
                    await wait_at_most(self._closing, rest_s)

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
