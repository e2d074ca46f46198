"""Events as bytes: the JSON that is stored and the SSE frame that is sent are made once, here.

`body` is exactly what the `events` row holds and what stands behind `data:`; a replayed frame is
therefore byte for byte the frame that was sent live. Format: WHATWG HTML, section 9.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from app.domain.events import TERMINAL_EVENTS, Event, Level, type_named
from app.kit.clock import from_rfc3339, rfc3339
from app.ports import Delta


@dataclass(slots=True)  # not frozen: a dozen are made a run, and freezing costs thrice the time
class Frame:
    """One encoded event. `data` is the whole SSE frame, with its closing blank line."""

    seq: int
    type: str
    node_id: str | None
    level: str
    data: bytes

    @property
    def is_terminal(self) -> bool:
        return self.type in TERMINAL_EVENTS


def encode_body(event: Event, run_id: str, trace_id: str) -> bytes:
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


def frame_of(seq: int, event_type: str, node_id: str | None, level: str, body: bytes) -> Frame:
    """The SSE frame around a stored body. JSON has no raw line breaks, so one `data:` line does."""
    return Frame(
        seq,
        event_type,
        node_id,
        level,
        b"id: %d\nevent: %b\ndata: %b\n\n" % (seq, event_type.encode(), body),
    )


def delta_frame(delta: Delta) -> bytes:
    """The SSE frame of a delta. It is no event of the journal, so it has no `id`."""
    found: dict[str, Any] = {
        "run_id": str(delta.run_id),
        "node_id": delta.node_id,
        "attempt": delta.attempt,
    }
    if delta.call is not None:
        found["call"] = delta.call
    found["piece"] = delta.piece
    found["text"] = delta.text
    return b"event: delta\ndata: %b\n\n" % orjson.dumps(found)


def body_of(frame: Frame) -> bytes:
    """The stored body in a frame: what stands behind `data:`."""
    return frame.data[frame.data.index(b"\ndata: ") + 7 : -2]


def written_at(frame: Frame) -> int:
    """The `ts` of the event in a frame, in ms: the keys of a body come in a fixed order."""
    at = frame.data.index(b'"ts":"') + 6
    return from_rfc3339(frame.data[at : at + 24].decode())


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
