"""Reading `Accept` and `Prefer`, as far as runs need it (RFC 9110 12.5.1, RFC 7240)."""

from __future__ import annotations

import re

WAIT_MAX_S = 60.0

_WAIT = re.compile(r"(?:^|[,;\s])wait\s*=\s*\"?(\d{1,6})", re.IGNORECASE)


def accepts_stream(accept: str) -> bool:
    """Whether the client asked for an event stream; a tie with JSON goes to the stream."""
    if "text/event-stream" not in accept:
        return False
    quality = {"text/event-stream": 0.0, "application/json": 0.0}
    for part in accept.lower().split(","):
        media, *parameters = [piece.strip() for piece in part.split(";")]
        if media in quality:
            quality[media] = max(quality[media], _quality(parameters))
    stream = quality["text/event-stream"]
    return stream > 0 and stream >= quality["application/json"]


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
