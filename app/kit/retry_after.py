"""The header Retry-After (RFC 9110, 10.2.3), as far as we let it command us."""

from __future__ import annotations

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

RETRY_AFTER_S_MAX = 86_400.0


def retry_after_s(value: str, now: datetime) -> float | None:
    """Seconds of a Retry-After header, a number or a date, 0 to one day; None when unreadable."""
    value = value.strip()
    if value.isdecimal() and len(value) < 12:
        return min(float(value), RETRY_AFTER_S_MAX)
    try:
        at = parsedate_to_datetime(value)
    except ValueError:
        return None
    if at.tzinfo is None:
        at = at.replace(tzinfo=UTC)
    return min(max((at - now).total_seconds(), 0.0), RETRY_AFTER_S_MAX)
