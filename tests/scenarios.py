"""What a simulated run is made of: its plan, its troubles, and the plans that take its place.

For `simulator.py`, which drives the runs. Everything here is drawn from a generator that is given.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

from app.domain.capability import Effect, NodeKind
from app.domain.decide import Failure
from app.domain.errors import Fault
from app.domain.plan import Bound, Plan, PlanNode
from app.domain.policy import ReplanAction, RuntimePolicy, Selector, Trigger, TriggerKind
from app.domain.state import RunState
from tests.journal_rules import Inheritance, is_kept
from tests.plans import plan_node, plan_of

CONCURRENCY: dict[str, int | None] = {"free": None, "rare": 1, "scarce": 2}
FAILURES = {
    failure.code: failure
    for failure in (
        Failure("refused", "Connection refused.", retryable=True),
        Failure("forbidden", "No.", retryable=False),
        Failure("timeout", "Too late.", retryable=True, unknown_outcome=True),
        Failure("strange", "What?", retryable=False, unknown_outcome=True),
        Failure(
            "invalid_output",
            "The output breaks the contract.",
            retryable=False,
            faults=(Fault("TYPE", "no text", "/a"),),
            scope="capability_output",
        ),
    )
}


@dataclass(frozen=True)
class Scenario:
    """A run and its troubles: `trouble` and `refusal` are chances of a call, others of a turn.

    `no_plan` is the chance that no plan is found when one is asked for.
    """

    plan: Plan
    seed: int
    max_parallel: int = 16
    deadline_ms: int | None = None
    failures: tuple[str, ...] = tuple(FAILURES)
    trouble: float = 0.3
    crash: float = 0.05
    foreign: float = 0.3
    cancel: float = 0.0
    pause: float = 0.0
    refusal: float = 0.0
    policies: tuple[RuntimePolicy, ...] = ()
    no_plan: float = 0.2
    inherits: Inheritance | None = None


def random_scenario(seed: int) -> Scenario:
    """The scenario of a seed, of up to twelve nodes at first."""
    rng = random.Random(seed)
    nodes: list[PlanNode] = []
    density = rng.random()
    for index in range(rng.randint(1, 12)):
        earlier = [node.id for node in nodes if rng.random() < density][:4]
        nodes.append(random_node(rng, f"n{index}", earlier))
    return Scenario(
        plan=replace(plan_of(*nodes), open_goals=goals(rng.choice([0, 0, 0, 0, 1, 3]))),
        seed=seed,
        max_parallel=rng.randint(1, 5),
        deadline_ms=rng.choice([None, None, None, 50, 400, 2_000]),
        failures=rng.choice([tuple(FAILURES), ("refused", "timeout"), ("timeout",)]),
        trouble=rng.choice([0.0, 0.05, 0.2, 0.5, 0.9]),
        crash=rng.choice([0.0, 0.05, 0.3]),
        foreign=rng.choice([0.0, 0.5]),
        cancel=rng.choice([0.0, 0.0, 0.05]),
        pause=rng.choice([0.0, 0.1, 0.3]),
        refusal=rng.choice([0.0, 0.0, 0.3]),
        policies=tuple(random_policy(rng, f"p{i}") for i in range(rng.choice([0, 0, 1, 2]))),
    )


def random_node(rng: random.Random, node_id: str, requires: list[str]) -> PlanNode:
    """A node of one of three capabilities, now and then one that nobody calls."""
    capability = rng.choice(list(CONCURRENCY))
    return plan_node(
        node_id,
        *requires,
        kind=NodeKind.FALLBACK if rng.random() < 0.06 else NodeKind.EXECUTION,
        text="What shall we say?",
        effect=rng.choice(list(Effect)),
        max_attempts=rng.randint(1, 3),
        capability_id=capability,
        concurrency=CONCURRENCY[capability],
        bindings={"told": Bound(None, "", 1)},
    )


def random_policy(rng: random.Random, policy_id: str) -> RuntimePolicy:
    """A policy that looks at all nodes, one, those of a capability, or those that are called."""
    selectors: list[dict[str, Any]] = [
        {},
        {"node_id": f"n{rng.randint(0, 3)}"},
        {"capability_id": rng.choice(list(CONCURRENCY))},
        {"kind": NodeKind.EXECUTION},
    ]
    return RuntimePolicy(
        id=policy_id,
        enabled=rng.random() < 0.9,
        trigger=Trigger(
            kind=rng.choice(list(TriggerKind)), selector=Selector(**rng.choice(selectors))
        ),
        action=ReplanAction(kind="replan", max_attempts=rng.randint(1, 3)),
    )


def goals(count: int) -> tuple[str, ...]:
    """Goals that no node does yet."""
    return tuple(f"goal {i}" for i in range(count))


def next_plan(state: RunState, rng: random.Random) -> Plan:
    """Any plan that may take the place of the one in force.

    What has a result, or may have had an effect, is in it as it was. Everything else stays, changes
    or goes; what went may come back, and new nodes come in.
    """
    before = state.plan
    assert before is not None
    nodes = {node.id: node for node in before.nodes.values() if is_kept(state.nodes[node.id])}
    for node in before.nodes.values():
        if node.id in nodes or rng.random() < 0.3:
            continue
        if rng.random() < 0.6 and set(node.requires) <= nodes.keys():
            nodes[node.id] = node
        else:
            nodes[node.id] = _changed(rng, node, list(nodes))
    new = [f"v{before.version + 1}.{i}" for i in range(rng.choice([0, 1, 1, 3]))]
    for node_id in [*(i for i in state.retired if rng.random() < 0.3), *new]:
        nodes.setdefault(node_id, random_node(rng, node_id, _some(rng, list(nodes))))
    left = max(len(before.open_goals) - rng.randint(1, 2), 0)
    plan = plan_of(*nodes.values(), version=before.version + 1)
    return replace(plan, open_goals=goals(left))


def _changed(rng: random.Random, node: PlanNode, others: list[str]) -> PlanNode:
    """Another node of the same id. The smallest change there is: one constant becomes another that
    Python takes for equal."""
    if rng.random() < 0.3 and set(node.requires) <= set(others):
        told = node.bindings["told"]
        return replace(node, bindings={"told": replace(told, value=_equal_to(told.value))})
    return replace(random_node(rng, node.id, _some(rng, others)), label="changed")


def _equal_to(value: Any) -> Any:
    return True if value is not True else 1.0


def _some(rng: random.Random, ids: list[str]) -> list[str]:
    return rng.sample(ids, min(len(ids), rng.randint(0, 2)))
