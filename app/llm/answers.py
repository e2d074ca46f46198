"""What a model answered, read strictly, and what it is told when the answer is no good.

A model that was asked for JSON may still wrap it: in a fence, or in words around one object. Those
two are understood, nothing else: to guess which of two objects is meant would make answers up.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

import orjson

from app.domain.chat import AnswerForm, ChatAnswer, ChatRole, Message, Prompt, StopReason
from app.domain.errors import Fault
from app.kit.json_gate import JsonRefused, parse_json
from app.kit.json_pointer import escape, tokens

FAULTS_TOLD_MAX = 20
ANSWER_TOLD_MAX = 20_000
_FENCED = re.compile(r"```(?:json|JSON)?[ \t]*\n(.*?)\n?[ \t]*```", re.DOTALL)
_DECODER = json.JSONDecoder()


class BadAnswer(Exception):
    """The answer can not be used. `code` as in `PromptFailed`; `answer` is what the model said."""

    def __init__(self, code: str, faults: Sequence[Fault], answer: ChatAnswer) -> None:
        super().__init__(code)
        self.code = code
        self.faults = tuple(faults)
        self.answer = answer


def value_of(prompt: Prompt, answer: ChatAnswer) -> Any:
    """The JSON value that was asked for; None for a prompt that wants text. Raises `BadAnswer`."""
    if answer.stop is StopReason.REFUSED:
        raise BadAnswer("refused", (), answer)
    if answer.stop is StopReason.LENGTH:
        raise BadAnswer("cut_off", (), answer)
    if answer.tool_calls or prompt.form is AnswerForm.TEXT:
        return None
    try:
        value = parse_json_answer(answer.text)
    except JsonRefused as refused:
        fault = Fault(refused.code, refused.detail, refused.pointer)
        raise BadAnswer("invalid_json", (fault,), answer) from None
    if prompt.faults_of is not None and (faults := prompt.faults_of(value)):
        raise BadAnswer("schema_validation_failed", faults, answer)
    return value


def parse_json_answer(text: str) -> Any:
    """The one JSON value of an answer: bare, in one fence, or one object among words.

    Raises `JsonRefused`, with the reason that fits the text best.
    """
    try:
        return parse_json(text.encode())
    except JsonRefused as refused:
        bare = refused
    fenced = _FENCED.findall(text)
    if len(fenced) == 1:
        return parse_json(fenced[0].encode())
    objects = list(_objects_in(text))
    if len(objects) == 1:
        return parse_json(objects[0].encode())
    if objects:
        raise JsonRefused("JSON_SYNTAX", "the answer holds more than one object")
    raise bare


def _objects_in(text: str) -> Iterator[str]:
    """The texts of all objects that stand in no other object; two are enough to know."""
    at, found = text.find("{"), 0
    while at != -1 and found < 2:
        try:
            _, end = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            found += 1
            yield text[at:end]
        at = text.find("{", end)


_NAMES_A_KEY = {
    "CONTRACT_ADDITIONAL_PROPERTIES": "properties that are not declared are not allowed",
    "CONTRACT_UNEVALUATED_PROPERTIES": "properties that are not declared are not allowed",
    "CONTRACT_PROPERTY_NAMES": "the name of a property is not allowed",
    "JSON_DUPLICATE_KEY": "a key is there twice",
}


def without_names(fault: Fault, schema: Mapping[str, Any] | None) -> Fault:
    """A fault as others than the model may be told: names that the schema lacks are the answer's.

    The pointer goes as far as its names stand in the schema.
    """
    declared = set(_names_in(schema))
    kept = takewhile(lambda name: name.isdigit() or name in declared, tokens(fault.pointer))
    pointer = "".join(f"/{escape(name)}" for name in kept)
    return replace(fault, message=_NAMES_A_KEY.get(fault.code, fault.message), pointer=pointer)


def _names_in(schema: Any) -> Iterator[str]:
    """Every name and text that stands in a schema."""
    if isinstance(schema, str):
        yield schema
    elif isinstance(schema, Mapping):
        yield from schema
        for part in schema.values():
            yield from _names_in(part)
    elif isinstance(schema, list):
        for part in schema:
            yield from _names_in(part)


def repair_of(prompt: Prompt, bad: BadAnswer) -> tuple[Message, ...]:
    """The prompt again, with the bad answer and what is wrong with it."""
    if bad.code == "invalid_json":
        wrong = "Your answer is not one JSON value"
    else:
        wrong = "Your answer does not fit"
    told = [f"- at {fault.pointer or '/'}: {fault.message}" for fault in bad.faults]
    parts = [f"{wrong}:", *told[:FAULTS_TOLD_MAX]]
    if prompt.schema is not None:
        schema = orjson.dumps(prompt.schema, option=orjson.OPT_SORT_KEYS).decode()
        parts += ["It has to fit this JSON Schema:", schema]
    parts.append("Answer again, with the JSON value alone.")
    return (
        *prompt.messages,
        Message(ChatRole.ASSISTANT, bad.answer.text[:ANSWER_TOLD_MAX]),
        Message(ChatRole.USER, "\n".join(parts)),
    )
