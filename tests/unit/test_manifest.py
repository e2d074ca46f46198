"""The manifest of a run: every kind of attempt told by hand, then random journals."""

from __future__ import annotations

from collections import Counter
from typing import Any

import orjson
import pytest

from app.cli.manifest import LIST_OF_STATUS, manifest
from app.cli.picture import ENDED
from app.domain.state import RunState
from app.kit.rfc3339 import rfc3339
from tests.plans import RUN_ID, START_MS
from tests.simulator import Simulation, random_scenario

ERROR = {"code": "broken", "message": "It broke."}


def told(*events: tuple[str, str | None, dict[str, Any]]) -> list[dict[str, Any]]:
    """Events one second apart; the attempt of a node is the number of its starts."""
    starts: Counter[str] = Counter()
    found = []
    for seq, (event_type, node_id, data) in enumerate(events, 1):
        event = {"seq": seq, "type": event_type, "ts": rfc3339(START_MS + seq * 1_000)}
        if node_id is not None:
            starts[node_id] += event_type == "NODE_START"
            event |= {"node_id": node_id, "attempt": starts[node_id]}
        found.append({**event, "data": data})
    return found


def resource(
    events: list[dict[str, Any]], status: str, *nodes: dict[str, Any], **more: Any
) -> dict[str, Any]:
    """A run resource as of the last of the events."""
    return {
        "run_id": RUN_ID,
        "status": status,
        "objective": "tell a story",
        "plan_version": 1,
        "last_seq": len(events),
        "nodes": list(nodes),
        "error": None,
        "created_at": rfc3339(START_MS),
        "finished_at": events[-1]["ts"] if status in ENDED.values() else None,
        **more,
    }


def node(node_id: str, status: str, **more: Any) -> dict[str, Any]:
    return {"node_id": node_id, "status": status, "capability_id": "util.echo", **more}


def test_a_failed_run_says_what_is_done_what_is_left_and_what_failed() -> None:
    events = told(
        ("RUN_START", None, {}),
        ("NODE_START", "A", {}),
        ("NODE_DONE", "A", {"output": 1, "duration_ms": 12.5}),
        ("NODE_START", "B", {}),
        ("NODE_RETRY", "B", {"delay_ms": 5, "error": ERROR}),
        ("NODE_START", "B", {}),
        ("NODE_FAILED", "B", {"error": ERROR, "duration_ms": 3.0}),
        ("NODE_BLOCKED", "C", {"reason": "dependency_failed"}),
        ("RUN_FAILED", None, {"error": {"code": "nodes_failed", "message": "B failed."}}),
    )
    run = resource(
        events,
        "failed",
        node("A", "done"),
        node("B", "failed", error=ERROR),
        node("C", "blocked", reason="dependency_failed"),
        node("D", "pending"),
        error={"code": "nodes_failed", "message": "B failed."},
    )

    found = manifest(run, events)

    assert found["completed_nodes"] == ["A"]
    assert found["failed_nodes"] == ["B"]
    assert found["blocked_nodes"] == ["C"]
    assert found["pending_nodes"] == ["D"]
    assert found["running_nodes"] == found["skipped_nodes"] == found["files"] == []
    assert found["started_at"] == events[0]["ts"]
    assert found["finished_at"] == events[-1]["ts"]
    assert found["duration_s"] == 8.0
    assert found["failures"] == [
        {"node_id": "B", "code": "broken", "message": "It broke."},
        {"node_id": None, "code": "nodes_failed", "message": "B failed."},
    ]
    assert found["nodes"]["A"]["attempts"] == [
        {
            "attempt": 1,
            "round": 1,
            "started_at": events[1]["ts"],
            "calls": 1,
            "finished_at": events[2]["ts"],
            "outcome": "done",
            "duration_ms": 12.5,
        }
    ]
    first, second = found["nodes"]["B"]["attempts"]
    assert (first["attempt"], first["outcome"], first["error"]) == (1, "failed", ERROR)
    assert first["duration_ms"] == 1_000.0, "where none was recorded, the times tell"
    assert (second["attempt"], second["outcome"], second["duration_ms"]) == (2, "failed", 3.0)
    assert found["nodes"]["C"] == {
        "status": "blocked",
        "capability_id": "util.echo",
        "reason": "dependency_failed",
        "attempts": [],
    }


def test_a_run_under_way_has_an_attempt_without_an_end() -> None:
    events = told(("RUN_START", None, {}), ("NODE_START", "A", {}))

    found = manifest(resource(events, "running", node("A", "running")), events)

    [attempt] = found["nodes"]["A"]["attempts"]
    assert attempt["outcome"] is attempt["finished_at"] is attempt["duration_ms"] is None
    assert found["running_nodes"] == ["A"]
    assert found["duration_s"] is found["finished_at"] is None


def test_a_queued_run_has_a_manifest_too() -> None:
    events = told(("RUN_QUEUED", None, {}))

    found = manifest(resource(events, "queued", plan_version=None), events)

    assert found["nodes"] == {}
    assert found["started_at"] is found["duration_s"] is found["resumed_from"] is None


def test_events_behind_the_resource_are_left_out() -> None:
    events = told(("RUN_START", None, {}), ("NODE_START", "A", {}), ("NODE_DONE", "A", {}))
    run = resource(events, "running", node("A", "running"), last_seq=2)

    [attempt] = manifest(run, events)["nodes"]["A"]["attempts"]

    assert attempt["outcome"] is None


