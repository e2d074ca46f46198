"""The journal, the heads of runs, workers, signals and the registry.

Revision: 0001
Follows: nothing

Plain SQL, because partitions, storage parameters and partial indexes are what this schema is about.
There are no foreign keys on the hot path: the single statement that writes them keeps them true.
"""

from alembic import op

revision = "0001"
down_revision = None

SCHEMA = """
create table runs (
    run_id uuid primary key,
    tenant_id text not null,
    created_at timestamptz not null,
    objective text not null,
    label text,
    correlation_id text,
    envelope text,
    traceparent text not null,
    pruned_at timestamptz
);
create index runs_by_tenant on runs (tenant_id, run_id desc);
create index runs_by_label on runs (tenant_id, label, run_id desc) where label is not null;

-- Narrow and updated by every append: the free space keeps those updates heap-only.
create table run_heads (
    run_id uuid primary key,
    tenant_id text not null,
    epoch integer not null check (epoch >= 0),
    seq integer not null check (seq >= 1),
    owner text,
    takes smallint not null default 0,
    wake_at timestamptz,
    status text not null check (status in
        ('queued', 'running', 'awaiting_human', 'paused', 'done', 'failed', 'cancelled')),
    lane text not null check (lane in ('interactive', 'standard', 'batch')),
    check (owner is null or status not in ('done', 'failed', 'cancelled'))
) with (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.01);
create index run_heads_unfinished on run_heads (run_id)
    where status in ('queued', 'running', 'awaiting_human', 'paused');

create table events (
    run_day date not null,
    run_id uuid not null,
    seq integer not null check (seq >= 1),
    attempt integer,
    type text not null,
    node_id text,
    level text not null check (level in ('INFO', 'WARN', 'ERROR')),
    body text not null,
    primary key (run_day, run_id, seq)
) partition by range (run_day);
-- A node attempt has one result, whatever crashes: this index is the last guard of that promise.
create unique index events_one_result on events (run_day, run_id, node_id, attempt)
    where type in ('NODE_DONE', 'NODE_FAILED');

create table plan_versions (
    run_day date not null,
    run_id uuid not null,
    version integer not null check (version >= 1),
    body text not null,
    primary key (run_day, run_id, version)
) partition by range (run_day);

create table snapshots (
    run_day date not null,
    run_id uuid not null,
    seq integer not null,
    body text not null,
    primary key (run_day, run_id, seq)
) partition by range (run_day);

create table blobs (
    run_day date not null,
    run_id uuid not null,
    sha256 text not null,
    body bytea not null,
    primary key (run_day, run_id, sha256)
) partition by range (run_day);

create table signals (
    signal_id uuid primary key,
    run_id uuid not null,
    tenant_id text not null,
    kind text not null check (kind in ('resume')),
    body text not null,
    created_at timestamptz not null,
    outcome text
);
create index signals_open on signals (run_id) where outcome is null;

create table workers (
    worker_id text primary key,
    lease_until timestamptz not null,
    pg_start timestamptz not null,
    lock_key bigint not null,
    started_at timestamptz not null,
    host text not null,
    pid integer not null
) with (fillfactor = 50);

create table idempotency_keys (
    tenant_id text not null,
    route text not null,
    key text not null,
    run_id uuid not null,
    fingerprint text not null,
    created_at timestamptz not null,
    primary key (tenant_id, route, key)
);
create index idempotency_keys_by_age on idempotency_keys (created_at);

create table capabilities (
    tenant_id text not null,
    capability_id text not null,
    version text not null,
    body text not null,
    status text not null check (status in ('active', 'inactive')),
    registered_at timestamptz not null,
    last_seen_at timestamptz not null,
    expires_at timestamptz,
    primary key (tenant_id, capability_id, version)
);

create table facets (
    tenant_id text not null,
    name text not null,
    body text not null,
    registered_at timestamptz not null,
    primary key (tenant_id, name)
);

create table registry_revisions (
    tenant_id text primary key,
    revision bigint not null
);

-- What was written stays as it was written. Retention drops whole partitions, never rows.
create function refuse_change() returns trigger language plpgsql as $$
begin
    raise exception '% rows never change', tg_table_name using errcode = 'restrict_violation';
end $$;
create trigger events_never_change before update or delete on events
    for each row execute function refuse_change();
create trigger plan_versions_never_change before update or delete on plan_versions
    for each row execute function refuse_change();
"""


def upgrade() -> None:
    for statement in _statements(SCHEMA):
        op.execute(statement)


def _statements(script: str) -> list[str]:
    """The script cut at semicolons, but not inside the one function body."""
    head, body, tail = script.partition("create function")
    function, end, triggers = (body + tail).partition("end $$;")
    parts = [*head.split(";"), function + end.rstrip(";"), *triggers.split(";")]
    return [part for part in parts if part.strip()]
