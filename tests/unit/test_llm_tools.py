"""The kind `llm` with tools: what is called of what a model asks for, and what it is told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import orjson
import pytest

from app.adapters.capabilities.llm import LlmAdapter
from app.adapters.capabilities.llm_tools import CALLS_AT_ONCE_MAX, RESULT_CHARS_MAX
from app.domain.capability import Capability, Registration
from app.domain.chat import ChatRole, Completion, Message, Prompt, PromptFailed, ToolCall
from app.domain.errors import Fault
from app.ports import Call, CallFailed, CallRefused
from tests.capability_samples import call_of, compiled

Answer = dict[str, Any] | Exception
OATS = Completion("m", '{"verdict": "oats"}', {"verdict": "oats"})


def capability_of(capability_id: str, **changes: Any) -> Capability:
    body = {
        "capability_id": capability_id,
        "version": "1.0.0",
        "display_name": "Adviser",
        "summary": "Says what grows where.",
        "kind": "llm",
        "effect": "idempotent",
        "input_contract": {"schema": {"type": "object"}},
        "output_contract": {"schema": {"type": "object"}},
        **changes,
    }
    return compiled(Registration.model_validate(body))


@dataclass
class Bench:
    """Tools that answer by script, and a model that says one completion after the other."""

    said: list[Completion | Exception]
    answers: dict[str, Callable[[], Answer]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=lambda: {"tools": ["soil.lookup"]})
    effect: str = "idempotent"
    asked: list[Prompt] = field(default_factory=list)
    called: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    logged: list[dict[str, Any]] = field(default_factory=list)

    def find(self, capability_id: str, version: str | None = None) -> Capability | None:
        if capability_id not in self.answers:
            return None
        return capability_of(capability_id, kind="http", effect=self.effect)

    async def invoke(
        self, call: Call, capability: Capability, inputs: Mapping[str, Any]
    ) -> dict[str, Any]:
        self.called.append((capability.capability_id, dict(inputs)))
        await asyncio.sleep(0)
        found = self.answers[capability.capability_id]()
        if isinstance(found, Exception):
            raise found
        return found

    async def complete(self, prompt: Prompt) -> Completion:
        self.asked.append(prompt)
        found = self.said.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    async def run(self) -> dict[str, Any]:
        capability = capability_of("soil.advise", config=self.config, effect=self.effect)
        call = replace(
            call_of(capability, {"plot": 7}),
            complete=self.complete,
            tools=self,
            emit=lambda event_type, data: self.logged.append(data),
        )
        return await LlmAdapter().invoke(call)

    def told(self, round_number: int = 1) -> list[Message]:
        """What the prompt of a later round has beyond the one before."""
        before, after = self.asked[round_number - 1 : round_number + 1]
        assert after.messages[: len(before.messages)] == before.messages
        return list(after.messages[len(before.messages) :])

    def results(self, round_number: int = 1) -> list[Any]:
        """The results of a round, as JSON."""
        _, *results = self.told(round_number)
        assert {message.role for message in results} <= {ChatRole.TOOL}
        return [orjson.loads(message.text) for message in results]


def asks(*calls: tuple[str, str], text: str = "") -> Completion:
    found = tuple(ToolCall(f"call_{n}", *call) for n, call in enumerate(calls))
    return Completion("m", text, tool_calls=found)


def loam() -> Answer:
    return {"soil": "loam"}


async def test_what_the_model_asks_for_is_called_and_told_until_it_answers() -> None:
    first = asks(("soil_lookup", '{"plot": 7}'), ("soil_lookup", ""), text="Let me see.")
    bench = Bench([first, asks(("soil_lookup", '{"plot": 8}')), OATS], {"soil.lookup": loam})
    assert await bench.run() == {"verdict": "oats"}
    assert bench.called == [("soil.lookup", inputs) for inputs in ({"plot": 7}, {}, {"plot": 8})]
    assert bench.told() == [
        Message(
            ChatRole.ASSISTANT,
            "Let me see.",
            tool_calls=(first.tool_calls[0], ToolCall("call_1", "soil_lookup", "{}")),
        ),
        Message(ChatRole.TOOL, '{"soil":"loam"}', call_id="call_0"),
        Message(ChatRole.TOOL, '{"soil":"loam"}', call_id="call_1"),
    ]
    assert [tool.name for tool in bench.asked[0].tools] == ["soil_lookup"]
    assert [prompt.tools for prompt in bench.asked] == [bench.asked[0].tools] * 3
    assert bench.logged == []


async def test_calls_of_one_round_run_side_by_side() -> None:
    both = asyncio.Barrier(2)

    class Paired(Bench):
        async def invoke(self, *what: Any) -> dict[str, Any]:
            await both.wait()
            return await super().invoke(*what)

    bench = Paired([asks(*[("soil_lookup", "{}")] * 2), OATS], {"soil.lookup": loam})
    async with asyncio.timeout(10):
        assert await bench.run() == {"verdict": "oats"}


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        (("soil_guess", "{}"), "unknown_tool"),
        (("soil.lookup", "{}"), "unknown_tool"),
        (("soil_lookup", "{plot: 7}"), "invalid_arguments"),
        (("soil_lookup", "[7]"), "invalid_arguments"),
        (("soil_lookup", '{"plot": 7, "plot": 8}'), "invalid_arguments"),
        (("soil_lookup", '{"plot": "\ud800"}'), "invalid_arguments"),
    ],
)
async def test_a_mistake_is_told_to_the_model_and_calls_nothing(
    asked: tuple[str, str], code: str
) -> None:
    bench = Bench([asks(asked), OATS], {"soil.lookup": loam})
    assert await bench.run() == {"verdict": "oats"}
    assert bench.called == []
    [result] = bench.results()
    assert result["error"]["code"] == code
    [logged] = bench.logged
    assert (logged["level"], logged["code"]) == ("WARN", code)
    assert "guess" not in str(logged)
    [repeated] = bench.told()[0].tool_calls
    is_readable = code != "invalid_arguments"
    assert repeated.arguments == (asked[1] if is_readable else "{}")


async def test_a_failure_is_told_with_what_broke_the_contract() -> None:
    broken = CallFailed(
        "invalid_input",
        "The inputs break the contract.",
        retryable=False,
        faults=(Fault("CONTRACT_TYPE", "7 is no string", "/plot"), Fault("X", "empty")),
    )
    bench = Bench([asks(("soil_lookup", '{"plot": 7}')), OATS], {"soil.lookup": lambda: broken})
    assert await bench.run() == {"verdict": "oats"}
    assert bench.results() == [
        {
            "error": {
                "code": "invalid_input",
                "message": "The inputs break the contract.",
                "faults": [
                    {"pointer": "/plot", "message": "7 is no string"},
                    {"pointer": "/", "message": "empty"},
                ],
            }
        }
    ]


async def test_more_calls_at_once_than_are_made_are_told_so() -> None:
    asked = asks(*[("soil_lookup", "{}")] * (CALLS_AT_ONCE_MAX + 2))
    bench = Bench([asked, OATS], {"soil.lookup": loam})
    await bench.run()
    assert len(bench.called) == CALLS_AT_ONCE_MAX
    codes = [result.get("error", {}).get("code") for result in bench.results()]
    assert codes == [None] * CALLS_AT_ONCE_MAX + ["too_many_calls"] * 2


async def test_a_long_result_is_cut_and_the_model_knows() -> None:
    long = {"text": "x" * RESULT_CHARS_MAX}
    bench = Bench([asks(("soil_lookup", "{}")), OATS], {"soil.lookup": lambda: long})
    await bench.run()
    text = bench.told()[1].text
    assert text.endswith(f"(cut off: {RESULT_CHARS_MAX} of {RESULT_CHARS_MAX + 11} characters)")
    assert len(text) < RESULT_CHARS_MAX + 100


@pytest.mark.parametrize(("rounds", "is_enough"), [(1, False), (2, True)])
async def test_rounds_are_limited_and_nothing_is_called_in_vain(
    rounds: int, *, is_enough: bool
) -> None:
    config = {"tools": ["soil.lookup"], "tool_rounds_max": rounds}
    asked = asks(("soil_lookup", "{}"))
    bench = Bench([asked, asked, OATS], {"soil.lookup": loam}, config)
    if is_enough:
        assert await bench.run() == {"verdict": "oats"}
    else:
        with pytest.raises(CallFailed) as caught:
            await bench.run()
        assert caught.value.code == "tool_rounds_exhausted"
        assert not caught.value.retryable
        assert not caught.value.unknown_outcome
    assert len(bench.called) == rounds


async def test_a_model_without_tools_that_asks_for_one_is_not_asked_again() -> None:
    bench = Bench([asks(("soil_lookup", "{}")), OATS], {"soil.lookup": loam}, config={})
    with pytest.raises(CallFailed) as caught:
        await bench.run()
    assert caught.value.code == "tool_rounds_exhausted"
    assert (len(bench.asked), bench.called) == (1, [])


async def test_a_tool_that_is_not_there_fails_the_call_before_a_model_is_asked() -> None:
    bench = Bench([OATS])
    with pytest.raises(CallFailed) as caught:
        await bench.run()
    assert caught.value.code == "tool_not_found"
    assert bench.asked == []


async def test_what_is_a_tool_itself_has_no_tools() -> None:
    capability = capability_of("soil.advise", config={"tools": ["soil.lookup"]})
    call = call_of(capability, {})
    with pytest.raises(CallFailed) as caught:
        await LlmAdapter().invoke(call)
    assert caught.value.code == "tool_has_tools"
    with pytest.raises(CallFailed) as caught:
        await call.invoke(capability_of("soil.lookup"), {})
    assert caught.value.code == "tool_has_tools"


# --- effects that must not happen twice -----------------------------------------------------------

SMS = {"tools": ["sms.send", "soil.lookup"]}


async def test_an_effect_that_may_have_happened_ends_the_call_when_all_others_have_ended() -> None:
    lost = CallFailed("timeout", "No answer.", retryable=True, unknown_outcome=True)
    answers = {"sms.send": lambda: lost, "soil.lookup": loam}
    asked = asks(("sms_send", "{}"), ("soil_lookup", "{}"))
    bench = Bench([asked, OATS], answers, SMS, "at_most_once")
    with pytest.raises(CallFailed) as caught:
        await bench.run()
    assert (caught.value.code, caught.value.unknown_outcome) == ("timeout", True)
    assert len(bench.called) == 2
    assert len(bench.asked) == 1


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (PromptFailed("breaker_open", "Later.", retry_after_s=3), "breaker_open"),
        (PromptFailed("llm_unavailable", "No."), "llm_unavailable"),
    ],
)
async def test_after_an_effect_nothing_is_repeated(failure: PromptFailed, code: str) -> None:
    answers: dict[str, Callable[[], Answer]] = {"sms.send": dict, "soil.lookup": loam}
    bench = Bench([asks(("sms_send", "{}")), failure], answers, SMS, "at_most_once")
    with pytest.raises(CallFailed) as caught:
        await bench.run()
    assert (caught.value.code, caught.value.retryable) == (code, False)
    assert caught.value.unknown_outcome


async def test_without_an_effect_an_open_breaker_is_waited_for() -> None:
    refused = CallFailed("provider_busy", "Not now.", retryable=True)
    answers: dict[str, Callable[[], Answer]] = {"sms.send": lambda: refused, "soil.lookup": loam}
    failure = PromptFailed("breaker_open", "Later.", retry_after_s=3)
    bench = Bench([asks(("sms_send", "{}")), failure], answers, SMS, "at_most_once")
    with pytest.raises(CallRefused) as caught:
        await bench.run()
    assert caught.value.retry_after_s == 3
