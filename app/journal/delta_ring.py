"""The newest deltas of a followed run, each with its place among the events.

Streams read it with a cursor of their own. The ring is bounded, so whoever reads too slowly misses
the oldest: deltas are dropped for a slow client, events never.
"""

from __future__ import annotations

from typing import NamedTuple

DELTAS_MAX = 1_024
DELTA_BYTES_MAX = 256 * 1024
"""Of frames; the newest one is kept whatever its size."""


class PlacedDelta(NamedTuple):
    """A ready frame. It belongs right behind the event with the seq `after`, and nowhere else."""

    after: int
    node_id: str
    data: bytes


class DeltaRing:
    """Deltas by their numbers: `first` is the oldest that is kept, `end` the next to come."""

    __slots__ = ("_bytes", "_kept", "end")

    def __init__(self) -> None:
        self._kept: list[PlacedDelta] = []
        self._bytes = 0
        self.end = 0

    @property
    def first(self) -> int:
        return self.end - len(self._kept)

    def __getitem__(self, number: int) -> PlacedDelta:
        return self._kept[number - self.first]

    def push(self, delta: PlacedDelta) -> None:
        """Take a delta, and drop the oldest beyond the bounds."""
        kept = self._kept
        kept.append(delta)
        self.end += 1
        self._bytes += len(delta.data)
        drop = 0
        while len(kept) - drop > 1 and (
            self._bytes > DELTA_BYTES_MAX or len(kept) - drop > DELTAS_MAX
        ):
            self._bytes -= len(kept[drop].data)
            drop += 1
        del kept[:drop]
