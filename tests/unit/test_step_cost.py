"""A step costs the same in a plan of 100 nodes and in one of 2,000.

Counted, not timed: every call that the core makes, of Python and of C, and every element that it
takes from a dictionary of the state or the plan.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import FrameType
from typing import Any, TypeVar

import pytest

from app.domain.capability import Effect
from app.domain.decide import RunLimits, decide, recover
from app.domain.events import Event, EventType, error_data
from app.domain.plan import Plan
from app.domain.state import RunState, apply
from tests.plans import START_MS, chain, plan_node, plan_of, story_of, wide

K = TypeVar("K")
V = TypeVar("V")

SMALL, BIG = 100, 2_000
GROWTH_MAX = 1.3
LIMITS = RunLimits(16, deadline_ms=60_000, free_slots={("rare", "1.0.0"): 4})


class Counted(dict[K, V]):
    """A dictionary that hands its elements out through generators, where each one is a call."""

    def __iter__(self) -> Iterator[K]:
        yield from super().__iter__()

    def __reversed__(self) -> Iterator[K]:
        yield from super().__reversed__()

    def keys(self) -> Iterator[K]:  # type: ignore[override]  # only iterated
        yield from super().keys()

    def values(self) -> Iterator[V]:  # type: ignore[override]  # only iterated
        yield from super().values()

    def items(self) -> Iterator[tuple[K, V]]:  # type: ignore[override]  # only iterated
        yield from super().items()


def _counted_state(plan: Plan) -> RunState:
    """A run of the plan, just begun, whose dictionaries all count."""
    story = story_of(replace(plan, nodes=Counted(plan.nodes), children=Counted(plan.children)))
    state = story.state
    for name in ("nodes", "ready", "ready_limited", "waiting", "running", "to_block", "failed"):
        setattr(state, name, Counted(getattr(state, name)))
    state.blocked = Counted(state.blocked)
    return state


def calls_of(work: Callable[[], object]) -> int:
    """How many calls `work` makes."""
    count = 0

    def note(_: FrameType, what: str, __: Any) -> None:
        nonlocal count
        if what in ("call", "c_call"):
            count += 1

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def _append(state: RunState, events: list[Event]) -> None:
    for event in events:
        event.seq, event.ts = state.seq + 1, START_MS
        apply(state, event)


def _run_through(state: RunState) -> None:
    """Outcomes come one by one, the longest running first: as many decisions as nodes."""
    while True:
        decision = decide(state, START_MS, LIMITS)
        _append(state, decision.events)
        if decision.complete:
            return
        oldest = next(iter(state.running))
        done = Event(EventType.NODE_DONE, {"output": {}}, node_id=oldest, attempt=1)
        _append(state, [done])


def _growth(shape: Callable[[int], Plan], work: Callable[[RunState], object]) -> float:
    """How much more the work costs per node in the big plan."""
    small, big = (
        calls_of(partial(work, _counted_state(shape(size)))) / size for size in (SMALL, BIG)
    )
    return big / small


def _wide_limited(width: int) -> Plan:
    return wide(width, capability_id="rare", concurrency=4)


@pytest.mark.parametrize("shape", [chain, wide, _wide_limited])
def test_a_node_costs_the_same_in_a_big_plan(shape: Callable[[int], Plan]) -> None:
    assert _growth(shape, _run_through) < GROWTH_MAX


def test_one_step_of_a_wide_run_costs_the_same_in_a_big_plan() -> None:
    def step(size: int) -> int:
        state = _counted_state(wide(size))
        _append(state, [Event(EventType.NODE_DONE, {}, node_id="root")])
        _append(state, decide(state, START_MS, LIMITS).events)
        done = Event(EventType.NODE_DONE, {"output": {}}, node_id="w3", attempt=1)

        def take_one() -> None:
            _append(state, [done])
            _append(state, decide(state, START_MS, LIMITS).events)

        return calls_of(take_one)

    assert step(BIG) == step(SMALL)


def test_deciding_while_all_places_are_taken_costs_the_same_in_a_big_plan() -> None:
    def look(size: int) -> int:
        state = _counted_state(wide(size))
        _append(state, [Event(EventType.NODE_DONE, {}, node_id="root")])
        _append(state, decide(state, START_MS, LIMITS).events)
        return calls_of(lambda: decide(state, START_MS, LIMITS))

    assert look(BIG) == look(SMALL)


def test_a_take_over_looks_only_at_what_was_running() -> None:
    def take_over(size: int) -> int:
        state = _counted_state(
            plan_of(*(plan_node(f"n{i}", effect=Effect.AT_MOST_ONCE) for i in range(size)))
        )
        _append(state, decide(state, START_MS, LIMITS).events)
        return calls_of(lambda: recover(state))

    assert take_over(BIG) == take_over(SMALL)


def test_giving_up_what_depends_on_a_failed_node_costs_one_look_a_node() -> None:
    def fail(state: RunState) -> None:
        _append(state, decide(state, START_MS, LIMITS).events)
        error = {"error": error_data("broken", "It broke.")}
        _append(state, [Event(EventType.NODE_FAILED, error, node_id="n0", attempt=1)])
        _append(state, decide(state, START_MS, LIMITS).events)
        assert state.status.is_terminal

    assert _growth(chain, fail) < GROWTH_MAX


def test_the_count_sees_a_look_at_the_whole_plan() -> None:
    """The tests above would pass if the counter were blind."""

    def peek(state: RunState) -> None:
        assert state.plan is not None
        sum(1 for node in state.nodes.values() if node.unmet)
        list(state.nodes)
        list(state.plan.nodes.values())

    for size in (SMALL, BIG):
        assert calls_of(partial(peek, _counted_state(chain(size)))) > 3 * size
