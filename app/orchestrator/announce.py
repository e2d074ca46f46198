"""Announcements of breakers that no run makes: its worker died first, or an operator reset it.

A transition is told to one caller, who carries it into its run's journal. Should that caller lose
its run before, nobody else has the event; the shared store still lists it, and one of the workers
announces it here. As long as the caller may still do so, it is waited for: so nobody tells twice.
"""

from __future__ import annotations

import logging
from uuid import UUID

from app.ports import Breakers, Transition
from app.store.breakers import announce, announced, holders_that_may_announce
from app.store.database import Database

log = logging.getLogger("flexrun.breakers")


async def announce_transition(database: Database, transition: Transition) -> None:
    """Announce a change that belongs to no run. Of several who try, one does."""
    if await announce(database, transition):
        log.warning(
            "breaker %s: %s (generation %s)",
            transition.scope,
            transition.kind.value,
            transition.generation,
        )


async def announce_the_forgotten(breakers: Breakers, database: Database) -> None:
    """Announce what its callers did not and can not any more; drop what is announced."""
    told = await breakers.unannounced()
    if not told:
        return
    done = await announced(database, [transition for transition, _ in told])
    open_ones = [(t, holder) for t, holder in told if t.key not in done]
    holders = {found for _, holder in open_ones if (found := _holder(holder)) is not None}
    waited_for = await holders_that_may_announce(database, list(holders)) if holders else set()
    for transition, holder in open_ones:
        if _holder(holder) not in waited_for:
            await announce_transition(database, transition)
            done.add(transition.key)
    await breakers.forget([transition for transition, _ in told if transition.key in done])


def _holder(text: str) -> tuple[UUID, int] | None:
    """`run_id:epoch` of who caused a transition; None for an operator."""
    run_id, _, epoch = text.rpartition(":")
    try:
        return UUID(run_id), int(epoch)
    except ValueError:
        return None
