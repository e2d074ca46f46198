"""The lease of this worker: one row renewed every 3 s, one advisory lock held for life.

Two clocks, each where it can be trusted. The lease is judged on the database's clock, by others. On
its own monotonic clock the worker counts `FENCE_S` from the *start* of its last good renewal, and
then considers itself dead: it stops writing before anybody may take its runs. The advisory lock
only speeds a take-over up; the epoch in every write is what makes it safe.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from app.journal.errors import LeaseLost
from app.kit import clock
from app.kit.ids import new_id
from app.kit.processes import ProcessAddress, is_gone
from app.kit.waiting import wait_at_most
from app.store.database import HotConnection
from app.store.leases import (
    forget_earlier_workers,
    other_workers,
    ownerless,
    register_worker,
    renew_lease,
    resign,
    server_clock_ms,
)

log = logging.getLogger("flexrun.lease")

RENEW_EVERY_S = 3.0
RENEW_WITHIN_S = 2.5
"""A session that does not answer must be replaced while there is time before `FENCE_S`."""
FENCE_S = 7.0


class Lease:
    """Who this worker is, and whether it may still write. `session` holds the advisory lock."""

    def __init__(
        self,
        connect: Callable[[], Awaitable[HotConnection]],
        role: str = "serve",
        *,
        sole_user: bool = False,
    ) -> None:
        self._connect = connect
        self._role = role
        self._sole_user = sole_user
        self._process = ProcessAddress.own()
        self._session: HotConnection | None = None
        self._good_until = 0.0
        self._renewed_at = 0.0
        self._session_since = 0.0
        self._registered = asyncio.Event()
        self._suspects: set[str] = set()
        self._former: list[str] = []
        self.on_lost: Callable[[], None] = lambda: None
        """Called when the lock session ended without us."""
        self.has_company = False
        """Whether other workers took part at the last look."""
        self.is_nobody = True
        self.worker_id = ""
        """Who we are, or were last."""

    @property
    def held(self) -> bool:
        """Registered, and renewed recently enough to be sure that nobody may take our runs."""
        return self._registered.is_set() and time.monotonic() < self._good_until

    @property
    def fenced(self) -> bool:
        """Too long without a renewal: whatever we drove may belong to others now."""
        return not self.is_nobody and time.monotonic() >= self._good_until

    async def forget_ourselves(self) -> None:
        """We are no worker any more, until `register` makes us another one."""
        self._former.append(self.worker_id)
        self.is_nobody = True
        self._good_until = 0.0
        await self.close()

    @property
    def session(self) -> HotConnection:
        assert self._session is not None
        return self._session

    async def regain(self) -> None:
        """Wait until the worker is registered again; `LeaseLost` when that came too late."""
        worker_id = self.worker_id
        while not self.held:
            left = self._good_until - time.monotonic()
            if left <= 0 or self.worker_id != worker_id:
                raise LeaseLost("the worker's own lease ran out")
            await wait_at_most(self._registered, left)
        if self.worker_id != worker_id:
            raise LeaseLost("the worker was registered anew")

    async def register(self) -> None:
        """Take part: a new worker id, its lock and its row.

        Who we were before is no worker any more: nobody needs to wait for the end of that lease.
        """
        worker_id = f"{self._process.host}:{self._process.pid}:{new_id().hex[-12:]}"
        await self._open_session(worker_id)
        self.worker_id, self.is_nobody = worker_id, False
        self._registered.set()
        log.info("worker %s takes part", worker_id)
        if self._former:
            await resign(self.session, self._former)
            self._former.clear()

    async def _open_session(self, worker_id: str) -> None:
        started = time.monotonic()
        session = await self._connect()
        try:
            taken = await register_worker(
                session, worker_id, self._role, _lock_key(worker_id), self._process
            )
            if not taken:
                raise ConnectionError("our advisory lock is still held by the old session")
            await _follow_server_clock(session)
            if self._sole_user:
                # Once, at the start: whoever comes later may share the server with others by then.
                await forget_earlier_workers(session)
                self._sole_user = False
        except BaseException:
            session.terminate()  # it may hold the lock, which would keep us out
            raise
        session.add_termination_listener(self._session_ended)
        self._session = session
        self._good_until = started + FENCE_S
        self._renewed_at = started
        self._session_since = started

    def _session_ended(self, session: object) -> None:
        """Others may see our lock free by now: start nothing until we have it again."""
        if session is self._session:
            self._registered.clear()
            self.on_lost()

    async def renew(self) -> None:
        """Renew when it is time; open a new lock session when the old one was lost.

        Raises what the database raises; the caller tries again. A worker that was fenced comes
        back under a new id, because its old runs may be driven by others.
        """
        if self._session is None or self._session.is_closed():
            self._registered.clear()
            await self._open_session(self.worker_id)
            self._registered.set()
        elif time.monotonic() - self._renewed_at >= RENEW_EVERY_S:
            started = time.monotonic()
            try:
                async with asyncio.timeout(RENEW_WITHIN_S):
                    is_renewed = await renew_lease(self._session, self.worker_id)
                    await _follow_server_clock(self._session)
            except TimeoutError:
                self.lose_session()
                raise
            if is_renewed:
                self._good_until = started + FENCE_S
                self._renewed_at = started
            else:
                # Postgres was restarted, or somebody took us for dead and removed the row.
                self._registered.clear()
                await self._session.close(timeout=2)

    async def dead_workers(self) -> list[str]:
        """Owners whose runs may be taken: their lease is over, their lock was free twice, or once
        and their process is gone from this machine, or they are no worker any more.

        After a restart of Postgres all locks are free, so they do not count before their owner is
        back. Neither does a lease that could not be renewed while the server was away, until its
        owner had the time to come back in which we could have.
        """
        others = await other_workers(self.session, self.worker_id)
        self.has_company = bool(others)
        all_are_back = time.monotonic() - self._session_since >= FENCE_S
        over = {w.worker_id for w in others if w.lease_over and (w.same_server or all_are_back)}
        free = {w.worker_id: w.process for w in others if w.lock_free and w.same_server}
        gone = {worker_id for worker_id, process in free.items() if is_gone(process)}
        dead = over | gone | free.keys() & self._suspects
        self._suspects = set(free)
        return sorted(dead) + await ownerless(self.session, self.worker_id)

    @property
    def suspects_somebody(self) -> bool:
        return bool(self._suspects)

    def lose_session(self) -> None:
        """Give up a session that is of no use any more; the next renewal opens another."""
        self._registered.clear()
        if self._session is not None:
            self._session.terminate()

    async def close(self) -> None:
        self._registered.clear()
        if self._session is not None and not self._session.is_closed():
            await self._session.close(timeout=2)


async def _follow_server_clock(session: HotConnection) -> None:
    """All processes of one database live by its clock, in what they write and in what they wait."""
    asked_at = time.monotonic_ns()
    told = await server_clock_ms(session)
    clock.follow(told, asked_at, time.monotonic_ns())


def _lock_key(worker_id: str) -> int:
    """The second half of the advisory key: 31 bits of the id's random end."""
    return int(worker_id[-8:], 16) & 0x7FFFFFFF
