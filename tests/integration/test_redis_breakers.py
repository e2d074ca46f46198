"""What only the shared breakers promise: Redis away, broken or flushed, and replies kept apart."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from app.adapters.breakers.policy import SCOPES_MAX
from app.adapters.breakers.redis import INDEX_KEY, RedisBreakers
from app.adapters.breakers.scripts import TRANSITIONS_MAX
from app.ports import BreakerStatus, Permit, Refused, Transition, TransitionKind
from tests.redis_kit import MortalRedis, elapse, make_client, until
from tests.servers import RunningRedis, free_port

COOLDOWN_S = 30.0
LIMIT_S = 60.0
SCOPE = "http::tool.example:443"
KEY = f"flexrun:cb:{{{SCOPE}}}"
Make = Callable[..., RedisBreakers]


@pytest.fixture
async def client(redis_server: RunningRedis) -> AsyncIterator[Any]:
    client = make_client(redis_server.url)
    await client.flushall()
    yield client
    await client.aclose()


@pytest.fixture
async def make(redis_server: RunningRedis) -> AsyncIterator[Make]:
    async with AsyncExitStack() as stack:

        def make_one(url: str = redis_server.url, **changes: Any) -> RedisBreakers:
            options = {"threshold": 1, "cooldown_s": COOLDOWN_S, "budget_s": 10.0, **changes}
            breakers = RedisBreakers(url, worker_id_of=lambda: "worker-1", **options)
            stack.push_async_callback(breakers.aclose)
            return breakers

        yield make_one


async def allowed(breakers: RedisBreakers, scope: str = SCOPE, limit_s: float = LIMIT_S) -> Permit:
    answer = await breakers.allow(scope, "run-1:1", limit_s)
    assert isinstance(answer, Permit)
    return answer


async def fail(breakers: RedisBreakers, scope: str = SCOPE, holder: str = "run-1:1") -> Transition:
    told = await breakers.report(await allowed(breakers, scope), False, holder)
    assert told is not None
    return told


async def test_failures_of_two_processes_add_up(make: Make, client: Any) -> None:
    first, second = make(threshold=4), make(threshold=4)
    for breakers in (first, second, first):
        assert await breakers.report(await allowed(breakers), False, "run-1:1") is None
    tripped = await fail(second)

    assert tripped.worker_id == ""
    for breakers in (first, second):
        assert isinstance(await breakers.allow(SCOPE, "run-1:1", LIMIT_S), Refused)


async def test_two_workers_racing_trip_once_per_opening(make: Make, client: Any) -> None:
    workers = (make(threshold=5), make(threshold=5))
    openings: list[int] = []
    for _ in range(20):
        permits = [(worker, await allowed(worker)) for worker in workers for _ in range(50)]
        told = await asyncio.gather(*(w.report(p, False, "run-1:1") for w, p in permits))
        openings += [transition.generation for transition in told if transition]
        await elapse(client, SCOPE, COOLDOWN_S + 1)
        await workers[0].report(await allowed(workers[0]), True, "run-1:1")

    assert len(openings) == len(set(openings)) == 20


async def test_every_key_has_a_time_to_live(make: Make, client: Any) -> None:
    breakers = make(threshold=2)
    await breakers.report(await allowed(breakers, "one failure"), False, "run-1:1")
    for scope in ("open", "half-open", "closed", "given back", "reset"):
        await breakers.report(await allowed(breakers, scope), False, "run-1:1")
        await breakers.report(await allowed(breakers, scope), False, "run-1:1")
        if scope not in ("open", "reset"):
            await elapse(client, scope, COOLDOWN_S + 1)
            probe = await allowed(breakers, scope)
            if scope != "half-open":
                await breakers.report(probe, True if scope == "closed" else None, "run-1:1")
    await breakers.reset("reset")
    keys = await client.keys("*")

    assert len(keys) == 7
    for key in keys:
        assert await client.pttl(key) > (10 * COOLDOWN_S - 5) * 1000, key


async def test_a_breaker_outlives_the_longest_call(make: Make, client: Any) -> None:
    """As long as somebody may report on it, it is in Redis and in the index."""
    breakers, day_s = make(threshold=2), 86_400.0

    async def lives_longer() -> bool:
        ends = [await client.pttl(KEY) / 1000, await client.pttl(INDEX_KEY) / 1000]
        seconds, _ = await client.time()
        ends.append(await client.zscore(INDEX_KEY, SCOPE) - seconds)
        return bool(min(ends) > 2 * day_s)

    for _ in range(2):
        await breakers.report(await allowed(breakers, limit_s=day_s), False, "run-1:1")
        assert await lives_longer(), "or its failures are never in a row"
    await elapse(client, SCOPE, COOLDOWN_S + 1)
    await allowed(breakers, limit_s=day_s)
    await make().allow(SCOPE, "run-1:1", 1.0)
    assert await lives_longer(), "half open, whoever asks meanwhile"


async def test_all_scopes_are_read_in_a_few_round_trips(make: Make, client: Any) -> None:
    breakers = make()
    scopes = [f"scope {number:03}" for number in range(300)]
    told = await asyncio.gather(*(fail(breakers, scope) for scope in scopes))
    before = await reads_of(client)
    views = await breakers.views()
    kept = await breakers.unannounced()

    assert await reads_of(client) - before < 100
    assert [view.scope for view in views] == scopes
    assert [transition for transition, _ in kept] == told


async def reads_of(client: Any) -> int:
    """How often Redis read from any socket."""
    return int((await client.info("stats"))["total_reads_processed"])


async def test_a_transition_is_kept_until_it_is_forgotten(make: Make, client: Any) -> None:
    first, second = make(), make()
    tripped = await fail(first, holder="run-7:3")
    await elapse(client, SCOPE, COOLDOWN_S + 1)
    probe = await second.allow(SCOPE, "run:with:colons", LIMIT_S)
    assert isinstance(probe, Permit)
    closed = await second.report(probe, True, "run-9:1")
    assert probe.transition is not None
    assert closed is not None

    kept = [(tripped, "run-7:3"), (probe.transition, "run:with:colons"), (closed, "run-9:1")]
    assert await first.unannounced() == await second.unannounced() == kept
    await second.forget([tripped, closed])
    assert await first.unannounced() == [kept[1]]
    await first.forget([probe.transition])
    assert await second.unannounced() == []


async def test_kept_transitions_are_bounded_and_the_newest_stay(make: Make, client: Any) -> None:
    breakers = make()
    told = [await fail(breakers)]
    for _ in range(TRANSITIONS_MAX):
        await elapse(client, SCOPE, COOLDOWN_S + 1)
        probe = await allowed(breakers)
        assert probe.transition is not None
        failed = await breakers.report(probe, False, "run-1:1")
        assert failed is not None
        told += [probe.transition, failed]

    kept = [transition for transition, _ in await breakers.unannounced()]
    assert kept == told[-TRANSITIONS_MAX:]


async def test_a_flush_never_brings_a_generation_back(make: Make, client: Any) -> None:
    breakers = make()
    generations = []
    for _ in range(100):
        generations.append((await fail(breakers)).generation)
        await client.flushall()

    assert sorted(set(generations)) == generations


async def test_scopes_are_found_again_after_a_flush(make: Make, client: Any) -> None:
    now = [0.0]
    breakers = make(clock=lambda: now[0])
    await fail(breakers)
    await client.flushall()
    await fail(breakers)
    assert await breakers.unannounced() == []
    now[0] += 10.0
    await breakers.allow(SCOPE, "run-1:1", LIMIT_S)

    assert [transition.kind for transition, _ in await breakers.unannounced()] == ["tripped"]


async def test_scripts_that_redis_forgot_are_sent_again(make: Make, client: Any) -> None:
    breakers = make(threshold=50)
    for _ in range(49):
        assert await breakers.report(await allowed(breakers), False, "run-1:1") is None
        await client.script_flush()
    assert (await fail(breakers)).kind is TransitionKind.TRIPPED

    assert not breakers.is_degraded


@pytest.mark.parametrize("key", [KEY, INDEX_KEY])
@pytest.mark.parametrize(
    "command",
    [
        ("SET", "x"),
        ("RPUSH", "x"),
        ("HSET", "status", "odd", "failures", "many", "t:odd", "odd", "t:1:1:odd", "1:"),
        ("HSET", "status", "half_open", "generation", "inf", "probe_at", "nan", "cooldown", "-1"),
    ],
)
async def test_a_key_that_somebody_filled_breaks_no_call(
    make: Make, client: Any, key: str, command: tuple[str, ...]
) -> None:
    breakers = make(threshold=2)

    async def spoil() -> None:
        await client.delete(key)
        await client.execute_command(command[0], key, *command[1:])

    await spoil()
    permit = await allowed(breakers)
    for ok in (False, True, None):
        await spoil()
        await breakers.report(permit, ok, "run-1:1")
    await spoil()
    assert len(await breakers.views()) <= 1
    await spoil()
    assert await breakers.unannounced() == []

    assert not breakers.is_degraded
    assert await client.type(KEY) in ("hash", "none")


async def test_the_index_holds_the_scopes_in_use_and_no_more(make: Make, client: Any) -> None:
    seconds, _ = await client.time()
    await client.zadd(INDEX_KEY, {f"in use {n}": seconds + 60 for n in range(SCOPES_MAX + 100)})
    await client.zadd(INDEX_KEY, {f"of last year {n}": 0 for n in range(100)})
    await allowed(make())

    names = await client.zrange(INDEX_KEY, 0, -1)
    assert len(names) == SCOPES_MAX
    assert SCOPE in names
    assert not [name for name in names if name.startswith("of last year")]


async def test_without_redis_this_process_judges_alone(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    breakers = make(f"redis://:s3cret@127.0.0.1:{free_port()}/0", threshold=2)
    permit = await allowed(breakers)
    assert await breakers.report(permit, False, "run-1:1") is None
    tripped = await fail(breakers)

    assert permit.is_local
    assert breakers.is_degraded
    assert (tripped.worker_id, tripped.degraded) == ("worker-1", True)
    assert isinstance(await breakers.allow(SCOPE, "run-1:1", LIMIT_S), Refused)
    assert [(v.scope, v.degraded) for v in await breakers.views()] == [(SCOPE, True)]
    assert await breakers.reset(SCOPE) is not None
    with pytest.raises(KeyError):
        await breakers.reset("never asked for")
    assert await breakers.unannounced() == []
    await breakers.forget([tripped])
    assert warnings(caplog) == [
        "Redis is away (ConnectionError): this process judges its breakers alone"
    ]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno >= logging.WARNING and record.name == "flexrun.breakers"
    ]


async def test_killed_and_started_again(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with MortalRedis(tmp_path) as server:
        breakers = make(server.url, threshold=2)
        before = await allowed(breakers)
        server.kill()
        assert await breakers.report(before, False, "run-1:1") is None, "its judge is away"
        during = await allowed(breakers)
        assert (before.is_local, during.is_local) == (False, True)
        assert await breakers.report(during, False, "run-1:1") is None
        assert (await fail(breakers)).degraded

        server.start()
        await until(lambda: not breakers.is_degraded, "Redis is found again")
        after = await allowed(breakers)
        assert not after.is_local
        assert await breakers.report(during, False, "run-1:1") is None, "a local permit, long over"
        assert await breakers.report(after, False, "run-1:1") is None
        assert not (await fail(breakers)).degraded

        server.kill()
        assert (await allowed(breakers)).is_local, "the opening of the last outage is forgotten"
    assert len(warnings(caplog)) == 2, "one for each outage"


async def test_a_frozen_redis_holds_nobody_up(make: Make, tmp_path: Path) -> None:
    with MortalRedis(tmp_path) as server:
        breakers = make(server.url, budget_s=0.05)
        await until(lambda: is_shared(breakers), "a first answer from Redis")
        server.freeze()
        try:
            answers = await asyncio.gather(
                *(breakers.allow(SCOPE, "run-1:1", LIMIT_S) for _ in range(200))
            )
            assert all(isinstance(a, Permit) and a.is_local for a in answers)
            # Not yet, if it was our own loop that was late.
            await until(lambda: is_away(breakers), "Redis is found away")
        finally:
            server.thaw()
        await until(lambda: is_shared(breakers), "Redis is found again")


async def is_away(breakers: RedisBreakers) -> bool:
    await breakers.allow(SCOPE, "run-1:1", LIMIT_S)
    return breakers.is_degraded


async def is_shared(breakers: RedisBreakers) -> bool:
    answer = await breakers.allow("another", "run-1:1", LIMIT_S)
    return isinstance(answer, Permit) and not answer.is_local


async def test_a_process_that_stood_still_does_not_blame_redis(make: Make, tmp_path: Path) -> None:
    with MortalRedis(tmp_path) as server:
        breakers = make(server.url, budget_s=0.5)
        await until(lambda: is_shared(breakers), "a first answer from Redis")
        server.freeze()  # or its answer may be there before the time is over
        try:
            asking = asyncio.create_task(breakers.allow(SCOPE, "run-1:1", LIMIT_S))
            await asyncio.sleep(0.05)  # the question is under way
            time.sleep(1.5)  # noqa: ASYNC251 - the point of the test
            answer = await asking
        finally:
            server.thaw()

    assert isinstance(answer, Permit)
    assert answer.is_local
    assert not breakers.is_degraded


async def test_a_read_only_redis_is_away_until_it_takes_writes(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with MortalRedis(tmp_path) as server:
        admin = make_client(server.url)
        breakers = make(server.url)
        await allowed(breakers)
        await admin.replicaof("127.0.0.1", str(free_port()))
        permit = await allowed(breakers)
        await breakers.report(permit, False, "run-1:1")
        assert breakers.is_degraded
        assert (await allowed(breakers)).is_local
        looks = await looks_at(admin)
        await until(lambda: looked_again(admin, looks), "another look at Redis")
        assert breakers.is_degraded
        await admin.replicaof("NO", "ONE")
        await until(lambda: not breakers.is_degraded, "Redis is found again")
        await admin.aclose()
    assert len(warnings(caplog)) == 1


async def looks_at(admin: Any) -> int:
    return int((await admin.info("commandstats"))["cmdstat_evalsha"]["calls"])


async def looked_again(admin: Any, looks: int) -> bool:
    return await looks_at(admin) > looks


async def test_a_password_that_we_do_not_have(make: Make, tmp_path: Path) -> None:
    with MortalRedis(tmp_path, "--requirepass", "s3cret") as server:
        breakers = make(server.url)
        assert (await allowed(breakers)).is_local
        assert breakers.is_degraded
        with_password = make(server.url.replace("redis://", "redis://:s3cret@"))
        assert not (await allowed(with_password)).is_local


async def test_a_probe_that_nobody_heard_of_is_given_back(make: Make, client: Any) -> None:
    """Cancelled at every step of the way, also where Redis has granted the probe already."""
    breakers = make()
    await fail(breakers)
    await elapse(client, SCOPE, COOLDOWN_S + 1)
    granted = 0
    for steps in range(40):
        asking = asyncio.create_task(breakers.allow(SCOPE, "run-1:1", LIMIT_S))
        for _ in range(steps):
            await asyncio.sleep(0)
        asking.cancel()
        (answer,) = await asyncio.gather(asking, return_exceptions=True)
        if isinstance(answer, Permit):
            granted += 1
            await breakers.report(answer, None, "run-1:1")
        probe = await probe_at_last(breakers)
        await breakers.report(probe, None, "run-1:1")

    assert granted < 40
    assert (await breakers.views())[0].status is BreakerStatus.HALF_OPEN


async def probe_at_last(breakers: RedisBreakers) -> Permit:
    async with asyncio.timeout(10):
        while not isinstance(answer := await breakers.allow(SCOPE, "run-1:1", LIMIT_S), Permit):  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    return answer
