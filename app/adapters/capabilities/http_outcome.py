"""What an HTTP exchange means for a call: one place that maps statuses and errors to `CallFailed`.

| outcome | code | retryable | unknown outcome |
|---|---|---|---|
| no connection (DNS, refused, TLS, connect time-out) | capability_unreachable | yes | no |
| deadline or read time-out | capability_timeout | yes | once bytes were sent |
| reset, cut-off, broken protocol | capability_connection_lost | yes | once bytes were sent |
| 429 | capability_overloaded | yes | no |
| 408, 5xx | capability_unavailable | yes | yes |
| other 4xx, 1xx, 3xx (redirects are not followed) | capability_refused | no | no |
| 2xx: no JSON object, too large, other media type | capability_garbage | not at_most_once | no |
| forbidden target | egress_refused | no | no |

The breaker of the far side counts the first five rows. The next two are answers, so they are good
news to it; a forbidden target was not called, which says nothing.

Garbage is a definite answer: the far side has acted. Where acting again does no harm a repetition
may give a better answer; an `at_most_once` node fails, since its result is lost for good.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import httpx
import orjson

from app.adapters.capabilities.egress import EgressRefused
from app.adapters.capabilities.secrets import redacted
from app.kit.retry_after import retry_after_s
from app.ports import CallFailed

DETAIL_CHARS_MAX = 300
DETAIL_BYTES_MAX = 16_384


def refused_target(error: EgressRefused) -> CallFailed:
    """The policy forbids the URL or the address behind it."""
    return CallFailed("egress_refused", error.message, retryable=False, target_failed=None)


def timed_out(*, sent: bool) -> CallFailed:
    """The deadline passed; `sent` tells whether the far side may have seen the request."""
    return CallFailed(
        "capability_timeout",
        "no complete answer arrived before the deadline",
        retryable=True,
        unknown_outcome=sent,
        target_failed=True,
    )


def broken_off(error: httpx.HTTPError, *, sent: bool) -> CallFailed:
    """The transport failed; the library's own text stays out of the message."""
    if isinstance(error, httpx.TimeoutException):
        if not sent:
            return unreachable("no connection in time")
        return timed_out(sent=True)
    return connection_lost() if sent else unreachable("no connection could be made")


def unreachable(why: str, *, retry_after_s: float | None = None) -> CallFailed:
    """Nothing was sent, because nobody was there to take it."""
    return CallFailed(
        "capability_unreachable",
        why,
        retryable=True,
        retry_after_s=retry_after_s,
        target_failed=True,
    )


def connection_lost() -> CallFailed:
    """The far side went away with the request: nobody knows what it did."""
    return CallFailed(
        "capability_connection_lost",
        "the connection broke before the answer was complete",
        retryable=True,
        unknown_outcome=True,
        target_failed=True,
    )


def garbage(what: str, *, retryable: bool) -> CallFailed:
    """A 2xx answer that can not be the output."""
    return CallFailed("capability_garbage", f"the answer {what}", retryable=retryable)


def status_failure(response: httpx.Response, detail: str) -> CallFailed:
    """What a status outside 2xx means; `detail` is shown to people, see `detail_of`."""
    status = response.status_code
    text = f"answered {status}" + (f": {detail}" if detail else "")
    wish = retry_after_s(response.headers.get("retry-after", ""), datetime.now(UTC))
    if status == 429:
        return CallFailed(
            "capability_overloaded", text, retryable=True, retry_after_s=wish, target_failed=True
        )
    if status == 408 or status >= 500:
        return CallFailed(
            "capability_unavailable",
            text,
            retryable=True,
            unknown_outcome=True,
            retry_after_s=wish,
            target_failed=True,
        )
    if 300 <= status < 400:
        text = f"answered {status}: redirects are not followed"
    return CallFailed("capability_refused", text, retryable=False)


def detail_of(body: bytes, secrets: Iterable[str] = ()) -> str:
    """The sentence in a JSON problem (RFC 9457) or a similar body, for people; "" without one.

    Control characters are gone and the length is bounded. Secrets are hidden before that: half a
    secret would not be found.
    """
    try:
        found: Any = orjson.loads(body)
    except orjson.JSONDecodeError:
        return ""
    if not isinstance(found, dict):
        return ""
    named = [found.get(name) for name in ("detail", "title", "message", "error")]
    texts = [text for text in named if isinstance(text, str) and text.strip()]
    return plain_line(redacted(texts[0], secrets)) if texts else ""


def plain_line(text: str) -> str:
    """One printable line of at most 300 characters."""
    shown = "".join(char if char.isprintable() else " " for char in text[: 4 * DETAIL_CHARS_MAX])
    return " ".join(shown.split())[:DETAIL_CHARS_MAX]
