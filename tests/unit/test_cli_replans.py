"""Plans that are made anew, as the command line shows them."""

from __future__ import annotations

from typing import Any

from app.cli.next_steps import next_steps
from app.cli.picture import Picture
from app.cli.render import event_line

RUN_ID = "0190b1c2-0000-7000-8000-000000000001"


def event(event_type: str, node_id: str | None = None, **data: Any) -> dict[str, Any]:
    found = {"seq": 7, "type": event_type, "level": "INFO", "data": data}
    return found if node_id is None else {**found, "node_id": node_id}


def generated(version: int, *nodes: str) -> dict[str, Any]:
    listed = [{"id": node, "capability_id": "util.echo", "requires": []} for node in nodes]
    return event(
        "PLAN_GENERATED",
        version=version,
        author="llm",
        node_count=len(nodes),
        nodes=listed,
        open_goals=["D"],
    )


UPDATED = event(
    "PLAN_UPDATED",
    previous_version=1,
    version=2,
    cause="policy",
    policy_id="second-thoughts",
    kept=["A"],
    added=["C"],
    removed=["B"],
)


def test_a_picture_keeps_what_is_done_and_forgets_what_failed() -> None:
    picture = Picture(RUN_ID)
    for seen in (
        generated(1, "A", "B", "C"),
        event("NODE_START", "A", capability_id="util.echo"),
        event("NODE_DONE", "A", duration_ms=3.0),
        event("NODE_START", "B", capability_id="util.echo"),
        event("NODE_FAILED", "B", error={"code": "broken", "message": "It broke."}),
        generated(2, "A", "B", "D"),
        UPDATED,
    ):
        picture.apply(seen)
    assert picture.plan_version == 2
    statuses = {node_id: look.status for node_id, look in picture.nodes.items()}
    assert statuses == {"A": "done", "B": "pending", "D": "pending"}
    assert picture.nodes["B"].error is None


def test_events_of_a_replan_are_told_in_a_line() -> None:
    triggered = event(
        "POLICY_TRIGGERED",
        "A",
        policy_id="second-thoughts",
        trigger="on_node_complete",
        action="replan",
    )
    blocked = event(
        "NODE_BLOCKED", "fallback", reason="awaiting_answer", operator_prompt="No plan was found"
    )
    assert [event_line(seen) for seen in (generated(1, "A"), triggered, UPDATED, blocked)] == [
        "   7 PLAN_GENERATED   version 1 by llm, 1 nodes, 1 goals to come",
        "   7 POLICY_TRIGGERED A  second-thoughts: on_node_complete, replan",
        "   7 PLAN_UPDATED     by second-thoughts: added C; removed B",
        "   7 NODE_BLOCKED     fallback  awaiting_answer No plan was found",
    ]


def test_a_run_that_nobody_has_a_plan_for_comes_with_commands() -> None:
    node = {"node_id": "fallback", "status": "blocked", "reason": "awaiting_answer"}
    run = {"run_id": RUN_ID, "status": "awaiting_human", "nodes": [node]}
    lines = list(next_steps(run, "http://127.0.0.1:8000"))
    assert lines[1].startswith("No plan was found")
    assert lines[2:5] == [
        f"  flexrun resume {RUN_ID} --node fallback=retry"
        "    # plan again, now that what was missing is there",
        f"  flexrun resume {RUN_ID} --node fallback=done --output fallback=@output.json"
        "    # this is the output of the run",
        f"  flexrun resume {RUN_ID} --node fallback=fail    # give it up",
    ]
