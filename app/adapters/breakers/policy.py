"""When a breaker opens, for how long, and how long its probe is waited for.

The numbers that `local.py`, `redis.py` and `scripts.py` share, so that all judge alike. It never
judges by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

PROBE_GRACE_S = 5.0
"""A call that its time limit ended has so long to report, before it counts as lost."""
PROBE_LOOK_S = 0.5
"""Whoever is refused because of a probe asks again after so long, at the earliest."""
PROBE_LOOK_MAX_S = 60.0
"""And after so long at the latest: a probe may take a day, and the breaker close meanwhile."""
SCOPES_MAX = 4_096
"""Beyond this many, the scopes that were asked for longest ago are forgotten."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Open after `threshold` consecutive failures, for `cooldown_s`."""

    threshold: int
    cooldown_s: float

    def __post_init__(self) -> None:
        if self.threshold < 1 or self.cooldown_s <= 0:
            raise ValueError("a breaker needs a threshold of at least 1 and a cool-down above 0")


def probe_s(limit_s: float) -> float:
    """How long a probe whose call may take `limit_s` is trusted to be under way.

    Not shorter, or a second probe would start beside a slow first one, whose success then counts
    for nothing.
    """
    return limit_s + PROBE_GRACE_S


def look_s(age_s: float, left_s: float) -> float:
    """When to ask again behind a probe that is `age_s` old and trusted for `left_s` more.

    As long as it is old: every ask is two events of a run, and a probe that hangs is soon old.
    """
    return min(max(PROBE_LOOK_S, age_s), PROBE_LOOK_MAX_S, left_s)
