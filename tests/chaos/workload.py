"""Seeded envelopes: order number n of a seed is the same on every machine and in every run.

An `Order` is what one client does: the envelope, how often it breaks its own stream, and what its
operator does to the run. The shapes are chains, diamonds and wide fans; a share of the nodes calls
tools of all three effects, whose behaviour is part of the inputs. Others have no graph: they ask
for the last of `STAGES`, and a policy plans the rest anew when the tool of a stage refuses or has
given the first result.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

TOOLS = 2
EFFECTS = {"pure": "pure", "idem": "idempotent", "once": "at_most_once"}
POISON = "chaos.poison"
STAGES = ("chaos_seed", "chaos_grain", "chaos_flour", "chaos_bread")
"""Facets, each made of the one before: by a cheap tool, or by another that never refuses."""

# What a tool does with the first attempt. Most calls go well, as in life.
BEHAVIOURS = {
    "ok": 80,
    "500": 4,
    "429": 4,
    "hang": 1,
    "reset": 4,
    "garbage": 2,
    "slow": 5,
}
REPLAN = {"kind": "replan", "rationale": "by another way", "max_attempts": 4}
SAFE = ("ok", "ok", "ok", "ok", "ok", "429", "reset", "500")


class Meddling(StrEnum):
    """What the operator of a run does besides answering its questions."""

    NOTHING = "nothing"
    CANCEL = "cancel"
    PAUSE = "pause"
    NEVER_ANSWER = "never_answer"


@dataclass(frozen=True, slots=True)
class Order:
    """One client's work. `breaks`: after how many frames each it drops its stream."""

    key: str
    kind: str
    envelope: dict[str, Any]
    breaks: tuple[int, ...] = ()
    meddling: Meddling = Meddling.NOTHING
    meddle_after: int = 0
    by_stream: bool = True
    posts: int = 1
    operator: dict[str, str] = field(default_factory=lambda: {"id": "operator"})


def order(seed: int, number: int, *, long_share: float = 0.3) -> Order:
    """The number-th order of a seed. `long_share`: how many hold a worker for a second or more."""
    rng = random.Random(f"{seed}:{number}")
    key = f"chaos-{seed}-{number}"
    kind = rng.choices((*SHAPES, "stages"), (36, 22, 14, 18, 10))[0]
    lane = rng.choice(("interactive", "standard", "batch"))
    if kind == "stages":
        made, size = _stages(rng, key, lane), 12
    else:
        nodes = SHAPES[kind](rng)
        if rng.random() < long_share:
            _make_long(rng, nodes)
        made, size = envelope(key, nodes, lane), 2 * len(nodes)
    meddling = rng.choices(list(Meddling), (88, 5, 5, 2))[0]
    return Order(
        key=key,
        kind=kind,
        envelope=made,
        breaks=tuple(rng.randrange(1, size + 2) for _ in range(rng.choice((0, 0, 1, 1, 2, 3)))),
        meddling=meddling,
        meddle_after=rng.randrange(1, size + 2),
        by_stream=rng.random() < 0.5,
        posts=2 if rng.random() < 0.1 else 1,
    )


def envelope(key: str, nodes: list[dict[str, Any]], lane: str = "standard") -> dict[str, Any]:
    """An envelope with these nodes; its key is its correlation id, to be found in the database."""
    return {
        "objective": f"survive {key}",
        "output_contract": {"mode": "freeform", "instructions": "whatever comes out"},
        "goal_graph": {"nodes": nodes},
        "constraints": {"max_parallel": 64, "lane": lane},
        "metadata": {"correlation_id": key},
    }


def node(
    node_id: str, *requires: str, capability: str = "util.echo", **values: Any
) -> dict[str, Any]:
    """A node whose inputs are constants."""
    inputs = {name: {"value": value} for name, value in ({"n": 1} | values).items()}
    return {"id": node_id, "requires": list(requires), "capability": capability, "inputs": inputs}


def _call(rng: random.Random, node_id: str, *requires: str) -> dict[str, Any]:
    """A node that calls a tool."""
    effect = rng.choices(tuple(EFFECTS), (25, 50, 25))[0]
    behave = rng.choices(tuple(BEHAVIOURS), tuple(BEHAVIOURS.values()))[0]
    if effect == "once" and behave in ("garbage", "hang") and rng.random() < 0.7:
        behave = "ok"  # most of these end the run, or hold a human up
    capability = f"chaos.{effect}_{rng.randrange(TOOLS)}"
    work_s = round(rng.uniform(0.0, 0.1), 3)
    return node(node_id, *requires, capability=capability, behave=behave, work_s=work_s)


def _some_call(rng: random.Random, share: float, node_id: str, *requires: str) -> dict[str, Any]:
    return _call(rng, node_id, *requires) if rng.random() < share else node(node_id, *requires)


def _fan(rng: random.Random) -> list[dict[str, Any]]:
    middle = [f"w{i}" for i in range(rng.randrange(40, 121))]
    return [
        _some_call(rng, 0.3, "root"),
        *(_some_call(rng, 0.03, name, "root") for name in middle),
        node("join", *middle),
    ]


