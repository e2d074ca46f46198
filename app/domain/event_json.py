"""Events as JSON: what the journal stores, streams send and exporters of traces read."""

from __future__ import annotations

from typing import Any

import orjson

from app.domain.events import Event, Level, type_named
from app.kit.rfc3339 import from_rfc3339, rfc3339


def encode_event(event: Event, run_id: str, trace_id: str) -> bytes:
    """The event as JSON. Keys come in a fixed order; those that do not apply are left out."""
    found: dict[str, Any] = {
        "seq": event.seq,
        "run_id": run_id,
        "ts": rfc3339(event.ts),
        "level": event.level,
        "type": event.type,
    }
    if event.node_id is not None:
        found["node_id"] = event.node_id
    if event.attempt is not None:
        found["attempt"] = event.attempt
    if event.plan_version is not None:
        found["plan_version"] = event.plan_version
    found["trace_id"] = trace_id
    found["data"] = event.data
    return orjson.dumps(found)


def decode_event(body: str | bytes) -> Event:
    """The event of a stored body."""
    found = orjson.loads(body)
    return Event(
        type_named(found["type"]),
        found["data"],
        node_id=found.get("node_id"),
        attempt=found.get("attempt"),
        plan_version=found.get("plan_version"),
        level=Level(found["level"]),
        seq=found["seq"],
        ts=from_rfc3339(found["ts"]),
    )
