"""Traces as a reading of the journal: a run that came to rest here is told as spans, off the path.

Once a second the runs that came to rest here (`rested.py`) go to an exporter, with the trace
context from their rows. Everything is best effort: an exporter that is slow or away costs traces,
which are counted, and nothing else. Nor does one that is well take more than its share of a core
from a service that is busy (`Pace`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from uuid import UUID

from app.domain.errors import FlexrunError
from app.journal.frames import Frame
from app.journal.rested import RestedRun, RestedRuns
from app.kit.metrics import Metrics
from app.kit.waiting import wait_at_most
from app.ports import RunTrace, TraceExporter
from app.store.events import EventReader

log = logging.getLogger("flexrun.tracer")

EVERY_S = 1.0
RUNS_AT_ONCE = 32
LEAVING_S = 2.0
"""How long a process that leaves waits for its last traces."""
CORE_IN_USE = 0.75
"""How much of a core a service and an exporter may use before the service counts as busy."""
LOOK_S = 0.1
"""How long is looked at how busy the service is, and how long a rest lasts until the next look. A
shorter time shows nothing, as every loop has idle moments, and is no rest."""


@dataclass(frozen=True, slots=True)
class TraceLimits:
    """`sample`: the share of the traces that is exported, chosen by trace id (0 to 1). `cpu_share`:
    the share of one core that an exporter may take of a service that is busy."""

    sample: float = 1.0
    cpu_share: float = 0.02


class Pace:
    """How long an exporter rests after a batch.

    What the service leaves of `CORE_IN_USE`, an exporter takes as it needs it, so that a service
    with time to spare traces every run; from a busy one it takes `cpu_share` and no more. Until it
    was looked at, a service counts as busy.
    """

    def __init__(self, cpu_share: float) -> None:
        self._cpu_share = cpu_share
        self._share = cpu_share
        self._owed_s = 0.0
        self._paid_at = time.monotonic()
        self._seen_at = self._paid_at, time.process_time()

    def worked(self, worked_s: float) -> None:
        """A batch took so many seconds of CPU, in the exporter's own process."""
        self._owed_s += worked_s

    def rest_s(self) -> float:
        """Seconds to wait before asking again; 0 when the next batch may go."""
        now = time.monotonic()
        self._owed_s = max(self._owed_s - (now - self._paid_at) * self._share, 0.0)
        self._paid_at = now
        self._look(now)
        rest_s = self._owed_s / self._share
        return LOOK_S if rest_s >= LOOK_S else 0.0  # what is less stays owed

    def _look(self, now: float) -> None:
        """How busy was the service since the last look?"""
        since, cpu_s = self._seen_at
        if now - since >= LOOK_S:
            self._seen_at = now, time.process_time()
            busy = (self._seen_at[1] - cpu_s) / (now - since)
            self._share = max(self._cpu_share, CORE_IN_USE - busy)


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
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        await self._exporter.aclose()

    # --- off the path -----------------------------------------------------------------------------

    async def _export_for_ever(self) -> None:
        is_last = False
        while not is_last:
            is_last = await wait_at_most(self._closing, EVERY_S)
            pace = Pace(self._limits.cpu_share)
            while runs := self.runs.take(RUNS_AT_ONCE):
                pace.worked(await self._export_and_count(runs))
                while (rest_s := pace.rest_s()) and not self._closing.is_set():
                    await wait_at_most(self._closing, rest_s)

    async def _export_and_count(self, runs: list[RestedRun]) -> float:
        """Seconds of CPU that it took. Whatever goes wrong, the next runs are traced.

        An export that is cut off when the service leaves has failed, too.
        """
        outcome, worked_s = "failed", 0.0
        sampled: list[tuple[RestedRun, str]] = [(run, "") for run in runs]
        try:
            contexts = await self._reader.traceparents([run.run_id for run in runs])
            sampled = [(run, contexts.get(run.run_id, "")) for run in runs]
            sampled = [found for found in sampled if is_sampled(found[1], self._limits.sample)]
            if sampled:
                traces = [await self._trace_of(run, context) for run, context in sampled]
                exported = await self._exporter.export(traces)
                outcome = "exported" if exported.arrived else "failed"
                worked_s = exported.cpu_s
        except FlexrunError as error:
            log.warning("%d runs are not traced: %s", len(sampled), error.code)
        except Exception:
            log.exception("%d runs are not traced", len(sampled))
        finally:
            self._counted["unsampled"] += len(runs) - len(sampled)
            self._counted[outcome] += len(sampled)
            self.runs.done(runs)
        return worked_s

    async def _trace_of(self, run: RestedRun, traceparent: str) -> RunTrace:
        bodies = [body for _, body in await self.runs.bodies_of(run)]
        return RunTrace(str(run.run_id), traceparent, bodies)


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
