"""Capabilities, envelopes, errors, plans and events: what they accept and what they say."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import FrozenInstanceError
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from app.domain import errors
from app.domain.capability import (
    Capability,
    CapabilityStatus,
    Effect,
    Heartbeat,
    NodeKind,
    Registration,
)
from app.domain.contract import compile_contract
from app.domain.envelope import (
    MAX_PARALLEL_CAP,
    MAX_PARALLEL_DEFAULT,
    Envelope,
    FromBinding,
    Lane,
    ProofMode,
    ValueBinding,
)
from app.domain.errors import Fault, FlexrunError, Unavailable
from app.domain.events import (
    TERMINAL_EVENTS,
    BlockReason,
    Event,
    EventType,
    Level,
    error_data,
)
from app.domain.plan import Bound, Plan, children_of
from tests.plans import diamond, plan_node

_FREEFORM = {"mode": "freeform", "instructions": "say something"}


def _registration(**changes: Any) -> dict[str, Any]:
    return {
        "capability_id": "far.side",
        "version": "1.0.0",
        "display_name": "Far side",
        "summary": "A server under test.",
        "kind": "http",
        "effect": "pure",
        "input_contract": {"schema": {"type": "object"}},
        "output_contract": {"schema": {"type": "object"}},
        **changes,
    }


def _envelope(**changes: Any) -> dict[str, Any]:
    return {"objective": "brief the team", "output_contract": _FREEFORM, **changes}


def _with_node(**changes: Any) -> dict[str, Any]:
    node = {"id": "A", "capability": "util.echo", **changes}
    return _envelope(goal_graph={"nodes": [node]})


def _refusals(model: type[BaseModel], body: dict[str, Any]) -> set[str]:
    """Where the model refuses the body, as pointers without the names of union members."""
    with pytest.raises(ValidationError) as refused:
        model.model_validate(body)
    return {"/" + "/".join(str(part) for part in error["loc"]) for error in refused.value.errors()}


# Capabilities


@pytest.mark.parametrize(
    ("effect", "given", "expected"),
    [
        ("pure", None, 3),
        ("idempotent", None, 3),
        ("at_most_once", None, 1),
        ("pure", 1, 1),
        ("at_most_once", 5, 5),
    ],
)
def test_attempts_follow_from_the_effect_unless_they_are_given(
    effect: str, given: int | None, expected: int
) -> None:
    found = Registration.model_validate(_registration(effect=effect, max_attempts=given))
    assert found.attempts_max == expected


def test_the_operator_speaks_where_a_registration_is_silent() -> None:
    silent = Registration.model_validate(_registration())
    found = silent.with_defaults(timeout_s=7, attempts_max=5)
    assert (found.timeout_s, found.attempts_max) == (7, 5)
    assert (silent.timeout_s, silent.attempts_max) == (60, 3)
    spoken = Registration.model_validate(_registration(timeout_s=60, max_attempts=2))
    assert spoken.with_defaults(timeout_s=7, attempts_max=5) == spoken


def test_no_default_makes_an_at_most_once_capability_repeat() -> None:
    once = Registration.model_validate(_registration(effect="at_most_once"))
    assert once.with_defaults(timeout_s=7, attempts_max=5).attempts_max == 1
    asked = Registration.model_validate(_registration(effect="at_most_once", max_attempts=4))
    assert asked.with_defaults(timeout_s=7, attempts_max=5).attempts_max == 4


def test_silence_is_three_intervals_unless_it_is_given() -> None:
    assert Heartbeat(interval_s=10).silence_max_s == 30
    assert Heartbeat(interval_s=10, timeout_s=12).silence_max_s == 12


def test_a_registration_has_the_documented_defaults() -> None:
    found = Registration.model_validate(_registration())
    assert (found.node_kind, found.timeout_s, found.concurrency) == (NodeKind.EXECUTION, 60, None)
    assert (found.cost.tier, found.cost.usd_per_call, found.heartbeat) == (0, None, None)
    assert (found.preferred_models, found.config, found.metadata) == ([], {}, {})


@pytest.mark.parametrize(
    "name", ["capability_id", "version", "display_name", "summary", "kind", "effect"]
)
def test_what_a_registration_must_say(name: str) -> None:
    body = _registration()
    del body[name]
    assert _refusals(Registration, body) == {f"/{name}"}


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"capability_id": "Upper"}, "/capability_id"),
        ({"capability_id": ".hidden"}, "/capability_id"),
        ({"capability_id": "a b"}, "/capability_id"),
        ({"capability_id": "a\n"}, "/capability_id"),
        ({"capability_id": "a" * 121}, "/capability_id"),
        ({"capability_id": ""}, "/capability_id"),
        ({"version": "-1"}, "/version"),
        ({"version": "1 0"}, "/version"),
        ({"version": "1" * 65}, "/version"),
        ({"display_name": ""}, "/display_name"),
        ({"summary": "x" * 2_001}, "/summary"),
        ({"kind": "carrier_pigeon"}, "/kind"),
        ({"effect": "harmless"}, "/effect"),
        ({"timeout_s": 0}, "/timeout_s"),
        ({"timeout_s": 86_401}, "/timeout_s"),
        ({"max_attempts": 0}, "/max_attempts"),
        ({"max_attempts": 21}, "/max_attempts"),
        ({"concurrency": 0}, "/concurrency"),
        ({"concurrency": 10_001}, "/concurrency"),
        ({"cost": {"tier": 10}}, "/cost/tier"),
        ({"cost": {"tier": -1}}, "/cost/tier"),
        ({"cost": {"usd_per_call": "-0.01"}}, "/cost/usd_per_call"),
        ({"cost": {"tokens": -1}}, "/cost/tokens"),
        ({"cost": {"euro": 1}}, "/cost/euro"),
        ({"heartbeat": {}}, "/heartbeat/interval_s"),
        ({"heartbeat": {"interval_s": 0}}, "/heartbeat/interval_s"),
        ({"heartbeat": {"interval_s": 1, "timeout_s": 0}}, "/heartbeat/timeout_s"),
        ({"preferred_models": ["m"] * 21}, "/preferred_models"),
        ({"system_prompt": "x" * 20_001}, "/system_prompt"),
        ({"timeout": 5}, "/timeout"),
    ],
)
def test_a_registration_refuses(changes: dict[str, Any], where: str) -> None:
    assert _refusals(Registration, _registration(**changes)) == {where}


@pytest.mark.parametrize(
    "changes",
    [
        {"capability_id": "a" * 120},
        {"capability_id": "0.a-b_c"},
        {"version": "2026.11-rc.1+build"},
        {"timeout_s": 86_400},
        {"max_attempts": 20},
        {"concurrency": 10_000},
        {"cost": {"tier": 9, "usd_per_call": "0.001", "tokens": 0}},
    ],
)
def test_a_registration_accepts_the_bounds_themselves(changes: dict[str, Any]) -> None:
    Registration.model_validate(_registration(**changes))


def test_a_capability_is_known_by_id_and_version() -> None:
    registration = Registration.model_validate(_registration())
    contract = compile_contract(registration.input_contract, "input", {}, "")
    now = datetime(2026, 1, 1, tzinfo=UTC)
    found = Capability(registration, contract, contract, CapabilityStatus.ACTIVE, now, now)
    assert (found.capability_id, found.version) == ("far.side", "1.0.0")
    assert found.key == ("far.side", "1.0.0")


# Envelopes


def test_an_envelope_needs_an_objective_and_an_output_contract() -> None:
    assert _refusals(Envelope, {}) == {"/objective", "/output_contract"}
    assert _refusals(Envelope, _envelope(objective="")) == {"/objective"}


def test_an_envelope_has_the_documented_defaults() -> None:
    found = Envelope.model_validate(_envelope())
    constraints = found.constraints
    assert constraints.max_parallel == MAX_PARALLEL_DEFAULT == 16
    assert (constraints.deadline_s, constraints.durability) == (None, "strict")
    assert (constraints.lane, constraints.proof) == (Lane.STANDARD, ProofMode.ALLOW_CHECKED)
    assert constraints.budget.model_dump() == {"usd": None, "tokens": None, "calls": None}
    assert (found.inputs, found.goal_graph, found.special_instructions) == ({}, None, [])
    assert found.metadata.model_dump() == {
        "label": None,
        "correlation_id": None,
        "client_id": None,
    }


def test_the_envelope_of_the_documentation_is_accepted() -> None:
    found = Envelope.model_validate(
        {
            "objective": "Brief the team on this release",
            "inputs": {"document": {"title": "Changelog", "text": "…"}},
            "output_contract": {"mode": "facets", "facets": ["brief"]},
            "goal_graph": {
                "nodes": [
                    {
                        "id": "A",
                        "text": "read it",
                        "requires": [],
                        "capability": "document.outline",
                        "inputs": {"document": {"from": "inputs", "pointer": "/document"}},
                    }
                ]
            },
            "constraints": {
                "deadline_s": 120,
                "max_parallel": 16,
                "lane": "standard",
                "proof": "allow_checked",
                "budget": {"usd": "0.50", "tokens": 20000, "calls": 50},
            },
            "policies": {"planner": {}, "runtime": []},
            "goal_conditions": [],
            "special_instructions": [],
            "metadata": {"label": "nightly", "correlation_id": "c-1"},
        }
    )
    assert found.constraints.budget.usd == Decimal("0.50")
    assert found.goal_graph is not None
    [node] = found.goal_graph.nodes
    assert node.inputs == {
        "document": FromBinding.model_validate({"from": "inputs", "pointer": "/document"})
    }


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"objektive": "x"}, "/objektive"),
        ({"objective": "x" * 20_001}, "/objective"),
        ({"inputs": {"": 1}}, "/inputs//[key]"),
        ({"constraints": {"max_paralel": 4}}, "/constraints/max_paralel"),
        ({"constraints": {"max_parallel": 0}}, "/constraints/max_parallel"),
        (
            {"constraints": {"max_parallel": MAX_PARALLEL_CAP + 1}},
            "/constraints/max_parallel",
        ),
        ({"constraints": {"deadline_s": 0}}, "/constraints/deadline_s"),
        ({"constraints": {"deadline_s": 2_592_001}}, "/constraints/deadline_s"),
        ({"constraints": {"lane": "fast"}}, "/constraints/lane"),
        ({"constraints": {"durability": "pipelined"}}, "/constraints/durability"),
        ({"constraints": {"budget": {"usd": -1}}}, "/constraints/budget/usd"),
        ({"constraints": {"budget": {"tokens": -1}}}, "/constraints/budget/tokens"),
        ({"constraints": {"budget": {"eur": 1}}}, "/constraints/budget/eur"),
        ({"policies": {"runtime": {}}}, "/policies/runtime"),
        ({"policies": {"runtme": []}}, "/policies/runtme"),
        ({"goal_conditions": [{}]}, "/goal_conditions"),
        (
            {"policies": {"planner": {"topology": {"max_depth": 0}}}},
            "/policies/planner/topology/max_depth",
        ),
        (
            {"policies": {"planner": {"topology": {"max_nodes": 2_001}}}},
            "/policies/planner/topology/max_nodes",
        ),
        (
            {"policies": {"planner": {"selection": {"prefered": []}}}},
            "/policies/planner/selection/prefered",
        ),
        ({"special_instructions": ["x"] * 101}, "/special_instructions"),
        ({"metadata": {"label": "x" * 201}}, "/metadata/label"),
        ({"goal_graph": {"nodes": []}}, "/goal_graph/nodes"),
    ],
)
def test_an_envelope_refuses(changes: dict[str, Any], where: str) -> None:
    assert _refusals(Envelope, _envelope(**changes)) == {where}


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"id": ""}, "id"),
        ({"id": "a/b"}, "id"),
        ({"id": ".a"}, "id"),
        ({"id": "a\n"}, "id"),
        ({"id": "a" * 101}, "id"),
        ({"requires": ["a b"]}, "requires/0"),
        ({"capability": ""}, "capability"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"max_attempts": 0}, "max_attempts"),
        ({"max_attempts": 21}, "max_attempts"),
        ({"input": {}}, "input"),
    ],
)
def test_a_goal_node_refuses(changes: dict[str, Any], where: str) -> None:
    assert _refusals(Envelope, _with_node(**changes)) == {f"/goal_graph/nodes/0/{where}"}


@pytest.mark.parametrize("node_id", ["A", "0", "_x", "a.b-c_9", "a" * 100])
def test_a_goal_node_accepts_plain_ids(node_id: str) -> None:
    Envelope.model_validate(_with_node(id=node_id))


@pytest.mark.parametrize(
    "binding",
    [
        {},
        {"value": 1, "from": "A"},
        {"from": "A", "pointer": "a/b"},
        {"from": "A", "pointer": "/" + "a" * 1_000},
        {"from": ""},
        {"source": "A"},
        {"from": "A", "default": 1},
        "inputs",
    ],
)
def test_a_binding_is_a_value_or_a_source_and_nothing_between(binding: Any) -> None:
    where = _refusals(Envelope, _with_node(inputs={"document": binding}))
    assert {pointer.split("/")[5] for pointer in where} == {"document"}


def test_a_binding_keeps_any_value() -> None:
    body = _with_node(
        inputs={"a": {"value": None}, "b": {"value": {"from": "A"}}, "c": {"from": "A"}}
    )
    graph = Envelope.model_validate(body).goal_graph
    assert graph is not None
    assert graph.nodes[0].inputs == {
        "a": ValueBinding(value=None),
        "b": ValueBinding(value={"from": "A"}),
        "c": FromBinding.model_validate({"from": "A", "pointer": ""}),
    }


def test_envelopes_share_their_defaults() -> None:
    first, second = (Envelope.model_validate(_envelope()) for _ in range(2))
    assert deepcopy(first) is first, "nothing in it can change"
    assert first.constraints is second.constraints


def test_values_of_the_domain_do_not_change() -> None:
    envelope = Envelope.model_validate(_envelope())
    with pytest.raises(ValidationError):
        envelope.objective = "another"  # type: ignore[misc]  # that is the point
    registration = Registration.model_validate(_registration())
    with pytest.raises(ValidationError):
        registration.effect = Effect.PURE  # type: ignore[misc]  # that is the point
    plan = diamond()
    with pytest.raises(FrozenInstanceError):
        plan.version = 2  # type: ignore[misc]  # that is the point
    with pytest.raises(FrozenInstanceError):
        plan.nodes["A"].effect = Effect.PURE  # type: ignore[misc]  # that is the point


# Errors


def test_a_fault_says_only_what_applies() -> None:
    assert Fault("CYCLE", "A needs itself.").as_dict() == {
        "code": "CYCLE",
        "pointer": "",
        "message": "A needs itself.",
    }
    full = Fault("TYPE", "no text", "/a", facet="brief", node_id="A", capability_id="util.echo")
    assert full.as_dict() == {
        "code": "TYPE",
        "pointer": "/a",
        "message": "no text",
        "facet": "brief",
        "node_id": "A",
        "capability_id": "util.echo",
    }


def _all_errors() -> list[type[FlexrunError]]:
    return [
        found
        for found in vars(errors).values()
        if isinstance(found, type) and issubclass(found, FlexrunError)
    ]


@pytest.mark.parametrize("error", _all_errors(), ids=lambda error: str(error.__name__))
def test_every_error_has_a_code_of_its_own(error: type[FlexrunError]) -> None:
    codes = [other.code for other in _all_errors()]
    assert codes.count(error.code) == 1
    found = error("what went wrong")
    assert (found.code, found.detail, str(found)) == (error.code, *("what went wrong",) * 2)
    assert (found.faults, found.extra) == ((), {})
    assert error("gone", code="run_not_found").code == "run_not_found"
    assert error.code != "run_not_found", "the code of one error is not that of its kind"


def test_the_tree_of_errors_is_the_documented_one() -> None:
    children = {cls.__name__ for cls in FlexrunError.__subclasses__()}
    assert children >= {
        *("BadInput", "Unprocessable", "TooLarge", "NotFound", "Conflict", "Unavailable"),
    }
    for cls in (errors.ContractError, errors.PlanRejected, errors.IdempotencyMismatch):
        assert issubclass(cls, errors.Unprocessable)


def test_an_error_keeps_its_faults_and_extras() -> None:
    fault = Fault("CYCLE", "A needs itself.")
    found = errors.PlanRejected("refused", faults=[fault], extra={"current": 2})
    assert found.faults == (fault,)
    assert found.extra == {"current": 2}


def test_an_outage_says_when_to_come_back() -> None:
    assert Unavailable("busy").retry_after_s == 1
    assert Unavailable("draining", code="draining", retry_after_s=9).retry_after_s == 9


# Plans


def test_children_are_listed_in_plan_order() -> None:
    nodes = {
        node.id: node
        for node in (
            plan_node("Z"),
            plan_node("B", "Z"),
            plan_node("A", "B", "Z"),
            plan_node("alone"),
        )
    }
    assert children_of(nodes) == {"Z": ("B", "A"), "B": ("A",), "A": (), "alone": ()}


def test_a_binding_is_written_as_the_envelope_spells_it() -> None:
    assert Bound(None, "", {"a": 1}).as_dict() == {"value": {"a": 1}}
    assert Bound(None, "", None).as_dict() == {"value": None}
    assert Bound("inputs", "/a/0").as_dict() == {"from": "inputs", "pointer": "/a/0"}


def test_plans_are_equal_by_what_they_say_and_not_by_what_is_derived() -> None:
    plan = diamond()
    bare = Plan(
        plan.run_id, plan.version, plan.created_at, plan.author, plan.nodes, plan.output, plan.proof
    )
    assert bare == plan
    assert bare.children == {}


# Events


def test_a_run_has_three_ends() -> None:
    assert {event.value for event in TERMINAL_EVENTS} == {"RUN_DONE", "RUN_FAILED", "RUN_CANCELLED"}


def test_words_are_stored_streamed_and_printed_alike() -> None:
    assert all(found.name == found.value == str(found) for found in (*EventType, *Level))
    assert all(found.name.lower() == found.value for found in (*BlockReason, *Effect, *NodeKind))


def test_an_event_is_informative_and_unnumbered_until_it_is_appended() -> None:
    event = Event(EventType.LOG, {})
    assert (event.level, event.seq, event.ts) == (Level.INFO, 0, 0)
    assert (event.node_id, event.attempt, event.plan_version) == (None, None, None)


def test_an_error_in_an_event_has_a_code_and_a_sentence() -> None:
    assert error_data("reset", "It went dead.", host="h") == {
        "code": "reset",
        "message": "It went dead.",
        "host": "h",
    }
