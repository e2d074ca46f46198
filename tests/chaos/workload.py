"""Seeded envelopes: order number n of a seed is the same on every machine and in every run.

An `Order` is what one client does: the envelope, how often it breaks its own stream, and what its
operator does to the run. The shapes are chains, diamonds and wide fans; a share of the nodes calls
tools of all three effects, whose behaviour is part of the inputs.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

TOOLS = 2
EFFECTS = {"pure": "pure", "idem": "idempotent", "once": "at_most_once"}
POISON = "chaos.poison"

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
    kind = rng.choices(("fan", "chain", "diamond", "tools"), (40, 25, 15, 20))[0]
    nodes = {"fan": _fan, "chain": _chain, "diamond": _diamond, "tools": _tools}[kind](rng)
    if rng.random() < long_share:
        _make_long(rng, nodes)
    meddling = rng.choices(list(Meddling), (88, 5, 5, 2))[0]
    size = 2 * len(nodes)
    return Order(
        key=key,
        kind=kind,
        envelope=envelope(key, nodes, rng.choice(("interactive", "standard", "batch"))),
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


def capabilities(ports: list[int], poison_port: int) -> list[dict[str, Any]]:
    """The registrations of all tools: every effect on every tool server, and the poison."""
    found = [
        _capability(f"chaos.{name}_{index}", effect, port)
        for index, port in enumerate(ports)
        for name, effect in EFFECTS.items()
    ]
    return [*found, _capability(POISON, "idempotent", poison_port)]


def _capability(capability_id: str, effect: str, port: int) -> dict[str, Any]:
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
        "config": {"url": f"http://127.0.0.1:{port}/call"},
    }
