"""Every event as a line of the log, for those who search logs: another reading of the journal.

A sink of frames beside the feed, off unless FLEXRUN_LOG_EVENTS is set. The lines are written in a
thread, a moment after the events are durable, with the fields that `FIELDS` names; nothing of
`data` but names, codes and numbers is in them. When more comes than can be written, events are
left out and counted: the journal has them all.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from uuid import UUID

from app.domain.event_json import decode_event
from app.domain.events import TERMINAL_EVENTS, Event, EventType
from app.domain.record_shapes import EventLine
from app.journal.frames import Frame, body_of
from app.kit.metrics import Metrics
from app.kit.rfc3339 import rfc3339
from app.kit.side_thread import SideThread
from app.kit.waiting import wait_at_most

log = logging.getLogger("flexrun.events")

EVERY_S = 0.25
FRAMES_WAITING_MAX = 20_000
RUNS_KNOWN_MAX = 10_000
LEAVING_S = 2.0

FIELDS = tuple(EventLine.model_fields)
"""The fields of a line; each is there, null where it does not apply."""

_LEVELS = {"INFO": logging.INFO, "WARN": logging.WARNING, "ERROR": logging.ERROR}
_STATUS: dict[EventType | str, str] = {
    EventType.RUN_QUEUED: "queued",
    EventType.RUN_START: "running",
    EventType.RUN_RECOVERED: "running",
    EventType.RUN_RESUMED: "running",
    EventType.RUN_DONE: "done",
    EventType.RUN_FAILED: "failed",
    EventType.RUN_CANCELLED: "cancelled",
    EventType.NODE_START: "running",
    EventType.NODE_DONE: "done",
    EventType.NODE_RETRY: "pending",
    EventType.NODE_FAILED: "failed",
    EventType.NODE_BLOCKED: "blocked",
    EventType.NODE_SKIPPED: "skipped",
}

Facets = dict[str, list[str]]
FacetsOf = Callable[[str], Facets]
"""The facets that a capability reads and makes: `{"input": […], "output": […]}`."""


@dataclass(slots=True)
class _Known:
    """What later lines of a run need from its earlier events."""

    plan_version: int | None = None
    capabilities: dict[str, str] = field(default_factory=dict)


class EventLog:
    """Writes the lines of this process's own appends."""

    def __init__(self, facets_of: FacetsOf, metrics: Metrics) -> None:
        self._facets_of = facets_of
        self._metrics = metrics
        self._waiting: deque[tuple[UUID, Frame]] = deque()
        self._known: dict[UUID, _Known] = {}
        self._closing = asyncio.Event()
        self._thread = SideThread("event-log")
        self._task = asyncio.create_task(self._write_for_ever(), name="event-log")

    def publish(self, run_id: UUID, frames: list[Frame]) -> None:
        """Keep durable frames for a moment. On the path of every append: no more here."""
        if len(self._waiting) + len(frames) > FRAMES_WAITING_MAX:
            self._metrics.unlogged_events += len(frames)
            return
        for frame in frames:
            self._waiting.append((run_id, frame))

    async def aclose(self) -> None:
        """Write what waits, as far as that does not hang, then stop."""
        self._closing.set()
        await asyncio.wait([self._task], timeout=LEAVING_S)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._thread.stop()

    async def _write_for_ever(self) -> None:
        is_closing = False
        while not is_closing:
            is_closing = await wait_at_most(self._closing, EVERY_S)
            taken, self._waiting = self._waiting, deque()
            if taken:
                await self._thread.run(partial(self._write, taken))

    # --- in the thread ----------------------------------------------------------------------------

    def _write(self, taken: deque[tuple[UUID, Frame]]) -> None:
        for run_id, frame in taken:
            event = decode_event(body_of(frame))
            fields = self._fields_of(run_id, event)
            log.log(_LEVELS[event.level], "%s", event.type, extra={"fields": fields})

    def _fields_of(self, run_id: UUID, event: Event) -> dict[str, Any]:
        known = self._known_of(run_id)
        data = event.data
        if event.type is EventType.PLAN_GENERATED:
            known.plan_version = data["version"]
        if event.type is EventType.NODE_START and event.node_id is not None:
            known.capabilities[event.node_id] = data["capability_id"]
        capability_id = known.capabilities.get(event.node_id or "")
        error = data.get("error") if event.type != EventType.LOG else None
        values = (
            *(rfc3339(event.ts), event.seq, str(event.type), str(run_id)),
            *(event.plan_version or known.plan_version, event.node_id, capability_id),
            None if capability_id is None else self._facets_of(capability_id),
            *(event.attempt, _status_of(event), _duration_of(event)),
            error.get("code") if isinstance(error, dict) else None,
        )
        if event.type in TERMINAL_EVENTS:
            del self._known[run_id]
        return dict(zip(FIELDS, values, strict=True))

    def _known_of(self, run_id: UUID) -> _Known:
        known = self._known.get(run_id)
        if known is None:
            if len(self._known) >= RUNS_KNOWN_MAX:
                del self._known[next(iter(self._known))]
            known = self._known[run_id] = _Known()
        return known


def _status_of(event: Event) -> str | None:
    """The status that the event leads to; of a call of a model or a tool its outcome."""
    if event.type is EventType.RUN_PAUSED:
        return str(event.data["status"])
    if event.type in (EventType.LLM_RESPONSE, EventType.TOOL_CALLED):
        return str(event.data["outcome"])
    return _STATUS.get(event.type)


def _duration_of(event: Event) -> float | None:
    """How long it took, of what has a duration."""
    if event.type is EventType.LOG:
        return None
    found = event.data.get(
        "planning_ms" if event.type is EventType.PLAN_GENERATED else "duration_ms"
    )
    return None if found is None else float(found)
