"""SSE frames around events: made once, when the event is written.

A `body` is the JSON of an event (`domain/event_json.py`), exactly what the `events` row holds and
what stands behind `data:`; a replayed frame is therefore byte for byte the frame that was sent
live. Format: WHATWG HTML, section 9.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from app.domain.events import TERMINAL_EVENTS
from app.kit.rfc3339 import from_rfc3339
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
