"""From a claim to a run that is driven: what was stored is read, and what comes first is decided.

A run straight from the queue needs its envelope and its plan and is read with all others of the
same claim. One that was under way is folded from its journal, in a task of its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from uuid import UUID

import orjson

from app.domain.decide import recover
from app.domain.envelope import Envelope
from app.domain.errors import Unavailable
from app.domain.events import Event, EventType, Level
from app.domain.plan_json import plan_from_dict
from app.domain.run import RunStatus
from app.domain.signals import Signal
from app.domain.state import RunState
from app.journal.errors import HeadDiverged, JournalClosed, JournalRejected, LeaseLost
from app.journal.record import Append, RunHandle
from app.kit import failpoints
from app.kit.clock import now_ms
from app.kit.ids import created_ms
from app.orchestrator.lease import Lease
from app.orchestrator.outcomes import run_failed
from app.orchestrator.plans import plan_generated
from app.orchestrator.resume import load_outputs, load_run
from app.orchestrator.run import DrivenRun, limits_of
from app.orchestrator.runner import Runner
from app.planner.plan_envelope import output_contract_of
from app.store.claims import TAKES_MAX, Claim, NewlyClaimed, read_new
from app.store.database import HotConnection
from app.store.events import EventReader
from app.store.signals import signals_of

log = logging.getLogger("flexrun.take_up")

TRY_AGAIN_S = 0.5


class TakeUp:
    """Takes up what a worker claimed. `count` are runs that are read but not driven yet."""

    def __init__(
        self, reader: EventReader, runner: Runner, lease: Lease, on_loaded: Callable[[], None]
    ) -> None:
        self._reader = reader
        self._runner = runner
        self._lease = lease
        self._on_loaded = on_loaded
        self._tasks: dict[UUID, asyncio.Task[None]] = {}

    @property
    def count(self) -> int:
        return len(self._tasks)

    def holds(self, run_id: UUID) -> bool:
        return run_id in self._tasks

    async def ended(self) -> None:
        """Until everything that was claimed is driven or given up."""
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def abandon(self) -> None:
        """Start none of those that are being read: our claims may not hold any more."""
        for task in self._tasks.values():
            task.cancel()
        await self.ended()

    async def all(self, connection: HotConnection, claims: list[Claim]) -> None:
        """Take them all up. Raises what the database raises; what was not reached is a stray."""
        failpoints.hit("recover.before_load")
        new = [claim for claim in claims if claim.is_new and claim.seq == 1]
        found = await read_new(connection, new) if new else {}
        signals: dict[UUID, list[Signal]] = {}
        for signal in await signals_of(connection, [claim.run_id for claim in claims]):
            signals.setdefault(signal.run_id, []).append(signal)
        for claim in claims:
            waiting = signals.get(claim.run_id, [])
            row = found.get(claim.run_id)
            if row is None or not self._start_new(claim, row, waiting):
                task = asyncio.create_task(self._start_stored(claim, waiting))
                self._tasks[claim.run_id] = task
                task.add_done_callback(partial(self._ended, claim.run_id))

    def _ended(self, run_id: UUID, task: asyncio.Task[None]) -> None:
        if self._tasks.get(run_id) is task:
            del self._tasks[run_id]
        self._on_loaded()

    def _start_new(self, claim: Claim, row: NewlyClaimed, signals: list[Signal]) -> bool:
        """Start a run of which the journal holds nothing but RUN_QUEUED. False: read it whole."""
        try:
            envelope = Envelope.model_validate_json(row.envelope)
            plans = {version: plan_from_dict(orjson.loads(body)) for version, body in row.plans}
            queued_at = created_ms(claim.run_id)
            state = RunState(
                str(claim.run_id), plans, queued_at=queued_at, seq=claim.seq, last_ts=queued_at
            )
            run = self._driven(claim, state, envelope, row.traceparent.split("-")[1])
        except Exception:
            return False  # the long way finds out, and ends a run that can not be read
        self._start(run, signals)
        return True

    def _start(self, run: DrivenRun, signals: list[Signal]) -> None:
        """Signals that wait come before the first decision."""
        for signal in signals:
            run.receive(signal)
        self._runner.start(run)

    async def _start_stored(self, claim: Claim, signals: list[Signal]) -> None:
        """Load a claimed run and drive it. A database that is away is waited for."""
        run: DrivenRun | None = None
        while run is None and not self._lease.fenced:
            try:
                run = await self._load(claim)
            except Unavailable as error:
                log.warning("run %s can not be loaded yet: %s", claim.run_id, error.detail)
                await asyncio.sleep(TRY_AGAIN_S)
            except Exception:
                log.exception("run %s can not be read", claim.run_id)
                await self._fail_unreadable(claim)
                return
        failpoints.hit("recover.after_load")
        if run is not None:
            self._start(run, signals)

    async def _load(self, claim: Claim) -> DrivenRun:
        stored = await load_run(self._reader, claim.tenant_id, claim.run_id)
        assert stored is not None, claim
        assert stored.envelope is not None, claim
        run = self._driven(claim, stored.state, stored.envelope, stored.trace_id)
        run.outputs = await load_outputs(self._reader, claim.run_id, stored.state)
        run.snapshot_seq = stored.snapshot_seq
        return run

    def _driven(
        self, claim: Claim, state: RunState, envelope: Envelope, trace_id: str
    ) -> DrivenRun:
        image = self._runner.drive.image(claim.tenant_id)
        handle = RunHandle(
            claim.run_id,
            claim.epoch,
            claim.seq,
            trace_id,
            last_ts=state.last_ts,
            recorded_seq=claim.seq,
            recorded_epoch=claim.epoch,
        )
        events, recall = _opening_events(claim, state, self._lost_by(claim))
        return DrivenRun(
            handle=handle,
            state=state,
            envelope=envelope,
            output_contract=output_contract_of(envelope, image),
            tenant_id=claim.tenant_id,
            opening=Append(events, state.status, None),
            accepted=asyncio.get_running_loop().create_future(),
            limits=limits_of(envelope),
            recall=recall,
            durable_seq=claim.seq,
            takes=claim.takes,
        )

    def _lost_by(self, claim: Claim) -> str | None:
        """Who drove the run before. Our own stray was never ours to lose: whoever had it before."""
        if claim.from_worker != self._lease.worker_id:
            return claim.from_worker
        return claim.lost_workers[-1] if claim.takes else None

    async def _fail_unreadable(self, claim: Claim) -> None:
        """Rows that this version can not read: end the run instead of holding it for ever."""
        handle = RunHandle(
            claim.run_id,
            claim.epoch,
            claim.seq,
            trace_id="0" * 32,
            recorded_seq=claim.seq,
            recorded_epoch=claim.epoch,
        )
        failed = run_failed("run_unreadable", "The stored run can not be read by this version.")
        handle.stamp([failed], now_ms())
        append = Append([failed], RunStatus.FAILED, None)
        try:
            await self._runner.drive.journal.record(handle, append)
        except (LeaseLost, JournalRejected, HeadDiverged, JournalClosed) as error:
            log.error("run %s could not be failed: %s", claim.run_id, type(error).__name__)


def _opening_events(
    claim: Claim, state: RunState, lost_by: str | None
) -> tuple[list[Event], list[str]]:
    """What the journal must say before the run goes on, and which attempts are called again."""
    if claim.takes >= TAKES_MAX:
        message = (
            f"{claim.takes} workers in a row were lost while they drove this run, without any "
            "progress in between; it is not tried again."
        )
        lost = claim.lost_workers[-claim.takes :]
        return [run_failed("poison_run", message, lost_workers=lost)], []
    if state.status is RunStatus.QUEUED:
        plans = () if state.plan is not None else state.plans.values()
        return [Event(EventType.RUN_START, {}), *(plan_generated(p, None) for p in plans)], []
    blocked, again = recover(state)
    is_running = state.status is RunStatus.RUNNING
    was_parked = claim.from_worker is None and not (is_running and claim.handed_over)
    if was_parked and not blocked and not again:
        return [], []  # in order: nothing was lost
    data = {"epoch": claim.epoch, "from_worker": lost_by, "called_again": again}
    return [Event(EventType.RUN_RECOVERED, data, level=Level.WARN), *blocked], again
