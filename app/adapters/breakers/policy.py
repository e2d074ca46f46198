"""When a breaker opens, for how long, and how long its probe is waited for.

The numbers that `local.py` and `redis.py` share, so that both judge alike. Imported by those two
only; it never judges by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

CALL_LIMIT_S = 60.0
"""No call to a far side runs longer: its time limit ends it."""
PROBE_LOOK_S = 0.5
"""Whoever is refused because of a probe asks again after so long, at the latest."""
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

    @property
    def probe_s(self) -> float:
        """How long the one probe is trusted to be under way.

        Not shorter than a call may take, or a second probe would start beside a slow first one. Not
        shorter than the cool-down, so that a prober that died costs a target at most what one more
        opening would have cost.
        """
        return max(self.cooldown_s, CALL_LIMIT_S)
