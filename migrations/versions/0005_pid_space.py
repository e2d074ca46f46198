"""Where the pid of a worker means something.

Revision: 0005
Follows: 0004

A process that was killed is known to be gone by whoever shares its table of pids, without a second
look at its lock. Workers of the previous version leave the column empty and are looked at twice.
"""

from alembic import op

revision = "0005"
down_revision = "0004"

STATEMENTS = ("alter table workers add column pid_space text",)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
