"""The lease of a worker, and the hint that one is dead. Hot: asyncpg directly.

Every function works on the worker's own lock session: a connection that holds a session advisory
lock for as long as the process lives. A free lock is only a hint that its owner is dead; the epoch
in every write is the fence.
"""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from app.kit.processes import ProcessAddress
from app.store.database import HotConnection

LEASE_S = 10
LOCK_CLASS = 0x466C  # first half of the two-part advisory key: ours, not a migration's


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """A worker as the others see it. `lock_free`: nobody holds its advisory lock right now."""

    worker_id: str
    lease_over: bool
    lock_free: bool
    same_server: bool
    process: ProcessAddress


async def register_worker(
    connection: HotConnection, worker_id: str, role: str, lock_key: int, process: ProcessAddress
) -> bool:
    """Take the advisory lock and write the row, anew after a lost session. False: still locked."""
    if not await connection.fetchval("select pg_try_advisory_lock($1, $2)", LOCK_CLASS, lock_key):
        return False
    await connection.execute(
        """insert into workers
            (worker_id, lease_until, pg_start, lock_key, started_at, host, pid, pid_space, role)
        values ($1, clock_timestamp() + make_interval(secs => $2), pg_postmaster_start_time(),
                $3, clock_timestamp(), $4, $5, $6, $7)
        on conflict (worker_id) do update
        set lease_until = excluded.lease_until, pg_start = excluded.pg_start""",
        worker_id,
        LEASE_S,
        lock_key,
        process.host,
        process.pid,
        process.pid_space,
        role,
    )
    return True


async def forget_earlier_workers(connection: HotConnection) -> None:
    """Forget workers of an earlier start of the server; their runs can be claimed at once.

    Only for a server that we started for ourselves: on any other they may be alive and about to
    register again.
    """
    await connection.execute("delete from workers where pg_start <> pg_postmaster_start_time()")


async def resign(connection: HotConnection, worker_ids: list[str]) -> None:
    """They are no workers any more: what they still own can be claimed at once."""
    await connection.execute("delete from workers where worker_id = any($1::text[])", worker_ids)


async def renew_lease(connection: HotConnection, worker_id: str) -> bool:
    """One row, without waiting for the disk: losing a renewal in a crash only shortens a lease."""
    async with connection.transaction():
        await connection.execute("set local synchronous_commit = off")
        status = await connection.execute(
            """update workers
            set lease_until = clock_timestamp() + make_interval(secs => $2)
            where worker_id = $1 and pg_start = pg_postmaster_start_time()""",
            worker_id,
            LEASE_S,
        )
    return str(status) == "UPDATE 1"


async def server_clock_ms(connection: HotConnection) -> float:
    """The database's clock, in ms since 1970."""
    found = await connection.fetchval(
        "select (extract(epoch from clock_timestamp()) * 1000)::float8"
    )
    return float(found)


async def leave(connection: HotConnection, worker_id: str) -> int:
    """Give back what is still held and forget the worker: the others need not wait for a lease.

    Returns how many runs were given back.
    """
    status = await connection.execute(
        """update run_heads set owner = null, epoch = epoch + 1, wake_at = 'epoch'
        where owner = $1""",
        worker_id,
    )
    await resign(connection, [worker_id])
    return int(str(status).rpartition(" ")[2])


async def other_workers(connection: HotConnection, worker_id: str) -> list[WorkerRow]:
    """Every other worker, with what speaks for its death."""
    rows = await connection.fetch(
        """select w.worker_id, w.lease_until < clock_timestamp() as lease_over,
            not exists (select from pg_locks l where l.locktype = 'advisory'
                and l.classid = $2 and l.objid = w.lock_key::oid and l.objsubid = 2
                and l.database = (select oid from pg_database where datname = current_database()))
                as lock_free,
            w.pg_start = pg_postmaster_start_time() as same_server,
            w.host, w.pid, w.pid_space
        from workers w where w.worker_id <> $1""",
        worker_id,
        LOCK_CLASS,
    )
    return [
        WorkerRow(
            row["worker_id"],
            row["lease_over"],
            row["lock_free"],
            row["same_server"],
            ProcessAddress(row["host"], row["pid"], row["pid_space"]),
        )
        for row in rows
    ]


async def ownerless(connection: HotConnection, worker_id: str) -> list[str]:
    """Other owners of runs that are no worker any more: their row was forgotten while they were
    away."""
    rows = await connection.fetch(
        """with recursive owners as (
            (select owner from run_heads where owner is not null order by owner limit 1)
            union all
            select (select h.owner from run_heads h where h.owner > o.owner
                    order by h.owner limit 1) from owners o where o.owner is not null)
        select owner from owners o where owner is not null and owner <> $1
        and not exists (select from workers w where w.worker_id = o.owner)""",
        worker_id,
    )
    return [row[0] for row in rows]


async def owned_runs(connection: HotConnection, worker_id: str) -> list[UUID]:
    """The runs that the heads say this worker drives."""
    rows = await connection.fetch("select run_id from run_heads where owner = $1", worker_id)
    return [row[0] for row in rows]


async def forget_workers(connection: HotConnection, dead: list[str]) -> None:
    """Delete the rows of dead workers that own nothing any more."""
    await connection.execute(
        """delete from workers w where w.worker_id = any($1::text[])
        and not exists (select from run_heads h where h.owner = w.worker_id)""",
        dead,
    )
