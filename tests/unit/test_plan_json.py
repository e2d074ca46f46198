"""Plans as JSON and back, and what changed between two versions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import orjson
from hypothesis import given
from hypothesis import strategies as st

from app.domain.capability import Effect, NodeKind
from app.domain.plan import (
    Author,
    Bound,
    Fit,
    OutputSource,
    Plan,
    PlanNode,
    ProofStep,
    children_of,
)
from app.domain.plan_diff import diff_plans
from app.domain.plan_json import plan_as_dict, plan_from_dict

_words = st.text(max_size=8)
_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | _words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_words, inner, max_size=3),
    max_leaves=5,
)
_bound = st.builds(lambda value: Bound(None, "", value), _json) | st.builds(
    Bound, _words, st.just("/a")
)


def _node(node_id: str, requires: tuple[str, ...] = (), **more: Any) -> PlanNode:
    parts: dict[str, Any] = {
        "kind": NodeKind.EXECUTION,
        "label": "Echo",
        "text": "",
        "capability_id": "util.echo",
        "capability_version": "1",
        "bindings": {},
        "input_facets": (),
        "output_facets": (),
        "effect": Effect.PURE,
        "timeout_s": 60.0,
        "max_attempts": 3,
    }
    return PlanNode(id=node_id, requires=requires, **{**parts, **more})


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    nodes: dict[str, PlanNode] = {}
    for index in range(draw(st.integers(1, 5))):
        earlier = st.sampled_from(list(nodes)) if nodes else st.nothing()
        requires = tuple(draw(st.lists(earlier, unique=True, max_size=3)) if nodes else ())
        nodes[f"n{index}"] = _node(
            f"n{index}",
            requires,
            kind=draw(st.sampled_from(NodeKind)),
            effect=draw(st.sampled_from(Effect)),
            bindings=draw(st.dictionaries(_words, _bound, max_size=2)),
            input_facets=tuple(draw(st.lists(_words, max_size=2))),
            timeout_s=draw(st.floats(0.1, 1e5)),
            concurrency=draw(st.none() | st.integers(1, 9)),
            text=draw(_words),
        )
    name = st.none() | _words
    step = st.builds(ProofStep, name, _words, name, _words, st.sampled_from(Fit), _words)
    part = st.builds(OutputSource, name, _words, _words)
    return Plan(
        "run",
        draw(st.integers(1, 9)),
        "2026-01-01T00:00:00Z",
        draw(st.sampled_from(Author)),
        nodes,
        tuple(draw(st.lists(part, max_size=2))),
        tuple(draw(st.lists(step, max_size=3))),
        draw(_words),
        children_of(nodes),
        tuple(draw(st.lists(_words, max_size=2))),
    )


@given(plans())
def test_the_way_through_json_is_exact(plan: Plan) -> None:
    stored = orjson.dumps(plan_as_dict(plan))
    found = plan_from_dict(orjson.loads(stored))
    assert found == plan
    assert found.children == plan.children
    assert list(found.nodes) == list(plan.nodes)
    assert orjson.dumps(plan_as_dict(found)) == stored


def _plan(version: int, *nodes: PlanNode, output: str = "B") -> Plan:
    by_id = {node.id: node for node in nodes}
    sources = (OutputSource(None, output, ""),)
    return Plan("run", version, "now", Author.CALLER, by_id, sources, (), "", children_of(by_id))


def test_the_shape_is_the_documented_one() -> None:
    bindings = {"a": Bound(None, "", None), "b": Bound("inputs", "/b")}
    found = plan_as_dict(_plan(1, _node("B", bindings=bindings)))
    assert found["nodes"][0]["bindings"] == {
        "a": {"value": None},
        "b": {"from": "inputs", "pointer": "/b"},
    }
    assert found["nodes"][0]["facets"] == {"input": [], "output": []}
    assert found["author"] == "caller"
    assert found["metadata"] == {
        "rationale": "",
        "proof": [],
        "output": [{"key": None, "source": "B", "pointer": ""}],
    }


def test_goals_that_are_left_are_told_only_where_there_are_some() -> None:
    whole = _plan(1, _node("B"))
    assert "open_goals" not in plan_as_dict(whole)["metadata"]
    part = replace(whole, open_goals=("C", "D"))
    assert plan_as_dict(part)["metadata"]["open_goals"] == ["C", "D"]
    assert plan_from_dict(plan_as_dict(part)).open_goals == ("C", "D")
    assert plan_from_dict(plan_as_dict(whole)).open_goals == ()


def test_a_diff_names_nodes_and_fields() -> None:
    a, b, c = _node("A"), _node("B", ("A",)), _node("C")
    slower = replace(b, timeout_s=90.0, requires=())
    found = diff_plans(_plan(1, a, b), _plan(2, slower, c))
    assert (found["from"], found["to"]) == (1, 2)
    assert [node["id"] for node in found["added"]] == ["C"]
    assert [node["id"] for node in found["removed"]] == ["A"]
    assert found["changed"] == [
        {
            "id": "B",
            "fields": {
                "requires": {"before": ["A"], "after": []},
                "timeout_s": {"before": 60.0, "after": 90.0},
            },
        }
    ]
    assert "output" not in found


def test_a_diff_of_equal_plans_is_empty_and_the_output_is_compared() -> None:
    a, b = _node("A"), _node("B")
    same = diff_plans(_plan(1, a, b), _plan(2, a, b))
    assert same == {"from": 1, "to": 2, "added": [], "removed": [], "changed": []}
    moved = diff_plans(_plan(1, a, b), _plan(2, a, b, output="A"))
    assert moved["output"]["after"] == [{"key": None, "source": "A", "pointer": ""}]
    assert moved["output"]["before"] == [{"key": None, "source": "B", "pointer": ""}]
