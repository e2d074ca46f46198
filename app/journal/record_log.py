"""Records of runs as lines of the log: calls of models, who gave the answers, where the time went.

A reading of the journal, off unless one of FLEXRUN_LOG_GENERATIONS, FLEXRUN_LOG_FALLBACKS and
FLEXRUN_LOG_LATENCIES is set. Once a second the runs that came to rest here (`rested.py`) are read,
in a thread. `docs/RECORDS.md` says what the lines hold.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from functools import partial
from uuid import UUID

import orjson

from app.domain.errors import FlexrunError
from app.domain.event_json import decode_event
from app.domain.events import rested_before
from app.domain.record_shapes import RecordKind
from app.journal.frames import Frame
from app.journal.rested import Body, RestedRun, RestedRuns
from app.journal.run_records import READ, records_of
from app.kit.metrics import Metrics
from app.kit.side_thread import SideThread
from app.kit.waiting import wait_at_most
from app.store.events import EventReader

log = logging.getLogger("flexrun.records")

EVERY_S = 1.0
RUNS_AT_ONCE = 32
LEAVING_S = 2.0


@dataclass(frozen=True, slots=True)
class RecordsWanted:
    """Which kinds are written, and whether models are configured in this process."""

    kinds: frozenset[RecordKind]
    has_models: bool


class RecordLog:
    """Writes the records of the runs whose last event this process wrote."""

    def __init__(self, reader: EventReader, metrics: Metrics, wanted: RecordsWanted) -> None:
        self._metrics = metrics
        self._wanted = wanted
        self._runs = RestedRuns(reader, self._leave_out)
        self._closing = asyncio.Event()
        self._thread = SideThread("record-log")
        self._task = asyncio.create_task(self._write_for_ever(), name="record-log")

    def publish(self, run_id: UUID, frames: list[Frame]) -> None:
        """Keep durable frames until their run rests. On the path of every append: no more here."""
        self._runs.publish(run_id, frames)

    async def aclose(self) -> None:
        """Write what waits, as far as that does not hang, then stop."""
        self._closing.set()
        await asyncio.wait([self._task], timeout=LEAVING_S)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._thread.stop()

    def _leave_out(self, run: RestedRun) -> None:
        self._metrics.unlogged_events += run.seq

    async def _write_for_ever(self) -> None:
        is_closing = False
        while not is_closing:
            is_closing = await wait_at_most(self._closing, EVERY_S)
            while runs := self._runs.take(RUNS_AT_ONCE):
                await self._write_all(runs)

    async def _write_all(self, runs: list[RestedRun]) -> None:
        """Whatever goes wrong with one run, the others are written."""
        left_out: list[RestedRun] = []
        found = []
        for run in runs:
            try:
                found.append((run, await self._runs.bodies_of(run)))
            except FlexrunError as error:
                log.warning("run %s has no records: %s", run.run_id, error.code)
                left_out.append(run)
            except Exception:
                log.exception("run %s has no records", run.run_id)
                left_out.append(run)
        left_out += await self._thread.run(partial(self._write, found))
        for run in left_out:
            self._leave_out(run)
        self._runs.done(runs)

    # --- in the thread ----------------------------------------------------------------------------

    def _write(self, found: list[tuple[RestedRun, list[Body]]]) -> list[RestedRun]:
        """Write the lines of these runs. Those whose events could not be read come back."""
        left_out = []
        for run, bodies in found:
            try:
                self._write_one(run, bodies)
            except Exception:
                log.exception("run %s has no records", run.run_id)
                left_out.append(run)
        return left_out

    def _write_one(self, run: RestedRun, bodies: list[Body]) -> None:
        if not bodies:
            return  # retention was faster
        trace_id = orjson.loads(bodies[0][1])["trace_id"]
        events = [decode_event(body) for event_type, body in bodies if event_type in READ]
        records = records_of(
            str(run.run_id),
            trace_id,
            events,
            rested_before(events),
            has_models=self._wanted.has_models,
        )
        for kind, record in records:
            if kind in self._wanted.kinds:
                log.info("%s", kind.value, extra={"fields": record.model_dump(mode="json")})
