"""Hundreds of runs in virtual time: random plans, replans, outcomes, slots, operators, crashes.

Every rule of `tests/journal_rules.py` is checked at every event. A failing seed is replayed with
`Simulation(random_scenario(seed)).run()`.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain.capability import Effect, NodeKind
from app.domain.plan import Bound, PlanNode
from app.domain.policy import ReplanAction, RuntimePolicy, Trigger, TriggerKind
from app.domain.run import RunStatus
from tests.plans import chain, diamond, plan_node, plan_of, wide
from tests.scenarios import (
    CONCURRENCY,
    FAILURES,
    Scenario,
    goals,
    random_policy,
    random_scenario,
)
from tests.simulator import Simulation

SEEDS = range(600)
_CHUNK = 100


@pytest.fixture(autouse=True)
def _untraced() -> Iterator[None]:
    """No coverage here: it makes these loops three times as slow, and other tests cover it all."""
    tracer = sys.gettrace()
    sys.settrace(None)
    yield
    sys.settrace(tracer)


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    """The same troubles as `random_scenario`, but Hypothesis shrinks the plan."""
    nodes: list[PlanNode] = []
    for index in range(draw(st.integers(1, 7))):
        earlier = [node.id for node in nodes]
        requires = draw(st.lists(st.sampled_from(earlier), unique=True)) if earlier else []
        capability = draw(st.sampled_from(list(CONCURRENCY)))
        nodes.append(
            plan_node(
                f"n{index}",
                *requires,
                kind=draw(st.sampled_from([NodeKind.EXECUTION] * 9 + [NodeKind.FALLBACK])),
                bindings={"told": Bound(None, "", 1)},
                effect=draw(st.sampled_from(Effect)),
                max_attempts=draw(st.integers(1, 3)),
                capability_id=capability,
                concurrency=CONCURRENCY[capability],
            )
        )
    seed = draw(st.integers(0, 2**32))
    rng = random.Random(seed)
    return Scenario(
        plan=replace(plan_of(*nodes), open_goals=goals(draw(st.sampled_from([0, 0, 2])))),
        seed=seed,
        max_parallel=draw(st.integers(1, 4)),
        deadline_ms=draw(st.none() | st.integers(1, 1_000)),
        failures=draw(st.sampled_from([tuple(FAILURES), ("refused", "timeout")])),
        trouble=draw(st.sampled_from([0.0, 0.3, 0.8])),
        crash=draw(st.sampled_from([0.0, 0.1, 0.4])),
        foreign=draw(st.sampled_from([0.0, 0.5])),
        cancel=draw(st.sampled_from([0.0, 0.0, 0.1])),
        pause=draw(st.sampled_from([0.0, 0.2])),
        refusal=draw(st.sampled_from([0.0, 0.4])),
        policies=tuple(random_policy(rng, f"p{i}") for i in range(draw(st.integers(0, 2)))),
        no_plan=draw(st.sampled_from([0.0, 0.3])),
    )


@settings(max_examples=80)
@given(scenarios())
def test_any_run_keeps_the_rules_whatever_happens(scenario: Scenario) -> None:
    Simulation(scenario).run().check_snapshots()


@pytest.mark.parametrize("first", SEEDS[::_CHUNK])
def test_seeded_runs_keep_the_rules(first: int) -> None:
    for seed in range(first, first + _CHUNK):
        Simulation(random_scenario(seed)).run().check_snapshots(lambda k: k % 8 == 0)


def test_the_simulated_runs_meet_every_trouble_and_every_end() -> None:
    """The rules would hold for runs in which nothing happens, so a look at what did happen."""
    seen: Counter[str] = Counter()
    for seed in range(120):
        seen += Simulation(random_scenario(seed)).run().seen
    expected = {
        *("NODE_RETRY", "NODE_FAILED", "NODE_BLOCKED", "RUN_PAUSED", "RUN_RECOVERED"),
        *("crash in the append", "crash before the calls", "crash after the calls"),
        *("recovered with calls under way", "waited for a slot", "deadline", "nobody came"),
        *("ended done", "ended failed", "ended cancelled", "ended awaiting_human"),
        *("blocked to done", "blocked to failed", "blocked to pending", "pending to blocked"),
        *("running to blocked", "running to pending", "blocked to running"),
        *("cancel applied", "cancel discarded", "pause applied", "pause discarded"),
        *("resume applied", "resume discarded", "ended paused"),
        *("replan by policy", "replan by next goal", "kept done", "kept pending", "ordered anew"),
        "went on with calls of before the pause",
    }
    assert {name for name in expected if seen[name] == 0} == set()


_TOLD = {"told": Bound(None, "", 1)}
_EVERY_END = tuple(
    RuntimePolicy(
        id=kind,
        trigger=Trigger(kind=kind),
        action=ReplanAction(kind="replan", max_attempts=4),
    )
    for kind in TriggerKind
)
REPLANNED = {
    "a policy asks, operators interfere": Scenario(
        plan_of(
            *(plan_node(f"n{i}", effect=Effect.AT_MOST_ONCE, bindings=_TOLD) for i in range(6))
        ),
        seed=0,
        failures=("timeout",),
        trouble=0.6,
        pause=0.6,
        crash=0.02,
        policies=_EVERY_END,
    ),
    "an operator asks": Scenario(
        plan_of(
            plan_node("A", bindings=_TOLD),
            plan_node("asked", "A", kind=NodeKind.FALLBACK, bindings=_TOLD),
            plan_node("B", "asked", bindings=_TOLD),
        ),
        seed=0,
        trouble=0.0,
        no_plan=0.4,
    ),
    "goals are left": Scenario(
        replace(plan_of(plan_node("A", bindings=_TOLD)), open_goals=goals(3)),
        seed=0,
        trouble=0.0,
        policies=_EVERY_END,
    ),
}


def test_the_simulated_plans_are_replaced_in_every_way() -> None:
    seen: Counter[str] = Counter()
    for scenario in REPLANNED.values():
        for seed in range(30):
            simulation = Simulation(replace(scenario, seed=seed)).run()
            simulation.check_snapshots(lambda k: k % 8 == 0)
            seen += simulation.seen
    expected = {
        *("replan by policy", "replan by operator", "replan by next goal"),
        *("no plan for policy", "no plan for operator", "no plan for next goal"),
        *("kept done", "kept pending", "kept blocked", "ordered anew", "ordered again"),
        *("replan of a pause", "dropped a plan", "crash while a plan is made"),
        *("ended done", "ended failed", "ended awaiting_human"),
    }
    assert {name for name in expected if seen[name] == 0} == set()


def test_what_a_finished_run_came_to_is_kept_by_its_successors() -> None:
    """From one to the next until one is done: what was done is never called again."""
    seen: Counter[str] = Counter()
    for seed in range(60):
        simulation = Simulation(random_scenario(seed)).run()
        for generation in range(4):
            status = simulation.state.status
            if status not in (RunStatus.FAILED, RunStatus.CANCELLED):
                break
            if simulation.state.plan is None:
                break
            successor = simulation.successor(1_000 * generation + seed).run()
            successor.check_snapshots(lambda k: k % 8 == 0)
            inherits = successor.scenario.inherits
            assert inherits is not None
            seen[f"{status} to {successor.state.status}"] += 1
            seen["kept"] += len(inherits.kept)
            seen["uncertain"] += len(inherits.uncertain)
            simulation = successor
    expected = {"failed to done", "failed to failed", "cancelled to done", "kept", "uncertain"}
    assert {name for name in expected if seen[name] == 0} == set(), seen


def test_a_seed_is_replayed_exactly() -> None:
    first, second = (Simulation(random_scenario(42)).run() for _ in range(2))
    assert first.durable == second.durable
    assert first.outside == second.outside


@pytest.mark.parametrize("max_parallel", [1, 2, 16])
def test_without_trouble_every_node_is_called_once_and_the_run_is_done(max_parallel: int) -> None:
    for plan in (diamond(), chain(9), wide(9)):
        quiet = Scenario(plan, 7, max_parallel, trouble=0.0, crash=0.0, foreign=0.0)
        simulation = Simulation(quiet).run()
        assert simulation.state.status is RunStatus.DONE
        assert simulation.outside.calls == {(node_id, 1): 1 for node_id in plan.nodes}


@pytest.mark.parametrize("effect", Effect)
def test_a_process_that_dies_all_the_time_still_brings_its_run_to_an_end(effect: Effect) -> None:
    for seed in range(10):
        scenario = Scenario(wide(4, effect=effect), seed, crash=0.5, trouble=0.2)
        assert Simulation(scenario).run().crashes > 0
