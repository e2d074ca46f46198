"""What processes tell each other: `adapters/wake/` and `store/notify.py` carry it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol
from uuid import UUID


class Topic(StrEnum):
    """What a wake-up is about. It carries no data: whoever hears it looks in the database."""

    COMMITS = "commits"
    WORK = "work"


class WakeUps(Protocol):
    """Tells other processes to look now. A lost wake-up costs a poll interval, nothing else."""

    def announce(self, topic: Topic) -> None:
        """Something is durable. Never blocks and never raises; many become one every 10 ms."""
        ...

    def start(self) -> None:
        """Listen and tell, until closed. A transport that is away is tried again for ever."""
        ...

    async def aclose(self) -> None:
        """Stop, and let go of connections."""
        ...


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of text that an attempt of a node says, for whoever follows its run just now.

    `call` is the number of the model's call, as in LLM_REQUEST; None for what the capability says
    itself. Pieces of one text are numbered 1, 2, 3 …; a number that is missing was dropped. `seq`
    is the last event that the run had when this was said.
    """

    run_id: UUID
    seq: int
    node_id: str
    attempt: int
    call: int | None
    piece: int
    text: str


class DeltaRelay(Protocol):
    """Takes deltas to other processes whose streams follow the run. Best effort: nothing raises."""

    async def is_heard(self) -> bool:
        """Whether another process listens. Answered within a fraction of a second."""
        ...

    def send(self, delta: Delta) -> None:
        """Pass a delta on. Never blocks; what can not be sent in time is dropped."""
        ...

    def listen(self) -> None:
        """A stream was opened here: hear what others send, until there is none for a while."""
        ...

    def start(self) -> None:
        """Send and listen, until closed. A transport that is away is tried again for ever."""
        ...

    async def aclose(self) -> None:
        """Stop, and let go of connections."""
        ...
