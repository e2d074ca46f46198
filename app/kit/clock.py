"""What time it is. Nothing in `domain` may import this.

Several processes write and read the times of one run, and their machines' clocks may be minutes
apart: a retry that one of them puts off by a second must not wait for an hour in another. So all
follow one clock, the database's: `follow` sets this process's time by it, every few seconds. In
between the monotonic clock counts, so that a jump of the machine's clock changes nothing.
"""

from __future__ import annotations

import time

_ahead_ns = time.time_ns() - time.monotonic_ns()


def now_ns() -> int:
    """Nanoseconds since 1970, UTC."""
    return time.monotonic_ns() + _ahead_ns


def now_ms() -> int:
    """Wall clock in ms since 1970, UTC: for what is shown and stored."""
    return (time.monotonic_ns() + _ahead_ns) // 1_000_000


def follow(told_ms: float, asked_at_ns: int, answered_at_ns: int) -> None:
    """Set the clock by a server's, which said `told_ms` between two readings of monotonic time.

    A clock that the answer allows stays as it is: one that was long under way says little, and must
    not shake it. Otherwise the answer is taken to be from the middle between them (Cristian's
    algorithm, 1989).
    """
    global _ahead_ns
    told_ns = int(told_ms * 1_000_000)
    if not told_ns - answered_at_ns <= _ahead_ns <= told_ns - asked_at_ns:
        _ahead_ns = told_ns - (asked_at_ns + answered_at_ns) // 2
