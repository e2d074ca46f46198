"""Claims: one statement that takes runs nobody drives, fair by lane, tenant and age.

Claimable is derived, never flagged: unfinished, without a live owner, and queued, or due to wake,
or with a signal that waits. Runs that were under way come before queued ones. Queued ones are
taken by weighted fair queueing over the lanes (each run of a lane moves the lane's virtual time on
by 1/weight; the lane that is furthest behind is served first: Demers, Keshav, Shenker, 1989), in a
lane turn by turn from its tenants, and of a tenant the oldest first. Every part reads a partial
index, so that a claim costs the same whether ten runs wait or a hundred thousand.

All functions work on the worker's own session. The new epoch is durable before anything of the
run is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from uuid import UUID

from app.kit.ids import run_day
from app.store.database import HotConnection

LANE_WEIGHTS: Mapping[str, float] = {"interactive": 6.0, "standard": 3.0, "batch": 1.0}
TENANTS_MAX = 100
"""How many tenants of a lane one claim looks at, from behind the one that was served last."""

TAKES_MAX = 3
"""Workers that may die over a run, without progress in between, before it is given up."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A run that is ours now, under a new epoch. `from_worker` is who held it before, if anyone.

    `takes` counts the workers that were lost while they held it, since its last progress; they are
    the last of `lost_workers`.
    """

    run_id: UUID
    tenant_id: str
    epoch: int
    seq: int
    status: str
    lane: str
    takes: int
    lost_workers: list[str]
    from_worker: str | None
    finish: float
    """Where it stood in the line of the claim; those under way stand before all queued ones."""
    handed_over: bool = False
    """A worker that left gave it back, in contrast to a run whose own time has come."""

    @property
    def is_new(self) -> bool:
        """It comes from the queue; nobody drove it before."""
        return self.status == "queued" and self.from_worker is None


@dataclass(slots=True)
class Fairness:
    """Whose turn it is, from claim to claim: the lanes' virtual times, and the tenants' cursors."""

    served: dict[str, float] = field(default_factory=lambda: dict.fromkeys(LANE_WEIGHTS, 0.0))
    after: dict[str, str] = field(default_factory=lambda: dict.fromkeys(LANE_WEIGHTS, ""))

    def note(self, claims: list[Claim]) -> None:
        """Move the lanes on by what was taken from their queues."""
        for claim in sorted(claims, key=lambda claim: claim.finish):
            if claim.is_new:
                self.served[claim.lane] += 1 / LANE_WEIGHTS[claim.lane]
                self.after[claim.lane] = claim.tenant_id
        # A lane that was empty for long has no claim on more than its next turn.
        newest = max(self.served.values())
        self.served = {lane: max(at, newest - 1.0) - newest for lane, at in self.served.items()}


_UNFINISHED = "h.status in ('queued', 'running', 'awaiting_human', 'paused')"
_CLAIM = f"""
with recursive lanes as (
    select * from unnest($7::text[], $8::float8[], $9::float8[], $10::text[])
        as l (lane, weight, served, after)),
tenants as (
    select lane, after, false as is_around, after as tenant_id, 0 as n from lanes
    union all
    select p.lane, p.after, p.is_around or ahead.tenant_id is null, t.tenant_id, p.n + 1
    from tenants p left join lateral (
        select h.tenant_id from run_heads h
        where h.lane = p.lane and h.status = 'queued' and h.owner is null
            and h.tenant_id > p.tenant_id
        order by h.tenant_id limit 1) ahead on true
    cross join lateral (
        select coalesce(ahead.tenant_id, case when not p.is_around then (
            select h.tenant_id from run_heads h
            where h.lane = p.lane and h.status = 'queued' and h.owner is null
                and h.tenant_id <= p.after
            order by h.tenant_id limit 1) end) as tenant_id) t
    where p.n < $11 and t.tenant_id is not null and (not p.is_around or t.tenant_id <= p.after)),
widths as (
    select lane, ceil(2.0 * $5 / count(*))::int as width from tenants where n > 0 group by lane),
queued as (
    select t.lane, t.n, q.run_id, q.takes,
        row_number() over (partition by t.lane, t.tenant_id order by q.run_id) as turn
    from tenants t join widths w using (lane) cross join lateral (
        select h.run_id, h.takes from run_heads h
        where h.lane = t.lane and h.tenant_id = t.tenant_id and h.status = 'queued'
            and h.owner is null and h.run_id <> all($4::uuid[])
        order by h.run_id limit w.width for update skip locked) q
    where t.n > 0),
in_turn as (
    select q.*, l.served + row_number() over (partition by q.lane order by q.turn, q.n)
        / l.weight as finish
    from queued q join lanes l using (lane)),
of_the_dead as (
    select h.run_id, h.takes from run_heads h
    where h.owner = any($2::text[]) and {_UNFINISHED} and (h.takes = 0 or $6 > 0)
    order by h.run_id limit $5 for update skip locked),
