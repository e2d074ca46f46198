"""The ready set: nodes that are not started and whose requirements are all done."""

from __future__ import annotations

from app.domain.state import RunState


def ready_set(state: RunState) -> list[str]:
    """Ids that may start now, without regard to limits. It only reads what `apply` counted.

    A node that waits for its next attempt is not in it until `retry_at` has come.
    """
    found = list(state.ready)
    for queue in state.ready_limited.values():
        found.extend(queue)
    return found
