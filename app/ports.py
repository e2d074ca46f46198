"""What a capability gets and gives: the only seam between the engine and its adapters.

`orchestrator/execute.py` builds a `Call`, hands it to the adapter of the node's kind and reads the
outcome. Adapters import this file and `domain`, never the journal, the gateway or each other.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from app.domain.capability import Capability
from app.domain.errors import Fault


def _no_emit(event_type: str, data: dict[str, Any]) -> None:
    """The default of `Call.emit`: for calls outside a run, such as tests of one capability."""


@dataclass(frozen=True, slots=True)
class Call:
    """One attempt of one node, as its capability sees it.

    `deadline_ms` is the time left in milliseconds when the call was built. `idempotency_key` is the
    same for every attempt of one round, so that the far side can recognise a repetition. `emit`
    puts an event (LOG, FILE_WRITTEN …) into the run's next append.
    """

    run_id: str
    node_id: str
    attempt: int
    idempotency_key: str
    objective: str
    instructions: str
    inputs: Mapping[str, Any]
    deadline_ms: int
    capability: Capability
    traceparent: str = ""
    emit: Callable[[str, dict[str, Any]], None] = field(default=_no_emit)


class CallFailed(Exception):
    """A call that gave no result. The engine decides by `effect` what follows.

    `retryable`: a repetition may help. `unknown_outcome`: the far side may have acted although no
    answer arrived (time-out, reset, 5xx): an `at_most_once` node is then blocked, never repeated.
    `retry_after_s`: the far side's own wish.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        retryable: bool,
        unknown_outcome: bool = False,
        retry_after_s: float | None = None,
        faults: tuple[Fault, ...] = (),
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retryable = retryable
        self.unknown_outcome = unknown_outcome
        self.retry_after_s = retry_after_s
        self.faults = faults


class CapabilityAdapter(Protocol):
    """Runs the calls of one capability kind (builtin, http …)."""

    def check(self, capability: Capability) -> list[Fault]:
        """What is wrong with this registration's `config`; an empty list when it can run."""
        ...

    def inline(self, capability: Capability) -> Callable[[Call], dict[str, Any]] | None:
        """The function itself when it takes well under 1 ms and never waits, else None."""
        ...

    def invoke(self, call: Call) -> Awaitable[dict[str, Any]]:
        """The node's output; raises `CallFailed`. Cancelling it must stop the work."""
        ...