def _chain(rng: random.Random) -> list[dict[str, Any]]:
    length = rng.randrange(10, 51)
    return [_some_call(rng, 0.06, f"c{i}", *([f"c{i - 1}"] if i else [])) for i in range(length)]


def _diamond(rng: random.Random) -> list[dict[str, Any]]:
    return [
        _some_call(rng, 0.4, "A"),
        _some_call(rng, 0.4, "B", "A"),
        _some_call(rng, 0.4, "C", "A"),
        _some_call(rng, 0.4, "D", "B", "C"),
    ]


def _tools(rng: random.Random) -> list[dict[str, Any]]:
    nodes = [_call(rng, "t0")]
    for i in range(1, rng.randrange(3, 9)):
        nodes.append(_call(rng, f"t{i}", f"t{rng.randrange(i)}"))
    return nodes


SHAPES: dict[str, Callable[[random.Random], list[dict[str, Any]]]] = {
    "fan": _fan,
    "chain": _chain,
    "diamond": _diamond,
    "tools": _tools,
}


def _stages(rng: random.Random, key: str, lane: str) -> dict[str, Any]:
    recipe = {stage: rng.choice(("ok", "ok", "refuse", "refuse", "500")) for stage in STAGES[1:]}
    return staged(
        key,
        {**recipe, "work_s": round(rng.uniform(0.0, 0.3), 3)},
        lane,
        twice=rng.random() < 0.5,
    )


def staged(
    key: str, recipe: dict[str, Any], lane: str = "standard", *, twice: bool = True
) -> dict[str, Any]:
    """An envelope without a graph. `recipe`: how the first tool of a stage behaves, by its facet,
    and `work_s`; `twice`: the rest is planned anew after the first result as well."""
    triggers: list[dict[str, Any]] = [{"kind": "on_node_failed"}]
    if twice:
        selector = {"capability_id": f"chaos.first_{STAGES[1]}"}
        triggers.append({"kind": "on_node_complete", "selector": selector})
    return {
        "objective": f"survive {key}",
        "inputs": {STAGES[0]: recipe},
        "output_contract": {"facets": [STAGES[-1]]},
        "policies": {
            "runtime": [
                {"id": trigger["kind"], "trigger": trigger, "action": REPLAN}
                for trigger in triggers
            ]
        },
        "constraints": {"lane": lane},
        "metadata": {"correlation_id": key},
    }


def _make_long(rng: random.Random, nodes: list[dict[str, Any]]) -> None:
    """Somewhere in the middle a call takes its time, so that faults meet the run under way."""
    last = max(0, len(nodes) - 2)
    index = rng.randrange(last + 1)
    found = nodes[index]
    effect = rng.choices(tuple(EFFECTS), (20, 65, 15))[0]
    nodes[index] = node(
        found["id"],
        *found["requires"],
        capability=f"chaos.{effect}_{rng.randrange(TOOLS)}",
        behave=rng.choice(SAFE),
        work_s=round(rng.uniform(0.3, 1.5), 3),
    )


def poison(key: str) -> Order:
    """A run whose second node kills whoever drives it."""
    nodes = [node("first"), node("kills", "first", capability=POISON, behave="kill")]
    return Order(key=key, kind="poison", envelope=envelope(key, nodes), by_stream=False)


def facets() -> list[dict[str, Any]]:
    """The registrations of what the stages make."""
    return [
        {"name": name, "title": name, "schema": {"type": "object"}, "semantics": f"The {name}."}
        for name in STAGES
    ]


def capabilities(ports: list[int], poison_port: int) -> list[dict[str, Any]]:
    """The registrations of all tools: every effect on every tool server, two ways to make every
    stage, and the poison."""
    found = [
        _capability(f"chaos.{name}_{index}", effect, f"{port}/call")
        for index, port in enumerate(ports)
        for name, effect in EFFECTS.items()
    ]
    for takes, gives in itertools.pairwise(STAGES):
        contracts = {"input_contract": {"facets": [takes]}, "output_contract": {"facets": [gives]}}
        first = _capability(f"chaos.first_{gives}", "idempotent", f"{ports[0]}/make/{gives}")
        other = _capability(f"chaos.other_{gives}", "at_most_once", f"{ports[-1]}/surely/{gives}")
        found += [{**first, **contracts}, {**other, **contracts, "cost": {"tier": 3}}]
    return [*found, _capability(POISON, "idempotent", f"{poison_port}/call")]


def _capability(capability_id: str, effect: str, place: str) -> dict[str, Any]:
    return {
        "capability_id": capability_id,
        "version": "1.0.0",
        "display_name": capability_id,
        "summary": "a tool of the fault suite",
        "kind": "http",
        "effect": effect,
        "input_contract": {"mode": "json_schema", "schema": {"type": "object"}},
        "output_contract": {"mode": "json_schema", "schema": {"type": "object"}},
        "timeout_s": 4,
        "max_attempts": 3 if effect == "at_most_once" else 10,
        "config": {"url": f"http://127.0.0.1:{place}"},
    }
