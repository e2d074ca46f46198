"""All tables, for the statements that are built with SQLAlchemy Core.

The migrations in `migrations/versions` create them; a test compares both. Statuses repeat
`domain/run.py`. `run_day` is the UTC day in which the run was accepted: it is read from the UUIDv7
of the run id, so that every query of a run touches one partition only.
"""

from __future__ import annotations

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Column,
    Date,
    DateTime,
    Double,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    Uuid,
)

metadata = MetaData()

runs = Table(
    "runs",
    metadata,
    Column("run_id", Uuid, primary_key=True),
    Column("tenant_id", Text, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False),
    Column("objective", Text, nullable=False),
    Column("label", Text),
    Column("correlation_id", Text),
    Column("envelope", Text),  # the body as it was accepted; null once pruned
    Column("traceparent", Text, nullable=False),
    Column("pruned_at", DateTime(timezone=True)),
    Column("resumed_from", Uuid),  # the finished run whose results this one keeps
    Column("resumed_from_seq", Integer),
)

run_heads = Table(
    "run_heads",
    metadata,
    Column("run_id", Uuid, primary_key=True),
    Column("tenant_id", Text, nullable=False),
    Column("epoch", Integer, nullable=False),  # fencing number of the lease: in every write
    Column("seq", Integer, nullable=False),  # seq of the last event
    Column("owner", Text),  # the worker that drives it, null when nobody does
    Column("takes", SmallInteger, nullable=False),  # workers lost since the last progress
    Column("lost_workers", ARRAY(Text), nullable=False),  # the last of them are those of `takes`
    Column("wake_at", DateTime(timezone=True)),  # when a parked run wants to be claimed
    Column("status", Text, nullable=False),
    Column("lane", Text, nullable=False),
)

events = Table(
    "events",
    metadata,
    Column("run_day", Date, primary_key=True),
    Column("run_id", Uuid, primary_key=True),
    Column("seq", Integer, primary_key=True),
    Column("attempt", Integer),
    Column("type", Text, nullable=False),
    Column("node_id", Text),
    Column("level", Text, nullable=False),
    Column("body", Text, nullable=False),  # exactly the `data:` of the SSE frame
)

plan_versions = Table(
    "plan_versions",
    metadata,
    Column("run_day", Date, primary_key=True),
    Column("run_id", Uuid, primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("body", Text, nullable=False),
)

snapshots = Table(
    "snapshots",
    metadata,
    Column("run_day", Date, primary_key=True),
    Column("run_id", Uuid, primary_key=True),
    Column("seq", Integer, primary_key=True),
    Column("body", Text, nullable=False),
)

blobs = Table(
    "blobs",
    metadata,
    Column("run_day", Date, primary_key=True),
    Column("run_id", Uuid, primary_key=True),
    Column("sha256", Text, primary_key=True),
    Column("body", LargeBinary, nullable=False),
)

signals = Table(
    "signals",
    metadata,
    Column("signal_id", Uuid, primary_key=True),
    Column("run_id", Uuid, nullable=False),
    Column("tenant_id", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("body", Text, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False),
    Column("outcome", Text),  # null until the holder applied or discarded it
    Column("idempotency_key", Text),
)

workers = Table(
    "workers",
    metadata,
    Column("worker_id", Text, primary_key=True),
    Column("lease_until", DateTime(timezone=True), nullable=False),
    Column("pg_start", DateTime(timezone=True), nullable=False),
    Column("lock_key", BigInteger, nullable=False),
    Column("started_at", DateTime(timezone=True), nullable=False),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("role", Text, nullable=False),  # serve, api or worker
    Column("pid_space", Text),  # null where it is not known
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("tenant_id", Text, primary_key=True),
    Column("route", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("run_id", Uuid, nullable=False),
    Column("fingerprint", Text, nullable=False),  # sha256 of the canonical envelope
    Column("created_at", DateTime(timezone=True), nullable=False),
)

breaker_transitions = Table(
    "breaker_transitions",
    metadata,
    Column("scope", Text, primary_key=True),
    Column("worker_id", Text, primary_key=True),  # "" for a breaker that all processes share
    Column("generation", BigInteger, primary_key=True),
    Column("kind", Text, primary_key=True),
    Column("cooldown_s", Double, nullable=False),
    Column("run_id", Uuid),  # whose journal holds the event; null: announced by a sweep or by hand
    Column("announced_at", DateTime(timezone=True), nullable=False),
)

llm_answers = Table(
    "llm_answers",
    metadata,
    Column("tenant_id", Text, primary_key=True),
    Column("cache_key", Text, primary_key=True),
    Column("body", LargeBinary),  # null while somebody makes the call, who is
    Column("owner", Text),
    Column("lease_until", DateTime(timezone=True)),
    Column("created_at", DateTime(timezone=True), nullable=False),
    Column("last_used_day", Date, nullable=False),
)

capabilities = Table(
    "capabilities",
    metadata,
    Column("tenant_id", Text, primary_key=True),
    Column("capability_id", Text, primary_key=True),
    Column("version", Text, primary_key=True),
    Column("body", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("registered_at", DateTime(timezone=True), nullable=False),
    Column("last_seen_at", DateTime(timezone=True), nullable=False),
    Column("expires_at", DateTime(timezone=True)),  # last_seen_at + the heartbeat's patience
)

facets = Table(
    "facets",
    metadata,
    Column("tenant_id", Text, primary_key=True),
    Column("name", Text, primary_key=True),
    Column("body", Text, nullable=False),
    Column("registered_at", DateTime(timezone=True), nullable=False),
)

registry_revisions = Table(
    "registry_revisions",
    metadata,
    Column("tenant_id", Text, primary_key=True),
    Column("revision", BigInteger, nullable=False),
)

DAY_TABLES = ("events", "plan_versions", "snapshots", "blobs")
"""Tables with one partition a day, dropped together by retention."""
