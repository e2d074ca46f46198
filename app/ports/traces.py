"""Traces: what `adapters/tracing/` is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class RunTrace:
    """A run that came to rest, to be told as spans of the trace that it belongs to.

    `traceparent` is the W3C context that the run was accepted with. `bodies` are all its events up
    to now as JSON, by seq.
    """

    run_id: str
    traceparent: str
    bodies: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class Exported:
    """What became of a batch: whether it arrived, as far as is known, and the seconds of CPU that
    it took."""

    arrived: bool
    cpu_s: float


class TraceExporter(Protocol):
    """Sends traces away, best effort and off the loop. One export is under way at a time."""

    async def export(self, runs: Sequence[RunTrace]) -> Exported:
        """Build the spans and send them; may take its time.

        No input, output, prompt or text of an error leaves the service.
        """
        ...

    async def aclose(self) -> None:
        """Stop. An export that was cancelled is not waited for."""
        ...
