"""One suite for both kinds of breakers: in the memory of a process, and in a real Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import pytest

from app.adapters.breakers.local import LocalBreakers
from app.adapters.breakers.policy import PROBE_LOOK_MAX_S, SCOPES_MAX, probe_s
from app.adapters.breakers.redis import RedisBreakers
from app.kit.clock import now_ms
from app.ports import (
    Breakers,
    BreakerStatus,
    Permit,
    Refused,
    Transition,
    TransitionKind,
)
from tests.redis_kit import elapse, make_client
from tests.servers import RunningRedis

THRESHOLD = 3
COOLDOWN_S = 30.0
LIMIT_S = 60.0
PROBE_S = probe_s(LIMIT_S)
SCOPE = "http::tool.example:443"
ME = "run-1:1"


@dataclass
class Bench:
    """Breakers under test, a way to let time pass for a scope, and the ms of their clock."""

    breakers: Breakers
    elapse: Callable[[str, float], Awaitable[None]]
    now: Callable[[], Awaitable[int]]
    worker_id: str


@pytest.fixture(params=["local", "redis"])
async def bench(request: pytest.FixtureRequest, redis_server: RunningRedis) -> AsyncIterator[Bench]:
    if request.param == "local":
        passed = [0.0]

        async def pass_time(scope: str, seconds: float) -> None:
            passed[0] += seconds

        async def our_time() -> int:
            return now_ms()

        yield Bench(
            LocalBreakers(
                threshold=THRESHOLD,
                cooldown_s=COOLDOWN_S,
                worker_id_of=lambda: "worker-1",
                clock=lambda: passed[0],
            ),
            pass_time,
            our_time,
            "worker-1",
        )
        return
    client = make_client(redis_server.url)
    await client.flushall()

    async def time_of_redis() -> int:
        seconds, microseconds = await client.time()
        return int(seconds) * 1_000 + int(microseconds) // 1_000

    shared = RedisBreakers(
        redis_server.url,
        threshold=THRESHOLD,
        cooldown_s=COOLDOWN_S,
        worker_id_of=lambda: "worker-1",
        budget_s=10.0,  # a busy machine is not what is tested here
    )
    yield Bench(shared, lambda scope, seconds: elapse(client, scope, seconds), time_of_redis, "")
    await shared.aclose()
    await client.aclose()


async def allowed(breakers: Breakers, scope: str = SCOPE, limit_s: float = LIMIT_S) -> Permit:
    answer = await breakers.allow(scope, ME, limit_s)
    assert isinstance(answer, Permit)
    return answer


async def refused(breakers: Breakers, scope: str = SCOPE) -> Refused:
    answer = await breakers.allow(scope, ME, LIMIT_S)
    assert isinstance(answer, Refused)
    return answer


async def call(breakers: Breakers, ok: bool | None, scope: str = SCOPE) -> Transition | None:
    return await breakers.report(await allowed(breakers, scope), ok, ME)


async def trip(breakers: Breakers, scope: str = SCOPE) -> Transition:
    for _ in range(THRESHOLD - 1):
        assert await call(breakers, False, scope) is None
    tripped = await call(breakers, False, scope)
    assert tripped is not None
    assert tripped.kind is TransitionKind.TRIPPED
    return tripped


async def only_view(breakers: Breakers) -> tuple[BreakerStatus, int, int]:
    (view,) = await breakers.views()
    assert view.scope == SCOPE
    return view.status, view.generation, view.failures


async def test_it_opens_after_consecutive_failures_only(bench: Bench) -> None:
    for _ in range(5):
        for _ in range(THRESHOLD - 1):
            assert await call(bench.breakers, False) is None
        assert await call(bench.breakers, True) is None
    before = await bench.now()
    tripped = await trip(bench.breakers)

    assert before <= tripped.generation <= await bench.now()
    assert tripped == Transition(
        SCOPE, tripped.generation, TransitionKind.TRIPPED, COOLDOWN_S, bench.worker_id
    )
    assert await only_view(bench.breakers) == (BreakerStatus.OPEN, tripped.generation, THRESHOLD)


async def test_no_verdict_is_neither_success_nor_failure(bench: Bench) -> None:
    for _ in range(THRESHOLD - 1):
        await call(bench.breakers, False)
    for _ in range(THRESHOLD):
        assert await call(bench.breakers, None) is None
    last = await call(bench.breakers, False)

    assert last is not None


async def test_open_refuses_until_the_cooldown_is_over(bench: Bench) -> None:
    tripped = await trip(bench.breakers)
    at_once = await refused(bench.breakers)
    await bench.elapse(SCOPE, COOLDOWN_S - 5)
    later = await refused(bench.breakers)
    await bench.elapse(SCOPE, 6)
    probe = await allowed(bench.breakers)

    assert 5 < at_once.retry_after_s <= COOLDOWN_S
    assert 0 < later.retry_after_s <= 5
    assert at_once.generation == later.generation == probe.generation == tripped.generation
    assert probe.probe != ""
    assert probe.transition is not None
    assert probe.transition.kind is TransitionKind.HALF_OPEN


async def half_open(bench: Bench, limit_s: float = LIMIT_S) -> tuple[Transition, Permit]:
    tripped = await trip(bench.breakers)
    await bench.elapse(SCOPE, COOLDOWN_S + 1)
    return tripped, await allowed(bench.breakers, limit_s=limit_s)


async def test_one_probe_at_a_time(bench: Bench) -> None:
    tripped, probe = await half_open(bench)
    answers = await asyncio.gather(*(bench.breakers.allow(SCOPE, ME, LIMIT_S) for _ in range(50)))

    assert all(isinstance(answer, Refused) for answer in answers)
    assert all(0 < a.retry_after_s < LIMIT_S / 2 for a in answers if isinstance(a, Refused))
    assert await only_view(bench.breakers) == (
        *(BreakerStatus.HALF_OPEN, tripped.generation, THRESHOLD),
    )
    assert probe.generation == tripped.generation


async def test_of_many_who_race_for_the_probe_one_gets_it(bench: Bench) -> None:
    await trip(bench.breakers)
    await bench.elapse(SCOPE, COOLDOWN_S + 1)
    answers = await asyncio.gather(*(bench.breakers.allow(SCOPE, ME, LIMIT_S) for _ in range(50)))

    assert sum(isinstance(answer, Permit) for answer in answers) == 1


async def test_a_good_probe_closes(bench: Bench) -> None:
    tripped, probe = await half_open(bench)
    closed = await bench.breakers.report(probe, True, ME)

    assert closed == Transition(
        SCOPE, tripped.generation, TransitionKind.CLOSED, COOLDOWN_S, bench.worker_id
    )
    assert await only_view(bench.breakers) == (BreakerStatus.CLOSED, tripped.generation, 0)
    again = await trip(bench.breakers)
    assert again.generation > tripped.generation


async def test_a_failed_probe_opens_under_a_new_generation(bench: Bench) -> None:
    tripped, probe = await half_open(bench)
    again = await bench.breakers.report(probe, False, ME)

    assert again is not None
    assert again.kind is TransitionKind.TRIPPED
    assert again.generation > tripped.generation
    assert (await refused(bench.breakers)).generation == again.generation
    await bench.elapse(SCOPE, COOLDOWN_S + 1)
    assert (await allowed(bench.breakers)).transition is not None


async def test_a_probe_without_verdict_is_given_back(bench: Bench) -> None:
    _, probe = await half_open(bench)
    assert await bench.breakers.report(probe, None, ME) is None
    second = await allowed(bench.breakers)

    assert second.probe not in ("", probe.probe)
    assert second.transition is None, "it was half-open all the time"
    assert await bench.breakers.report(probe, True, ME) is None, "no longer its turn"
    assert await bench.breakers.report(second, True, ME) is not None


async def test_a_dead_prober_does_not_wedge_the_breaker(bench: Bench) -> None:
    _, dead = await half_open(bench)
    await bench.elapse(SCOPE, PROBE_S - 5)
    await refused(bench.breakers)
    await bench.elapse(SCOPE, 6)
    second = await allowed(bench.breakers)

    assert second.probe not in ("", dead.probe)
    assert await bench.breakers.report(dead, False, ME) is None
    assert await bench.breakers.report(second, True, ME) is not None
    assert await bench.breakers.report(dead, False, ME) is None
    assert (await only_view(bench.breakers))[0] is BreakerStatus.CLOSED
    assert (await only_view(bench.breakers))[2] == 0


async def test_a_probe_that_took_long_counts_while_nobody_took_its_place(bench: Bench) -> None:
    _, slow = await half_open(bench)
    await bench.elapse(SCOPE, PROBE_S + 1)

    assert await bench.breakers.report(slow, True, ME) is not None


@pytest.mark.parametrize("limit_s", [600.0, 86_400.0])
async def test_no_second_probe_starts_beside_a_slow_one(bench: Bench, limit_s: float) -> None:
    """Else each success would come after its turn, and the breaker never close."""
    _, slow = await half_open(bench, limit_s)
    for _ in range(9):
        await bench.elapse(SCOPE, limit_s / 10)
        await refused(bench.breakers)

    closed = await bench.breakers.report(slow, True, ME)
    assert closed is not None
    assert closed.kind is TransitionKind.CLOSED


async def test_a_probe_is_trusted_for_its_own_limit(bench: Bench) -> None:
    """Not for the limit of whoever asks, and not for that of an earlier probe."""
    _, slow = await half_open(bench, 600.0)
    await bench.breakers.report(slow, None, ME)
    await allowed(bench.breakers, limit_s=1.0)
    await bench.elapse(SCOPE, probe_s(1.0) + 1)

    assert (await allowed(bench.breakers)).probe != ""


async def test_who_waits_for_a_probe_that_hangs_asks_seldom(bench: Bench) -> None:
    await half_open(bench)
    asks = 0
    while isinstance(answer := await bench.breakers.allow(SCOPE, ME, LIMIT_S), Refused):
        asks += 1
        await bench.elapse(SCOPE, answer.retry_after_s)

    assert asks <= 10


async def test_who_waits_for_a_long_probe_still_looks(bench: Bench) -> None:
    """The breaker may close, or be closed by hand, any moment."""
    await half_open(bench, 86_400.0)
    await bench.elapse(SCOPE, 43_200.0)

    assert (await refused(bench.breakers)).retry_after_s == PROBE_LOOK_MAX_S


async def test_reports_of_an_older_generation_change_nothing(bench: Bench) -> None:
    early = [await allowed(bench.breakers) for _ in range(2 * THRESHOLD)]
    _, probe = await half_open(bench)
    for permit in early:
        assert await bench.breakers.report(permit, True, ME) is None
    assert (await only_view(bench.breakers))[0] is BreakerStatus.HALF_OPEN
    await bench.breakers.report(probe, True, ME)
    for permit in early:
        assert await bench.breakers.report(permit, False, ME) is None

    assert (await only_view(bench.breakers))[0] is BreakerStatus.CLOSED
    assert (await only_view(bench.breakers))[2] == 0


async def test_racing_failures_trip_once_per_opening(bench: Bench) -> None:
    generations = set()
    for _ in range(20):
        permits = [await allowed(bench.breakers) for _ in range(50)]
        told = await asyncio.gather(
            *(bench.breakers.report(permit, False, ME) for permit in permits)
        )
        (tripped,) = [transition for transition in told if transition is not None]
        generations.add(tripped.generation)
        await bench.elapse(SCOPE, COOLDOWN_S + 1)
        assert await call(bench.breakers, True) is not None

    assert len(generations) == 20


async def test_scopes_do_not_know_each_other(bench: Bench) -> None:
    await trip(bench.breakers, "http::b")
    await allowed(bench.breakers, "http::a")

    views = await bench.breakers.views()
    assert [(view.scope, view.status) for view in views] == [
        ("http::a", BreakerStatus.CLOSED),
        ("http::b", BreakerStatus.OPEN),
    ]


async def test_reset_by_hand(bench: Bench) -> None:
    with pytest.raises(KeyError):
        await bench.breakers.reset(SCOPE)
    for _ in range(THRESHOLD - 1):
        await call(bench.breakers, False)
    assert await bench.breakers.reset(SCOPE) is None, "it was closed"
    tripped = await trip(bench.breakers)
    closed = await bench.breakers.reset(SCOPE)

    assert closed is not None
    assert (closed.kind, closed.generation) == (TransitionKind.CLOSED, tripped.generation)
    assert await call(bench.breakers, True) is None


async def test_a_reset_takes_the_turn_of_a_probe(bench: Bench) -> None:
    _, probe = await half_open(bench)
    assert await bench.breakers.reset(SCOPE) is not None

    assert await bench.breakers.report(probe, False, ME) is None
    assert (await only_view(bench.breakers))[0] is BreakerStatus.CLOSED


async def test_memory_holds_a_bounded_number_of_scopes() -> None:
    breakers = LocalBreakers(
        threshold=1, cooldown_s=COOLDOWN_S, worker_id_of=lambda: "worker-1", clock=lambda: 0.0
    )
    first = await call(breakers, False)
    assert first is not None
    for number in range(SCOPES_MAX):
        await allowed(breakers, f"scope-{number}")
    assert len(await breakers.views()) == SCOPES_MAX
    again = await call(breakers, False)

    assert again is not None, "forgotten, so it let the call through"
    assert again.generation > first.generation
    assert not breakers.is_degraded
    assert await breakers.unannounced() == []


@pytest.mark.parametrize(("threshold", "cooldown_s"), [(0, 1.0), (1, 0.0)])
def test_a_policy_that_can_not_work_is_refused(threshold: int, cooldown_s: float) -> None:
    with pytest.raises(ValueError, match="a breaker needs"):
        LocalBreakers(threshold=threshold, cooldown_s=cooldown_s, worker_id_of=lambda: "")
