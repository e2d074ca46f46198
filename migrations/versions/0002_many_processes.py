"""Claims by lane and tenant, all signals, resumed runs, and announcements of breakers.

Revision: 0002
Follows: 0001

One index per way in which a run can be claimed replaces the one over all unfinished runs, so that
a claim costs the same whether ten runs wait or a hundred thousand. None of them is touched by an
append in the middle of a run: those updates stay heap-only.
"""

from alembic import op

revision = "0002"
down_revision = "0001"

STATEMENTS = (
    """create index run_heads_queued on run_heads (lane, tenant_id, run_id)
    where status = 'queued' and owner is null""",
    "create index run_heads_owned on run_heads (owner) where owner is not null",
    """create index run_heads_due on run_heads (wake_at)
    where owner is null and wake_at is not null""",
    "drop index run_heads_unfinished",
    # The workers that `takes` counts, for who asks why a run was given up.
    "alter table run_heads add column lost_workers text[] not null default '{}'",
    """alter table runs
    add column resumed_from uuid,
    add column resumed_from_seq integer,
    add check ((resumed_from is null) = (resumed_from_seq is null))""",
    "create index runs_resumed on runs (resumed_from) where resumed_from is not null",
    """alter table signals
    add column idempotency_key text,
    drop constraint signals_kind_check,
    add check (kind in ('cancel', 'pause', 'resume'))""",
    """create unique index signals_once on signals (run_id, kind, idempotency_key)
    where idempotency_key is not null""",
    # What a process is for; 'api' never drives a run.
    """alter table workers add column role text not null default 'serve'
    check (role in ('serve', 'api', 'worker'))""",
    # The row is the announcement: whoever inserts it has told, and nobody tells twice.
    """create table breaker_transitions (
    scope text not null,
    worker_id text not null,
    generation bigint not null,
    kind text not null check (kind in ('tripped', 'half_open', 'closed')),
    cooldown_s double precision not null,
    run_id uuid,
    announced_at timestamptz not null default clock_timestamp(),
    primary key (scope, worker_id, generation, kind)
    )""",
    "create index breaker_transitions_by_age on breaker_transitions (announced_at)",
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
