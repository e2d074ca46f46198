"""Answers of models: what counts as the JSON value that was asked for, and what is told back."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.chat import AnswerForm, ChatAnswer, ChatRole, Message, Prompt, StopReason, ToolCall
from app.domain.errors import Fault
from app.kit.json_gate import JsonRefused
from app.llm.answers import FAULTS_TOLD_MAX, BadAnswer, parse_json_answer, repair_of, value_of

ASKED = (Message(ChatRole.USER, "the colour, please"),)
_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text("ab{}\"'`\\\n ", max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=3), inner),
    max_leaves=8,
)
_objects = st.dictionaries(st.text("ab{", max_size=3), _values, max_size=3)
_words = st.text("abc .,:!?\n", max_size=20)


def prompt_for_json(*faults: Fault) -> Prompt:
    return Prompt(
        ASKED,
        form=AnswerForm.JSON,
        schema={"type": "object", "required": ["colour"]},
        faults_of=lambda value: faults,
    )


@given(_values)
def test_a_bare_value_is_taken_as_it_is(value: Any) -> None:
    assert parse_json_answer(orjson.dumps(value).decode()) == value


@given(_values, _words, _words, st.sampled_from(["", "json", "JSON"]))
def test_a_fence_may_stand_among_words(value: Any, before: str, after: str, tag: str) -> None:
    text = f"{before}\n```{tag}\n{orjson.dumps(value, option=orjson.OPT_INDENT_2).decode()}\n```\n"
    if "```" in orjson.dumps(value).decode():
        return  # a fence inside the value ends the outer one
    assert parse_json_answer(text + after) == value


@given(_objects, _words, _words)
def test_one_object_may_stand_among_words(value: Any, before: str, after: str) -> None:
    assert parse_json_answer(f"{before}x {orjson.dumps(value).decode()} {after}") == value


@given(_objects, _objects, _words)
def test_which_of_two_objects_is_meant_is_not_guessed(one: Any, two: Any, between: str) -> None:
    text = f"first {orjson.dumps(one).decode()} {between} {orjson.dumps(two).decode()}"
    with pytest.raises(JsonRefused, match="more than one"):
        parse_json_answer(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I can not answer that.",
        "[1, 2] or so",
        '{"a": 1,}',
        '{"a": NaN}',
        '{"a": 1, "a": 2}',
        "```json\n{}\n```\nor\n```json\n{}\n```",
        '"{',
        "{" * 5_000,
        '{"a":' * 2_000 + "1" + "}" * 2_000,
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(JsonRefused):
        parse_json_answer(text)


def test_what_came_back_is_judged() -> None:
    good = ChatAnswer('{"colour": "red"}', StopReason.END)
    assert value_of(prompt_for_json(), good) == {"colour": "red"}
    assert value_of(Prompt(ASKED), ChatAnswer("red", StopReason.END)) is None

    asks = ChatAnswer("", StopReason.TOOLS, tool_calls=(ToolCall("1", "look", "{}"),))
    assert value_of(prompt_for_json(), asks) is None

    fault = Fault("CONTRACT", "'colour' is required", "")
    for answer, prompt, code in (
        (ChatAnswer("red", StopReason.END), prompt_for_json(), "invalid_json"),
        (ChatAnswer("{}", StopReason.END), prompt_for_json(fault), "schema_validation_failed"),
        (ChatAnswer('{"colour"', StopReason.LENGTH), prompt_for_json(), "cut_off"),
        (ChatAnswer("No.", StopReason.REFUSED), Prompt(ASKED), "refused"),
    ):
        with pytest.raises(BadAnswer) as bad:
            value_of(prompt, answer)
        assert (bad.value.code, bad.value.answer) == (code, answer)
        assert answer.text not in str(bad.value)


def test_a_repair_shows_the_answer_its_faults_and_the_schema() -> None:
    faults = [Fault("CONTRACT", f"fault {n}", f"/{n}") for n in range(30)]
    prompt = prompt_for_json(*faults)
    bad = BadAnswer("schema_validation_failed", faults, ChatAnswer("x" * 30_000, StopReason.END))
    first, said, told = repair_of(prompt, bad)
    assert (first, said.role, told.role) == (*ASKED, ChatRole.ASSISTANT, ChatRole.USER)
    assert len(said.text) == 20_000
    assert told.text.count("fault ") == FAULTS_TOLD_MAX
    assert '{"required":["colour"],"type":"object"}' in told.text
    bad.code = "invalid_json"
    assert "not one JSON value" in repair_of(prompt, bad)[-1].text
