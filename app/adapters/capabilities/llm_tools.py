"""The tools of one call of kind `llm`: what its model asks for is called, and told back to it.

A model errs: it makes names and arguments up, and breaks contracts. All of that is told to it like
the failure of a tool, so that it may do better. What ends the call is only a tool whose effect may
have happened and must not happen twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import orjson

from app.domain.capability import Capability, Effect
from app.domain.chat import ChatRole, Message, Tool, ToolCall
from app.domain.errors import Fault
from app.domain.tools import ToolRef, named_tools, tool_as_told
from app.kit.json_gate import JsonRefused, parse_json
from app.ports import Call, CallFailed

CALLS_AT_ONCE_MAX = 8
"""Of one round; they run side by side. What a model asks for beyond is not called."""
RESULT_CHARS_MAX = 20_000
FAULTS_TOLD_MAX = 20


class Toolbox:
    """The tools that `refs` name, for one call. Raises `CallFailed` when one is not there.

    `has_acted`: an effect happened that must not happen twice.
    """

    def __init__(self, call: Call, refs: Iterable[ToolRef]) -> None:
        self._call = call
        self._tools = named_tools(_found(call, ref) for ref in refs)
        self.has_acted = False

    def told(self) -> tuple[Tool, ...]:
        """What a model may ask for."""
        return tuple(tool_as_told(name, tool) for name, tool in self._tools.items())

    async def answer(self, text: str, calls: Sequence[ToolCall]) -> tuple[Message, ...]:
        """The turn of the model and the results of its calls, for the next prompt.

        Raises `CallFailed` with `unknown_outcome` when a tool may have acted, once all have ended.
        """
        # A model that has nothing to say to a tool may write no arguments at all.
        calls = [replace(call, arguments=call.arguments.strip() or "{}") for call in calls]
        asked = [(call, _arguments_of(call)) for call in calls]
        results = await asyncio.gather(
            *(self._result(index, call, inputs) for index, (call, inputs) in enumerate(asked)),
            return_exceptions=True,  # the others go on: they may have effects
        )
        messages = []
        for (call, _), result in zip(asked, results, strict=True):
            if isinstance(result, BaseException):
                raise result
            messages.append(Message(ChatRole.TOOL, result, call_id=call.call_id))
        # Some providers can not send what is no object: arguments that are none become an empty
        # one, and the result says what was wrong with them.
        readable = tuple(
            replace(call, arguments="{}") if isinstance(inputs, JsonRefused) else call
            for call, inputs in asked
        )
        return (Message(ChatRole.ASSISTANT, text, tool_calls=readable), *messages)

    async def _result(
        self, index: int, asked: ToolCall, inputs: dict[str, Any] | JsonRefused
    ) -> str:
        """What the model is told of one of its calls."""
        tool = self._tools.get(asked.name)
        if tool is None:
            known = ", ".join(self._tools)
            return self._mistake("unknown_tool", f"There is no such tool. There are: {known}.")
        if isinstance(inputs, JsonRefused):
            return self._mistake("invalid_arguments", f"The arguments are no object: {inputs}.")
        if index >= CALLS_AT_ONCE_MAX:
            text = f"Not called: at most {CALLS_AT_ONCE_MAX} calls at once."
            return self._mistake("too_many_calls", text)
        try:
            output = await self._call.invoke(tool, inputs)
        except CallFailed as failed:
            if failed.unknown_outcome:
                raise
            return _error(failed.code, failed.message, failed.faults)
        if tool.registration.effect is Effect.AT_MOST_ONCE:
            self.has_acted = True
        return _cut(orjson.dumps(output).decode())

    def _mistake(self, code: str, text: str) -> str:
        """What was never called is no TOOL_CALLED. Names that a model makes up are in no event."""
        self._call.emit("LOG", {"level": "WARN", "code": code, "message": _MISTAKES[code]})
        return _error(code, text)


_MISTAKES = {
    "unknown_tool": "The model asked for a tool that it does not have.",
    "invalid_arguments": "The model gave a tool arguments that are no JSON object.",
    "too_many_calls": "The model asked for more calls at once than are made.",
}


def _found(call: Call, ref: ToolRef) -> Capability:
    tool = call.tools.find(ref.capability_id, ref.version)
    if tool is None:
        text = f"The tool {ref.capability_id} is not registered any more, or not active."
        raise CallFailed("tool_not_found", text, retryable=False, target_failed=None)
    return tool


def _arguments_of(asked: ToolCall) -> dict[str, Any] | JsonRefused:
    """The arguments as an object, or why they are none."""
    try:
        value = parse_json(asked.arguments.encode())
    except JsonRefused as refused:
        return refused
    except UnicodeEncodeError:
        return JsonRefused("JSON_SURROGATE", "a string contains half a surrogate pair")
    if not isinstance(value, dict):
        return JsonRefused("JSON_NOT_JSON", "this is another JSON value")
    return value


def _error(code: str, message: str, faults: Sequence[Fault] = ()) -> str:
    told: dict[str, Any] = {"code": code, "message": message}
    if faults:
        told["faults"] = [
            {"pointer": fault.pointer or "/", "message": fault.message}
            for fault in faults[:FAULTS_TOLD_MAX]
        ]
    return _cut(orjson.dumps({"error": told}).decode())


def _cut(text: str) -> str:
    if len(text) <= RESULT_CHARS_MAX:
        return text
    return f"{text[:RESULT_CHARS_MAX]}\n(cut off: {RESULT_CHARS_MAX} of {len(text)} characters)"
