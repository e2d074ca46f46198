"""A moment in its forms: ms since 1970 in memory, RFC 3339 in UTC where it is shown and stored."""

from __future__ import annotations

import functools
from datetime import UTC, datetime


@functools.lru_cache(maxsize=64)
def rfc3339(ms: int) -> str:
    """`2026-11-21T09:30:00.123Z`. Cached: all events of an append have the same time."""
    return f"{_second(ms // 1000)}.{ms % 1000:03}Z"


@functools.lru_cache(maxsize=16)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


@functools.lru_cache(maxsize=64)
def from_rfc3339(text: str) -> int:
    """The ms of a time that `rfc3339` wrote."""
    return round(datetime.fromisoformat(text).timestamp() * 1000)


def to_datetime(ms: int) -> datetime:
    return datetime.fromtimestamp(ms / 1000, UTC)
