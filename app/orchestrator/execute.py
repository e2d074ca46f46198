"""Where a node runs: one attempt of one node, from its bindings to a judged outcome.

The loop has recorded the intent (NODE_START) before it comes here. `Executor.perform` either runs
an inline function at once or starts a task; both end in one `Outcome` in the run's inbox. Nothing
here writes to the journal.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import orjson

from app.domain.capability import Capability, CapabilityKind
from app.domain.decide import Failure
from app.domain.errors import Fault
from app.domain.events import Event, EventType, Level
from app.domain.plan import Bound, PlanNode
from app.kit import failpoints
from app.kit.background import Background
from app.kit.json_gate import JsonRefused, check_value
from app.kit.json_pointer import PointerMissing, resolve
from app.llm.gateway import Gateway
from app.orchestrator.ask import Asking
from app.orchestrator.run import DrivenRun, Outcome
from app.orchestrator.slots import Slots
from app.ports import (
    Breakers,
    Call,
    CallFailed,
    CallRefused,
    CapabilityAdapter,
    Refused,
    no_embedding,
    no_model,
)
from app.registry.image import RegistryImage

log = logging.getLogger("flexrun.execute")

EMITTED_MAX = 200
ADAPTER_GRACE_S = 0.1
"""An adapter that keeps the deadline itself knows more of how the call ended: let it come first."""


@dataclass(frozen=True, slots=True)
class ExecutionLimits:
    """Bounds of one value (bytes of JSON) and of the back-off between attempts (ms)."""

    value_bytes_max: int = 2 * 1024 * 1024
    backoff_base_ms: int = 200
    backoff_max_ms: int = 30_000


class Executor:
    """Performs started nodes. `image` gives the registry of a tenant as it is now."""

    def __init__(
        self,
        adapters: Mapping[CapabilityKind, CapabilityAdapter],
        image: Callable[[str], RegistryImage],
        limits: ExecutionLimits,
        breakers: Breakers,
        gateway: Gateway | None = None,
    ) -> None:
        self._adapters = adapters
        self._gateway = gateway
        self._breakers = breakers
        self._image = image
        self._limits = limits
        self._reports = Background()
        self.slots = Slots()

    def perform(self, run: DrivenRun, node_id: str) -> None:
        """Call the node. Inline functions have ended when this returns."""
        assert run.state.plan is not None
        node = run.state.plan.nodes[node_id]
        capability = self._image(run.tenant_id).get(node.capability_id, node.capability_version)
        if capability is None:
            self._end(run, Outcome(node_id, failure=_not_registered(node)))
            return
        emitted: list[Event] = []
        call = self._bind(run, node, capability, emitted)
        if isinstance(call, Failure):
            self._end(run, Outcome(node_id, failure=call))
            return
        adapter = self._adapters[capability.registration.kind]
        function = adapter.inline(capability)
        if function is not None:
            self._run_inline(run, node, call, function, emitted)
        else:
            self._start_task(run, node, call, adapter, emitted)

    def _bind(
        self, run: DrivenRun, node: PlanNode, capability: Capability, emitted: list[Event]
    ) -> Call | Failure:
        """The call with its inputs, or why they do not satisfy the capability's contract."""
        inputs: dict[str, Any] = {}
        for key, bound in node.bindings.items():
            try:
                inputs[key] = _value_of(bound, run)
            except PointerMissing:
                declared = capability.input.properties.get(key)
                if declared is not None and not declared.required:
                    continue  # an optional input that its source did not produce this time
                fault = Fault(
                    "INPUT_MISSING",
                    f"{bound.source!r} has nothing at {bound.pointer!r}.",
                    pointer=f"/{key}",
                    node_id=node.id,
                )
                return _invalid_input((fault,))
        if not capability.input.is_valid(inputs):
            return _invalid_input(tuple(capability.input.violations(inputs)))
        state = run.state.nodes[node.id]
        asking = None
        if self._gateway is not None:
            asking = Asking(self._gateway, run, node.id, state.attempt, node.timeout_s)
        return Call(
            run_id=run.handle.text_id,
            node_id=node.id,
            attempt=state.attempt,
            idempotency_key=f"{run.handle.text_id}:{node.id}:{state.round}",
            objective=run.envelope.objective,
            instructions="\n".join([node.text, *run.envelope.special_instructions]),
            inputs=inputs,
            deadline_ms=int(node.timeout_s * 1000),
            capability=capability,
            trace_id=run.handle.trace_id,
            emit=partial(_emit, emitted, node.id, state.attempt),
            complete=no_model if asking is None else asking.complete,
            embed=no_embedding if asking is None else asking.embed,
        )

    def _run_inline(
        self,
        run: DrivenRun,
        node: PlanNode,
        call: Call,
        function: Callable[[Call], dict[str, Any]],
        emitted: list[Event],
    ) -> None:
        failpoints.hit("call.inline_before")
        started = time.perf_counter()
        try:
            output = function(call)
        except CallFailed as failed:
            outcome = self._failed(call, failed, started)
        except Exception as error:
            outcome = self._crashed(call, error, started)
        else:
            outcome = self._returned(call, output, started)
        failpoints.hit("call.inline_after")
        outcome.emitted = emitted
        self._end(run, outcome)

    def _end(self, run: DrivenRun, outcome: Outcome) -> None:
        """The call is over: its slot is free, and the loop learns how it went."""
        self.slots.release(run, outcome.node_id)
        run.inbox.put(outcome)

    def _start_task(
        self,
        run: DrivenRun,
        node: PlanNode,
        call: Call,
        adapter: CapabilityAdapter,
        emitted: list[Event],
    ) -> None:
        task = asyncio.create_task(self._attempt(run, node, call, adapter, emitted))
        run.calls[node.id] = task

    async def _attempt(
        self,
        run: DrivenRun,
        node: PlanNode,
        call: Call,
        adapter: CapabilityAdapter,
        emitted: list[Event],
    ) -> None:
        """One attempt in a task. Cancelled means: the run is no longer ours to record."""
        scope = adapter.breaker_scope(call.capability, run.tenant_id)
        if scope is None:
            outcome = await self._invoke(node, call, adapter)
        else:
            holder = f"{call.run_id}:{run.handle.epoch}"
            outcome = await self._guarded(node, call, adapter, scope, holder)
        outcome.emitted = emitted
        run.calls.pop(node.id, None)
        self._end(run, outcome)

    async def _guarded(
        self, node: PlanNode, call: Call, adapter: CapabilityAdapter, scope: str, holder: str
    ) -> Outcome:
        """The call as its breaker permits it; how it went is reported, whatever happens."""
        permit = await self._breakers.allow(scope, holder, node.timeout_s)
        if isinstance(permit, Refused):
            return Outcome(call.node_id, refused=permit)
        try:
            outcome = await self._invoke(node, call, adapter)
        except BaseException:
            # Cut off: no verdict. Not awaited by us any more, but a probe must be given back.
            self._reports.run(self._breakers.report(permit, None, holder))
            raise
        reported = await self._breakers.report(permit, _verdict(outcome), holder)
        outcome.transitions = tuple(t for t in (permit.transition, reported) if t is not None)
        return outcome

    async def _invoke(self, node: PlanNode, call: Call, adapter: CapabilityAdapter) -> Outcome:
        """Call the adapter within the node's time limit, and judge what comes back."""
        started = time.perf_counter()
        try:
            failpoints.hit("call.before")
            async with asyncio.timeout(node.timeout_s + ADAPTER_GRACE_S):
                output = await adapter.invoke(call)
            failpoints.hit("call.after")
        except TimeoutError:
            timed_out = CallFailed(
                "timeout",
                f"The call did not end within {node.timeout_s:g} s.",
                retryable=True,
                unknown_outcome=True,
                target_failed=True,
            )
            return self._failed(call, timed_out, started)
        except CallFailed as failed:
            return self._failed(call, failed, started)
        except CallRefused as refused:
            waits = Refused(refused.scope, 0, refused.retry_after_s)
            return Outcome(call.node_id, refused=waits)
        except Exception as error:
            return self._crashed(call, error, started)
        return self._returned(call, output, started)

    def _returned(self, call: Call, output: Any, started: float) -> Outcome:
        """The output after the strict JSON gate, the size limit and the output contract."""
        duration_ms = _since(started)
        contract = call.capability.output
        try:
            check_value(output)
            raw = orjson.dumps(output)
        except (JsonRefused, TypeError) as error:
            fault = Fault(
                "NOT_JSON", f"The output is no JSON value: {error}.", node_id=call.node_id
            )
            return self._invalid_output(call, (fault,), duration_ms)
        if len(raw) > self._limits.value_bytes_max:
            message = (
                f"The output has {len(raw)} bytes, {self._limits.value_bytes_max} are allowed."
            )
            failure = Failure("value_too_large", message, retryable=False, duration_ms=duration_ms)
            return Outcome(call.node_id, failure=failure)
        if not contract.is_valid(output):
            return self._invalid_output(call, tuple(contract.violations(output)), duration_ms)
        return Outcome(call.node_id, output=output, raw=raw, duration_ms=duration_ms)

    def _invalid_output(self, call: Call, faults: tuple[Fault, ...], duration_ms: float) -> Outcome:
        """The call ended, so its effect happened: only what may be repeated is tried again."""
        failure = Failure(
            "invalid_output",
            f"The output breaks the contract of {call.capability.capability_id}.",
            retryable=call.capability.registration.effect != "at_most_once",
            duration_ms=duration_ms,
            delay_ms=self._backoff_ms(call.attempt, None),
            faults=faults,
            scope="capability_output",
        )
        return Outcome(call.node_id, failure=failure)

    def _failed(self, call: Call, failed: CallFailed, started: float) -> Outcome:
        failure = Failure(
            failed.code,
            failed.message,
            retryable=failed.retryable,
            unknown_outcome=failed.unknown_outcome,
            target_failed=failed.target_failed,
            duration_ms=_since(started),
            delay_ms=self._backoff_ms(call.attempt, failed.retry_after_s),
            faults=failed.faults,
            scope="capability_output",
        )
        return Outcome(call.node_id, failure=failure)

    def _crashed(self, call: Call, error: Exception, started: float) -> Outcome:
        """An adapter let an exception out: our fault or the function's. Its text stays here."""
        log.error("call of %s crashed", call.capability.capability_id, exc_info=error)
        crashed = CallFailed(
            "capability_crashed",
            f"{call.capability.capability_id} raised {type(error).__name__}.",
            retryable=True,
            unknown_outcome=True,
            target_failed=None,
        )
        return self._failed(call, crashed, started)

    def _backoff_ms(self, attempt: int, retry_after_s: float | None) -> int:
        """Exponential with full jitter (Brooker, AWS, 2015), and what the far side asks for."""
        ceiling = min(
            self._limits.backoff_base_ms * 2 ** (attempt - 1), self._limits.backoff_max_ms
        )
        delay = random.uniform(0, ceiling)
        if retry_after_s is not None:
            delay += retry_after_s * 1000
        return int(delay)


