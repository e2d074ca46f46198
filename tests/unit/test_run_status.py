"""The statuses of runs and nodes, and which may follow which."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from app.domain.events import TERMINAL_EVENTS, EventType
from app.domain.run import (
    NODE_TRANSITIONS,
    RUN_TRANSITIONS,
    TERMINAL,
    NodeStatus,
    RunStatus,
)


def test_the_words_are_the_documented_ones() -> None:
    assert [status.value for status in RunStatus] == [
        *("queued", "running", "awaiting_human", "paused", "done", "failed", "cancelled"),
    ]
    assert [status.value for status in NodeStatus] == [
        *("pending", "running", "blocked", "done", "failed", "skipped"),
    ]


@pytest.mark.parametrize("status", RunStatus)
def test_a_run_is_over_when_it_is_done_failed_or_cancelled(status: RunStatus) -> None:
    assert status.is_terminal is (status.value in {"done", "failed", "cancelled"})
    assert (RUN_TRANSITIONS[status] == frozenset()) is status.is_terminal


def test_there_is_a_terminal_event_for_every_terminal_status() -> None:
    assert {status.value.upper() for status in TERMINAL} == {
        event.value.removeprefix("RUN_") for event in TERMINAL_EVENTS
    }
    assert EventType.RUN_PAUSED not in TERMINAL_EVENTS


def _reachable(start: str, transitions: Mapping[RunStatus, frozenset[RunStatus]]) -> set[RunStatus]:
    found: set[RunStatus] = set()
    stack = [RunStatus(start)]
    while stack:
        status = stack.pop()
        if status not in found:
            found.add(status)
            stack.extend(transitions[status])
    return found


def test_every_run_status_has_a_place_and_every_open_one_can_still_end_in_any_way() -> None:
    assert set(RUN_TRANSITIONS) == set(RunStatus)
    assert _reachable("queued", RUN_TRANSITIONS) == set(RunStatus)
    for status in set(RunStatus) - TERMINAL:
        assert _reachable(status, RUN_TRANSITIONS) >= TERMINAL
        assert {RunStatus.FAILED, RunStatus.CANCELLED} <= RUN_TRANSITIONS[status]


def test_a_run_is_done_only_from_running_and_never_queued_again() -> None:
    before_done = {old for old, allowed in RUN_TRANSITIONS.items() if RunStatus.DONE in allowed}
    assert before_done == {RunStatus.RUNNING}
    assert all(RunStatus.QUEUED not in allowed for allowed in RUN_TRANSITIONS.values())
    assert all(status not in allowed for status, allowed in RUN_TRANSITIONS.items())


def test_what_a_node_came_to_never_changes() -> None:
    """Under its plan version, that is: the next one starts its own nodes."""
    assert set(NODE_TRANSITIONS) == set(NodeStatus)
    final = {status for status, allowed in NODE_TRANSITIONS.items() if not allowed}
    assert final == {NodeStatus.DONE, NodeStatus.FAILED, NodeStatus.SKIPPED}


def test_a_node_must_run_or_be_decided_upon_before_it_is_done() -> None:
    before_done = {old for old, allowed in NODE_TRANSITIONS.items() if NodeStatus.DONE in allowed}
    assert before_done == {NodeStatus.RUNNING, NodeStatus.BLOCKED}
    before_failed = {
        old for old, allowed in NODE_TRANSITIONS.items() if NodeStatus.FAILED in allowed
    }
    assert before_failed == before_done


def test_a_node_is_skipped_only_before_it_ever_ran() -> None:
    before = {old for old, allowed in NODE_TRANSITIONS.items() if NodeStatus.SKIPPED in allowed}
    assert before == {NodeStatus.PENDING}


def test_a_blocked_node_may_go_on_by_itself() -> None:
    """When the breaker that refused it lets a call in again."""
    assert NodeStatus.RUNNING in NODE_TRANSITIONS[NodeStatus.BLOCKED]
