"""How an append can end other than durable."""

from __future__ import annotations


class LeaseLost(Exception):
    """The run is driven by somebody else now."""


class JournalRejected(Exception):
    """The database refused the data of this append; nothing of it was written."""


class HeadDiverged(Exception):
    """The head of the run is neither before nor after this append, under our own epoch."""


class KeyTaken(Exception):
    """The idempotency key of a new run belongs to another run."""


class JournalClosed(Exception):
    """The process is shutting down; the append was not sent."""
