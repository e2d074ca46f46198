"""Eight processes and one breaker: each opening is told once, and one probe is under way at most.

The full size is `python -m tests.breaker_storm`, and with `--kill-at 0.3 --budget-s 0.05` the one
in which Redis dies.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from app.ports import TransitionKind
from tests.breaker_storm import Plan, storm
from tests.redis_kit import MortalRedis

pytestmark = pytest.mark.slow


async def test_announcements_are_openings_and_probes_are_alone(tmp_path: Path) -> None:
    plan = Plan(processes=8, outages=5, seed=7)
    with MortalRedis(tmp_path) as server:
        found = await storm(plan, server)

    tripped = found.told(TransitionKind.TRIPPED)
    assert len(tripped) == len(set(tripped)) >= plan.outages
    assert set(tripped) == found.openings
    for kind in TransitionKind:
        told = found.told(kind)
        assert len(told) == len(set(told)), "told once"
        assert {number for number, name in found.swept if name == kind} <= set(told)
    assert found.overlaps == 0
    assert len(found.probes) >= len(found.told(TransitionKind.HALF_OPEN)) > 0
    assert found.checks >= 2_000
    assert sum(seen.local_checks for seen in found.seen) == 0
    assert found.immortal_keys == set()
    assert found.final_status == "closed"


async def test_redis_killed_in_the_middle_stops_no_call(tmp_path: Path) -> None:
    plan = Plan(processes=8, outages=10, seed=8, kill_at=0.2, away_s=0.5)
    with MortalRedis(tmp_path) as server:
        found = await storm(plan, server)

    for seen in found.seen:
        assert seen.local_checks > 0, "went on alone"
        assert seen.shared_after_local > 0, "and came back"
    tripped = found.told(TransitionKind.TRIPPED)
    assert len(tripped) == len(set(tripped)) > 0
    assert len(found.openings - set(tripped)) <= 1, "the one whose answer died with Redis"
    assert found.overlaps == 0
    assert found.immortal_keys == set()
    assert found.final_status == "closed"
