"""Traces: what `adapters/tracing/` is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from app.domain.events import Event


@dataclass(frozen=True, slots=True)
class RunTrace:
    """A run that came to rest, to be told as spans of the trace that it belongs to.

    `traceparent` is the W3C context that the run was accepted with; a run that began its trace is
    named in it itself. `events` are all up to now, by seq. What ended up to `told_seq` was told
    when the run rested before.
    """

    run_id: str
    traceparent: str
    events: Sequence[Event]
    told_seq: int = 0


class TraceExporter(Protocol):
    """Sends traces away, best effort. Called by one thread at a time, never by that of the loop."""

    def export(self, runs: Sequence[RunTrace]) -> bool:
        """Build the spans and send them; may take its time. Whether they arrived, if it is known.

        No input, output, prompt or text of an error leaves the process.
        """
        ...

    def close(self) -> None:
        """Stop, also an export under way in another thread. May take as long as one."""
        ...
