"""Where a node runs: one attempt of one node, from its bindings to a judged outcome.

The loop has recorded the intent (NODE_START) before it comes here. `Executor.perform` either runs
an inline function at once or starts a task; both end in one `Outcome` in the run's inbox. Nothing
here writes to the journal.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from app.domain.capability import Capability, CapabilityKind
from app.domain.decide import Failure
from app.domain.errors import Fault
from app.domain.events import Event, EventType, Level
from app.domain.plan import Bound, PlanNode
from app.journal.deltas import Deltas, Speech
from app.kit.json_gate import check_value
from app.kit.json_pointer import PointerMissing, resolve
from app.llm.gateway import Gateway
from app.orchestrator.ask import Asking
from app.orchestrator.invoke import ExecutionLimits, Invoker, invalid_input
from app.orchestrator.run import DrivenRun, Outcome
from app.orchestrator.slots import Slots
from app.orchestrator.tools import NodeTools
from app.ports import Breakers, Call, CapabilityAdapter
from app.registry.image import RegistryImage

EMITTED_MAX = 200


class Executor:
    """Performs started nodes. `image` gives the registry of a tenant as it is now."""

    def __init__(
        self,
        adapters: Mapping[CapabilityKind, CapabilityAdapter],
        image: Callable[[str], RegistryImage],
        limits: ExecutionLimits,
        breakers: Breakers,
        deltas: Deltas,
        gateway: Gateway | None = None,
    ) -> None:
        self._adapters = adapters
        self._deltas = deltas
        self._gateway = gateway
        self._image = image
        self._invoker = Invoker(adapters, limits, breakers)
        self.slots = Slots()

    def perform(self, run: DrivenRun, node_id: str) -> None:
        """Call the node. Inline functions have ended when this returns."""
        assert run.state.plan is not None
        node = run.state.plan.nodes[node_id]
        image = self._image(run.tenant_id)
        capability = image.get(node.capability_id, node.capability_version)
        if capability is None:
            self._end(run, Outcome(node_id, failure=_not_registered(node)))
            return
        inputs = _inputs_of(run, node, capability)
        if isinstance(inputs, Failure):
            self._end(run, Outcome(node_id, failure=inputs))
            return
        emitted: list[Event] = []
        call = _call_of(run, node, capability, inputs, emitted)
        function = self._adapters[capability.registration.kind].inline(capability)
        if function is not None:
            outcome = self._invoker.run_inline(call, function)
            outcome.emitted = emitted
            self._end(run, outcome)
        else:
            speech = self._deltas.speech(run.handle, node_id, call.attempt)
            call = self._connected(call, run, node, image, speech)
            attempt = self._attempt(run, node, call, emitted, speech)
            run.calls[node_id] = asyncio.create_task(attempt)

    def _connected(
        self, call: Call, run: DrivenRun, node: PlanNode, image: RegistryImage, speech: Speech
    ) -> Call:
        """A call that may wait has ways to those who follow, to models and other capabilities."""
        tools = NodeTools(self._invoker, self.slots, image, run, node.timeout_s)
        if self._gateway is None:
            return replace(call, delta=speech.add, tools=tools)
        asking = Asking(self._gateway, self._deltas, run, node.id, call.attempt, node.timeout_s)
        return replace(
            call,
            delta=speech.add,
            tools=tools,
            complete=asking.complete,
            embed=asking.embed,
        )

    def _end(self, run: DrivenRun, outcome: Outcome) -> None:
        """The call is over: its slot is free, and the loop learns how it went."""
        self.slots.release(run, outcome.node_id)
        run.inbox.put(outcome)

    async def _attempt(
        self, run: DrivenRun, node: PlanNode, call: Call, emitted: list[Event], speech: Speech
    ) -> None:
        """One attempt in a task. Cancelled means: the run is no longer ours to record."""
        with speech:
            outcome = await self._invoker.invoke(call, node.timeout_s, run.tenant_id, run.holder)
        outcome.emitted = emitted
        run.calls.pop(node.id, None)
        self._end(run, outcome)


def _inputs_of(run: DrivenRun, node: PlanNode, capability: Capability) -> dict[str, Any] | Failure:
    """What the node is bound to, or why it does not satisfy the capability's contract."""
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
            return invalid_input((fault,))
    if not capability.input.is_valid(inputs):
        return invalid_input(tuple(capability.input.violations(inputs)))
    return inputs


def _call_of(
    run: DrivenRun,
    node: PlanNode,
    capability: Capability,
    inputs: dict[str, Any],
    emitted: list[Event],
) -> Call:
    state = run.state.nodes[node.id]
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
    )


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