strays as (
    select h.run_id, h.takes from run_heads h
    where h.run_id = any($3::uuid[]) and h.owner = $1 and {_UNFINISHED}
    for update skip locked),
due as (
    select h.run_id, h.takes from run_heads h
    where h.owner is null and h.wake_at <= clock_timestamp() and {_UNFINISHED}
        and (h.takes = 0 or $6 > 0) and not $12
    order by h.wake_at limit $5 for update skip locked),
signalled as (
    select h.run_id, h.takes from run_heads h
    where h.run_id in (select s.run_id from signals s
            where s.outcome is null and (s.kind = 'cancel' or not $12))
        and h.owner is null and {_UNFINISHED} and (h.takes = 0 or $6 > 0)
        and h.run_id <> all($4::uuid[])
    order by h.run_id limit $5 for update skip locked),
claimable as (
    select run_id, max(takes) as takes, min(finish) as finish from (
        select run_id, takes, '-infinity'::float8 as finish from of_the_dead
        union all select run_id, takes, '-infinity' from strays
        union all select run_id, takes, '-infinity' from due
        union all select run_id, takes, '-infinity' from signalled
        union all select run_id, takes, finish from in_turn) found
    group by run_id),
trusted as (
    select c.*, count(*) filter (where takes > 0) over (order by finish, run_id) as suspects
    from claimable c),
chosen as (
    select h.run_id, h.owner, h.wake_at, t.finish from (
        select run_id, finish from trusted where takes = 0 or suspects <= $6
        order by finish, run_id limit $5) t
    join run_heads h using (run_id))
update run_heads h
set owner = $1, epoch = h.epoch + 1, wake_at = null,
    takes = h.takes + (c.owner <> $1 and c.owner is not null)::int,
    lost_workers = case when c.owner <> $1
        then h.lost_workers[cardinality(h.lost_workers) - h.takes + 1:] || c.owner
        else h.lost_workers end
from chosen c where h.run_id = c.run_id
returning h.run_id, h.tenant_id, h.epoch, h.seq, h.status, h.lane, h.takes,
    h.lost_workers, c.owner, c.finish, coalesce(c.wake_at = 'epoch', false)"""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a claim may take: up to `limit` runs, among them `suspects_max` that lost a worker.

    `dead` are owners that are gone; `strays` our own runs that nobody here drives; `not_these`
    queued runs that this process starts itself. `only_cancelled`: this process is full, but a run
    that somebody cancelled and nobody drives takes no place; it only has to end.
    """

    limit: int
    suspects_max: int
    dead: list[str]
    strays: list[UUID]
    not_these: list[UUID]
    only_cancelled: bool = False


async def claim_runs(
    connection: HotConnection, worker_id: str, wanted: Wanted, fairness: Fairness
) -> list[Claim]:
    """Take what is wanted, as far as it is there; locked rows are skipped, never waited for."""
    lanes = [] if wanted.only_cancelled else list(LANE_WEIGHTS)
    rows = await connection.fetch(
        _CLAIM,
        worker_id,
        wanted.dead,
        wanted.strays,
        wanted.not_these,
        wanted.limit,
        wanted.suspects_max,
        lanes,
        [LANE_WEIGHTS[lane] for lane in lanes],
        [fairness.served[lane] for lane in lanes],
        [fairness.after[lane] for lane in lanes],
        # Twice as many as could get a run, because others may be about to take theirs.
        min(2 * wanted.limit, TENANTS_MAX),
        wanted.only_cancelled,
    )
    claims = [Claim(*row) for row in rows]
    fairness.note(claims)
    return claims


async def something_waits(connection: HotConnection, not_these: list[UUID]) -> bool:
    """Whether a queued run has no owner, whoever may be about to take it."""
    found: bool = await connection.fetchval(
        """select exists (select from run_heads
        where status = 'queued' and owner is null and run_id <> all($1::uuid[]))""",
        not_these,
    )
    return found


@dataclass(frozen=True, slots=True)
class NewlyClaimed:
    """What a run from the queue is started with. `plans` are `(version, body)`."""

    envelope: str
    traceparent: str
    plans: list[tuple[int, str]]


async def read_new(connection: HotConnection, claims: list[Claim]) -> dict[UUID, NewlyClaimed]:
    """Envelopes and plans of runs that nobody drove before, for all of them in one query."""
    rows = await connection.fetch(
        """select r.run_id, r.envelope, r.traceparent,
            (select array_agg(p.version order by p.version) from plan_versions p
                where p.run_day = w.day and p.run_id = w.run_id),
            (select array_agg(p.body order by p.version) from plan_versions p
                where p.run_day = w.day and p.run_id = w.run_id)
        from unnest($1::uuid[], $2::date[]) as w (run_id, day) join runs r using (run_id)
        where r.envelope is not null""",
        [claim.run_id for claim in claims],
        [run_day(claim.run_id) for claim in claims],
    )
    return {
        row[0]: NewlyClaimed(row[1], row[2], list(zip(row[3] or (), row[4] or (), strict=True)))
        for row in rows
    }
