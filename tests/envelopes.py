"""Envelopes that many tests use."""

from __future__ import annotations

from typing import Any


def echo_node(
    node_id: str, *requires: str, capability: str = "util.echo", **more: Any
) -> dict[str, Any]:
    """A node that echoes the outputs of what it requires."""
    inputs = {name: {"from": name, "pointer": ""} for name in requires}
    node = {"id": node_id, "requires": list(requires), "capability": capability}
    return {**node, "inputs": inputs or {"start": {"value": 1}}, **more}


def graph(*nodes: dict[str, Any], **more: Any) -> dict[str, Any]:
    """An envelope with a caller's goal graph and a free output."""
    return {
        "objective": "run the graph",
        "output_contract": {"mode": "freeform", "instructions": "whatever comes out"},
        "goal_graph": {"nodes": list(nodes)},
        **more,
    }


def diamond(**more: Any) -> dict[str, Any]:
    """A, then B and C, then D."""
    return graph(
        echo_node("A"),
        echo_node("B", "A"),
        echo_node("C", "A"),
        echo_node("D", "B", "C"),
        **more,
    )


def chain(length: int, **more: Any) -> dict[str, Any]:
    """n1 → n2 → …; each gets a small constant, so that nothing grows along the way."""
    nodes = [
        {
            "id": f"n{i}",
            "requires": [f"n{i - 1}"] if i > 1 else [],
            "capability": "util.echo",
            "inputs": {"i": {"value": i}},
        }
        for i in range(1, length + 1)
    ]
    return graph(*nodes, **more)


def wide(width: int, **more: Any) -> dict[str, Any]:
    """One root, `width` nodes beside each other, one that joins them."""
    middle = [f"w{i}" for i in range(width)]
    nodes = [
        {"id": "root", "capability": "util.echo", "inputs": {"go": {"value": True}}},
        *(
            {
                "id": n,
                "requires": ["root"],
                "capability": "util.echo",
                "inputs": {"n": {"value": n}},
            }
            for n in middle
        ),
        {"id": "join", "requires": middle, "capability": "util.echo", "inputs": {}},
    ]
    return graph(*nodes, constraints={"max_parallel": min(width, 256)}, **more)
