"""What operators order: cancel, pause, resume. Each is judged here, stored, and applied elsewhere.

An order for a run that is under way becomes a signal, which whoever drives the run consumes and
judges again. A run that failed or was cancelled never changes: to resume it is to submit a
successor. The same Idempotency-Key orders once, also when the run has moved on since.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

from app.domain.capability import NodeKind
from app.domain.errors import Conflict, Fault, NotFound, Unprocessable
from app.domain.run import NodeStatus, RunStatus
from app.domain.signals import NodeDecision, Signal, SignalKind
from app.kit import failpoints
from app.kit.ids import new_id
from app.kit.json_pointer import escape
from app.orchestrator.commands import Commands, once_of
from app.orchestrator.resume import StoredRun, load_run
from app.orchestrator.successor import successor_of
from app.planner.plan_envelope import output_contract_of
from app.registry.image import RegistryImage
from app.store.signals import accept_signal, find_signal, wrong_state

_ALLOWED = {
    SignalKind.CANCEL: (
        RunStatus.QUEUED,
        RunStatus.RUNNING,
        RunStatus.PAUSED,
        RunStatus.AWAITING_HUMAN,
    ),
    SignalKind.PAUSE: (RunStatus.QUEUED, RunStatus.RUNNING),
    SignalKind.RESUME: (RunStatus.PAUSED, RunStatus.AWAITING_HUMAN),
}
_RESUMED_AS_NEW = (RunStatus.FAILED, RunStatus.CANCELLED)


@dataclass(frozen=True, slots=True)
class Ordered:
    """What became of an order: a signal of the run, or a new run."""

    run_id: UUID
    signal_id: UUID | None
    resumed_from: tuple[UUID, int] | None = None
    is_replay: bool = False


@dataclass(slots=True)
class Orders:
    """The orders of operators, with what they need. Shared by all requests.

    `nudge_workers`: whichever process drives the run, its worker looks now.
    """

    commands: Commands
    nudge_workers: Callable[[], None]

    async def stop(
        self,
        kind: SignalKind,
        tenant_id: str,
        run_id: UUID,
        body: Mapping[str, Any],
        key: str | None,
    ) -> Ordered:
        """Cancel or pause a run.

        `body`: `{operator?, note?, expected_plan_version?}`. Raises `NotFound`, `Conflict`
        (`invalid_run_state`, `stale_plan_version`) and `IdempotencyMismatch`.
        """
        signal = Signal(new_id(), run_id, kind, dict(body))

        async def give() -> Ordered:
            if body.get("expected_plan_version") is not None:
                _check_plan_version(await self._stored(tenant_id, run_id), body)
            return await self._send(tenant_id, signal, key)

        return await self._once(tenant_id, signal, key, give)

    async def resume(
        self,
        tenant_id: str,
        run_id: UUID,
        body: Mapping[str, Any],
        image: RegistryImage,
        key: str | None,
    ) -> Ordered:
        """Go on with a run that waits, or submit the successor of one that failed or was cancelled.

        `body`: `{nodes?: {id: {decision, output?}}, operator?, note?, expected_plan_version?}`.
        Raises what `stop` raises, `Conflict` (`missing_snapshot`), and `Unprocessable` when a
        decision does not fit its node.
        """
        signal = Signal(new_id(), run_id, SignalKind.RESUME, dict(body))

        async def give() -> Ordered:
            stored = await self._stored(tenant_id, run_id)
            state = stored.state
            _check_plan_version(stored, body)
            if stored.status in _RESUMED_AS_NEW:
                return await self._succeed(stored, body, image, key)
            if stored.pruned or state.status not in _ALLOWED[SignalKind.RESUME]:
                raise wrong_state(SignalKind.RESUME, stored.status)
            _check_decisions(stored, body.get("nodes") or {}, image)
            # A resume answers one pause: should the run pause again, an old answer must not count.
            answer = {**signal.body, "paused_seq": state.paused_seq}
            return await self._send(tenant_id, replace(signal, body=answer), key)

        return await self._once(tenant_id, signal, key, give)

    async def _once(
        self,
        tenant_id: str,
        signal: Signal,
        key: str | None,
        give: Callable[[], Awaitable[Ordered]],
    ) -> Ordered:
        """Give the order, unless this key ordered before: then the answer is the same again."""
        if key is None:
            return await give()
        replay = await self._replay(tenant_id, signal, key)
        if replay is not None:
            return replay
        try:
            return await give()
        except (Conflict, Unprocessable):
            # The same order may have come first by a moment, and the run has moved on since.
            replay = await self._replay(tenant_id, signal, key)
            if replay is None:
                raise
            return replay

    async def _stored(self, tenant_id: str, run_id: UUID) -> StoredRun:
        stored = await load_run(self.commands.reader, tenant_id, run_id)
        if stored is None:
            raise NotFound(f"There is no run {run_id}.", code="run_not_found")
        return stored

    async def _replay(self, tenant_id: str, signal: Signal, key: str) -> Ordered | None:
        """What this key ordered before."""
        database = self.commands.database
        found = await find_signal(database, tenant_id, signal, key)
        if found is not None:
            return Ordered(signal.run_id, found, is_replay=True)
        once = once_of(_resume_route(signal.run_id), key, signal.body)
        assert once is not None
        if signal.kind is SignalKind.RESUME:
            run_id = await self.commands.replayed(tenant_id, once)
            if run_id is not None:
                return await self._replayed_successor(tenant_id, run_id)
        return None

    async def _replayed_successor(self, tenant_id: str, run_id: UUID) -> Ordered:
        stored = await self._stored(tenant_id, run_id)
        return Ordered(run_id, None, stored.resumed_from, is_replay=True)

    async def _send(self, tenant_id: str, signal: Signal, key: str | None) -> Ordered:
        """Store the signal and let whoever drives the run know of it."""
        failpoints.hit("signal.before_commit")
        allowed = _ALLOWED[signal.kind]
        stored_id = await accept_signal(self.commands.database, tenant_id, signal, allowed, key)
        failpoints.hit("signal.after_commit")
        self.nudge_workers()
        return Ordered(signal.run_id, stored_id, is_replay=stored_id != signal.signal_id)

    async def _succeed(
        self, old: StoredRun, body: Mapping[str, Any], image: RegistryImage, key: str | None
    ) -> Ordered:
        """Submit the run that goes on where the old one stopped."""
        if body.get("nodes"):
            raise Unprocessable(
                "The run has ended: decisions are for the new run, when it asks for them.",
                faults=[Fault("NODE_NOT_WAITING", "No node of a finished run waits.", "/nodes")],
            )
        commands = self.commands
        successor = await successor_of(commands.reader, old, body.get("operator"), body.get("note"))
        once = once_of(_resume_route(old.run_id), key, dict(body))
        submission = await commands.submit_successor(successor, image, once)
        earlier = await commands.accepted(submission, old.tenant_id, once)
        if earlier is not None:
            return await self._replayed_successor(old.tenant_id, earlier)
        return Ordered(submission.run_id, None, (old.run_id, old.seq))


def _resume_route(run_id: UUID) -> str:
    return f"POST /v1/runs/{run_id}/resume"


def _check_plan_version(stored: StoredRun, body: Mapping[str, Any]) -> None:
    """Raises `Conflict` (`stale_plan_version`) when the plan changed since the operator looked."""
    expected = body.get("expected_plan_version")
    plan = stored.state.plan
    version = None if plan is None else plan.version
    if expected is not None and expected != version:
        raise Conflict(
            f"The run is at plan version {version}, not {expected}.",
            code="stale_plan_version",
            extra={"expected": expected, "current": version},
        )


def _check_decisions(
    stored: StoredRun, decisions: Mapping[str, Mapping[str, Any]], image: RegistryImage
) -> None:
    """Decisions are about nodes that wait for a person, and every such node needs one."""
    state = stored.state
    faults: list[Fault] = []
    for node_id, given in decisions.items():
        pointer = f"/nodes/{escape(node_id)}"
        node = state.nodes.get(node_id)
        if node is None:
            faults.append(Fault("UNKNOWN_NODE", f"The plan has no node {node_id!r}.", pointer))
        elif node.status is not NodeStatus.BLOCKED or not node.awaits_human:
            message = f"Node {node_id!r} does not wait for a decision, it is {node.status}."
            faults.append(Fault("NODE_NOT_WAITING", message, pointer))
        elif given["decision"] == NodeDecision.DONE:
            faults += _check_output(stored, node_id, given, pointer, image)
    missing = [node_id for node_id in state.awaiting_human() if node_id not in decisions]
    faults += [
        Fault("DECISION_MISSING", f"Node {node_id!r} needs a decision.", "/nodes")
        for node_id in missing
    ]
    if faults:
        raise Unprocessable("The decisions do not fit the run.", faults=faults)


def _check_output(
    stored: StoredRun, node_id: str, given: Mapping[str, Any], pointer: str, image: RegistryImage
) -> list[Fault]:
    """An output that an operator supplies passes the same contract as one that was computed; that
    of a fallback is the output of the run."""
    assert stored.state.plan is not None
    assert stored.envelope is not None
    plan_node = stored.state.plan.nodes[node_id]
    if "output" not in given:
        return [Fault("OUTPUT_MISSING", "A node declared done needs its output.", pointer)]
    if plan_node.kind is NodeKind.FALLBACK:
        contract = output_contract_of(stored.envelope, image)
    else:
        capability = image.get(plan_node.capability_id, plan_node.capability_version)
        if capability is None:
            return []
        contract = capability.output
    return [
        Fault(fault.code, fault.message, f"{pointer}/output{fault.pointer}", facet=fault.facet)
        for fault in contract.violations(given["output"])
    ]
