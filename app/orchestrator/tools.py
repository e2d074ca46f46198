"""What a node calls itself: registered capabilities, within its own attempt.

A tool is called like a node: held to its contracts, with the permission of its breaker, in a slot
of its own if it is limited, for as long as its node has. But no plan knows of it, and nothing of it
is recorded beyond TOOL_CALLED: a node that is called again calls its tools again, with the same
keys for the same inputs.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import orjson

from app.domain.capability import Capability, Effect
from app.domain.errors import Fault
from app.domain.events import Event, EventType, Level
from app.domain.tools import is_stronger
from app.kit.json_gate import JsonRefused, check_value
from app.orchestrator.invoke import Invoker
from app.orchestrator.run import DrivenRun, Outcome, Said
from app.orchestrator.slots import Slots
from app.ports import NO_TOOLS, Call, CallFailed
from app.registry.image import RegistryImage


class NodeTools:
    """The tools of one attempt of a node, which has `timeout_s` from now on. See `ports.Tools`."""

    __slots__ = ("_called", "_deadline", "_image", "_invoker", "_run", "_slots")

    def __init__(
        self,
        invoker: Invoker,
        slots: Slots,
        image: RegistryImage,
        run: DrivenRun,
        timeout_s: float,
    ) -> None:
        self._invoker = invoker
        self._slots = slots
        self._image = image
        self._run = run
        self._deadline = asyncio.get_running_loop().time() + timeout_s
        self._called = 0

    def find(self, capability_id: str, version: str | None = None) -> Capability | None:
        """See `Tools`."""
        return self._image.find(capability_id, version)

    async def invoke(
        self, call: Call, capability: Capability, inputs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See `Tools`."""
        self._called += 1
        ordinal, inputs = self._called, dict(inputs)
        outcome = Outcome(call.node_id)
        failed = _refused(call.capability, capability, inputs)
        if failed is None:
            outcome = await self._call(call, capability, inputs)
            failed = _failed(capability, outcome)
        data = {
            "capability_id": capability.capability_id,
            "version": capability.version,
            "call": ordinal,
            "outcome": "ok" if failed is None else failed.code,
            "duration_ms": _duration_ms(outcome),
        }
        level = Level.INFO if failed is None else Level.WARN
        event = Event(EventType.TOOL_CALLED, data, call.node_id, call.attempt, level=level)
        self._run.inbox.put(Said((event,), outcome.transitions))
        if failed is not None:
            raise failed
        output: dict[str, Any] = outcome.output
        return output

    async def _call(self, call: Call, capability: Capability, inputs: dict[str, Any]) -> Outcome:
        """How it went. The time that it waits for a slot is its node's, too."""
        limit = capability.registration.concurrency
        async with AsyncExitStack() as stack:
            if limit is not None:
                await stack.enter_async_context(self._slots.held(capability.key, limit))
            left_s = max(self._deadline - asyncio.get_running_loop().time(), 0.0)
            timeout_s = min(capability.registration.timeout_s, left_s)
            part = replace(
                call,
                idempotency_key=_key(call, capability, inputs),
                inputs=inputs,
                deadline_ms=int(timeout_s * 1000),
                capability=capability,
                tools=NO_TOOLS,
            )
            run = self._run
            return await self._invoker.invoke(part, timeout_s, run.tenant_id, run.holder)


def _duration_ms(outcome: Outcome) -> float:
    """Of the call itself, without waiting; what was never called has none."""
    return outcome.duration_ms if outcome.failure is None else outcome.failure.duration_ms


def _key(call: Call, capability: Capability, inputs: dict[str, Any]) -> str:
    """The same in every attempt of a round, for the same inputs."""
    canonical = orjson.dumps(inputs, option=orjson.OPT_SORT_KEYS)
    digest = hashlib.sha256(canonical).hexdigest()
    return f"{call.idempotency_key}:{capability.capability_id}:{digest}"


def _refused(
    caller: Capability, capability: Capability, inputs: dict[str, Any]
) -> CallFailed | None:
    """Why the call is not made. What a registration said may not hold any more."""
    tool_id, effect = capability.capability_id, capability.registration.effect
    if tool_id == caller.capability_id:
        # Besides running away, it could wait for ever for the slot that its caller holds.
        return _not_called("tool_is_itself", f"{tool_id} can not call itself.")
    if is_stronger(effect, caller.registration.effect):
        text = f"{tool_id} is {effect}, more than what calls it: {caller.registration.effect}."
        return _not_called("tool_effect_too_strong", text)
    try:
        check_value(inputs)
    except JsonRefused as error:
        faults = [Fault(error.code, error.detail, error.pointer)]
    else:
        faults = capability.input.violations(inputs)
    if not faults:
        return None
    text = f"The inputs break the contract of {tool_id}; it was not called."
    return _not_called("invalid_input", text, *faults)


def _not_called(code: str, message: str, *faults: Fault) -> CallFailed:
    return CallFailed(code, message, retryable=False, target_failed=None, faults=faults)


def _failed(capability: Capability, outcome: Outcome) -> CallFailed | None:
    """What its caller is told of a call that gave no result."""
    if outcome.refused is not None:
        text = f"{capability.capability_id} is not called for now: a breaker is open."
        wait_s = outcome.refused.retry_after_s
        return CallFailed(
            "breaker_open", text, retryable=True, retry_after_s=wait_s, target_failed=None
        )
    failure = outcome.failure
    if failure is None:
        return None
    # Of an at_most_once capability only what failed before it did anything is retryable.
    is_harmless = failure.retryable and not failure.unknown_outcome
    return CallFailed(
        failure.code,
        failure.message,
        retryable=failure.retryable,
        unknown_outcome=capability.registration.effect is Effect.AT_MOST_ONCE and not is_harmless,
        target_failed=None,
        faults=failure.faults,
    )