def test_an_unknown_outcome_stays_unknown_when_an_operator_decided() -> None:
    events = told(
        ("RUN_START", None, {}),
        ("NODE_START", "A", {}),
        ("NODE_BLOCKED", "A", {"reason": "unknown_outcome", "error": ERROR}),
        ("RUN_PAUSED", None, {"status": "awaiting_human"}),
        ("RUN_RESUMED", None, {}),
        ("NODE_DONE", "A", {"output": 1, "decided_by": {"id": "ada"}}),
        ("RUN_DONE", None, {}),
    )

    found = manifest(resource(events, "done", node("A", "done")), events)["nodes"]["A"]

    [attempt] = found["attempts"]
    assert (attempt["outcome"], attempt["error"]) == ("unknown", ERROR)
    assert attempt["finished_at"] == events[2]["ts"]
    assert found["decided_by"] == {"id": "ada"}


def test_a_call_that_was_made_again_after_a_take_over_is_counted() -> None:
    events = told(
        ("RUN_START", None, {}),
        ("NODE_START", "A", {"round": 2}),
        ("RUN_RECOVERED", None, {"epoch": 2, "called_again": ["A"]}),
        ("RUN_RECOVERED", None, {"epoch": 3, "called_again": ["A"]}),
        ("NODE_DONE", "A", {}),
    )

    [attempt] = manifest(resource(events, "running", node("A", "done")), events)["nodes"]["A"][
        "attempts"
    ]

    assert (attempt["calls"], attempt["round"], attempt["outcome"]) == (3, 2, "done")


def test_an_attempt_that_a_breaker_held_back_called_nobody() -> None:
    events = told(
        ("RUN_START", None, {}),
        ("NODE_START", "A", {}),
        ("NODE_BLOCKED", "A", {"reason": "breaker_open", "scope": "t::h", "delay_ms": 9}),
        ("NODE_START", "A", {}),
        ("NODE_DONE", "A", {}),
    )

    attempts = manifest(resource(events, "running", node("A", "done")), events)["nodes"]["A"][
        "attempts"
    ]

    assert [(a["outcome"], a["calls"]) for a in attempts] == [("blocked", 0), ("done", 1)]


def test_what_a_cancelled_run_left_open_is_abandoned() -> None:
    events = told(
        ("RUN_START", None, {}), ("NODE_START", "A", {}), ("RUN_CANCELLED", None, {"by": None})
    )

    [attempt] = manifest(resource(events, "cancelled", node("A", "running")), events)["nodes"]["A"][
        "attempts"
    ]

    assert attempt["outcome"] == "abandoned"
    assert attempt["finished_at"] == events[-1]["ts"]
    assert "error" not in attempt


@pytest.mark.parametrize("status", ["skipped", "done"])
def test_a_node_that_was_taken_over_is_completed(status: str) -> None:
    events = told(
        ("RUN_START", None, {}),
        ("NODE_SKIPPED", "A", {"reason": "resume", "output": 1}),
        ("NODE_SKIPPED", "B", {"reason": "condition"}),
    )
    origin = {"run_id": "0190b1c2-0000-7000-8000-000000000000", "seq": 9}
    run = resource(
        events,
        "running",
        node("A", status, reason="resume"),
        node("B", "skipped", reason="condition"),
        resumed_from=origin,
    )

    found = manifest(run, events)

    assert (found["completed_nodes"], found["skipped_nodes"]) == (["A"], ["B"])
    assert found["nodes"]["A"]["reason"] == "resume"
    assert found["resumed_from"] == origin


# --- random journals ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(100))
def test_the_manifest_of_any_journal_agrees_with_its_state(seed: int) -> None:
    simulation = Simulation(random_scenario(seed)).run()
    events = [orjson.loads(body) for body in simulation.durable]

    found = manifest(_resource_of(simulation.state, events), events)

    listed = [node_id for name in LIST_OF_STATUS.values() for node_id in found[name]]
    assert sorted(listed) == sorted(simulation.state.nodes), "each node in exactly one list"
    starts = Counter(event["node_id"] for event in events if event["type"] == "NODE_START")
    for node_id, entry in found["nodes"].items():
        attempts = entry["attempts"]
        assert len(attempts) == starts[node_id]
        numbers = [attempt["attempt"] for attempt in attempts]
        assert numbers == sorted(set(numbers))
        if entry["status"] == "done" and "decided_by" not in entry:
            assert attempts[-1]["outcome"] in ("done", "unknown")
        if simulation.state.status.is_terminal:
            assert all(attempt["outcome"] for attempt in attempts)
        if not simulation.seen["went on with calls of before the pause"]:
            for attempt in attempts:
                called = simulation.outside.calls[node_id, attempt["attempt"]]
                assert called <= attempt["calls"], "no call that the journal does not tell of"


def _resource_of(state: RunState, events: list[dict[str, Any]]) -> dict[str, Any]:
    """The run resource as the API would give it."""
    nodes = []
    for node_id, found in state.nodes.items():
        more = {"reason": found.reason, "error": found.error}
        kept = {name: value for name, value in more.items() if value is not None}
        nodes.append(node(node_id, found.status.value, **kept))
    return resource(events, state.status.value, *nodes)
