"""Submitting runs: new ones, and successors of finished ones. Each ends in `Journal.record`.

A run is accepted when its first append is durable, and not before; the plan of a caller's goal
graph is verified here, so that a wrong graph is an answer and not a failed run.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import UUID

import orjson

from app.domain.envelope import Envelope
from app.domain.errors import (
    IdempotencyMismatch,
    Unavailable,
)
from app.domain.events import Event, EventType
from app.domain.run import RunStatus
from app.domain.state import RunState, apply
from app.journal.errors import HeadDiverged, JournalClosed, KeyTaken, LeaseLost
from app.journal.record import Append, Journal, RunHandle
from app.kit import failpoints
from app.kit.ids import created_ms, new_id, new_traceparent, span_id
from app.kit.rfc3339 import rfc3339, to_datetime
from app.orchestrator.plans import adopt_plan, plan_generated
from app.orchestrator.run import DrivenRun, limits_of
from app.orchestrator.runner import Runner
from app.orchestrator.successor import Successor
from app.planner.goals import check_goals, is_open
from app.planner.plan_envelope import PlanLimits, output_contract_of, plan_envelope
from app.registry.image import RegistryImage
from app.store.append import NewRun
from app.store.blobs import copy_blobs
from app.store.database import Database
from app.store.events import EventReader
from app.store.keys import find_key

log = logging.getLogger("flexrun.commands")

SUBMIT_ROUTE = "POST /v1/runs"
OBJECTIVE_IN_EVENT_MAX = 500


@dataclass(frozen=True, slots=True)
class Once:
    """An Idempotency-Key of a route, and the sha256 of what was asked for under it."""

    route: str
    key: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Submission:
    """A run on its way into the journal. `accepted` resolves when it is durable."""

    run_id: UUID
    run: DrivenRun
    accepted: asyncio.Future[None]


@dataclass(slots=True)
class Commands:
    """The orders of clients, with what they need. Shared by all requests.

    `models_up`: whether a call of a model has a chance now, as far as this process knows;
    `has_models`: whether any is configured.
    """

    journal: Journal
    runner: Runner
    reader: EventReader
    database: Database
    plan_limits: PlanLimits
    announce_work: Callable[[], None] = lambda: None
    submit_timeout_s: float = 5.0
    models_up: Callable[[], bool] = lambda: True
    has_models: bool = False

    def submit_run(
        self,
        tenant_id: str,
        envelope: Envelope,
        body: str,
        image: RegistryImage,
        *,
        once: Once | None = None,
        traceparent: str | None = None,
    ) -> Submission:
        """Plan (if the graph is the caller's), and queue the first append. Nothing is durable yet.

        `body` is the envelope as it was sent. Raises `PlanRejected` and `ContractError`.
        """
        run = self._new_run(tenant_id, envelope, body, image, once, traceparent)
        assert run.opening is not None
        start = [Event(EventType.RUN_START, {})]
        graph = envelope.goal_graph
        if graph is not None and self.has_models and is_open(graph):
            # A model chooses who does them, when they are ready.
            check_goals(graph, image, self.plan_limits)
        elif graph is not None:
            start.append(self._callers_plan(run, run.opening, image))
        return self._begin(run, start)

    async def submit_successor(
        self, successor: Successor, image: RegistryImage, once: Once | None
    ) -> Submission:
        """Queue a new run that keeps results of a finished one; the results come first."""
        old = successor.old
        assert old.envelope is not None
        run = self._new_run(old.tenant_id, old.envelope, old.body, image, once, old.traceparent)
        if successor.blobs:
            # Durable before any event refers to them.
            await copy_blobs(self.database, old.run_id, run.handle.run_id, successor.blobs)
        successor.begin(run)
        return self._begin(run, [Event(EventType.RUN_START, {})])

    def _new_run(
        self,
        tenant_id: str,
        envelope: Envelope,
        body: str,
        image: RegistryImage,
        once: Once | None,
        traceparent: str | None,
    ) -> DrivenRun:
        """A run in memory, with the rows and the first event of its first append."""
        failpoints.hit("submit.before_record")
        run_id = new_id()
        handle = RunHandle(run_id, epoch=0, seq=0, trace_id="")
        traceparent, handle.trace_id = _trace_of(traceparent, run_id)
        now = created_ms(run_id)
        opening = Append(
            [_run_queued(envelope)],
            RunStatus.QUEUED,
            None,
            new_run=_rows_of(tenant_id, envelope, body, once, traceparent, now),
        )
        return DrivenRun(
            handle=handle,
            state=RunState(handle.text_id, {}, queued_at=now),
            envelope=envelope,
            output_contract=output_contract_of(envelope, image),
            tenant_id=tenant_id,
            opening=opening,
            accepted=asyncio.get_running_loop().create_future(),
            limits=limits_of(envelope),
        )

    def _begin(self, run: DrivenRun, start: list[Event]) -> Submission:
        """Drive the run at once when there is room, else leave it in the queue."""
        assert run.opening is not None
        if self.runner.room > 0:
            run.handle.epoch = run.handle.recorded_epoch = 1
            run.opening.events += start
            self.runner.start(run)
        else:
            self._queue(run, start)
        return Submission(run.handle.run_id, run, run.accepted)

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
        if self.runner.runs_max:
            self.runner.handed_off.add(run_id)
        assert opening.new_run is not None
        size = len(opening.new_run.envelope)
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
            self.runner.hand_off(run_id, partial(_claimed_inside, run, opening.events), size)
            self.announce_work()

        recorded.add_done_callback(durable)

    async def accepted(
        self, submission: Submission, tenant_id: str, once: Once | None
    ) -> UUID | None:
        """Wait until the run is durable; the id of the earlier run when the key is taken.

        Raises `IdempotencyMismatch`, and `Unavailable` when the outcome stays unknown for long.
        """
        try:
            async with asyncio.timeout(self.submit_timeout_s):
                await submission.accepted
        except KeyTaken:
            assert once is not None
            return await self.replayed(tenant_id, once)
        except (TimeoutError, JournalClosed, LeaseLost, HeadDiverged):
            raise Unavailable(
                "The journal does not answer; whether the run was accepted is not known. "
                "Send it again with the same Idempotency-Key.",
                code="submit_outcome_unknown",
                retry_after_s=2,
            ) from None
        failpoints.hit("submit.after_record")
        return None

    async def replayed(self, tenant_id: str, once: Once) -> UUID | None:
        """The run that this key made before, if any; another body is `IdempotencyMismatch`."""
        found = await find_key(self.database, tenant_id, once.route, once.key)
        if found is None:
            return None
        run_id, fingerprint = found
        if fingerprint != once.fingerprint:
            raise IdempotencyMismatch(
                "This Idempotency-Key was used with another body. Use a new key."
            )
        return run_id


def _claimed_inside(run: DrivenRun, queued: list[Event]) -> DrivenRun:
    """Ready a queued run for its drive: the new epoch goes into the append that starts it."""
    for event in queued:
        apply(run.state, event)
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


def _rows_of(
    tenant_id: str, envelope: Envelope, body: str, once: Once | None, traceparent: str, now: int
) -> NewRun:
    return NewRun(
        tenant_id=tenant_id,
        created_at=to_datetime(now),
        objective=envelope.objective,
        label=envelope.metadata.label,
        correlation_id=envelope.metadata.correlation_id,
        envelope=body,
        traceparent=traceparent,
        lane=envelope.constraints.lane,
        idempotency=None if once is None else (once.route, once.key, once.fingerprint),
    )


def canonical(envelope: Envelope) -> dict[str, Any]:
    """The envelope as JSON with its defaults filled in: two that mean the same are equal."""
    return envelope.model_dump(mode="json", by_alias=True)


def once_of(route: str, key: str | None, body: Any) -> Once | None:
    """The key with the sha256 of the canonical body: keys sorted, defaults filled in."""
    if key is None:
        return None
    canonical = orjson.dumps(body, option=orjson.OPT_SORT_KEYS)
    return Once(route, key, hashlib.sha256(canonical).hexdigest())


def _trace_of(traceparent: str | None, run_id: UUID) -> tuple[str, str]:
    """Go on with the caller's W3C trace if it is well formed, else begin one at the run itself."""
    parts = (traceparent or "").split("-")
    if len(parts) == 4 and [len(part) for part in parts] == [2, 32, 16, 2]:
        hexadecimal = all(c in "0123456789abcdef-" for c in traceparent or "")
        if hexadecimal and int(parts[1], 16) and int(parts[2], 16) and parts[0] != "ff":
            return traceparent or "", parts[1]
    return new_traceparent(span_id(run_id))
