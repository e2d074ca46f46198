"""The one statement that writes run state: a fenced, gapless append for many runs at once.

`append_batch` sends a single data-modifying statement without an explicit transaction. For every
run it moves `(epoch, seq)` of the head forward if and only if they are what the writer believes
them to be, and inserts events, plan versions, snapshots, blobs and signal outcomes only for the
runs whose head moved. It answers with those runs. A run that does not come back has written
nothing; why, the caller must ask the head (`read_heads`).

New runs ride in the same statement: an idempotency key that is already taken leaves its run out.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Any
from uuid import UUID

import asyncpg

from app.store.database import HotConnection


@dataclass(slots=True)
class NewRun:
    """The rows that exist once per run.

    `idempotency` is `(route, key, fingerprint)`, `resumed_from` `(run_id, seq)` of a finished run.
    """

    tenant_id: str
    created_at: datetime
    objective: str
    label: str | None
    correlation_id: str | None
    envelope: str
    traceparent: str
    lane: str
    idempotency: tuple[str, str, str] | None = None
    resumed_from: tuple[UUID, int] | None = None


@dataclass(slots=True)
class HeadMove:
    """One run's part of a batch: from `(epoch, seq)` to `(new_epoch, new_seq)`, with its rows.

    `events` rows are `(seq, type, node_id, attempt, level, body)`, `plans` `(version, body)`,
    `snapshots` `(seq, body)`, `blobs` `(sha256, bytes)`, `signals` `(signal_id, outcome)`,
    `transitions` `(scope, worker_id, generation, kind, cooldown_s)` of breakers.
    """

    run_id: UUID
    run_day: date
    epoch: int
    seq: int
    new_epoch: int
    new_seq: int
    status: str
    owner: str | None
    wake_at: datetime | None
    new_run: NewRun | None = None
    events: list[tuple[int, str, str | None, int | None, str, str]] = field(default_factory=list)
    plans: list[tuple[int, str]] = field(default_factory=list)
    snapshots: list[tuple[int, str]] = field(default_factory=list)
    blobs: list[tuple[str, bytes]] = field(default_factory=list)
    signals: list[tuple[UUID, str]] = field(default_factory=list)
    transitions: list[tuple[str, str, int, str, float]] = field(default_factory=list)
    is_progress: bool = False


async def append_batch(connection: HotConnection, moves: list[HeadMove]) -> set[UUID]:
    """Write the batch; the ids of the runs whose head moved. Raises what asyncpg raises."""
    sections = frozenset(name for name in _OPTIONAL if any(getattr(move, name) for move in moves))
    arguments: list[Any] = []
    is_single = len(moves) == 1 and "new_run" not in sections
    if "new_run" in sections:
        arguments += _new_run_columns(moves)
    arguments += _head_row(moves[0]) if is_single else _head_columns(moves)
    for name in _ROW_SECTIONS:
        if name == "events" or name in sections:
            arguments += _rows_of_one(moves[0], name) if is_single else _row_columns(moves, name)
    rows = await connection.fetch(_statement(sections, is_single), *arguments)
    return {row[0] for row in rows}


def is_missing_partition(error: Exception) -> bool:
    """Whether a batch was refused because nobody prepared the day of one of its runs."""
    return isinstance(error, asyncpg.CheckViolationError) and "no partition" in str(error)


def is_out_of_time(error: Exception) -> bool:
    """Whether a batch was given up, by the server or by us, because it took too long."""
    return isinstance(error, (asyncpg.QueryCanceledError, TimeoutError))


_OPTIONAL = ("new_run", "plans", "snapshots", "blobs", "signals", "transitions")

# name -> (table, columns of the row, their types); run_day and run_id come first in every row.
_ROW_SECTIONS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "events": (
        "events",
        ("seq", "type", "node_id", "attempt", "level", "body"),
        ("int", "text", "text", "int", "text", "text"),
    ),
    "plans": ("plan_versions", ("version", "body"), ("int", "text")),
    "snapshots": ("snapshots", ("seq", "body"), ("int", "text")),
    "blobs": ("blobs", ("sha256", "body"), ("text", "bytea")),
    "signals": ("signals", ("signal_id", "outcome"), ("uuid", "text")),
    "transitions": (
        "breaker_transitions",
        ("scope", "worker_id", "generation", "kind", "cooldown_s"),
        ("text", "text", "bigint", "text", "float8"),
    ),
}

_HEAD_TYPES = ("uuid", "int", "int", "int", "int", "text", "text", "timestamptz", "bool")
_NEW_RUN_TYPES = (
    *("uuid", "text", "timestamptz", "text", "text", "text", "text", "text", "text"),
    *("int", "int", "text", "text", "timestamptz", "text", "text", "text", "uuid", "int"),
)


def _head_row(m: HeadMove) -> tuple[Any, ...]:
    return (
        *(m.run_id, m.epoch, m.seq, m.new_epoch, m.new_seq, m.status, m.owner, m.wake_at),
        m.is_progress,
    )


def _head_columns(moves: list[HeadMove]) -> list[list[Any]]:
    """Heads of runs that exist already; sorted, so that two batches lock in the same order."""
    rows = [_head_row(move) for move in moves if move.new_run is None]
    rows.sort(key=lambda row: row[0])
    return _transpose(rows, len(_HEAD_TYPES))


def _new_run_columns(moves: list[HeadMove]) -> list[list[Any]]:
    rows = []
    for move in moves:
        if (new := move.new_run) is not None:
            rows.append(
                (
                    *(move.run_id, new.tenant_id, new.created_at, new.objective, new.label),
                    *(new.correlation_id, new.envelope, new.traceparent, new.lane),
                    *(move.new_epoch, move.new_seq, move.owner, move.status, move.wake_at),
                    *(new.idempotency or (None, None, None)),
                    *(new.resumed_from or (None, None)),
                )
            )
    # In key order, so that two batches with the same keys can not wait for each other.
    rows.sort(key=lambda row: (row[14] or "", row[15] or "", row[0]))
    return _transpose(rows, len(_NEW_RUN_TYPES))


def _row_columns(moves: list[HeadMove], name: str) -> list[list[Any]]:
    rows = [(m.run_day, m.run_id, *row) for m in moves for row in getattr(m, name)]
    return _transpose(rows, 2 + len(_ROW_SECTIONS[name][1]))


def _rows_of_one(move: HeadMove, name: str) -> list[Any]:
    return [move.run_day, *_transpose(getattr(move, name), len(_ROW_SECTIONS[name][1]))]


def _transpose(rows: list[tuple[Any, ...]], width: int) -> list[list[Any]]:
    if not rows:
        return [[] for _ in range(width)]
    return [list(column) for column in zip(*rows, strict=True)]


@functools.lru_cache(maxsize=64)
def _statement(sections: frozenset[str], is_single: bool) -> str:
    """The statement with the parts that a batch needs; asyncpg keeps each one prepared."""
    parameters = _Parameters()
    parts: list[str] = []
    landed = "select run_id from moved"
    if "new_run" in sections:
        parts += _new_run_parts(parameters)
        landed += " union all select run_id from new_heads"
    parts += _one_head_part(parameters) if is_single else _head_parts(parameters)
    parts.append(f"landed as ({landed})")
    for name in _ROW_SECTIONS:
        if name == "events" or name in sections:
            parts.append(_rows_part(name, parameters, is_single))
    return "with " + ",\n".join(parts) + "\nselect run_id from landed"


def _rows_part(name: str, parameters: _Parameters, is_single: bool) -> str:
    """The rows of one table, for the runs that landed."""
    table, columns, types = _ROW_SECTIONS[name]
    names = ", ".join(columns)
    if is_single:
        [run_day] = parameters.scalars(("date",))
        key = f"{run_day}, landed.run_id"
        source = f"landed cross join unnest({parameters.arrays(types)}) as r ({names})"
    else:
        key = "r.run_day, r.run_id"
        unnested = parameters.arrays(("date", "uuid", *types))
        source = f"unnest({unnested}) as r (run_day, run_id, {names}) join landed using (run_id)"
    if name == "signals":
        return f"""signals as (update signals s set outcome = found.outcome
            from (select {key}, {names} from {source}) as found (run_day, run_id, {names})
            where s.signal_id = found.signal_id)"""
    if name == "transitions":
        # No day in the key: an opening is announced once, whichever run does it.
        return f"""{name} as (insert into {table} (run_id, {names})
            select found.run_id, {names} from (select {key}, {names} from {source})
            as found (run_day, run_id, {names}) on conflict do nothing)"""
    conflict = " on conflict do nothing" if name == "blobs" else ""
    return f"""{name} as (insert into {table} (run_day, run_id, {names})
        select {key}, {names} from {source}{conflict})"""


def _head_parts(parameters: _Parameters) -> list[str]:
    """Lock all heads in order, then move those that are where their writer believes them to be.

    The locks are taken head by head, in the order of the arguments: sorted, and never by a scan.
    """
    return [
        f"""wanted as materialized (select * from unnest({parameters.arrays(_HEAD_TYPES)}) as
            w (run_id, epoch, seq, new_epoch, new_seq, status, owner, wake_at, is_progress))""",
        """locked as materialized (select w.run_id from wanted w cross join lateral (
            select from run_heads h where h.run_id = w.run_id and h.epoch = w.epoch
            and h.seq = w.seq for update) as h)""",
        """moved as (update run_heads h set epoch = w.new_epoch, seq = w.new_seq,
            status = w.status, owner = w.owner, wake_at = w.wake_at,
            takes = case when w.is_progress then 0 else h.takes end
            from wanted w join locked using (run_id)
            where h.run_id = w.run_id and h.epoch = w.epoch and h.seq = w.seq
            returning h.run_id)""",
    ]


def _one_head_part(parameters: _Parameters) -> list[str]:
    """The same for a run alone: no order to keep, and a fifth less time in the server."""
    run_id, epoch, seq, *new = parameters.scalars(_HEAD_TYPES)
    new_epoch, new_seq, status, owner, wake_at, is_progress = new
    return [
        f"""moved as (update run_heads set epoch = {new_epoch}, seq = {new_seq},
            status = {status}, owner = {owner}, wake_at = {wake_at},
            takes = case when {is_progress} then 0 else takes end
            where run_id = {run_id} and epoch = {epoch} and seq = {seq} returning run_id)"""
    ]


def _new_run_parts(parameters: _Parameters) -> list[str]:
    return [
        f"""submitted as materialized (select * from unnest({parameters.arrays(_NEW_RUN_TYPES)}) as
            n (run_id, tenant_id, created_at, objective, label, correlation_id, envelope,
               traceparent, lane, epoch, seq, owner, status, wake_at, route, key, fingerprint,
               resumed_from, resumed_from_seq))""",
        """new_keys as (insert into idempotency_keys
            (tenant_id, route, key, run_id, fingerprint, created_at)
            select tenant_id, route, key, run_id, fingerprint, created_at from submitted
            where key is not null on conflict do nothing returning run_id)""",
        """new_runs as (insert into runs (run_id, tenant_id, created_at, objective, label,
            correlation_id, envelope, traceparent, resumed_from, resumed_from_seq)
            select run_id, tenant_id, created_at, objective, label, correlation_id, envelope,
            traceparent, resumed_from, resumed_from_seq from submitted
            where key is null or run_id in (select run_id from new_keys)
            on conflict do nothing returning run_id)""",
        """new_heads as (insert into run_heads (run_id, tenant_id, epoch, seq, owner, status,
            wake_at, lane)
            select run_id, tenant_id, epoch, seq, owner, status, wake_at, lane
            from submitted join new_runs using (run_id) returning run_id)""",
    ]


class _Parameters:
    """Numbers the placeholders in the order in which the arguments are sent."""

    def __init__(self) -> None:
        self._count = 0

    def arrays(self, types: tuple[str, ...]) -> str:
        return ", ".join(self.scalars(tuple(f"{name}[]" for name in types)))

    def scalars(self, types: tuple[str, ...]) -> list[str]:
        found = []
        for name in types:
            self._count += 1
            found.append(f"${self._count}::{name}")
        return found
