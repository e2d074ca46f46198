"""Connections: own ones for the hot statements, a SQLAlchemy engine for all others.

All speak to the one Postgres. Every session has time limits, so that a lost client or a stuck lock
can never hold the journal up.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeAlias

import asyncpg
from asyncpg.pool import PoolConnectionProxy
from sqlalchemy import URL, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as NoFreeConnection
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from app.domain.errors import Unavailable

SESSION_SETTINGS = {
    "application_name": "flexrun",
    "timezone": "UTC",
    "statement_timeout": "5s",
    "lock_timeout": "1s",
    "idle_in_transaction_session_timeout": "10s",
    "jit": "off",
    # Statements are planned once, maybe while the tables are still empty, and kept: a plan that
    # reads a whole table would read it for as long as the connection lives.
    "enable_seqscan": "off",
}

BROKEN = (asyncpg.InternalClientError,)
"""The driver lost step with the server, by a cut at the wrong moment: it never finds it again."""

TRANSIENT = (
    *BROKEN,
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.TransactionRollbackError,
    asyncpg.LockNotAvailableError,
    asyncpg.exceptions.ObjectInUseError,
    asyncpg.ReadOnlySQLTransactionError,  # a standby, until the primary is found again
    asyncpg.InvalidAuthorizationSpecificationError,  # a login that is being changed
)
"""Errors after which the same statement may succeed: the server is away, restarting, busy, or
does not let us in."""


REFUSED = (asyncpg.PostgresError,)
"""Errors that the server answered. Those of `TRANSIENT` are among them: ask that first."""

HotConnection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
"""A connection that its owner keeps: a journal writer's, a worker's lock session."""

PooledConnection: TypeAlias = "PoolConnectionProxy[asyncpg.Record]"
POOL_S = 5.0
"""How long a read waits for a connection while all others are in use."""
RELAXED_MAX = 4
RELAXED_S = 2.0
"""How long a statement waits for one of these connections, and `close` for all of them."""


async def connect(dsn: str) -> HotConnection:
    """A connection for one owner, with the time limits of every session of ours."""
    return await asyncpg.connect(
        asyncpg_dsn(dsn), server_settings=SESSION_SETTINGS, command_timeout=10, timeout=5
    )


class Database:
    """The engine of this process, for all statements that are not hot."""

    def __init__(
        self, dsn: str, engine: AsyncEngine, relaxed: asyncpg.Pool[asyncpg.Record]
    ) -> None:
        self.dsn = dsn
        self.engine = engine
        self._writes = engine.execution_options(isolation_level="READ COMMITTED")
        self._relaxed = relaxed

    @classmethod
    async def open(cls, dsn: str) -> Database:
        """Connect. Raises `Unavailable` (`database_unreachable`) when the server is not there."""
        try:
            probe = await connect(dsn)
            await probe.close(timeout=2)
        except (*TRANSIENT, *REFUSED, ValueError) as error:
            raise Unavailable(
                f"Postgres can not be reached ({type(error).__name__}).",
                code="database_unreachable",
            ) from error
        engine = create_async_engine(
            sqlalchemy_url(dsn),
            pool_size=3,
            max_overflow=5,
            pool_timeout=POOL_S,
            pool_pre_ping=True,
            # A read is one statement: a transaction around it, and one around the ping before it,
            # would be six more round trips.
            isolation_level="AUTOCOMMIT",
            hide_parameters=True,  # errors in the log must not quote what callers sent
            connect_args={
                "server_settings": SESSION_SETTINGS,
                "timeout": 5,
                "command_timeout": 10,
            },
        )
        relaxed = await asyncpg.create_pool(
            asyncpg_dsn(dsn),
            min_size=0,
            max_size=RELAXED_MAX,
            reset=_nothing_to_reset,
            server_settings={**SESSION_SETTINGS, "synchronous_commit": "off"},
            timeout=5,
            command_timeout=10,
        )
        return cls(dsn, engine, relaxed)

    async def close(self) -> None:
        await self.engine.dispose()
        with suppress(TimeoutError):  # a line that is dead; what it had is ended all the same
            async with asyncio.timeout(RELAXED_S):
                await self._relaxed.close()

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A connection for reads, each statement on its own. A server that is away becomes
        `Unavailable` (503)."""
        async with _translated(), self.engine.connect() as connection:
            yield connection

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        """A short transaction; commits at the end of the block."""
        async with _translated(), self._writes.begin() as connection:
            yield connection

    @asynccontextmanager
    async def relaxed(self) -> AsyncIterator[PooledConnection]:
        """A connection whose statements commit one by one, and wait for no disk: one round trip
        each, and a crash of the server may take the last ones back. Only for what can be had anew.

        By the driver alone: every call of a model waits for one of these, and through SQLAlchemy it
        takes twice as long.
        """
        async with _translated(), self._relaxed.acquire(timeout=RELAXED_S) as connection:
            try:
                yield connection
            except (asyncio.CancelledError, *BROKEN):
                connection.terminate()  # cut off: whose answer comes next is not known
                raise


async def _nothing_to_reset(_connection: PooledConnection) -> None:
    """Our statements leave nothing behind in a session, so that none is sent to clean it up."""


@asynccontextmanager
async def _translated() -> AsyncIterator[None]:
    try:
        yield
    except TRANSIENT as error:
        raise Unavailable("The journal is out of reach.", code="database_unreachable") from error
    except NoFreeConnection as error:
        raise Unavailable(
            "All connections to the journal are in use.", code="database_unreachable"
        ) from error
    except DBAPIError as error:
        driver = getattr(error.orig, "__cause__", None) or error.orig
        if error.connection_invalidated or isinstance(driver, TRANSIENT):
            raise Unavailable(
                "The journal is out of reach.", code="database_unreachable"
            ) from error
        raise


def asyncpg_dsn(dsn: str) -> str:
    """The address as asyncpg wants it; `postgresql+asyncpg://` is understood as well."""
    return dsn.replace("postgresql+asyncpg://", "postgresql://", 1)


def sqlalchemy_url(dsn: str) -> URL:
    return make_url(asyncpg_dsn(dsn)).set(drivername="postgresql+asyncpg")


async def server_facts(connection: AsyncConnection) -> dict[str, Any]:
    """Version, start time and the settings that durability hangs on."""
    row = (
        await connection.execute(
            text(
                """select current_setting('server_version') as version,
                pg_postmaster_start_time() as started_at,
                current_setting('fsync') as fsync,
                current_setting('full_page_writes') as full_page_writes,
                current_setting('synchronous_commit') as synchronous_commit"""
            )
        )
    ).one()
    return dict(row._mapping)
