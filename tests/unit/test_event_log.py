"""The shape of a line of the log of events, and that no content is in one."""

from __future__ import annotations

import logging
from typing import Any

import orjson
import pytest

from app.domain.event_json import encode_event
from app.domain.events import Event, EventType, Level
from app.journal import event_log
from app.journal.event_log import FIELDS, EventLog
from app.journal.frames import Frame, frame_of
from app.kit.ids import new_id
from app.kit.log import JsonFormatter
from app.kit.metrics import Metrics

START_MS = 1_764_000_000_000


def facets_of(capability_id: str) -> dict[str, list[str]]:
    assert capability_id == "brief.check"
    return {"input": ["document"], "output": ["brief"]}


def frames(run_id: str, *events: Event) -> list[Frame]:
    found = []
    for seq, event in enumerate(events, 1):
        event.seq, event.ts = seq, START_MS + seq
        body = encode_event(event, run_id, "a" * 32)
        found.append(frame_of(seq, event.type, event.node_id, event.level, body))
    return found


PLAN = {"version": 3, "author": "caller", "node_count": 1, "planning_ms": 0.5}
ERROR = {"code": "timeout", "message": "canary"}
EVENTS = (
    Event(EventType.RUN_QUEUED, {"objective": "canary", "lane": "batch"}),
    Event(EventType.RUN_START, {}),
    Event(EventType.PLAN_GENERATED, PLAN, plan_version=3),
    Event(EventType.NODE_START, {"capability_id": "brief.check"}, node_id="A", attempt=1),
    Event(
        EventType.NODE_RETRY,
        {"delay_ms": 5, "error": ERROR, "duration_ms": 2.5},
        node_id="A",
        attempt=1,
        level=Level.WARN,
    ),
    Event(EventType.LOG, {"error": "canary", "duration_ms": "canary"}, node_id="A", attempt=2),
    Event(EventType.NODE_DONE, {"output": "canary", "duration_ms": 1.0}, node_id="A", attempt=2),
    Event(EventType.RUN_PAUSED, {"status": "paused", "reason": "operator", "nodes": []}),
    Event("LATER_EVENT", {"text": "canary"}),
    Event(EventType.RUN_DONE, {"output": "canary"}),
)


async def test_every_event_is_a_line_with_all_fields_and_no_content(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="flexrun.events")
    run_id = new_id()
    log = EventLog(facets_of, Metrics())
    log.publish(run_id, frames(str(run_id), *EVENTS))
    await log.aclose()
    lines = [orjson.loads(JsonFormatter().format(record)) for record in caplog.records]
    assert [line["message"] for line in lines] == [str(event.type) for event in EVENTS]
    assert all(list(line) == ["ts", "level", "logger", "message", *FIELDS] for line in lines)
    assert "canary" not in str(lines)
    shown: list[dict[str, Any]] = [{name: line[name] for name in FIELDS} for line in lines]
    assert shown[4] == {
        "eventTs": "2025-11-24T16:00:00.005Z",
        "seq": 5,
        "eventType": "NODE_RETRY",
        "runId": str(run_id),
        "planVersion": 3,
        "nodeId": "A",
        "capabilityId": "brief.check",
        "facetProvenance": {"input": ["document"], "output": ["brief"]},
        "attempt": 1,
        "status": "pending",
        "durationMs": 2.5,
        "errorCode": "timeout",
    }
    assert [line["status"] for line in shown] == [
        *("queued", "running", None, "running", "pending", None, "done", "paused", None, "done")
    ]
    assert lines[4]["level"] == "WARNING"


async def test_what_can_not_be_written_in_time_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_log, "FRAMES_WAITING_MAX", 3)
    metrics, run_id = Metrics(), new_id()
    log = EventLog(facets_of, metrics)
    log.publish(run_id, frames(str(run_id), *EVENTS[:2]))
    log.publish(run_id, frames(str(run_id), *EVENTS[:2]))
    await log.aclose()
    assert metrics.unlogged_events == 2
