"""A run while this process drives it: its state, its outputs and what has arrived for it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import UUID

from app.domain.budget import Account
from app.domain.contract import Contract
from app.domain.decide import Failure, RunLimits
from app.domain.envelope import Envelope
from app.domain.errors import PlanRejected
from app.domain.events import Event
from app.domain.plan import Plan
from app.domain.signals import Signal
from app.domain.state import CapabilityKey, RunState
from app.journal.record import Append, RunHandle
from app.planner.replan import Progress
from app.ports import Refused, Transition


@dataclass(slots=True)
class Outcome:
    """How one call ended. `raw` is the output as JSON, made once; `emitted` came from the call.

    `refused`: an open breaker kept the call from being made. `transitions` are changes of breakers
    that this call caused and that its run announces.
    """

    node_id: str
    output: Any = None
    raw: bytes = b""
    failure: Failure | None = None
    duration_ms: float = 0.0
    emitted: list[Event] = field(default_factory=list)
    refused: Refused | None = None
    transitions: tuple[Transition, ...] = ()


@dataclass(slots=True)
class Said:
    """What a call under way has to tell the journal before it ends: it asks a model, say."""

    events: tuple[Event, ...] = ()
    transitions: tuple[Transition, ...] = ()


@dataclass(slots=True)
class Planned:
    """What planning by a model came to: a plan, or why there is none at this attempt.

    `progress` is what it was made for; None for the first plan of a run.
    """

    plan: Plan | None
    progress: Progress | None
    planning_ms: float
    rejected: PlanRejected | None = None
    attempt: int = 1


Item = Outcome | Signal | Said | Planned

PLANNING = ""
"""The key of planning among the calls of a run: no node has it."""


class Inbox:
    """What has arrived for a run since its loop last looked. One reader, the loop."""

    __slots__ = ("_items", "_waiter", "poked")

    def __init__(self) -> None:
        self._items: list[Item] = []
        self._waiter: asyncio.Future[None] | None = None
        self.poked = False

    def put(self, item: Item) -> None:
        self._items.append(item)
        self.poke()

    def poke(self) -> None:
        """Make the loop look again, for example because a slot became free."""
        self.poked = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def take(self) -> list[Item]:
        """Everything that arrived, in order."""
        items, self._items = self._items, []
        self.poked = False
        return items

    async def wait(self, timeout_s: float | None) -> None:
        """Until something arrives, at most `timeout_s`."""
        if self.poked:
            return
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        timer = None
        if timeout_s is not None:
            timer = loop.call_later(max(timeout_s, 0.0), self.poke)
        try:
            await self._waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()


@dataclass(slots=True)
class DrivenRun:
    """Everything the loop holds about one run.

    `opening` is what the first append of this process carries: the rows and first events of a new
    run, or what a take-over has to say. `accepted` resolves when it is durable. `recall` are nodes
    whose attempt is called again after a take-over; `calls` are the tasks under way. `takes` counts
    the workers that were lost over the run, until it makes progress; `received` are its signals.
    """

    handle: RunHandle
    state: RunState
    envelope: Envelope
    output_contract: Contract
    tenant_id: str
    opening: Append | None
    accepted: asyncio.Future[None]
    limits: RunLimits
    recall: list[str] = field(default_factory=list)
    inbox: Inbox = field(default_factory=Inbox)
    outputs: dict[str, Any] = field(default_factory=dict)
    calls: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    slots: dict[str, CapabilityKey] = field(default_factory=dict)
    limited: tuple[Plan, dict[CapabilityKey, int]] | None = None
    durable_seq: int = 0
    snapshot_seq: int = 0
    takes: int = 0
    received: set[UUID] = field(default_factory=set)
    account: Account | None = None

    @property
    def holder(self) -> str:
        """Who announces what its calls do to breakers."""
        return f"{self.handle.text_id}:{self.handle.epoch}"

    def receive(self, signal: Signal) -> None:
        """Put a signal into the inbox, once: it is found again until it is consumed."""
        if signal.signal_id not in self.received:
            self.received.add(signal.signal_id)
            self.inbox.put(signal)

    def budget(self) -> Account:
        """What the run may spend on models: one account for all of its nodes."""
        if self.account is None:
            self.account = Account(self.envelope.constraints.budget, replace(self.state.spent))
        return self.account

    def refuse(self, error: Exception) -> None:
        """Tell whoever waits for the first append why it will not come."""
        if not self.accepted.done():
            self.accepted.set_exception(error)
            self.accepted.exception()  # the submitter may have left: not an unhandled error

    def cancel_calls(self) -> None:
        """Stop what is under way; nothing of it will be recorded."""
        for task in list(self.calls.values()):
            task.cancel()
        self.calls.clear()


def limits_of(envelope: Envelope) -> RunLimits:
    """The bounds of a run as its envelope gives them."""
    constraints = envelope.constraints
    deadline_s = constraints.deadline_s
    return RunLimits(
        constraints.max_parallel, None if deadline_s is None else int(deadline_s * 1000)
    )
