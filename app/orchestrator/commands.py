"""What clients order: submit a run, resume one that waits. Each ends in `Journal.record`.

A run is accepted when its first append is durable, and not before; the plan of a caller's goal
graph is verified here, so that a wrong graph is an answer and not a failed run.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import UUID

import orjson

from app.domain.envelope import Envelope
from app.domain.errors import (
    Conflict,
    Fault,
    IdempotencyMismatch,
    NotFound,
    Unavailable,
    Unprocessable,
)
from app.domain.events import BlockReason, Event, EventType
from app.domain.run import NodeStatus, RunStatus
from app.domain.state import RunState
from app.journal.record import (
    Append,
    HeadDiverged,
    Journal,
    JournalClosed,
    KeyTaken,
    LeaseLost,
    RunHandle,
)
from app.kit import failpoints
from app.kit.clock import rfc3339, to_datetime
from app.kit.ids import created_ms, new_id, new_traceparent
from app.kit.json_pointer import escape
from app.orchestrator.outcomes import adopt_plan, plan_generated
from app.orchestrator.resume import load_run
from app.orchestrator.run import DrivenRun, limits_of
from app.orchestrator.runner import Runner
from app.orchestrator.signals import NodeDecision, SignalKind
from app.planner.plan_envelope import PlanLimits, output_contract_of, plan_envelope
from app.registry.image import RegistryImage
from app.store.append import NewRun
from app.store.database import Database
from app.store.events import EventReader
from app.store.keys import find_key
from app.store.signals import SignalRow, accept_signal

log = logging.getLogger("flexrun.commands")

SUBMIT_ROUTE = "POST /v1/runs"
OBJECTIVE_IN_EVENT_MAX = 500


@dataclass(frozen=True, slots=True)
class Submission:
    """A run on its way into the journal. `accepted` resolves when it is durable."""

    run_id: UUID
    run: DrivenRun
    accepted: asyncio.Future[None]


@dataclass(slots=True)
class Commands:
    """The orders of clients, with what they need. Shared by all requests."""

    journal: Journal
    runner: Runner
    reader: EventReader
    database: Database
    plan_limits: PlanLimits
    submit_timeout_s: float = 5.0

    def submit_run(
        self,
        tenant_id: str,
        envelope: Envelope,
        body: str,
        image: RegistryImage,
        *,
        key: str | None = None,
        traceparent: str | None = None,
    ) -> Submission:
        """Plan (if the graph is the caller's), and queue the first append. Nothing is durable yet.

        `body` is the envelope as it was sent. Raises `PlanRejected` and `ContractError`.
        """
        failpoints.hit("submit.before_record")
        run_id = new_id()
        handle = RunHandle(run_id, epoch=0, seq=0, trace_id="")
        traceparent, handle.trace_id = _trace_of(traceparent)
        now = created_ms(run_id)
        opening = Append(
            [_run_queued(envelope)],
            RunStatus.QUEUED,
            None,
            new_run=_new_run(tenant_id, envelope, body, key, traceparent, now),
        )
        run = DrivenRun(
            handle=handle,
            state=RunState(handle.text_id, {}, queued_at=now),
            envelope=envelope,
            output_contract=output_contract_of(envelope, image),
            tenant_id=tenant_id,
            opening=opening,
            accepted=asyncio.get_running_loop().create_future(),
            limits=limits_of(envelope),
        )
        start = [Event(EventType.RUN_START, {})]
        if envelope.goal_graph is not None:
            start.append(self._callers_plan(run, opening, image))
        if self.runner.room > 0:
            handle.epoch = handle.recorded_epoch = 1
            opening.events += start
            self.runner.start(run)
        else:
            self._queue(run, start)
        return Submission(run_id, run, run.accepted)

    def _callers_plan(self, run: DrivenRun, opening: Append, image: RegistryImage) -> Event:
        """Verify the caller's graph: the plan goes into the append, this event announces it."""
        started = time.perf_counter()
        plan = plan_envelope(
            run.envelope,
            image,
            run_id=run.handle.text_id,
            created_at=rfc3339(run.state.queued_at),
            limits=self.plan_limits,
        )
        adopt_plan(run, plan, opening)
        timed = self.runner.drive.limits.latency_record
        return plan_generated(plan, (time.perf_counter() - started) * 1000 if timed else None)

    def _queue(self, run: DrivenRun, start: list[Event]) -> None:
        """No room: it is stored without owner, claimed inside the first append of its drive."""
        assert run.opening is not None
        opening, run.opening = run.opening, Append(start, RunStatus.RUNNING, None)
        run_id = run.handle.run_id
        self.runner.handed_off.add(run_id)
        run.handle.stamp(opening.events, created_ms(run_id))
        recorded = self.journal.record(run.handle, opening)

        def durable(done: asyncio.Future[None]) -> None:
            if done.cancelled():
                return
            if (error := done.exception()) is not None:
                self.runner.handed_off.discard(run_id)
                run.refuse(error if isinstance(error, Exception) else RuntimeError())
                return
            run.durable_seq = run.handle.seq
            if not run.accepted.done():  # the client may have given up waiting
                run.accepted.set_result(None)
            self.runner.hand_off(run_id, partial(_claimed_inside, run, opening.events[0]))

        recorded.add_done_callback(durable)

    async def accepted(
        self, submission: Submission, tenant_id: str, key: str | None
    ) -> UUID | None:
        """Wait until the run is durable; the id of the earlier run when the key is taken.

        Raises `IdempotencyMismatch`, and `Unavailable` when the outcome stays unknown for long.
        """
        try:
            async with asyncio.timeout(self.submit_timeout_s):
                await submission.accepted
        except KeyTaken:
            assert key is not None
            return await self.replayed(tenant_id, submission.run.envelope, key)
        except (TimeoutError, JournalClosed, LeaseLost, HeadDiverged):
            raise Unavailable(
                "The journal does not answer; whether the run was accepted is not known. "
                "Send it again with the same Idempotency-Key.",
                code="submit_outcome_unknown",
                retry_after_s=2,
            ) from None
        failpoints.hit("submit.after_record")
        return None

    async def replayed(self, tenant_id: str, envelope: Envelope, key: str) -> UUID | None:
        """The run that this key made before, if any; another envelope is `IdempotencyMismatch`."""
        found = await find_key(self.database, tenant_id, SUBMIT_ROUTE, key)
        if found is None:
            return None
        run_id, fingerprint = found
        if fingerprint != _fingerprint(envelope):
            raise IdempotencyMismatch(
                "This Idempotency-Key was used with another envelope. Use a new key."
            )
        return run_id

    async def resume_run(
        self, tenant_id: str, run_id: UUID, body: Mapping[str, Any], image: RegistryImage
    ) -> UUID:
        """Store a resume signal for a run that waits for a human; its id.

        `body`: `{nodes: {id: {decision, output?}}, operator?, note?, expected_plan_version?}`.
        Raises `NotFound`, `Conflict` (`invalid_run_state`, `stale_plan_version`) and
        `Unprocessable` when a decision does not fit its node.
        """
        stored = await load_run(self.reader, tenant_id, run_id)
        if stored is None:
            raise NotFound(f"There is no run {run_id}.", code="run_not_found")
        state = stored.state
        expected = body.get("expected_plan_version")
        version = None if state.plan is None else state.plan.version
        if expected is not None and expected != version:
            raise Conflict(
                f"The run is at plan version {version}, not {expected}.",
                code="stale_plan_version",
                extra={"expected": expected, "current": version},
            )
        if state.status is not RunStatus.AWAITING_HUMAN:
            raise Conflict(f"The run is {state.status}; only a run that awaits a human is resumed.")
        _check_decisions(state, body.get("nodes") or {}, image)
        signal_id = new_id()
        # A resume answers one pause: should the run pause again, an old answer must not count.
        answer = {**body, "paused_seq": state.seq}
        row = SignalRow(signal_id, SignalKind.RESUME, orjson.dumps(answer).decode())
        failpoints.hit("signal.before_commit")
        await accept_signal(
            self.database,
            tenant_id=tenant_id,
            run_id=run_id,
            signal=row,
            allowed=(RunStatus.AWAITING_HUMAN,),
        )
        failpoints.hit("signal.after_commit")
        self.runner.on_free()  # look for claimable runs now: this one is
        return signal_id


def _claimed_inside(run: DrivenRun, queued: Event) -> DrivenRun:
    """Ready a queued run for its drive: the new epoch goes into the append that starts it."""
    run.state.seq, run.state.last_ts = queued.seq, queued.ts
    run.handle.epoch = 1
    return run


def _run_queued(envelope: Envelope) -> Event:
    data: dict[str, Any] = {
        "objective": envelope.objective[:OBJECTIVE_IN_EVENT_MAX],
        "lane": envelope.constraints.lane,
    }
    if envelope.metadata.label is not None:
        data["label"] = envelope.metadata.label
    return Event(EventType.RUN_QUEUED, data)


def _new_run(
    tenant_id: str, envelope: Envelope, body: str, key: str | None, traceparent: str, now: int
) -> NewRun:
    idempotency = None if key is None else (SUBMIT_ROUTE, key, _fingerprint(envelope))
    return NewRun(
        tenant_id=tenant_id,
        created_at=to_datetime(now),
        objective=envelope.objective,
        label=envelope.metadata.label,
        correlation_id=envelope.metadata.correlation_id,
        envelope=body,
        traceparent=traceparent,
        lane=envelope.constraints.lane,
        idempotency=idempotency,
    )


def _fingerprint(envelope: Envelope) -> str:
    """sha256 of the canonical envelope: keys sorted, defaults filled in."""
    plain = envelope.model_dump(mode="json", by_alias=True)
    return hashlib.sha256(orjson.dumps(plain, option=orjson.OPT_SORT_KEYS)).hexdigest()


def _trace_of(traceparent: str | None) -> tuple[str, str]:
    """Go on with the caller's W3C trace if it is well formed, else begin one."""
    parts = (traceparent or "").split("-")
    if len(parts) == 4 and [len(part) for part in parts] == [2, 32, 16, 2]:
        hexadecimal = all(c in "0123456789abcdef-" for c in traceparent or "")
        if hexadecimal and int(parts[1], 16) and int(parts[2], 16) and parts[0] != "ff":
            return traceparent or "", parts[1]
    return new_traceparent()


def _check_decisions(
    state: RunState, decisions: Mapping[str, Mapping[str, Any]], image: RegistryImage
) -> None:
    """Decisions are about nodes with an unknown outcome, and every such node needs one."""
    faults: list[Fault] = []
    for node_id, given in decisions.items():
        pointer = f"/nodes/{escape(node_id)}"
        node = state.nodes.get(node_id)
        if node is None:
            faults.append(Fault("UNKNOWN_NODE", f"The plan has no node {node_id!r}.", pointer))
        elif node.status is not NodeStatus.BLOCKED or node.reason != BlockReason.UNKNOWN_OUTCOME:
            message = f"Node {node_id!r} does not wait for a decision, it is {node.status}."
            faults.append(Fault("NODE_NOT_WAITING", message, pointer))
        elif given["decision"] == NodeDecision.DONE:
            faults += _check_output(state, node_id, given, pointer, image)
    missing = [node_id for node_id in state.unknown_outcomes() if node_id not in decisions]
    faults += [
        Fault("DECISION_MISSING", f"Node {node_id!r} needs a decision.", "/nodes")
        for node_id in missing
    ]
    if faults:
        raise Unprocessable("The decisions do not fit the run.", faults=faults)


def _check_output(
    state: RunState, node_id: str, given: Mapping[str, Any], pointer: str, image: RegistryImage
) -> list[Fault]:
    """An output that an operator supplies passes the same contract as one that was computed."""
    assert state.plan is not None
    plan_node = state.plan.nodes[node_id]
    if "output" not in given:
        return [Fault("OUTPUT_MISSING", "A node declared done needs its output.", pointer)]
    capability = image.get(plan_node.capability_id, plan_node.capability_version)
    if capability is None:
        return []
    return [
        Fault(fault.code, fault.message, f"{pointer}/output{fault.pointer}", facet=fault.facet)
        for fault in capability.output.violations(given["output"])
    ]
