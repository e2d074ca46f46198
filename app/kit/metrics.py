"""What a process counts and measures about itself: plain numbers, to be read by whoever asks.

Any floor may add to them; only the metrics page of the API reads them. Adding costs a few hundred
nanoseconds at most, because it happens on the path of every run: no locks (one event loop writes),
few labels, and no library. Nothing here may decide anything, and no text of a
caller may become a word, but for the bounded number of names that `HistogramBy` keeps.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from decimal import Decimal

WORDS_MAX = 200
OTHER = "other"
LAG_EVERY_S = 1.0

CALL_BOUNDS_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
WAKE_BOUNDS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
RUNS_BOUNDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
EVENTS_BOUNDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0)


class Histogram:
    """How often values fell between fixed bounds. A value on a bound belongs below it."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        return sum(self.counts)


class HistogramBy:
    """One histogram a word. The first `WORDS_MAX` words get their own, all later ones share one."""

    __slots__ = ("_bounds", "of")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self.of: dict[str, Histogram] = {}

    def observe(self, word: str, value: float) -> None:
        histogram = self.of.get(word)
        if histogram is None:
            histogram = self._of_new(word)
        histogram.observe(value)

    def _of_new(self, word: str) -> Histogram:
        if len(self.of) - (OTHER in self.of) >= WORDS_MAX:
            word = OTHER
        return self.of.setdefault(word, Histogram(self._bounds))


class LoopLag:
    """How late the event loop was: the newest look, and the worst one that nobody has read yet."""

    __slots__ = ("_worst", "last")

    def __init__(self) -> None:
        self.last = 0.0
        self._worst = 0.0

    def note(self, lag_s: float) -> None:
        self.last = max(lag_s, 0.0)
        self._worst = max(self._worst, self.last)

    def take_worst(self) -> float:
        """The worst lag since this was last asked."""
        worst, self._worst = self._worst, 0.0
        return worst


@asynccontextmanager
async def watched_loop(lag: LoopLag) -> AsyncIterator[None]:
    """Note once a second, for as long as the block lasts, how late this loop wakes a sleeper."""
    task = asyncio.create_task(_watch(lag), name="loop-lag")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _watch(lag: LoopLag) -> None:
    while True:
        due = time.monotonic() + LAG_EVERY_S
        await asyncio.sleep(LAG_EVERY_S)
        lag.note(time.monotonic() - due)


@dataclass(slots=True)
class Metrics:
    """Everything that one process counts. There is one of them a process.

    `events` counts durable events of this process's own appends by type: ends of runs, outcomes
    of nodes and take-overs are read from it. `signals` counts those that were applied, by kind.
    Calls of models are counted by provider, `llm_calls` also by outcome, `llm_tokens` by `in` or
    `out`; `model_selections` by reason. `traced_runs` counts runs that came to rest here, by what
    became of their traces.
    """

    events: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    flush_runs: Histogram = field(default_factory=lambda: Histogram(RUNS_BOUNDS))
    flush_events: Histogram = field(default_factory=lambda: Histogram(EVENTS_BOUNDS))
    stale_writes: int = 0
    calls: HistogramBy = field(default_factory=lambda: HistogramBy(CALL_BOUNDS_S))
    wake_latency: Histogram = field(default_factory=lambda: Histogram(WAKE_BOUNDS_S))
    stream_frames: int = 0
    lease_losses: int = 0
    signals: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    breaker_transitions: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    model_selections: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    llm_calls: defaultdict[tuple[str, str], int] = field(default_factory=lambda: defaultdict(int))
    llm_tokens: defaultdict[tuple[str, str], int] = field(default_factory=lambda: defaultdict(int))
    llm_cost_usd: defaultdict[str, Decimal] = field(default_factory=lambda: defaultdict(Decimal))
    llm_durations: HistogramBy = field(default_factory=lambda: HistogramBy(CALL_BOUNDS_S))
    traced_runs: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    unlogged_events: int = 0
    loop_lag: LoopLag = field(default_factory=LoopLag)
