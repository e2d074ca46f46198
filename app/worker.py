"""The worker of a process: takes part, claims runs that nobody drives, drives them, drains.

One task holds the lock session and does everything on it in turn: renew the lease, look for dead
workers, claim. It looks every 500 ms, at once when it is nudged, and after 250 ms when a worker
looks dead for the first time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

import orjson

from app.bootstrap import Services
from app.domain.decide import recover
from app.domain.errors import FlexrunError, Unavailable
from app.domain.events import Event, EventType, Level
from app.domain.run import RunStatus
from app.domain.state import RunState
from app.journal.record import (
    Append,
    HeadDiverged,
    JournalClosed,
    JournalRejected,
    LeaseLost,
    RunHandle,
)
from app.kit import failpoints
from app.kit.clock import now_ms
from app.kit.waiting import wait_at_most
from app.orchestrator.outcomes import plan_generated, run_failed
from app.orchestrator.resume import load_outputs, load_run
from app.orchestrator.run import DrivenRun, limits_of
from app.orchestrator.signals import Signal, SignalKind
from app.planner.plan_envelope import output_contract_of
from app.store.database import BROKEN, REFUSED, TRANSIENT
from app.store.keys import forget_old_keys
from app.store.leases import Claim, claim_runs, forget_workers, leave
from app.store.partitions import make_partitions
from app.store.signals import open_signals

log = logging.getLogger("flexrun.worker")

LOOK_EVERY_S = 0.5
SECOND_LOOK_S = 0.25
CLAIM_MAX = 50
HOUSEKEEPING_EVERY_S = 3600.0


class Worker:
    """Start it, nudge it, drain it."""

    def __init__(self, services: Services) -> None:
        self._database = services.database
        self._lease = services.lease
        self._registry = services.registry
        self._runner = services.runner
        self._reader = services.reader
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._taking_up: set[asyncio.Task[None]] = set()
        self._runner.on_free = self.nudge

    def nudge(self) -> None:
        """There may be something to claim: look now."""
        self._wake.set()

    async def start(self) -> None:
        """Take part and take up what the dead left behind, before anything else."""
        await self._lease.register()
        self._tasks = [
            asyncio.create_task(_for_ever(self._turn, self._pause), name="worker"),
            asyncio.create_task(_for_ever(self._keep_house, _hourly), name="housekeeping"),
        ]

    async def drain(self, grace_s: float) -> None:
        """Let running calls end, give the runs back, leave. Others take them up at once."""
        self._runner.accepting = False
        await asyncio.gather(*self._taking_up, return_exceptions=True)
        # The lease is renewed until the last call has ended.
        await self._runner.drain(grace_s)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            await leave(self._lease.session, self._lease.worker_id)
        except (*TRANSIENT, *REFUSED) as error:
            log.warning("could not give runs back (%s); their lease ends", type(error).__name__)
        await self._lease.close()

    async def _turn(self) -> None:
        if self._lease.fenced:
            log.error("the lease of %s ran out, letting all runs go", self._lease.worker_id)
            await self._runner.abandon()
            await self._lease.close()
            await self._lease.register()
        try:
            await self._lease.renew()
            if self._lease.held:
                await self._claim()
        except BROKEN:
            self._lease.lose_session()
            raise

    async def _pause(self) -> None:
        pause = SECOND_LOOK_S if self._lease.suspects_somebody else LOOK_EVERY_S
        await wait_at_most(self._wake, pause)
        self._wake.clear()

    async def _claim(self) -> None:
        room = self._runner.room - len(self._taking_up)
        if room <= 0:
            return
        dead = await self._lease.dead_workers()
        failpoints.hit("claim.before_commit")
        claims = await claim_runs(
            self._lease.session,
            self._lease.worker_id,
            dead,
            list(self._runner.handed_off),
            min(room, CLAIM_MAX),
        )
        failpoints.hit("claim.after_commit")
        if claims:
            # Another process may have registered, a moment ago, what these runs call.
            await self._registry.refresh()
        for claim in claims:
            task = asyncio.create_task(self._take_up(claim))
            self._taking_up.add(task)
            task.add_done_callback(self._taking_up.discard)
        if len(claims) == CLAIM_MAX:
            self._wake.set()
        elif dead:
            await forget_workers(self._lease.session, dead)

    async def _take_up(self, claim: Claim) -> None:
        """Load a claimed run and drive it. A database that is away is waited for."""
        failpoints.hit("recover.before_load")
        run: DrivenRun | None = None
        while run is None and not self._lease.fenced:
            try:
                run = await self._load(claim)
            except Unavailable as error:
                log.warning("run %s can not be loaded yet: %s", claim.run_id, error.detail)
                await asyncio.sleep(LOOK_EVERY_S)
            except Exception:
                log.exception("run %s can not be read", claim.run_id)
                await self._fail_unreadable(claim)
                return
        failpoints.hit("recover.after_load")
        if run is not None:
            self._runner.start(run)

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

    async def _load(self, claim: Claim) -> DrivenRun:
        stored = await load_run(self._reader, claim.tenant_id, claim.run_id)
        assert stored is not None, claim
        assert stored.envelope is not None, claim
        image = self._runner.drive.image(stored.tenant_id)
        handle = RunHandle(
            claim.run_id,
            claim.epoch,
            claim.seq,
            stored.trace_id,
            last_ts=stored.state.last_ts,
            recorded_seq=claim.seq,
            recorded_epoch=claim.epoch,
        )
        events, recall = _opening_events(claim, stored.state)
        run = DrivenRun(
            handle=handle,
            state=stored.state,
            envelope=stored.envelope,
            output_contract=output_contract_of(stored.envelope, image),
            tenant_id=stored.tenant_id,
            opening=Append(events, RunStatus.RUNNING, None),
            accepted=asyncio.get_running_loop().create_future(),
            limits=limits_of(stored.envelope),
            recall=recall,
            outputs=await load_outputs(self._reader, claim.run_id, stored.state),
            durable_seq=claim.seq,
            snapshot_seq=stored.snapshot_seq,
        )
        for row in await open_signals(self._database, claim.run_id):
            run.inbox.put(Signal(row.signal_id, SignalKind(row.kind), orjson.loads(row.body)))
        return run

    async def _keep_house(self) -> None:
        await make_partitions(self._database, datetime.now(UTC).date())
        await forget_old_keys(self._database)


def _opening_events(claim: Claim, state: RunState) -> tuple[list[Event], list[str]]:
    """What the journal must say before the run goes on, and which attempts are called again."""
    if state.status is RunStatus.QUEUED:
        plans = state.plans.values()
        return [Event(EventType.RUN_START, {}), *(plan_generated(p, None) for p in plans)], []
    if state.status is not RunStatus.RUNNING:
        return [], []
    blocked, again = recover(state)
    data = {"epoch": claim.epoch, "from_worker": claim.from_worker, "called_again": again}
    return [Event(EventType.RUN_RECOVERED, data, level=Level.WARN), *blocked], again


async def _hourly() -> None:
    await asyncio.sleep(HOUSEKEEPING_EVERY_S)


async def _for_ever(
    turn: Callable[[], Awaitable[None]], pause: Callable[[], Awaitable[None]]
) -> None:
    """Repeat until cancelled. A database that is away delays a turn and never ends the task."""
    while True:
        try:
            await turn()
        except (*TRANSIENT, *REFUSED, FlexrunError) as error:
            log.warning("%s: the database is away (%s)", turn.__name__, type(error).__name__)
        except Exception:
            log.exception("%s failed", turn.__name__)
        await pause()
