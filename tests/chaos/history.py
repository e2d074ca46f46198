"""What the checker judges: client logs, the outside ledger of the tools, and rows of the database.

Plain data, filled by the clients (`clients.py`), read from the ledger (`ledger.py`) and from
Postgres (`archive.py`). Nothing here asks the service anything, and nothing here judges.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import orjson

TERMINAL = frozenset({"RUN_DONE", "RUN_FAILED", "RUN_CANCELLED"})
STATUS_OF_END = {"RUN_DONE": "done", "RUN_FAILED": "failed", "RUN_CANCELLED": "cancelled"}
WAITING = frozenset({"awaiting_human", "paused"})


def digest(body: bytes) -> bytes:
    """What is kept of a frame's data: enough to say that two are the same bytes."""
    return hashlib.sha256(body).digest()[:16]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call that reached a tool. Times are monotonic seconds of this machine, all processes."""

    run_id: str
    node_id: str
    attempt: int
    key: str
    begin: float
    end: float | None = None
    answer: str = ""

    @property
    def acted(self) -> bool:
        """A 429 says that nothing was done."""
        return self.answer != "429"


@dataclass(slots=True)
class Connection:
    """One event stream as its client saw it. `ended`: `end` (in order), `cut`, or `204`."""

    run_id: str
    after: int
    seqs: array[int] = field(default_factory=lambda: array("l"))
    ended: str = "cut"
    saw_terminal: bool = False
    gaps: int = 0


@dataclass(slots=True)
class Post:
    """One envelope under one Idempotency-Key, over all its repetitions."""

    key: str
    kind: str
    run_ids: list[str] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class SentSignal:
    """A signal that was answered 202, `at` in monotonic seconds as in `ToolCall`."""

    run_id: str
    kind: str
    key: str
    signal_id: str
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class BadAnswer:
    """An answer of a status, type or shape that the API does not promise."""

    method: str
    path: str
    status: int
    what: str


@dataclass(slots=True)
class ClientLog:
    """What the clients were told. `left_waiting`: runs that no operator answers on purpose."""

    posts: dict[str, Post] = field(default_factory=dict)
    frames: defaultdict[str, dict[int, bytes]] = field(default_factory=lambda: defaultdict(dict))
    changed: list[tuple[str, int]] = field(default_factory=list)
    connections: list[Connection] = field(default_factory=list)
    signals: list[SentSignal] = field(default_factory=list)
    bad_answers: list[BadAnswer] = field(default_factory=list)
    left_waiting: set[str] = field(default_factory=set)
    unavailable: int = 0
    frames_seen: int = 0

    def saw(self, connection: Connection, seq: int, body: bytes) -> None:
        """A frame arrived on a connection."""
        self.frames_seen += 1
        connection.seqs.append(seq)
        mark = digest(body)
        if self.frames[connection.run_id].setdefault(seq, mark) != mark:
            self.changed.append((connection.run_id, seq))

    @property
    def accepted(self) -> set[str]:
        return {run_id for post in self.posts.values() for run_id in post.run_ids}


@dataclass(frozen=True, slots=True)
class Head:
    epoch: int
    seq: int
    status: str
    owner: str | None = None


@dataclass(frozen=True, slots=True)
class EventRow:
    """A row of the journal: its columns, and the body that was streamed."""

    seq: int
    type: str
    node_id: str | None
    attempt: int | None
    body: bytes

    @property
    def data(self) -> dict[str, Any]:
        found: dict[str, Any] = orjson.loads(self.body)["data"]
        return found


@dataclass(frozen=True, slots=True)
class SignalRow:
    signal_id: str
    kind: str
    key: str | None
    outcome: str | None


@dataclass(slots=True)
class RunRecord:
    """All that is known of one run, from all three sources."""

    run_id: str
    head: Head
    rows: list[EventRow]
    plans: dict[int, dict[str, Any]] = field(default_factory=dict)
    snapshots: list[tuple[int, bytes]] = field(default_factory=list)
    signals: list[SignalRow] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    frames: dict[int, bytes] = field(default_factory=dict)
    connections: list[Connection] = field(default_factory=list)
    sightings: list[tuple[int, int]] = field(default_factory=list)
    """`(epoch, seq)` of the head, as an observer saw it change."""

    @property
    def types(self) -> list[str]:
        return [row.type for row in self.rows]

    def nodes(self) -> dict[str, dict[str, Any]]:
        """The nodes of all plan versions, by id; what the newest says of one counts."""
        return {
            node["id"]: node for _, plan in sorted(self.plans.items()) for node in plan["nodes"]
        }


@dataclass(frozen=True, slots=True)
class BreakerRow:
    """A row of `breaker_transitions`: an announcement that is durable."""

    scope: str
    worker_id: str
    generation: int
    kind: str
    run_id: str | None


@dataclass(slots=True)
class Surroundings:
    """What is not of one run: keys, announcements, and what was done to workers, by pid.

    `disturbed`: others may have taken their runs; None means anybody's. `struck`: the suite itself
    killed, froze or cut them off, so that their end says nothing about the runs they drove.
    """

    key_of_run: dict[str, str] = field(default_factory=dict)
    runs_of_label: dict[str, list[str]] = field(default_factory=dict)
    announced: list[BreakerRow] = field(default_factory=list)
    disturbed: set[int] | None = None
    struck: set[int] = field(default_factory=set)
    expected_poison: set[str] = field(default_factory=set)
    may_wait: set[str] = field(default_factory=set)
    signal_ids: set[str] = field(default_factory=set)
