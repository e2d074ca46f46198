"""Reading `Accept`, `Prefer` and filters, as far as runs need it (RFC 9110 12.5.1, RFC 7240)."""

from __future__ import annotations

import re

WAIT_MAX_S = 60.0
STREAM = "text/event-stream"
JSON_RANGES = ("application/json", "application/*", "*/*")
NO_NUL = r"^[^\x00]*$"
"""Texts that filters compare with stored ones: Postgres has none with U+0000 in it."""

_WAIT = re.compile(r"(?:^|[,;\s])wait\s*=\s*\"?(\d{1,6})", re.IGNORECASE)


def accepts_stream(accept: str) -> bool:
    """Whether the client asked for an event stream; a tie with JSON goes to the stream.

    Only its name asks for it: who accepts everything is a client that wants JSON.
    """
    accept = accept.lower()
    if STREAM not in accept:
        return False
    quality: dict[str, float] = {}
    for part in accept.split(","):
        media, *parameters = [piece.strip() for piece in part.split(";")]
        quality[media] = max(quality.get(media, 0.0), _quality(parameters))
    stream = quality.get(STREAM, 0.0)
    # The most specific range that names JSON counts (RFC 9110 12.5.1).
    json = next((quality[media] for media in JSON_RANGES if media in quality), 0.0)
    return stream > 0 and stream >= json


def _quality(parameters: list[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                return min(max(float(value), 0.0), 1.0)
            except ValueError:
                return 0.0
    return 1.0


def preferred_wait_s(prefer: str | None) -> float:
    """The seconds of `Prefer: wait=N`, at most `WAIT_MAX_S`; 0 when the client does not wait."""
    if prefer is None:
        return 0.0
    match = _WAIT.search(prefer)
    return 0.0 if match is None else min(float(match[1]), WAIT_MAX_S)
