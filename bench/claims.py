"""How long one claim takes while 100,000 runs wait, and somebody keeps an old transaction open.

The old transaction is what makes queues in Postgres slow: nothing that was taken since it began
can be removed, so every later claim walks past it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import asyncpg

from app.kit.ids import id_at
from app.store.claims import LANE_WEIGHTS, Fairness, Wanted, claim_runs
from app.store.database import HotConnection, connect
from bench.rig import Rig
from bench.stats import Goal, percentile

QUEUED = 100_000
FINISHED = 100_000
TENANTS = 20
FIRST_MS = 1_764_000_000_000
COLUMNS = ("run_id", "tenant_id", "epoch", "seq", "status", "lane")
LIMITS = {1: 400, 50: 100}
"""How often a claim of so many runs is measured in a round."""

GOAL = Goal(20.0, 10.0)
NAME = "claim of {} of {:,} queued runs, an old transaction open"


async def claims(rig: Rig) -> None:
    """A queue made anew in each round, so that every round is the same."""
    dsn = await rig.database("bench_claims")
    queued = rig.count(QUEUED, least=1_000)
    session, old = await connect(dsn), await asyncpg.connect(dsn)
    try:
        await _fill(session, queued, rig.count(FINISHED))
        transaction = old.transaction(isolation="repeatable_read")
        await transaction.start()
        await old.fetchval("select count(*) from workers")  # now it has its snapshot
        for limit, times in LIMITS.items():
            took = await _measure(session, limit, rig.count(times, least=5))
            what = NAME.format(limit, QUEUED)
            rig.book.add(f"{what}, p50", "ms", percentile(took, 0.5))
            rig.book.add(f"{what}, p99", "ms", percentile(took, 0.99), goal=GOAL)
        await transaction.rollback()
    finally:
        await session.close()
        await old.close()


async def _fill(session: HotConnection, queued: int, finished: int) -> None:
    """Finished runs, and behind them a queue over all lanes and some tenants."""
    ids = map(id_at, itertools.count(FIRST_MS))
    await session.copy_records_to_table(
        "run_heads", records=_heads(ids, finished, "done"), columns=COLUMNS, timeout=120
    )
    await session.copy_records_to_table(
        "run_heads", records=_heads(ids, queued, "queued"), columns=COLUMNS, timeout=120
    )
    await session.execute("vacuum (analyze) run_heads", timeout=120)


def _heads(ids: Iterator[object], count: int, status: str) -> Iterator[tuple[object, ...]]:
    lanes = itertools.cycle(LANE_WEIGHTS)
    tenants = itertools.cycle(range(TENANTS))
    for run_id, lane, tenant, _ in zip(ids, lanes, tenants, range(count), strict=False):
        yield (run_id, f"tenant-{tenant}", 0, 1, status, lane)


async def _measure(session: HotConnection, limit: int, times: int) -> list[float]:
    """Milliseconds of each claim, on the session of one worker."""
    fairness = Fairness()
    wanted = Wanted(limit, 1, [], [], [])
    took = []
    for _ in range(times):
        started = time.perf_counter()
        found = await claim_runs(session, "bench", wanted, fairness)
        took.append((time.perf_counter() - started) * 1000)
        if len(found) != limit:
            raise RuntimeError(f"a claim of {limit} took {len(found)}")
    return took
