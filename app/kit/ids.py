"""Ids: UUIDv7 (RFC 9562), whose first 48 bits are the ms since 1970."""

from __future__ import annotations

import functools
import hashlib
import os
import uuid
from datetime import UTC, date, datetime

import uuid_utils.compat

from app.kit.clock import now_ns

DAY_MS = 86_400_000


def new_id() -> uuid.UUID:
    """A new time-ordered id."""
    return uuid_utils.compat.uuid7(nanoseconds=now_ns())


def created_ms(run_id: uuid.UUID) -> int:
    """When a UUIDv7 was made, in ms since 1970."""
    return run_id.int >> 80


def run_day(run_id: uuid.UUID) -> date:
    """The UTC day of a run id: the partition that all rows of the run live in."""
    return _day((run_id.int >> 80) // DAY_MS)


@functools.lru_cache(maxsize=64)
def _day(days: int) -> date:
    try:
        return datetime.fromtimestamp(days * 86_400, UTC).date()
    except (ValueError, OverflowError):
        # An id that is no UUIDv7 of this era names a run that does not exist.
        return date.max


def parse_id(text: str) -> uuid.UUID | None:
    """The UUID of a path segment, or None when it is none."""
    try:
        return uuid.UUID(text)
    except ValueError:
        return None


def new_traceparent(span: str | None = None) -> tuple[str, str]:
    """A W3C trace context for a new trace, at this span: `(traceparent, trace_id)`."""
    trace_id = os.urandom(16).hex()
    return f"00-{trace_id}-{span or os.urandom(8).hex()}-01", trace_id


def span_id(*parts: object) -> str:
    """The id of a span (W3C Trace Context, 16 hex digits), made of what the span is about: a run;
    a run, a node and an attempt; or a run and a seq. So every process knows it without being told.
    """
    return hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=8).hexdigest()


def id_at(ms: int) -> uuid.UUID:
    """The smallest UUIDv7 of a time: a bound for ids made from then on. Raises ValueError."""
    if not 0 <= ms < 1 << 48:
        raise ValueError("out of the range of UUIDv7")
    return uuid.UUID(int=(ms << 80) | (7 << 76) | (2 << 62))
