"""Answers of models that may be given again, and the leases of the calls that make them.

Revision: 0003
Follows: 0002

A row is an answer or a lease, so that one statement can tell whether there is neither. What was not
used for long is deleted by its day; the table is no journal, and needs no partitions.
"""

from alembic import op

revision = "0003"
down_revision = "0002"

STATEMENTS = (
    """create table llm_answers (
    tenant_id text not null,
    cache_key text not null,
    body bytea,
    owner text,
    lease_until timestamptz,
    created_at timestamptz not null,
    last_used_day date not null,
    primary key (tenant_id, cache_key),
    check ((body is null) = (owner is not null)),
    check ((owner is null) = (lease_until is null))
    )""",
    "create index llm_answers_by_use on llm_answers (last_used_day)",
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
