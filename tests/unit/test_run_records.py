"""Records as a fold over the events of a run: every way to an outcome, and times that add up."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain.events import Event, EventType
from app.domain.record_shapes import FallbackRecord, GenerationRecord, LatencyRecord
from app.journal.run_records import READ, Record, records_of
from tests.unit.test_spans import journal_of

TRACE = "a" * 32
START_MS = 1_764_000_000_000
NEAR = {"provider": "near", "role": "chat"}


def told(*events: Event, told_seq: int = 0, has_models: bool = True) -> list[Record]:
    """The records of these events; the first is at START_MS + 1, each a ms behind the other."""
    for seq, event in enumerate(events, 1):
        event.seq, event.ts = seq, event.ts or START_MS + seq
    found = records_of("run", TRACE, events, told_seq, has_models=has_models)
    return [record for _, record in found]


def fallback_of(*events: Event, has_models: bool = True) -> FallbackRecord:
    """The fallback record of a run that these events are the middle of."""
    *_, record, _ = told(queued(), *events, Event(EventType.RUN_DONE, {}), has_models=has_models)
    assert isinstance(record, FallbackRecord)
    return record


def outcome_of(*events: Event) -> tuple[str, str | None]:
    record = fallback_of(*events)
    return record.llm_outcome, record.fallback_reason


def queued() -> Event:
    return Event(EventType.RUN_QUEUED, {"objective": "…", "lane": "standard", "label": "nightly"})


def about(event_type: EventType, data: dict[str, Any], node: str | None, attempt: int = 1) -> Event:
    return Event(event_type, data, node_id=node, attempt=None if node is None else attempt)


def selected(
    chosen: str | None,
    *passed_over: tuple[str, str],
    reason: str = "cheapest",
    node: str | None = "A",
    attempt: int = 1,
) -> Event:
    rejected = [{"model": model, "why": why} for model, why in passed_over]
    data = {"chosen": chosen, "reason": reason, "role": "chat", "rejected": rejected}
    return about(EventType.MODEL_SELECTED, data, node, attempt)


def asked(model: str, call: int = 1, node: str | None = "A") -> Event:
    return about(EventType.LLM_REQUEST, {**NEAR, "model": model, "call": call}, node)


def answered(
    model: str, outcome: str = "ok", call: int = 1, node: str | None = "A", attempt: int = 1
) -> Event:
    data = {**NEAR, "model": model, "call": call, "outcome": outcome, "duration_ms": 2.5}
    counts = {"tokens_in": 12, "tokens_out": 5, "cost_usd": "0.5", "is_estimated": False}
    return about(EventType.LLM_RESPONSE, {**data, **counts}, node, attempt)


def over_budget() -> Event:
    return about(EventType.BUDGET_EXHAUSTED, {"resource": "usd", "limit": "1", "spent": "1"}, "A")


def hit(model: str) -> Event:
    return about(EventType.CACHE_HIT, {"cache_key": "k", "model": model}, "A")


def planning(attempt: int) -> Event:
    return Event(EventType.PLAN_REQUESTED, {"attempt": attempt, "phase": "initial"})


def refused(*codes: str) -> Event:
    found = [{"code": code, "pointer": "", "message": "canary"} for code in codes]
    return Event(EventType.PLAN_REJECTED, {"attempt": 1, "phase": "initial", "diagnostics": found})


def planned(author: str) -> Event:
    return Event(EventType.PLAN_GENERATED, {"version": 1, "author": author, "node_count": 1})


# --- who gave the answers -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        pytest.param([selected("a"), answered("a")], ("success", None), id="first"),
        pytest.param([selected("a"), hit("a")], ("success", None), id="cached"),
        pytest.param(
            [selected("a"), answered("a", "timeout"), answered("a", call=2)],
            ("success", None),
            id="same model again",
        ),
        pytest.param(
            [
                selected("a"),
                answered("a", "timeout"),
                selected("b", ("a", "timeout"), reason="fallback"),
                answered("b", call=2),
            ],
            ("fallback", "timeout"),
            id="next model",
        ),
        pytest.param(
            [
                selected("a"),
                answered("a", "invalid_json"),
                selected("r", ("a", "wrong_role")),
                answered("r", call=2),
            ],
            ("fallback", "invalid_json"),
            id="a reliable one",
        ),
        pytest.param(
            [
                selected("c", ("a", "no_json"), ("b", "overflow"), reason="fallback"),
                answered("c"),
            ],
            ("fallback", "overflow"),
            id="overflow",
        ),
        pytest.param(
            [selected("b", ("a", "unknown_model"), reason="fallback"), answered("b")],
            ("fallback", "unknown_model"),
            id="preferred is unknown",
        ),
        pytest.param(
            [selected("b", reason="fallback"), answered("b")],
            ("fallback", "fallback"),
            id="no reason is known",
        ),
        pytest.param(
            [
                selected("a"),
                answered("a", "timeout"),
                selected(None, ("a", "timeout"), reason="no_compatible_model"),
            ],
            ("error", "timeout"),
            id="nobody is left",
        ),
        pytest.param(
            [selected(None, reason="no_compatible_model")],
            ("error", "no_compatible_model"),
            id="nobody fits",
        ),
        pytest.param(
            [selected(None, ("a", "breaker_open"), reason="no_compatible_model")],
            ("error", "breaker_open"),
            id="breaker is open",
        ),
        pytest.param(
            [selected("a"), over_budget()],
            ("error", "budget_exhausted"),
            id="budget",
        ),
        pytest.param(
            [selected("a"), answered("a", "timeout"), over_budget()],
            ("error", "timeout"),
            id="the first trouble is told",
        ),
        pytest.param([selected("a"), asked("a")], ("error", "unfinished"), id="cut off"),
        pytest.param(
            [
                selected(None, ("a", "breaker_open"), reason="no_compatible_model"),
                selected("a", attempt=2),
                answered("a", attempt=2),
            ],
            ("success", None),
            id="the last attempt counts",
        ),
        pytest.param(
            [
                selected("b", ("a", "overflow"), reason="fallback"),
                answered("b"),
                selected("a", attempt=2),
                answered("a", attempt=2),
            ],
            ("success", None),
            id="an attempt does not inherit the way of an earlier one",
        ),
    ],
)
def test_what_became_of_the_questions_of_a_node(
    events: list[Event], expected: tuple[str, str | None]
) -> None:
    assert outcome_of(*events) == expected


def test_the_worst_component_counts_and_all_are_told() -> None:
    record = fallback_of(
        *(selected("a", node="A"), answered("a", node="A")),
        *(selected("a", node="B"), answered("a", "refused", node="B")),
        *(selected("b", ("a", "overflow"), reason="fallback", node="C"), answered("b", node="C")),
    )
    assert record.components == {"node:A": "success", "node:B": "error", "node:C": "fallback"}
    assert (record.llm_outcome, record.fallback_reason) == ("error", "refused")
    assert (record.llm_latency_ms, record.deterministic_used) == (7.5, False)


@pytest.mark.parametrize(
    ("has_models", "outcome"), [(True, "skipped"), (False, "deterministic_only")]
)
def test_a_run_that_asks_nobody_is_deterministic(has_models: bool, outcome: str) -> None:
    record = fallback_of(planned("caller"), has_models=has_models)
    assert (record.llm_outcome, record.fallback_reason) == (outcome, None)
    assert (record.deterministic_used, record.llm_latency_ms) == (True, None)
    assert (record.intent, record.decision_action) == ("nightly", "caller")
    assert (record.timestamp, record.command_id) == ("2025-11-24T16:00:00.003Z", "run")


def test_a_second_try_does_not_inherit_the_way_of_the_first() -> None:
    first = [selected("b", ("a", "breaker_open"), reason="fallback", node=None)]
    first.append(answered("b", node=None))
    assert outcome_of(
        *(planning(1), *first, refused("CYCLE"), planning(2), *of_planner(), planned("llm"))
    ) == ("success", None)


def of_planner(outcome: str = "ok") -> list[Event]:
    return [selected("a", node=None), answered("a", outcome, node=None)]


def test_a_plan_by_a_model_is_a_success_also_at_the_second_try() -> None:
    record = fallback_of(
        *(planning(1), *of_planner(), refused("CYCLE"), planning(2), *of_planner(), planned("llm"))
    )
    assert (record.llm_outcome, record.components) == ("success", {"planner": "success"})
    assert (record.decision_action, record.deterministic_used) == ("llm", False)


@pytest.mark.parametrize(
    ("outcome", "codes", "reason"),
    [("provider_failed", ["llm_unavailable"], "provider_failed"), ("ok", ["CYCLE", "X"], "CYCLE")],
)
def test_a_plan_by_the_assembler_is_a_fallback(outcome: str, codes: list[str], reason: str) -> None:
    record = fallback_of(
        *(planning(1), *of_planner(outcome), refused(*codes), planning(2), planned("assembler"))
    )
    assert (record.llm_outcome, record.fallback_reason) == ("fallback", reason)
    assert record.deterministic_used


def test_a_plan_that_nobody_finds_is_an_error() -> None:
    assert outcome_of(planning(1), *of_planner(), refused("CYCLE"), planning(2)) == (
        "error",
        "CYCLE",
    )
    assert outcome_of(planning(1), *of_planner(), refused()) == ("error", "rejected")


def test_each_plan_is_asked_for_anew_and_the_worst_one_is_told() -> None:
    record = fallback_of(
        *(planning(1), *of_planner(), planned("llm")),
        *(planning(1), *of_planner("timeout"), refused("timeout"), planning(2), planned("replan")),
        *(planning(1), *of_planner(), planned("replan")),
    )
    assert record.components == {"planner": "fallback"}
    assert (record.fallback_reason, record.deterministic_used) == ("timeout", True)
    without_a_model = fallback_of(planning(1), refused("CYCLE"), planned("assembler"))
    assert without_a_model.components == {}


# --- calls ----------------------------------------------------------------------------------------


def generations(*events: Event, told_seq: int = 0) -> list[tuple[Any, ...]]:
    return [
        (record.node_id, record.call, record.outcome, record.latency_ms, record.tokens_in)
        for record in told(queued(), *events, told_seq=told_seq)
        if isinstance(record, GenerationRecord)
    ]


@pytest.mark.parametrize(
    "ended",
    [
        about(EventType.NODE_FAILED, {"error": {"code": "timeout", "message": ""}}, "A"),
        Event(EventType.RUN_CANCELLED, {}),
    ],
)
def test_a_call_that_was_cut_off_is_told_once(ended: Event) -> None:
    found = generations(selected("a"), asked("a"), asked("b", node="B"), ended)
    cut_off = [("A", 1, "unfinished", 2.0, None)]
    if ended.node_id is None:
        cut_off.append(("B", 1, "unfinished", 1.0, None))
    assert found == cut_off


def test_a_call_that_is_made_again_after_a_takeover_is_two_calls() -> None:
    assert generations(selected("a"), asked("a"), asked("a"), answered("a")) == [
        ("A", 1, "unfinished", 1.0, None),
        ("A", 1, "ok", 2.5, 12),
    ]


def test_a_refusal_is_marked_and_events_that_nobody_declared_are_passed_over() -> None:
    found = told(queued(), Event("LATER", {}), answered("a", "refused"), hit("a"), over_budget())
    [record] = [found for found in found if isinstance(found, GenerationRecord)]
    assert record.refusal
    assert record.cost_usd == "0.5"


def test_what_was_told_at_a_pause_is_not_told_again() -> None:
    pause = Event(EventType.RUN_PAUSED, {"status": "paused"})
    events = (selected("a"), answered("a"), pause, answered("a", call=2))
    assert [call for _, call, *_ in generations(*events)] == [1, 2]
    assert [call for _, call, *_ in generations(*events, told_seq=4)] == [2]


# --- where the time went --------------------------------------------------------------------------


def latency_of(*events: Event) -> LatencyRecord:
    record = told(*events)[-1]
    assert isinstance(record, LatencyRecord)
    return record


def at(ms: int, event_type: EventType, **data: Any) -> Event:
    return Event(event_type, data, ts=START_MS + ms)


def test_the_time_of_a_run_has_four_parts() -> None:
    record = latency_of(
        at(0, EventType.RUN_QUEUED),
        at(10, EventType.RUN_START),
        at(13, EventType.PLAN_GENERATED, version=1, author="llm", planning_ms=2.5),
        at(20, EventType.RUN_PAUSED),
        at(50, EventType.RUN_RESUMED),
        at(51, EventType.RUN_RESUMED),  # a decision while it runs is no end of a pause
        at(70, EventType.RUN_PAUSED),
        at(100, EventType.RUN_CANCELLED),
    )
    assert record.total_ms == 100
    assert record.steps == {
        "queue_ms": 10,
        "planning_ms": 2.5,
        "paused_ms": 60,
        "execution_ms": 27.5,
    }


def test_a_run_that_never_started_was_queued_all_the_time() -> None:
    record = latency_of(at(0, EventType.RUN_QUEUED), at(40, EventType.RUN_CANCELLED))
    assert (record.total_ms, record.steps["queue_ms"]) == (40, 40)


@settings(max_examples=40)
@given(st.integers(0, 100_000))
def test_the_steps_of_any_run_are_its_total_and_it_ends_with_one_record_of_each_kind(
    seed: int,
) -> None:
    events = [event for event in journal_of(seed) if event.type in READ]
    found = [record for _, record in records_of("run", TRACE, events, 0, has_models=False)]
    if events[-1].type not in (EventType.RUN_DONE, EventType.RUN_FAILED, EventType.RUN_CANCELLED):
        assert found == []
        return
    fallback, latency = found
    assert isinstance(fallback, FallbackRecord)
    assert isinstance(latency, LatencyRecord)
    assert latency.total_ms == pytest.approx(sum(latency.steps.values()), abs=0.002)
    assert all(took >= 0 for took in latency.steps.values())
