"""Reads of the journal: pages of events, heads, plans, snapshots and blobs of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import RowMapping, Select, and_, exists, func, select, text, true
from sqlalchemy.dialects.postgresql import aggregate_order_by

from app.domain.events import TERMINAL_EVENTS
from app.kit.ids import run_day
from app.store.database import Database
from app.store.tables import blobs, events, plan_versions, run_heads, runs, snapshots

FIND_WINDOW = 100_000
FOUND_MAX = 100

_SUMMARY_COLUMNS = (
    *(runs.c.run_id, runs.c.objective, runs.c.label, runs.c.correlation_id),
    *(runs.c.created_at, run_heads.c.status, run_heads.c.seq, run_heads.c.lane),
)
_HEAD_COLUMNS = ("epoch", "seq", "owner", "status", "lane", "takes", "wake_at")


@dataclass(frozen=True, slots=True)
class EventRow:
    """One stored event; `body` is the frame's data."""

    seq: int
    type: str
    node_id: str | None
    level: str
    body: str


@dataclass(frozen=True, slots=True)
class HeadView:
    """Where a run stands: the seq of its last durable event, and its status."""

    seq: int
    status: str


@dataclass(frozen=True, slots=True)
class Tail:
    """Where the head of a run is, and the first events behind the seq that was asked for. No events
    although the head is further on: retention took them."""

    head: int
    rows: list[EventRow]


_TRACEPARENTS = text(
    "select run_id, traceparent from runs where run_id = any(cast(:run_ids as uuid[]))"
)
_TAILS = text(
    """
    with behind as (
        select asked.*, heads.seq as head
        from unnest(
            cast(:run_ids as uuid[]), cast(:run_days as date[]), cast(:afters as integer[])
        ) as asked (run_id, run_day, after)
        join run_heads as heads on heads.run_id = asked.run_id and heads.seq > asked.after
        limit :runs_max
    )
    select behind.run_id, behind.head, tail.seq, tail.type, tail.node_id, tail.level, tail.body
    from behind left join lateral (
        select * from (
            select page.*,
                sum(octet_length(body)) over (order by seq) - octet_length(body) as before
            from (
                select seq, type, node_id, level, body from events
                where events.run_day = behind.run_day and events.run_id = behind.run_id
                and events.seq > behind.after
                order by seq limit :rows_max
            ) as page
        ) as sized
        where before < :bytes_max
    ) as tail on true
    order by behind.run_id, tail.seq
    """
)


