"""An index over the calls of models in the journal.

Revision: 0004
Follows: 0003

`GET /v1/slm/metrics` reads all calls of a tenant, newest run first: with the index it touches the
rows that it shows, without it the whole journal. Partitions to come get it when they are attached.
"""

from alembic import op

revision = "0004"
down_revision = "0003"

STATEMENTS = (
    """create index events_model_calls on events (run_day, run_id, seq)
    where type = 'LLM_RESPONSE'""",
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
