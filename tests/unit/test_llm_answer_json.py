"""A stored answer reads back as it was; what is not one is a miss, never an error."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.chat import ChatAnswer, StopReason, ToolCall, Usage
from app.store.llm_cache import BODY_BYTES_MAX, KEPT_STOPS, answer_from_json, answer_to_json

TEXT = st.text(max_size=30)
COUNTS = st.integers(0, 2**53)
ANSWERS = st.builds(
    ChatAnswer,
    text=TEXT,
    stop=st.sampled_from(KEPT_STOPS),
    usage=st.none() | st.builds(Usage, COUNTS, COUNTS, COUNTS),
    tool_calls=st.lists(st.builds(ToolCall, TEXT, TEXT, TEXT), max_size=3).map(tuple),
)
ANSWER = ChatAnswer("forty-two", StopReason.TOOLS, Usage(7, 3, 2), (ToolCall("c", "find", "{}"),))


@given(ANSWERS)
def test_an_answer_reads_back_as_it_was(answer: ChatAnswer) -> None:
    body = answer_to_json(answer)
    assert body is not None
    assert answer_from_json(body) == answer


def test_the_stored_form() -> None:
    """It may only change together with `BODY_FORMAT`."""
    assert answer_to_json(ANSWER) == (
        b'{"format":1,"text":"forty-two","stop":"tools",'
        b'"usage":{"tokens_in":7,"tokens_out":3,"tokens_cached":2},'
        b'"tool_calls":[{"call_id":"c","name":"find","arguments":"{}"}]}'
    )


@pytest.mark.parametrize(
    "answer",
    [
        ChatAnswer("cut o", StopReason.LENGTH),
        ChatAnswer("I would rather not", StopReason.REFUSED),
        ChatAnswer("half of \ud83d", StopReason.END),
        ChatAnswer("x" * BODY_BYTES_MAX, StopReason.END),
    ],
    ids=["cut off", "refused", "not Unicode", "too large"],
)
def test_what_is_not_stored(answer: ChatAnswer) -> None:
    assert answer_to_json(answer) is None


def test_the_largest_answer_is_stored() -> None:
    room = BODY_BYTES_MAX - len(answer_to_json(ChatAnswer("", StopReason.END)) or b"")
    body = answer_to_json(ChatAnswer("x" * room, StopReason.END))
    assert body is not None
    assert len(body) == BODY_BYTES_MAX
    assert answer_to_json(ChatAnswer("x" * (room + 1), StopReason.END)) is None


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"text": None},
        {"stop": "never"},
        {"stop": ["end"]},
        {"usage": {"tokens_in": -1, "tokens_out": 0, "tokens_cached": 0}},
        {"usage": {"tokens_in": True, "tokens_out": 0, "tokens_cached": 0}},
        {"usage": {"tokens_in": 1.5, "tokens_out": 0, "tokens_cached": 0}},
        {"usage": {"tokens_in": 1}},
        {"usage": "abc"},
        {"tool_calls": ["abc"]},
        {"tool_calls": None},
        {"tool_calls": [{"call_id": "c", "name": 7, "arguments": "{}"}]},
    ],
)
def test_a_form_with_something_wrong_is_a_miss(change: dict[str, Any]) -> None:
    value = orjson.loads(answer_to_json(ANSWER) or b"")
    assert answer_from_json(orjson.dumps(value)) == ANSWER
    assert answer_from_json(orjson.dumps({**value, **change})) is None


@given(st.binary(max_size=60) | st.recursive(
    st.none() | st.booleans() | st.integers(0, 9) | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
).map(orjson.dumps))  # fmt: skip
def test_anything_else_is_a_miss(body: bytes) -> None:
    assert answer_from_json(body) is None
