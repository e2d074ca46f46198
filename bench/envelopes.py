"""The workloads as envelopes. Their nodes do next to nothing: the service itself is measured."""

from __future__ import annotations

from typing import Any

import orjson

ECHO = "util.echo"
BODY_BYTES = 2_048


def encoded(envelope: dict[str, Any], *, at_least: int = 0) -> bytes:
    """The envelope as bytes, filled up with a special instruction to `at_least` bytes."""
    body = orjson.dumps(envelope)
    missing = at_least - len(body)
    if missing <= 0:
        return body
    return orjson.dumps({**envelope, "special_instructions": ["y" * missing]})


def diamond() -> dict[str, Any]:
    """A, then B and C beside each other, then D; each hands on what it got."""
    return _graph(
        [
            _node("A", inputs={"ok": {"value": True}}),
            _node("B", "A", inputs={"ok": _from("A")}),
            _node("C", "A", inputs={"ok": _from("A")}),
            _node("D", "B", "C", inputs={"ok": _from("B")}),
        ]
    )


def chain(length: int) -> dict[str, Any]:
    """n1 → n2 → …: as many commits in a row as nodes."""
    nodes = [
        _node(f"n{i}", *([f"n{i - 1}"] if i > 1 else []), inputs={"ok": {"value": True}})
        for i in range(1, length + 1)
    ]
    return _graph(nodes)


def wide(width: int, *, root: dict[str, Any] | None = None) -> dict[str, Any]:
    """One root, `width` nodes beside each other, one that joins them. `root` replaces the root."""
    middle = [f"w{i}" for i in range(width)]
    nodes = [
        root or _node("root", inputs={"ok": {"value": True}}),
        *(_node(name, "root", inputs={"ok": {"value": True}}) for name in middle),
        _node("join", *middle, inputs={"ok": {"value": True}}),
    ]
    return _graph(nodes, max_parallel=min(width, 256))


def gate_node() -> dict[str, Any]:
    """A root that calls the bench's own gate and ends when that opens."""
    return _node("root", capability=GATE, inputs={})


GATE = "bench.gate"


def gate_registration(url: str) -> dict[str, Any]:
    """The http capability behind `gate_node`."""
    return {
        "capability_id": GATE,
        "version": "1.0.0",
        "display_name": "Gate",
        "summary": "Answers when the benchmark says so.",
        "kind": "http",
        "effect": "idempotent",
        "input_contract": {"mode": "json_schema", "schema": {"type": "object"}},
        "output_contract": {"mode": "json_schema", "schema": {"type": "object"}},
        "timeout_s": 600,
        "config": {"url": url},
    }


def _graph(nodes: list[dict[str, Any]], **constraints: Any) -> dict[str, Any]:
    return {
        "objective": "Measure the service",
        "output_contract": {"mode": "freeform", "instructions": "whatever the last node gives"},
        "goal_graph": {"nodes": nodes},
        "constraints": constraints,
    }


def _node(
    node_id: str, *requires: str, capability: str = ECHO, inputs: dict[str, Any]
) -> dict[str, Any]:
    return {
        "id": node_id,
        "requires": list(requires),
        "capability": capability,
        "inputs": inputs,
    }


def _from(node_id: str) -> dict[str, Any]:
    return {"from": node_id, "pointer": "/ok"}
