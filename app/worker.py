"""The worker of a process: takes part, claims runs that nobody drives, drives them, drains.

One task holds the lock session and does everything on it in turn. Every 500 ms it *looks*: for
workers that died, for runs of its own that nobody drives, and for breakers whose trip a dead worker
did not announce. When it is nudged it only takes what waits: signals of its runs, and claims. A
process that only serves the API takes part as well, so that others know of it, and claims nothing.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from uuid import UUID

from app.bootstrap import Services
from app.domain.errors import FlexrunError
from app.kit import failpoints
from app.kit.waiting import wait_at_most
from app.orchestrator.announce import announce_the_forgotten
from app.orchestrator.take_up import TakeUp
from app.store.breakers import forget_old_announcements
from app.store.claims import Claim, Fairness, Wanted, claim_runs, something_waits
from app.store.database import BROKEN, REFUSED, TRANSIENT
from app.store.keys import forget_old_keys
from app.store.leases import forget_workers, leave, owned_runs
from app.store.llm_cache import forget_old_answers
from app.store.partitions import make_partitions
from app.store.signals import discard_late_signals, signals_for

log = logging.getLogger("flexrun.worker")

LOOK_EVERY_S = 0.5
SECOND_LOOK_S = 0.25
CONTENDED_S = 0.01
CLAIM_MAX = 50
LOADING_MAX = 32
"""Runs that are read from the journal at once: requests need connections as well."""
PROBATION_S = 10.0
SWEEP_EVERY_S = 2.0
HOUSEKEEPING_EVERY_S = 3600.0


class Worker:
    """Start it and drain it. Whoever sets `Services.worker_wake` makes it look at once."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._lease = services.lease
        self._runner = services.runner
        self._take_up = TakeUp(services.reader, services.runner, services.lease, self._loaded)
        self._fairness = Fairness()
        self._wake = services.worker_wake
        self._tasks: list[asyncio.Task[None]] = []
        self._dead: list[str] = []
        self._unheld: set[UUID] = set()
        self._strays: list[UUID] = []
        self._look_at = 0.0
        self._suspect: tuple[UUID, float] | None = None

    async def start(self) -> None:
        """Take part and take up what the dead left behind, before anything else."""
        await self._lease.register()
        self._tasks = [
            asyncio.create_task(_for_ever(self._turn, self._pause), name="worker"),
            asyncio.create_task(_for_ever(self._sweep, _every(SWEEP_EVERY_S)), name="sweep"),
            asyncio.create_task(
                _for_ever(self._keep_house, _every(HOUSEKEEPING_EVERY_S)), name="housekeeping"
            ),
        ]

    async def drain(self, grace_s: float) -> None:
        """Let running calls end, give the runs back, leave. Others take them up at once."""
        self._runner.accepting = False
        await self._take_up.ended()
        # The lease is renewed until the last call has ended.
        await self._runner.drain(grace_s)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            await discard_late_signals(self._lease.session)
            if await leave(self._lease.session, self._lease.worker_id):
                self._services.announce_work()
        except (*TRANSIENT, *REFUSED) as error:
            log.warning("could not give runs back (%s); their lease ends", type(error).__name__)
        await self._lease.close()

    async def _turn(self) -> None:
        if self._lease.fenced:
            log.error("the lease of %s ran out, letting all runs go", self._lease.worker_id)
            self._services.metrics.lease_losses += 1
            await self._take_up.abandon()
            await self._runner.abandon()
            await self._lease.forget_ourselves()
        if self._lease.is_nobody:
            await self._lease.register()
        try:
            await self._lease.renew()
            if self._lease.held:
                if time.monotonic() >= self._look_at:
                    await self._look()
                if self._runner.runs_max:
                    await self._deliver_signals()
                    await self._claim()
        except BROKEN:
            self._lease.lose_session()
            raise

    async def _pause(self) -> None:
        await wait_at_most(self._wake, max(self._look_at - time.monotonic(), 0.0))
        self._wake.clear()

    # --- what every look does ---------------------------------------------------------------------

    async def _look(self) -> None:
        """Who is dead, and which runs of ours does nobody drive?"""
        self._dead = await self._lease.dead_workers()
        pause = SECOND_LOOK_S if self._lease.suspects_somebody else LOOK_EVERY_S
        self._look_at = time.monotonic() + pause
        if self._runner.runs_max:
            held = await owned_runs(self._lease.session, self._lease.worker_id)
            unheld = {run_id for run_id in held if not self._holds(run_id)}
            # Twice in a row: a run that ends right now is no stray.
            self._strays = list(unheld & self._unheld)
            self._unheld = unheld
        await discard_late_signals(self._lease.session)

    def _holds(self, run_id: UUID) -> bool:
        return self._runner.drives(run_id) or self._take_up.holds(run_id)

    async def _deliver_signals(self) -> None:
        """Hand the signals of the runs that we drive to their loops, each once."""
        for signal in await signals_for(self._lease.session, self._lease.worker_id):
            self._runner.deliver(signal)

    def _loaded(self) -> None:
        if self._take_up.count == LOADING_MAX - 1:
            self._wake.set()  # claims have waited for it

    # --- claims -----------------------------------------------------------------------------------

    async def _claim(self) -> None:
        if self._take_up.count >= LOADING_MAX:
            return  # it nudges when one of them is loaded
        room = self._runner.room - self._take_up.count
        if room > 0:
            wanted = Wanted(
                limit=min(room, CLAIM_MAX),
                suspects_max=self._room_for_suspects(),
                dead=self._dead,
                strays=self._strays,
                not_these=list(self._runner.handed_off),
            )
        elif self._runner.accepting:
            handed_off = list(self._runner.handed_off)
            wanted = Wanted(CLAIM_MAX, CLAIM_MAX, [], [], handed_off, only_cancelled=True)
        else:
            return
        failpoints.hit("claim.before_commit")
        worker_id = self._lease.worker_id
        claims = await claim_runs(self._lease.session, worker_id, wanted, self._fairness)
        failpoints.hit("claim.after_commit")
        self._strays = []
        if claims:
            self._note_suspects(claims)
            # Another process may have registered, a moment ago, what these runs call.
            await self._services.registry.refresh()
            await self._take_up.all(self._lease.session, claims)
        await self._look_again_if_worth_it(wanted, claims)

    async def _look_again_if_worth_it(self, wanted: Wanted, claims: list[Claim]) -> None:
        if wanted.only_cancelled:
            return
        if len(claims) == wanted.limit:
            self._wake.set()
        elif await something_waits(self._lease.session, wanted.not_these):
            # Others hold the rows for the moment: come back out of step with them.
            loop = asyncio.get_running_loop()
            loop.call_later(CONTENDED_S * (1 + random.random()), self._wake.set)
        elif wanted.dead:
            await forget_workers(self._lease.session, wanted.dead)

    def _room_for_suspects(self) -> int:
        """A run that lost its worker without progress is driven beside no other such run, so that
        the next loss tells which of them it is. After a while another may come."""
        if self._suspect is not None:
            run_id, since = self._suspect
            is_here = self._take_up.holds(run_id) or self._runner.is_suspect(run_id)
            if is_here and time.monotonic() - since < PROBATION_S:
                return 0
        return 1

    def _note_suspects(self, claims: list[Claim]) -> None:
        for claim in claims:
            if claim.takes > 1:
                self._suspect = (claim.run_id, time.monotonic())

    # --- upkeep -----------------------------------------------------------------------------------

    async def _sweep(self) -> None:
        await announce_the_forgotten(self._services.breakers, self._services.database)

    async def _keep_house(self) -> None:
        await make_partitions(self._services.database, datetime.now(UTC).date())
        await forget_old_keys(self._services.database)
        await forget_old_announcements(self._services.database)
        days = self._services.settings.llm_cache_days
        await forget_old_answers(self._services.database, days)


def _every(seconds: float) -> Callable[[], Awaitable[None]]:
    async def pause() -> None:
        await asyncio.sleep(seconds)

    return pause


async def _for_ever(
    turn: Callable[[], Awaitable[None]], pause: Callable[[], Awaitable[None]]
) -> None:
    """Repeat until cancelled. A database that is away delays a turn and never ends the task."""
    while True:
        try:
            await turn()
        except (*TRANSIENT, *REFUSED, FlexrunError) as error:
            log.warning("%s: the database is away (%s)", turn.__name__, type(error).__name__)
            await asyncio.sleep(SECOND_LOOK_S)
        except Exception:
            log.exception("%s failed", turn.__name__)
            await asyncio.sleep(SECOND_LOOK_S)
        await pause()