class EventReader:
    """All reading statements of runs' journals. They touch the partitions of these runs only."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def page(
        self,
        run_id: UUID,
        after: int,
        limit: int,
        *,
        types: frozenset[str] = frozenset(),
        nodes: frozenset[str] = frozenset(),
        levels: frozenset[str] = frozenset(),
    ) -> list[EventRow]:
        """Events behind `after` in order; with filters, those that pass and the terminal one."""
        statement: Select[Any] = (
            select(events.c.seq, events.c.type, events.c.node_id, events.c.level, events.c.body)
            .where(
                events.c.run_day == run_day(run_id),
                events.c.run_id == run_id,
                events.c.seq > after,
            )
            .order_by(events.c.seq)
            .limit(limit)
        )
        wanted = [
            column.in_(sorted(values))
            for column, values in (
                (events.c.type, types),
                (events.c.node_id, nodes),
                (events.c.level, levels),
            )
            if values
        ]
        if wanted:
            statement = statement.where(and_(*wanted) | events.c.type.in_(sorted(TERMINAL_EVENTS)))
        async with self._database.read() as connection:
            rows = (await connection.execute(statement)).all()
        return [EventRow(*row) for row in rows]

    async def traceparents(self, run_ids: list[UUID]) -> dict[UUID, str]:
        """The W3C trace context that each run was accepted with."""
        async with self._database.read() as connection:
            found = await connection.execute(_TRACEPARENTS, {"run_ids": run_ids})
            return {row.run_id: row.traceparent for row in found}

    async def tails(
        self, after: Mapping[UUID, int], *, runs_max: int, rows_max: int, bytes_max: int
    ) -> dict[UUID, Tail]:
        """What is new, in one statement: of the runs whose head is further than `after`, at most
        `runs_max`, each with its next events, at most `rows_max`, until `bytes_max` are full, but
        at least one.

        Bodies that do not fit are not read: a hundred slow clients of a run with big outputs must
        not hold a thousand of them each.
        """
        asked = {
            "run_ids": list(after),
            "run_days": [run_day(run_id) for run_id in after],
            "afters": list(after.values()),
        }
        limits = {"runs_max": runs_max, "rows_max": rows_max, "bytes_max": bytes_max}
        found: dict[UUID, Tail] = {}
        async with self._database.read() as connection:
            for run_id, head, *row in await connection.execute(_TAILS, {**asked, **limits}):
                tail = found.setdefault(run_id, Tail(head, []))
                if row[0] is not None:
                    tail.rows.append(EventRow(*row))
        return found

    async def head(self, tenant_id: str, run_id: UUID) -> HeadView | None:
        """The head of one run; None when this tenant has no such run."""
        statement = select(run_heads.c.seq, run_heads.c.status).where(
            run_heads.c.run_id == run_id, run_heads.c.tenant_id == tenant_id
        )
        async with self._database.read() as connection:
            row = (await connection.execute(statement)).first()
        return None if row is None else HeadView(*row)

    async def run(self, tenant_id: str, run_id: UUID) -> RowMapping | None:
        """The run's own row, its head, `versions` and `plans` (two lists of one order) and the
        newest snapshot, `snapshot_seq` and `snapshot`, all of one moment.

        None when this tenant has no such run.
        """
        version, body = plan_versions.c.version, plan_versions.c.body
        of_run = (plan_versions.c.run_day == run_day(run_id), plan_versions.c.run_id == run_id)
        newest = (
            select(snapshots.c.seq, snapshots.c.body)
            .where(snapshots.c.run_day == run_day(run_id), snapshots.c.run_id == run_id)
            .order_by(snapshots.c.seq.desc())
            .limit(1)
            .subquery()
        )
        statement = (
            select(
                *runs.c,
                *(run_heads.c[name] for name in _HEAD_COLUMNS),
                *(
                    select(func.array_agg(aggregate_order_by(column, version)))
                    .where(*of_run)
                    .scalar_subquery()
                    .label(name)
                    for name, column in (("versions", version), ("plans", body))
                ),
                newest.c.seq.label("snapshot_seq"),
                newest.c.body.label("snapshot"),
            )
            .join(run_heads, run_heads.c.run_id == runs.c.run_id)
            .outerjoin(newest, true())
            .where(runs.c.run_id == run_id, runs.c.tenant_id == tenant_id)
        )
        async with self._database.read() as connection:
            return (await connection.execute(statement)).mappings().first()

    async def plans(self, run_id: UUID) -> dict[int, str]:
        """The stored JSON of every plan version of the run."""
        statement = (
            select(plan_versions.c.version, plan_versions.c.body)
            .where(plan_versions.c.run_day == run_day(run_id), plan_versions.c.run_id == run_id)
            .order_by(plan_versions.c.version)
        )
        async with self._database.read() as connection:
            return {row.version: row.body for row in await connection.execute(statement)}

    async def events_at(self, run_id: UUID, seqs: list[int]) -> dict[int, str]:
        """The bodies of single events, by seq."""
        statement = select(events.c.seq, events.c.body).where(
            events.c.run_day == run_day(run_id),
            events.c.run_id == run_id,
            events.c.seq.in_(seqs),
        )
        async with self._database.read() as connection:
            return {row.seq: row.body for row in await connection.execute(statement)}

    async def blob(self, run_id: UUID, sha256: str) -> bytes | None:
        """A big value by its content hash."""
        statement = select(blobs.c.body).where(
            blobs.c.run_day == run_day(run_id),
            blobs.c.run_id == run_id,
            blobs.c.sha256 == sha256,
        )
        async with self._database.read() as connection:
            found: bytes | None = (await connection.execute(statement)).scalar()
            return found

    async def runs_for(self, tenant_id: str, objective: str) -> list[RowMapping]:
        """The newest runs with this objective that are not done, with their envelopes.

        A run that was resumed as another one is left out: the other one tells how it went on.

        Looks at the newest `FIND_WINDOW` runs of the tenant: nobody resumes what is older, and an
        index over envelopes would cost every run that is submitted.
        """
        newest = (
            select(runs.c.run_id, runs.c.objective)
            .where(runs.c.tenant_id == tenant_id)
            .order_by(runs.c.run_id.desc())
            .limit(FIND_WINDOW)
            .subquery()
        )
        successors = runs.alias()
        statement = (
            select(*_SUMMARY_COLUMNS, runs.c.envelope)
            .join(run_heads, run_heads.c.run_id == runs.c.run_id)
            .join(newest, newest.c.run_id == runs.c.run_id)
            .where(
                newest.c.objective == objective,
                run_heads.c.status != "done",
                runs.c.envelope.is_not(None),
                ~exists().where(successors.c.resumed_from == runs.c.run_id),
            )
            .order_by(runs.c.run_id.desc())
            .limit(FOUND_MAX)
        )
        async with self._database.read() as connection:
            return list((await connection.execute(statement)).mappings())

    async def list_runs(
        self,
        tenant_id: str,
        *,
        before: UUID | None,
        limit: int,
        status: list[str],
        label: str | None,
        created_after: UUID | None,
        created_before: UUID | None,
    ) -> list[RowMapping]:
        """Runs, newest first. Times are asked for as UUIDv7 bounds: the id is the time."""
        statement = (
            select(*_SUMMARY_COLUMNS)
            .join(run_heads, run_heads.c.run_id == runs.c.run_id)
            .where(runs.c.tenant_id == tenant_id)
            .order_by(runs.c.run_id.desc())
            .limit(limit)
        )
        for upper in (before, created_before):
            if upper is not None:
                statement = statement.where(runs.c.run_id < upper)
        if created_after is not None:
            statement = statement.where(runs.c.run_id >= created_after)
        if status:
            statement = statement.where(run_heads.c.status.in_(status))
        if label is not None:
            statement = statement.where(runs.c.label == label)
        async with self._database.read() as connection:
            return list((await connection.execute(statement)).mappings())
