"""What a node calls itself: real functions behind the real judge, and what of it is recorded."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest

from app.adapters.breakers.local import LocalBreakers
from app.adapters.capabilities.builtin import BuiltinAdapter, Pack
from app.domain.capability import Capability, CapabilityKind, Effect
from app.domain.events import Event, Level
from app.orchestrator.invoke import ExecutionLimits, Invoker
from app.orchestrator.run import DrivenRun, Inbox, Said
from app.orchestrator.slots import Slots
from app.orchestrator.tools import NodeTools
from app.ports import NO_TOOLS, Call, CallFailed
from app.registry.image import RegistryImage
from tests.capability_samples import call_of, compiled

PLOT: dict[str, Any] = {"type": "object", "properties": {"plot": {"type": "integer"}}}
SOIL: dict[str, Any] = {"type": "object", "properties": {"soil": {"type": "string"}}}
Function = Callable[[Call], Awaitable[dict[str, Any]]]


@dataclass
class Field:
    """One tool, the node that calls it, and as much of a driven run as that needs."""

    function: Function
    effect: Effect = Effect.IDEMPOTENT
    caller_effect: Effect = Effect.AT_MOST_ONCE
    changes: dict[str, Any] = field(default_factory=dict)
    timeout_s: float = 10.0
    slots: Slots = field(default_factory=Slots)
    inbox: Inbox = field(default_factory=Inbox)
    tenant_id: str = "default"
    holder: str = "run-1:1"

    def __post_init__(self) -> None:
        pack = Pack("tools")
        pack.capability(
            capability_id="soil.lookup",
            version="1.0.0",
            display_name="Lookup",
            summary="Looks a plot up.",
            effect=self.effect,
            input_schema=PLOT,
            output_schema=SOIL,
        )(self.function)
        [registration] = pack.registrations()
        self.tool = compiled(registration.model_copy(update=self.changes))
        self.caller = compiled(
            registration.model_copy(
                update={"capability_id": "soil.advise", "effect": self.caller_effect}
            )
        )
        breakers = LocalBreakers(threshold=1, cooldown_s=30, worker_id_of=lambda: "tests")
        adapters = {CapabilityKind.BUILTIN: BuiltinAdapter([pack])}
        self.invoker = Invoker(adapters, ExecutionLimits(value_bytes_max=100), breakers)

    def call(self, caller: Capability | None = None) -> Call:
        """A call that has this tool. Made inside of the loop, whose clock its deadline is of."""
        image = RegistryImage.build(1, [], [self.tool])
        run = cast(DrivenRun, self)
        tools = NodeTools(self.invoker, self.slots, image, run, self.timeout_s)
        return replace(call_of(caller or self.caller, {}), tools=tools)

    def told(self) -> list[Event]:
        events: list[Event] = []
        for item in self.inbox.take():
            assert isinstance(item, Said)
            events += item.events
        return events

    async def fails(self, inputs: dict[str, Any]) -> CallFailed:
        with pytest.raises(CallFailed) as caught:
            await self.call().invoke(self.tool, inputs)
        return caught.value


async def loam(call: Call) -> dict[str, Any]:
    return {"soil": "loam"}


async def test_a_call_gets_its_inputs_a_key_of_its_own_and_no_tools() -> None:
    seen: list[Call] = []

    async def look(call: Call) -> dict[str, Any]:
        seen.append(call)
        return {"soil": "loam"}

    site = Field(look, changes={"timeout_s": 2.0})
    call = site.call()
    assert call.tools.find("soil.lookup") is site.tool
    assert call.tools.find("soil.lookup", "1.0.0") is site.tool
    assert call.tools.find("soil.lookup", "2.0.0") is None
    assert await call.invoke(site.tool, {"plot": 7, "at": "noon"}) == {"soil": "loam"}
    assert await call.invoke(site.tool, {"at": "noon", "plot": 7}) == {"soil": "loam"}
    first, second = seen
    digest = hashlib.sha256(b'{"at":"noon","plot":7}').hexdigest()
    assert first.idempotency_key == f"{call.idempotency_key}:soil.lookup:{digest}"
    assert second.idempotency_key == first.idempotency_key
    assert (first.node_id, first.attempt, first.trace_id) == ("A", 2, call.trace_id)
    assert (first.capability, first.deadline_ms, first.tools) == (site.tool, 2_000, NO_TOOLS)


async def test_what_was_called_is_told_without_inputs_and_outputs() -> None:
    site = Field(loam)
    call = site.call()
    await call.invoke(site.tool, {"plot": 7})
    with pytest.raises(CallFailed):
        await call.invoke(site.tool, {"plot": "seven"})
    first, second = site.told()
    assert first.data.pop("duration_ms") > 0
    what = {"capability_id": "soil.lookup", "version": "1.0.0"}
    assert first == Event(
        "TOOL_CALLED", {**what, "call": 1, "outcome": "ok"}, node_id="A", attempt=2
    )
    assert second.data == {**what, "call": 2, "outcome": "invalid_input", "duration_ms": 0.0}
    assert second.level is Level.WARN


@pytest.mark.parametrize(
    ("inputs", "code"),
    [({"plot": "seven"}, "CONTRACT_TYPE"), ({"plot": 2**60}, "JSON_INTEGER_TOO_LARGE")],
)
async def test_inputs_that_break_the_contract_are_not_called(
    inputs: dict[str, Any], code: str
) -> None:
    failed = await Field(_never).fails(inputs)
    assert (failed.code, failed.retryable) == ("invalid_input", False)
    assert not failed.unknown_outcome
    [fault] = failed.faults
    assert (fault.code, fault.pointer) == (code, "/plot")


@pytest.mark.parametrize(
    ("output", "code"),
    [({"soil": 7}, "invalid_output"), ({"soil": "x" * 200}, "value_too_large")],
)
async def test_the_output_is_held_to_the_contract(output: dict[str, Any], code: str) -> None:
    async def look(call: Call) -> dict[str, Any]:
        return output

    failed = await Field(look).fails({})
    assert (failed.code, failed.unknown_outcome) == (code, False)
    # The effect happened, but the caller can not know how: it must not be asked for again.
    failed = await Field(look, Effect.AT_MOST_ONCE).fails({})
    assert (failed.code, failed.unknown_outcome) == (code, True)


async def test_a_stronger_tool_and_the_caller_itself_are_not_called() -> None:
    site = Field(_never, Effect.AT_MOST_ONCE, Effect.IDEMPOTENT)
    assert (await site.fails({})).code == "tool_effect_too_strong"
    with pytest.raises(CallFailed) as caught:
        await site.call(site.tool).invoke(site.tool, {})
    assert caught.value.code == "tool_is_itself"
    assert [event.data["outcome"] for event in site.told()] == [
        *("tool_effect_too_strong", "tool_is_itself")
    ]


@pytest.mark.parametrize(
    ("effect", "retryable", "unknown", "ends"),
    [
        (Effect.IDEMPOTENT, False, True, False),
        (Effect.AT_MOST_ONCE, True, False, False),
        (Effect.AT_MOST_ONCE, True, True, True),
        (Effect.AT_MOST_ONCE, False, False, True),
    ],
)
async def test_only_an_effect_that_may_have_happened_and_must_not_be_repeated_is_unknown(
    effect: Effect, *, retryable: bool, unknown: bool, ends: bool
) -> None:
    async def look(call: Call) -> dict[str, Any]:
        raise CallFailed("lost", "Lost.", retryable=retryable, unknown_outcome=unknown)

    failed = await Field(look, effect).fails({})
    assert (failed.code, failed.message, failed.unknown_outcome) == ("lost", "Lost.", ends)
    assert failed.target_failed is None


async def test_a_tool_has_its_own_time_within_that_of_its_node() -> None:
    async def hang(call: Call) -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    assert (await Field(hang, changes={"timeout_s": 0.001}).fails({})).code == "timeout"
    assert (await Field(hang, timeout_s=0.001).fails({})).code == "timeout"


async def test_calls_of_a_limited_tool_wait_for_each_other_and_for_nodes() -> None:
    gate, entered = asyncio.Event(), asyncio.Event()
    under_way: list[int] = []

    async def look(call: Call) -> dict[str, Any]:
        under_way.append(call.inputs["plot"])
        entered.set()
        await gate.wait()
        return {"soil": "loam"}

    site = Field(look, changes={"concurrency": 1})
    call = site.call()
    first, second, third = [
        asyncio.create_task(call.invoke(site.tool, {"plot": plot})) for plot in (1, 2, 3)
    ]
    await entered.wait()
    for _ in range(10):
        await asyncio.sleep(0)  # turns of the loop, in which another could come in
    assert under_way == [1]
    assert site.slots.free({site.tool.key: 1}) == {site.tool.key: 0}
    second.cancel()
    gate.set()
    assert await first == await third == {"soil": "loam"}
    assert second.cancelled()
    assert under_way == [1, 3]
    assert site.slots.free({site.tool.key: 1}) == {site.tool.key: 1}


async def _never(call: Call) -> dict[str, Any]:
    raise AssertionError("called")
