"""Who is told of frames that are durable, besides the feed: tracers, and the logs of events and of
records.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from uuid import UUID

from app.journal.event_log import EventLog, FacetsOf
from app.journal.frames import Frame
from app.journal.record_log import RecordLog, RecordsWanted
from app.journal.tracer import TraceLimits, Tracer
from app.journal.writer import FrameSink
from app.kit.metrics import Metrics
from app.ports import TraceExporter
from app.store.events import EventReader


class _All:
    """Tells one sink after the other; streams come first."""

    def __init__(self, sinks: list[FrameSink]) -> None:
        self._sinks = sinks

    def publish(self, run_id: UUID, frames: list[Frame]) -> None:
        for sink in self._sinks:
            sink.publish(run_id, frames)


@asynccontextmanager
async def open_readings(
    feed: FrameSink,
    reader: EventReader,
    metrics: Metrics,
    exporters: Sequence[TraceExporter],
    limits: TraceLimits,
    facets_of: FacetsOf | None,
    records: RecordsWanted,
) -> AsyncIterator[FrameSink]:
    """The sink for the journal: the feed itself when nothing else is asked for.

    Each exporter gets a tracer of its own, so that none waits for another. `facets_of` turns the
    log of events on.
    """
    found: list[Tracer | EventLog | RecordLog] = [
        Tracer(reader, exporter, metrics, limits) for exporter in exporters
    ]
    if facets_of is not None:
        found.append(EventLog(facets_of, metrics))
    if records.kinds:
        found.append(RecordLog(reader, metrics, records))
    try:
        yield _All([feed, *found]) if found else feed
    finally:
        await asyncio.gather(*(reading.aclose() for reading in found))