def _verdict(outcome: Outcome) -> bool | None:
    """Whether the far side did its part; None when the outcome does not tell."""
    if outcome.failure is None:
        return True
    blamed = outcome.failure.target_failed
    return None if blamed is None else not blamed


def _value_of(bound: Bound, run: DrivenRun) -> Any:
    if bound.source is None:
        return bound.value
    found = run.envelope.inputs if bound.source == "inputs" else run.outputs[bound.source]
    return resolve(found, bound.pointer) if bound.pointer else found


def _emit(
    emitted: list[Event], node_id: str, attempt: int, event_type: str, data: dict[str, Any]
) -> None:
    """What a capability may say about itself: LOG events, bounded in number."""
    if event_type != EventType.LOG:
        raise ValueError(f"a capability can not emit {event_type!r}")
    check_value(data)
    if len(emitted) < EMITTED_MAX:
        level = Level(data.get("level", Level.INFO))
        emitted.append(Event(EventType.LOG, data, node_id=node_id, attempt=attempt, level=level))


def _not_registered(node: PlanNode) -> Failure:
    return Failure(
        "capability_not_registered",
        f"{node.capability_id} {node.capability_version} is not registered any more.",
        retryable=False,
    )


def _invalid_input(faults: tuple[Fault, ...]) -> Failure:
    return Failure(
        "invalid_input",
        "The inputs break the capability's contract; it was not called.",
        retryable=False,
        faults=faults,
        scope="capability_input",
    )


def _since(started: float) -> float:
    return round((time.perf_counter() - started) * 1000, 3)
