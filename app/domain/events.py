"""The event vocabulary: what the journal can say about a run.

An `Event` in memory is small and untyped in its `data`, because the hot path makes a dozen of them
a run. What each `data` holds is declared in `EVENT_DATA`: the event table in `docs/EVENTS.md`, the
OpenAPI union and the tests read the shapes from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Level(StrEnum):
    INFO = "INFO"
    WARN = "WARN"
    ERROR = "ERROR"


class EventType(StrEnum):
    RUN_QUEUED = "RUN_QUEUED"
    RUN_START = "RUN_START"
    RUN_RECOVERED = "RUN_RECOVERED"
    PLAN_REQUESTED = "PLAN_REQUESTED"
    PLAN_REJECTED = "PLAN_REJECTED"
    PLAN_GENERATED = "PLAN_GENERATED"
    PLAN_UPDATED = "PLAN_UPDATED"
    NODE_START = "NODE_START"
    NODE_DONE = "NODE_DONE"
    NODE_FAILED = "NODE_FAILED"
    NODE_RETRY = "NODE_RETRY"
    NODE_BLOCKED = "NODE_BLOCKED"
    NODE_SKIPPED = "NODE_SKIPPED"
    VALIDATION_ERROR = "VALIDATION_ERROR"
    BREAKER_TRIPPED = "BREAKER_TRIPPED"
    BREAKER_HALF_OPEN = "BREAKER_HALF_OPEN"
    BREAKER_CLOSED = "BREAKER_CLOSED"
    RUN_PAUSED = "RUN_PAUSED"
    RUN_RESUMED = "RUN_RESUMED"
    RUN_DONE = "RUN_DONE"
    RUN_FAILED = "RUN_FAILED"
    RUN_CANCELLED = "RUN_CANCELLED"
    MODEL_SELECTED = "MODEL_SELECTED"
    LLM_REQUEST = "LLM_REQUEST"
    LLM_RESPONSE = "LLM_RESPONSE"
    TOOL_CALLED = "TOOL_CALLED"
    POLICY_TRIGGERED = "POLICY_TRIGGERED"
    CACHE_HIT = "CACHE_HIT"
    CACHE_MISS = "CACHE_MISS"
    BUDGET_EXHAUSTED = "BUDGET_EXHAUSTED"
    LOG = "LOG"


def type_named(name: str) -> EventType | str:
    """The type of a stored event; the bare name when a newer release wrote it."""
    try:
        return EventType(name)
    except ValueError:
        return name


TERMINAL_EVENTS = frozenset({EventType.RUN_DONE, EventType.RUN_FAILED, EventType.RUN_CANCELLED})


class BlockReason(StrEnum):
    """Why a node can not go on by itself."""

    DEPENDENCY_FAILED = "dependency_failed"
    UNKNOWN_OUTCOME = "unknown_outcome"
    BREAKER_OPEN = "breaker_open"
    AWAITING_ANSWER = "awaiting_answer"


class SkipReason(StrEnum):
    """Why a node counts as done without being called."""

    RESUME = "resume"


@dataclass(slots=True)
class Event:
    """One fact about a run. `seq` and `ts` (ms since 1970, UTC) are set when it is appended.

    `type` is a bare string only when a newer release wrote the event: folding passes over it.
    """

    type: EventType | str
    data: dict[str, Any]
    node_id: str | None = None
    attempt: int | None = None
    plan_version: int | None = None
    level: Level = Level.INFO
    seq: int = 0
    ts: int = 0


def rested_before(events: Sequence[Event]) -> int:
    """The seq up to which readings of a run were told when it paused before its last event; 0 when
    it never did."""
    rests = [event.seq for event in events[:-1] if event.type is EventType.RUN_PAUSED]
    return rests[-1] if rests else 0


def error_data(code: str, message: str, **more: Any) -> dict[str, Any]:
    """The shape of every `error` inside an event: a stable code and a sentence for people."""
    return {"code": code, "message": message, **more}
