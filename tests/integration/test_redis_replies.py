"""No reply of Redis reaches another caller, whatever is cut off in the middle of a command.

Each scope has a generation of its own here, so that a reply to another command shows.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

from app.adapters.breakers.redis import RedisBreakers
from app.ports import Permit, Refused
from tests.redis_kit import MortalRedis, make_client, until

SCOPES = 50
CUTS = 200
LIMIT_S = 60.0


@asynccontextmanager
async def opened(url: str, budget_s: float) -> AsyncIterator[RedisBreakers]:
    breakers = RedisBreakers(
        url, threshold=1, cooldown_s=30.0, worker_id_of=lambda: "worker-1", budget_s=budget_s
    )
    try:
        yield breakers
    finally:
        await breakers.aclose()


async def open_all(breakers: RedisBreakers) -> dict[str, int]:
    """Open a breaker for each scope; its generation is how its replies are known."""
    generations = {}
    for number in range(SCOPES):
        permit = await breakers.allow(f"scope-{number}", "run-1:1", LIMIT_S)
        assert isinstance(permit, Permit)
        tripped = await breakers.report(permit, False, "run-1:1")
        assert tripped is not None
        generations[permit.scope] = tripped.generation
    assert len(set(generations.values())) == SCOPES
    return generations


async def test_after_a_cancellation(tmp_path: Path) -> None:
    rng = Random(1)
    checks, cancelled = 0, 0
    with MortalRedis(tmp_path) as server:
        client = make_client(server.url)
        async with opened(server.url, budget_s=10.0) as breakers:
            generations = await open_all(breakers)

            async def ask(scope: str) -> None:
                nonlocal checks
                answer = await breakers.allow(scope, "run-1:1", LIMIT_S)
                assert isinstance(answer, Refused)
                assert answer.generation == generations[scope]
                checks += 1

            while cancelled < CUTS:
                tasks = [asyncio.create_task(ask(scope)) for scope in generations]
                for _ in range(rng.randrange(1, 12)):
                    await asyncio.sleep(0)
                rng.choice(tasks).cancel()
                for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                    if isinstance(outcome, asyncio.CancelledError):
                        cancelled += 1
                    elif outcome is not None:
                        raise outcome
            assert not breakers.is_degraded
            assert int((await client.info("clients"))["connected_clients"]) == 2, "no leak"
        await client.aclose()
    assert checks >= CUTS * (SCOPES - 1)


async def test_after_a_time_out(tmp_path: Path) -> None:
    """Redis answers what was given up, but later: those replies belong to nobody."""
    checks = 0
    with MortalRedis(tmp_path) as server:
        async with (
            opened(server.url, budget_s=10.0) as patient,
            opened(server.url, budget_s=0.1) as breakers,
        ):
            generations = await open_all(patient)
            while checks < 2 * SCOPES:
                await until(lambda: is_shared(breakers), "Redis answers")
                server.freeze()
                try:
                    during = await asyncio.gather(
                        *(breakers.allow(scope, "run-1:1", LIMIT_S) for scope in generations)
                    )
                finally:
                    server.thaw()
                assert all(isinstance(answer, Permit) and answer.is_local for answer in during)
                await until(lambda: is_shared(breakers), "Redis is found again")
                for scope, generation in generations.items():
                    answer = await breakers.allow(scope, "run-1:1", LIMIT_S)
                    if isinstance(answer, Refused):
                        assert answer.generation == generation
                        checks += 1


async def is_shared(breakers: RedisBreakers) -> bool:
    answer = await breakers.allow("another", "run-1:1", LIMIT_S)
    return isinstance(answer, Permit) and not answer.is_local
