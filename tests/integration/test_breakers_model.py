"""Random steps on three breakers at once: a plain model, the one in memory, the one in Redis.

The model is written from the policy and knows nothing of how the two are built. All three have to
give the same answers, whatever the order of calls, reports, resets and time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from app.adapters.breakers.local import LocalBreakers
from app.adapters.breakers.redis import RedisBreakers
from app.ports import Breakers, BreakerStatus, Permit, Refused, Transition, TransitionKind
from tests.redis_kit import elapse, make_client
from tests.servers import RunningRedis

THRESHOLD = 3
COOLDOWN_S = 1_000.0  # the seconds that a test really takes do not matter beside it
GRACE_S = 5.0
LIMITS_S = st.sampled_from([COOLDOWN_S / 10, COOLDOWN_S, 3 * COOLDOWN_S, 100 * COOLDOWN_S])
SCOPE = "http::tool.example:443"
WAITS_S = st.sampled_from([1.0, COOLDOWN_S / 2, COOLDOWN_S, 2 * COOLDOWN_S])
OUTCOMES = st.sampled_from([True, False, False, False, None])
MARGIN_S = 30.0
"""Time that passes in Redis by itself must not decide: steps do not lead to just before an end."""


@dataclass
class Model:
    """The policy. `opening` counts openings; a permit is `(opening, number of its probe or 0)`."""

    now: float = 0.0
    status: BreakerStatus = BreakerStatus.CLOSED
    opening: int = 0
    failures: int = 0
    begun: float = 0.0  # the probe
    ends: float = 0.0  # of the cool-down, then of the probe
    probes: int = 0
    probe: int = 0

    def wait_s(self) -> float:
        """How long whoever is refused now has to wait."""
        left_s = self.ends - self.now
        if self.status is BreakerStatus.OPEN:
            return left_s
        return min(max(0.5, self.now - self.begun), 60.0, left_s)

    def allow(self, limit_s: float) -> tuple[int, int] | None:
        if self.status is BreakerStatus.CLOSED:
            return self.opening, 0
        if self.status is BreakerStatus.OPEN and self.now < self.ends:
            return None
        if self.status is BreakerStatus.HALF_OPEN and self.probe and self.now < self.ends:
            return None
        self.status = BreakerStatus.HALF_OPEN
        self.probes += 1
        self.probe = self.probes
        self.begun = self.now
        self.ends = self.now + limit_s + GRACE_S
        return self.opening, self.probe

    def report(self, permit: tuple[int, int], ok: bool | None) -> TransitionKind | None:
        opening, probe = permit
        is_of_now = opening == self.opening and (
            probe == self.probe if self.status is BreakerStatus.HALF_OPEN else probe == 0
        )
        if not is_of_now or self.status is BreakerStatus.OPEN:
            return None
        if ok is None:
            self.probe = 0
            return None
        if ok:
            return self.close()
        self.failures += 1
        if self.status is BreakerStatus.CLOSED and self.failures < THRESHOLD:
            return None
        self.status = BreakerStatus.OPEN
        self.opening += 1
        self.probe = 0
        self.ends = self.now + COOLDOWN_S
        return TransitionKind.TRIPPED

    def close(self) -> TransitionKind | None:
        was_closed = self.status is BreakerStatus.CLOSED
        self.status = BreakerStatus.CLOSED
        self.failures = 0
        self.probe = 0
        return None if was_closed else TransitionKind.CLOSED


@dataclass
class World:
    """The loop and the Redis that all examples share."""

    loop: asyncio.AbstractEventLoop
    url: str


@dataclass
class Call:
    """One call under way, as each of the three let it through."""

    model: tuple[int, int]
    real: list[Permit]


@dataclass
class Told:
    """What was told of one of the two real breakers so far."""

    transitions: list[Transition] = field(default_factory=list)


class BreakerMachine(RuleBasedStateMachine):
    world: World

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.passed = 0.0
        self.calls: list[Call] = []
        self.told = (Told(), Told())

    @initialize()
    def start(self) -> None:
        self.world.loop.run_until_complete(self._start())

    async def _start(self) -> None:
        self.client = make_client(self.world.url)
        await self.client.flushall()
        self.real: tuple[Breakers, Breakers] = (
            LocalBreakers(
                threshold=THRESHOLD,
                cooldown_s=COOLDOWN_S,
                worker_id_of=lambda: "worker-1",
                clock=lambda: self.passed,
            ),
            RedisBreakers(
                self.world.url,
                threshold=THRESHOLD,
                cooldown_s=COOLDOWN_S,
                worker_id_of=lambda: "worker-1",
                budget_s=10.0,
            ),
        )

    def teardown(self) -> None:
        self.world.loop.run_until_complete(self._stop())

    async def _stop(self) -> None:
        await self.real[1].aclose()
        await self.client.aclose()

    @rule(limit_s=LIMITS_S)
    def ask(self, limit_s: float) -> None:
        was_open = self.model.status is BreakerStatus.OPEN
        expected = self.model.allow(limit_s)
        answers = [
            self.world.loop.run_until_complete(one.allow(SCOPE, "run:1", limit_s))
            for one in self.real
        ]
        if expected is None:
            for answer in answers:
                assert isinstance(answer, Refused)
                assert answer.retry_after_s > 0
                assert abs(answer.retry_after_s - self.model.wait_s()) < MARGIN_S
            return
        permits = [answer for answer in answers if isinstance(answer, Permit)]
        assert len(permits) == 2
        for permit, told in zip(permits, self.told, strict=True):
            assert (permit.probe != "") == (expected[1] != 0)
            kind = permit.transition and permit.transition.kind
            assert kind == (TransitionKind.HALF_OPEN if expected[1] and was_open else None)
            self._note(told, permit.transition)
        self.calls.append(Call(expected, permits))

    @precondition(lambda self: self.calls)
    @rule(data=st.data(), ok=OUTCOMES)
    def end_one(self, data: st.DataObject, ok: bool | None) -> None:
        self._report(self.calls.pop(data.draw(st.integers(0, len(self.calls) - 1))), ok)

    @rule(outcomes=st.lists(OUTCOMES, min_size=1, max_size=2 * THRESHOLD), limit_s=LIMITS_S)
    def call_in_a_row(self, outcomes: list[bool | None], limit_s: float) -> None:
        for ok in outcomes:
            calls = len(self.calls)
            self.ask(limit_s)
            if len(self.calls) > calls:
                self._report(self.calls.pop(), ok)

    @rule(seconds=WAITS_S, ok=OUTCOMES, limit_s=LIMITS_S)
    def call_later(self, seconds: float, ok: bool | None, limit_s: float) -> None:
        self.wait(seconds)
        self.call_in_a_row([ok], limit_s)

    @precondition(lambda self: self.model.status is not BreakerStatus.CLOSED)
    @rule(limits_s=st.tuples(LIMITS_S, LIMITS_S), seconds=WAITS_S)
    def ask_behind_a_probe(self, limits_s: tuple[float, float], seconds: float) -> None:
        self.wait(COOLDOWN_S)
        self.ask(limits_s[0])
        self.wait(seconds)
        self.ask(limits_s[1])

    def _report(self, call: Call, ok: bool | None) -> None:
        expected = self.model.report(call.model, ok)
        for one, permit, told in zip(self.real, call.real, self.told, strict=True):
            transition = self.world.loop.run_until_complete(one.report(permit, ok, "run:1"))
            assert (transition and transition.kind) == expected
            self._note(told, transition)

    @precondition(lambda self: self.told[0].transitions)
    @rule()
    def reset(self) -> None:
        expected = self.model.close()
        for one, told in zip(self.real, self.told, strict=True):
            transition = self.world.loop.run_until_complete(one.reset(SCOPE))
            assert (transition and transition.kind) == expected
            self._note(told, transition)

    @rule(seconds=WAITS_S)
    def wait(self, seconds: float) -> None:
        left = self.model.ends - self.model.now - seconds
        if 0 < left < MARGIN_S:
            seconds += left
        self.model.now += seconds
        self.passed += seconds
        self.world.loop.run_until_complete(elapse(self.client, SCOPE, seconds))

    def _note(self, told: Told, transition: Transition | None) -> None:
        """Told in the order in which it can happen, and each opening under a higher number."""
        if transition is None:
            return
        before = told.transitions[-1] if told.transitions else None
        if transition.kind is TransitionKind.TRIPPED:
            assert before is None or transition.generation > before.generation
        else:
            assert before is not None
            assert transition.generation == before.generation
            assert transition.kind != before.kind
        told.transitions.append(transition)

    @invariant()
    def all_stand_alike(self) -> None:
        if not self.calls and not self.told[0].transitions:
            return
        for one in self.real:
            (view,) = self.world.loop.run_until_complete(one.views())
            assert (view.status, view.failures) == (self.model.status, self.model.failures)


@pytest.fixture
def world(redis_server: RunningRedis) -> Iterator[World]:
    with asyncio.Runner() as runner:
        yield World(runner.get_loop(), redis_server.url)


def test_memory_and_redis_follow_the_model(world: World) -> None:
    BreakerMachine.world = world
    run_state_machine_as_test(
        BreakerMachine,
        settings=settings(
            max_examples=50,
            stateful_step_count=25,
            deadline=None,
            phases=[
                Phase.generate
            ],  # shrinking takes minutes; set it when there is something to shrink
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
