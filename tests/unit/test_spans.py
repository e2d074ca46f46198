"""The spans of a run as a reading of its events, and when nothing of tracing is loaded."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.semconv.attributes import error_attributes
from pydantic import ValidationError

from app.adapters.tracing import conventions
from app.adapters.tracing.spans import Span, spans_of
from app.domain.event_json import decode_event
from app.domain.events import TERMINAL_EVENTS, Event, EventType
from app.journal.tracer import is_sampled
from app.kit.ids import new_traceparent, span_id
from tests.conftest import make_settings
from tests.simulator import Simulation, random_scenario

RUN = "0190a5b0-0000-7000-8000-000000000000"
ROOT = span_id(RUN)
TRACEPARENT = f"00-{'a' * 32}-{ROOT}-01"


OMITTED: dict[EventType | str, dict[str, Any]] = {
    EventType.RUN_QUEUED: {"lane": "standard"},
    EventType.PLAN_GENERATED: {"author": "caller", "node_count": 1},
}


def journal_of(seed: int) -> list[Event]:
    """The events of a run that met every trouble, with what the simulator leaves out of them."""
    events = [decode_event(body) for body in Simulation(random_scenario(seed)).run().durable]
    for event in events:
        event.data = {**OMITTED.get(event.type, {}), **event.data}
    return events


def told(*events: Event, told_seq: int = 0) -> list[Span]:
    for seq, event in enumerate(events, 1):
        event.seq, event.ts = seq, 1_000 + seq
    return spans_of(RUN, TRACEPARENT, events, told_seq)


def started(node_id: str, attempt: int = 1) -> Event:
    return Event(EventType.NODE_START, {"capability_id": "x"}, node_id=node_id, attempt=attempt)


def model(event_type: EventType, call: int, **more: Any) -> Event:
    data = {"provider": "near", "model": "small", "call": call, **more}
    return Event(event_type, data, node_id="A", attempt=1)


@settings(max_examples=40)
@given(st.integers(0, 100_000))
def test_every_attempt_of_any_run_is_one_span_that_ends(seed: int) -> None:
    events = journal_of(seed)
    spans = spans_of(RUN, TRACEPARENT, events)
    ids = {span.span_id for span in spans}
    assert len(ids) == len(spans)
    has_ended = events[-1].type in TERMINAL_EVENTS
    assert (ROOT in ids) == has_ended
    assert all(span.start_ms <= span.end_ms for span in spans)
    assert {span.parent_id for span in spans if span.span_id != ROOT} <= {*ids, ROOT}
    starts = [(e.node_id, e.attempt) for e in events if e.type is EventType.NODE_START]
    tools = [span for span in spans if span.operation == conventions.EXECUTE_TOOL]
    if has_ended:
        assert len(tools) == len(starts)


@settings(max_examples=30)
@given(st.integers(0, 100_000), st.data())
def test_what_is_told_in_two_parts_is_what_is_told_at_once(seed: int, data: st.DataObject) -> None:
    events = journal_of(seed)
    cut = data.draw(st.integers(1, len(events)))
    first = spans_of(RUN, TRACEPARENT, events[:cut])
    second = spans_of(RUN, TRACEPARENT, events, told_seq=cut)
    whole = spans_of(RUN, TRACEPARENT, events)
    assert [span.span_id for span in (*first, *second)] == [span.span_id for span in whole]


def test_a_call_that_was_cut_off_by_a_takeover_ends_when_it_is_made_again() -> None:
    *chats, _node = told(
        started("A"),
        model(EventType.LLM_REQUEST, 1),
        model(EventType.LLM_REQUEST, 1),
        model(EventType.LLM_REQUEST, 2),
        Event(EventType.NODE_FAILED, {"error": {"code": "timeout"}}, node_id="A", attempt=1),
    )
    assert [(chat.start_ms, chat.end_ms, chat.error) for chat in chats] == [
        (1_002, 1_003, "unfinished"),
        (1_003, 1_005, "unfinished"),
        (1_004, 1_005, "unfinished"),
    ]


def test_a_plan_that_is_refused_and_an_output_that_does_not_fit_are_spans_of_the_run() -> None:
    rejected = {"attempt": 1, "phase": "initial", "diagnostics": [{"code": "CYCLE"}]}
    invalid = {"scope": "final_output", "errors": [{"code": "CONTRACT_TYPE"}]}
    plan, verify = told(
        Event(EventType.PLAN_REJECTED, rejected), Event(EventType.VALIDATION_ERROR, invalid)
    )
    assert (plan.name, plan.error, plan.parent_id) == ("plan", "CYCLE", ROOT)
    assert (verify.name, verify.error, verify.parent_id) == ("verify", "CONTRACT_TYPE", ROOT)


def test_what_an_operator_decided_and_what_a_newer_release_wrote_is_passed_over() -> None:
    assert (
        told(
            Event(EventType.NODE_DONE, {"decided_by": {}}, node_id="A", attempt=1),
            Event("LATER_EVENT", {}),
            model(EventType.LLM_RESPONSE, 1),
        )
        == []
    )


def test_names_are_those_of_the_conventions() -> None:
    theirs = {
        value
        for module in (gen_ai_attributes, error_attributes)
        for value in vars(module).values()
        if isinstance(value, str)
    }
    ours = {value for name, value in vars(conventions).items() if name.isupper()}
    standard = {name for name in ours if name.startswith(("gen_ai.", "error."))}
    assert len(standard) == 8
    assert standard <= theirs
    operations = {value.value for value in gen_ai_attributes.GenAiOperationNameValues}
    assert {"invoke_workflow", "execute_tool", "chat"} <= operations


@given(st.floats(0, 1), st.integers(0, 2**128 - 1))
def test_a_share_of_the_traces_is_chosen_by_their_ids(share: float, trace_id: int) -> None:
    traceparent = f"00-{trace_id:032x}-{ROOT}-01"
    assert is_sampled(traceparent, share) == (trace_id % 2**64 < int(share * 2**64))
    assert is_sampled(traceparent, 1.0)
    assert not is_sampled(traceparent, 0.0)
    assert not is_sampled(f"00-{trace_id:032x}-{ROOT}-00", 1.0)
    assert not is_sampled("", 1.0)


def test_a_new_trace_begins_at_the_run_itself() -> None:
    traceparent, trace_id = new_traceparent(ROOT)
    assert traceparent == f"00-{trace_id}-{ROOT}-01"


def test_nothing_of_an_sdk_is_loaded_unless_it_is_configured() -> None:
    code = (
        "import sys, app.main, app.worker, app.adapters.tracing as tracing;"
        "assert tracing.open_exporters('x', (None, None), ('', None, None)) == [];"
        "found = [m for m in sys.modules if m.startswith(('opentelemetry.sdk', 'langfuse',"
        " 'opentelemetry.exporter', 'requests'))]; assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_keys_of_langfuse_come_in_pairs_and_are_not_shown() -> None:
    both = make_settings(langfuse_public_key="pk", langfuse_secret_key="sk-secret")
    assert "sk-secret" not in repr(both)
    for half in ("langfuse_public_key", "langfuse_secret_key"):
        with pytest.raises(ValidationError, match="belong together"):
            make_settings(**{half: "a key"})


def test_a_call_that_a_node_made_itself_is_a_tool_below_it() -> None:
    def called(call: int, outcome: str, duration_ms: float) -> Event:
        data = {
            "capability_id": "soil.lookup",
            "version": "1.0.0",
            "call": call,
            "outcome": outcome,
            "duration_ms": duration_ms,
        }
        return Event(EventType.TOOL_CALLED, data, node_id="A", attempt=1)

    done = Event(EventType.NODE_DONE, {}, node_id="A", attempt=1)
    queued = Event(EventType.RUN_QUEUED, {"lane": "standard"})
    ok, failed, node = told(
        queued, started("A"), called(1, "ok", 0.6), called(2, "timeout", 500.0), done
    )
    assert {span.name for span in (ok, failed)} == {"execute_tool soil.lookup"}
    assert {span.parent_id for span in (ok, failed)} == {node.span_id}
    assert (ok.start_ms, ok.end_ms, ok.error) == (1_002, 1_003, "")
    # It does not begin before its node, whatever the clocks say.
    assert (failed.start_ms, failed.end_ms, failed.error) == (1_002, 1_004, "timeout")
    assert ok.attributes == {
        conventions.OPERATION_NAME: "execute_tool",
        conventions.TOOL_NAME: "soil.lookup",
        conventions.NODE_ID: "A",
        conventions.OUTCOME: "ok",
    }
