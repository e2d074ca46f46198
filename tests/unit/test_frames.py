"""Frames: what is stored and sent, and that a reader of the standard gets exactly that back."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sse_starlette import ServerSentEvent

from app.domain.event_json import decode_event, encode_event
from app.domain.events import TERMINAL_EVENTS, Event, EventType, Level
from app.journal.frames import Frame, frame_of
from app.kit.rfc3339 import from_rfc3339, rfc3339
from tests.plans import RUN_ID, START_MS, diamond, exact, story_of
from tests.sse import parse

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"

_nasty = st.sampled_from(
    [
        "\n\nid: 99\n",
        "\r\n",
        "\r",
        "data: x",
        "\n\nevent: RUN_DONE\n\n",
        "\u2028",
        "\x85",
        "\0",
        ": ",
    ]
)
_text = st.lists(st.text(max_size=6) | _nasty, max_size=3).map("".join)
_json: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | _text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_text, inner, max_size=3),
    max_leaves=6,
)
_events = st.builds(
    Event,
    type=st.sampled_from(EventType),
    data=st.dictionaries(_text, _json, max_size=4),
    node_id=st.none() | st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,9}", fullmatch=True),
    attempt=st.none() | st.integers(1, 1_000),
    plan_version=st.none() | st.integers(1, 1_000),
    level=st.sampled_from(Level),
    seq=st.integers(1, 2**53),
    ts=st.integers(0, 4_102_444_800_000),
)

_modest = settings(max_examples=80)


def _body(event: Event) -> bytes:
    return encode_event(event, RUN_ID, TRACE_ID)


def _frame(event: Event) -> Frame:
    return frame_of(event.seq, event.type, event.node_id, event.level, _body(event))


@_modest
@given(_events)
@example(Event(EventType.LOG, {"text": "a\n\nid: 99\n\ndata: forged\r\rend\r\n"}, seq=3))
@example(Event(EventType.RUN_DONE, {"\n": "\0"}, seq=1, ts=1_751_000_000_999))
def test_an_event_survives_storage(event: Event) -> None:
    assert decode_event(_body(event)) == event
    assert decode_event(_body(event).decode()) == event


@_modest
@given(st.lists(_events, min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_a_reader_of_the_standard_gets_every_event_back(events: list[Event], random: Any) -> None:
    stream = b"".join(_frame(event).data for event in events)
    cuts = sorted(random.randrange(len(stream) + 1) for _ in range(5))
    chunks = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    parsed = parse(chunks)
    assert [found.id for found in parsed.events] == [str(event.seq) for event in events]
    assert [found.event for found in parsed.events] == [str(event.type) for event in events]
    assert [found.data.encode() for found in parsed.events] == [_body(event) for event in events]
    assert (parsed.comments, parsed.retry) == ([], None)


@_modest
@given(_events)
def test_the_frame_is_that_of_sse_starlette(event: Event) -> None:
    theirs = ServerSentEvent(
        _body(event).decode(), event=str(event.type), id=str(event.seq), sep="\n"
    )
    assert _frame(event).data == theirs.encode()


@_modest
@given(_events)
def test_a_body_has_no_line_break_and_no_control_character(event: Event) -> None:
    assert not any(byte < 0x20 for byte in _body(event))


def test_keys_come_in_a_fixed_order() -> None:
    event = Event(
        EventType.NODE_DONE, {"z": 1, "a": 2}, "A", attempt=2, plan_version=1, seq=9, ts=START_MS
    )
    assert _body(event) == (
        b'{"seq":9,"run_id":"%b","ts":"2025-06-15T15:06:40.000Z","level":"INFO","type":"NODE_DONE",'
        b'"node_id":"A","attempt":2,"plan_version":1,"trace_id":"%b","data":{"z":1,"a":2}}'
        % (RUN_ID.encode(), TRACE_ID.encode())
    )


def test_what_does_not_apply_is_left_out() -> None:
    found = orjson.loads(_body(Event(EventType.RUN_START, {}, level=Level.WARN, seq=2)))
    assert list(found) == ["seq", "run_id", "ts", "level", "type", "trace_id", "data"]
    assert (found["level"], found["trace_id"], found["data"]) == ("WARN", TRACE_ID, {})


def test_a_value_that_is_json_already_goes_in_as_it_is() -> None:
    raw = b'{"n": 1.50, "s": "\\u00e9"}'
    event = Event(EventType.NODE_DONE, {"output": orjson.Fragment(raw), "duration_ms": 1.0})
    assert raw in _body(event)


def test_a_frame_carries_what_filters_ask_for() -> None:
    frame = _frame(Event(EventType.NODE_FAILED, {}, "A", level=Level.ERROR, seq=7))
    assert (frame.seq, frame.type, frame.node_id, frame.level) == (7, "NODE_FAILED", "A", "ERROR")


@pytest.mark.parametrize("event_type", EventType)
def test_only_terminal_events_end_a_stream(event_type: EventType) -> None:
    assert frame_of(1, event_type.value, None, "INFO", b"{}").is_terminal is (
        event_type in TERMINAL_EVENTS
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_json_does_not_have_become_null(value: float) -> None:
    """The gate refuses them long before; here it matters only that a body stays JSON."""
    assert orjson.loads(_body(Event(EventType.LOG, {"n": value})))["data"] == {"n": None}


def test_an_event_of_a_newer_release_is_read_and_changes_nothing() -> None:
    """Releases run side by side while the processes are replaced."""
    body = _body(Event(EventType.LOG, {"new": 1}, seq=2)).replace(b'"LOG"', b'"FUTURE"')
    event = decode_event(body)
    assert (event.type, event.data) == ("FUTURE", {"new": 1})
    story = story_of(diamond())
    before = exact(story.state)
    story.add(event)
    assert exact(story.state) == before | {"seq": before["seq"] + 1}


@given(st.integers(0, 4_000_000_000_000))
def test_times_are_written_as_rfc3339_and_read_back(ms: int) -> None:
    text = rfc3339(ms)
    expected = datetime.fromtimestamp(ms // 1000, UTC).replace(microsecond=ms % 1000 * 1000)
    assert datetime.fromisoformat(text) == expected
    assert from_rfc3339(text) == ms
