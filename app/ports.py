"""What a capability gets and gives: the only seam between the engine and its adapters.

`orchestrator/execute.py` builds a `Call`, hands it to the adapter of the node's kind and reads the
outcome. Adapters import this file and `domain`, never the journal, the gateway or each other.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from app.domain.capability import Capability
from app.domain.chat import (
    ChatAnswer,
    ChatRequest,
    Completion,
    Embeddings,
    Prompt,
    PromptFailed,
)
from app.domain.errors import Fault
from app.domain.events import Event
from app.kit.ids import span_id


def _no_emit(event_type: str, data: dict[str, Any]) -> None:
    """The default of `Call.emit`: for calls outside a run, such as tests of one capability."""


async def no_model(prompt: Prompt) -> Completion:
    """The default of `Call.complete`."""
    raise PromptFailed("no_compatible_model", "No model is configured.")


@dataclass(frozen=True, slots=True)
class Embedded:
    """The vector of a text, and the model that made it: those of two models do not compare."""

    model: str
    vector: tuple[float, ...]


async def no_embedding(text: str, models: Sequence[str] = ()) -> Embedded:
    """The default of `Call.embed`."""
    raise PromptFailed("no_compatible_model", "No model is configured.")


class Embed(Protocol):
    """How a capability embeds a text: by one of these models, by any when none is named."""

    def __call__(self, text: str, models: Sequence[str] = ()) -> Awaitable[Embedded]:
        """Raises `PromptFailed`."""
        ...


@dataclass(frozen=True, slots=True)
class Call:
    """One attempt of one node, as its capability sees it.

    `deadline_ms` is the time left in milliseconds when the call was built. `idempotency_key` is the
    same for every attempt of one round, so that the far side can recognise a repetition. `emit`
    puts an event (LOG, FILE_WRITTEN …) into the run's next append. `complete` and `embed` ask a
    model, and raise `PromptFailed`.
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
    trace_id: str = ""
    emit: Callable[[str, dict[str, Any]], None] = field(default=_no_emit)
    complete: Callable[[Prompt], Awaitable[Completion]] = field(default=no_model)
    embed: Embed = field(default=no_embedding)

    @property
    def traceparent(self) -> str:
        """The header of W3C Trace Context, "" outside of a trace. Made when it is asked for."""
        if not self.trace_id:
            return ""
        return f"00-{self.trace_id}-{span_id(self.run_id, self.node_id, self.attempt)}-01"


class CallFailed(Exception):
    """A call that gave no result. The engine decides by `effect` what follows.

    `retryable`: a repetition may help. `unknown_outcome`: the far side may have acted although no
    answer arrived (time-out, reset, 5xx): an `at_most_once` node is then blocked, never repeated.
    `retry_after_s`: the far side's own wish. `target_failed`: the far side is to blame, so that its
    breaker counts the failure; None: it says nothing about the far side (not called, or our fault).
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        retryable: bool,
        unknown_outcome: bool = False,
        retry_after_s: float | None = None,
        target_failed: bool | None = False,
        faults: tuple[Fault, ...] = (),
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retryable = retryable
        self.unknown_outcome = unknown_outcome
        self.retry_after_s = retry_after_s
        self.target_failed = target_failed
        self.faults = faults


class CallRefused(Exception):
    """Nothing was called: an open breaker behind the adapter keeps it. The node waits for it."""

    def __init__(self, scope: str, retry_after_s: float) -> None:
        super().__init__(scope)
        self.scope = scope
        self.retry_after_s = retry_after_s


class CapabilityAdapter(Protocol):
    """Runs the calls of one capability kind (builtin, http …)."""

    def check(self, capability: Capability) -> list[Fault]:
        """What is wrong with this registration's `config`; an empty list when it can run."""
        ...

    def inline(self, capability: Capability) -> Callable[[Call], dict[str, Any]] | None:
        """The function itself when it takes well under 1 ms and never waits, else None."""
        ...

    def breaker_scope(self, capability: Capability, tenant_id: str) -> str | None:
        """`tool::host` of the far side that this capability calls; None when it calls nobody.

        Where the credentials are the tenant's own, the tenant is part of it: one that is locked out
        must not open the breaker for all.
        """
        ...

    def invoke(self, call: Call) -> Awaitable[dict[str, Any]]:
        """The node's output; raises `CallFailed` or `CallRefused`. Cancelling it stops the work."""
        ...


# --- models: adapters/providers/ ------------------------------------------------------------------


class Provider(Protocol):
    """One endpoint of a vendor of models. It tries once: retries and breakers are not its job.

    Every call raises `TimeoutError` when its time is over, `LlmUnavailableError` for all else, and
    stops the exchange when it is cancelled. Keys, prompts and answers are in no error and no log.
    """

    async def chat(
        self, request: ChatRequest, on_text: Callable[[str], None] | None = None
    ) -> ChatAnswer:
        """The whole answer. With `on_text` it is streamed, and each piece of text told at once."""
        ...

    async def embed(self, model: str, texts: Sequence[str], timeout_s: float) -> Embeddings:
        """A vector for each text."""
        ...

    async def models(self, timeout_s: float) -> list[str]:
        """The vendor's names of the models that it offers now, sorted."""
        ...

    async def aclose(self) -> None:
        """Let go of connections."""
        ...


class HotAnswers(Protocol):
    """Copies of cached answers that are quicker to read than the database, and never authoritative.

    Nothing here raises: a copy that can not be had in time is a miss, and one that can not be made
    is none.
    """

    async def get(self, name: str) -> bytes | None:
        """What `put` was given, for as long as it lives."""
        ...

    async def put(self, name: str, body: bytes) -> None:
        """Keep a copy for a while; one that is too large is not kept."""
        ...

    async def aclose(self) -> None:
        """Let go of connections."""
        ...


# --- traces: adapters/tracing/ --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RunTrace:
    """A run that came to rest, to be told as spans of the trace that it belongs to.

    `traceparent` is the W3C context that the run was accepted with; a run that began its trace is
    named in it itself. `events` are all up to now, by seq. What ended up to `told_seq` was told
    when the run rested before.
    """

    run_id: str
    traceparent: str
    events: Sequence[Event]
    told_seq: int = 0


class TraceExporter(Protocol):
    """Sends traces away, best effort. Called by one thread at a time, never by that of the loop."""

    def export(self, runs: Sequence[RunTrace]) -> bool:
        """Build the spans and send them; may take its time. Whether they arrived, if it is known.

        No input, output, prompt or text of an error leaves the process.
        """
        ...

    def close(self) -> None:
        """Stop, also an export under way in another thread. May take as long as one."""
        ...


# --- breakers: adapters/breakers/local.py and redis.py --------------------------------------------


class BreakerStatus(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class TransitionKind(StrEnum):
    """What a breaker did: it opened (also after a failed probe), let a probe in, or closed."""

    TRIPPED = "tripped"
    HALF_OPEN = "half_open"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class Transition:
    """One change of one breaker, told to exactly one caller, who announces it.

    `generation` grows with every opening of the scope and is never used again, not even after the
    store lost everything: it is at least the store's clock in ms. A half-open and a closed
    transition carry the generation of the opening that they end. `worker_id` is "" for a breaker
    that all processes share, else the process whose own breaker it is. `degraded`: it is only its
    own because the shared store is away.
    """

    scope: str
    generation: int
    kind: TransitionKind
    cooldown_s: float
    worker_id: str = ""
    degraded: bool = False

    @property
    def key(self) -> tuple[str, str, int, str]:
        """What makes it the only one: scope, worker, generation, kind."""
        return (self.scope, self.worker_id, self.generation, self.kind.value)


@dataclass(frozen=True, slots=True)
class Permit:
    """The call may be made; report how it went. `probe` is the token of the one trial call.

    `limit_s` is how long the call may take, as it was asked for.
    """

    scope: str
    generation: int
    probe: str = ""
    transition: Transition | None = None
    is_local: bool = False
    """Given by the process's own breaker; the report goes there, too."""
    limit_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Refused:
    """The breaker is open, or its probe is under way: ask again in `retry_after_s`."""

    scope: str
    generation: int
    retry_after_s: float


@dataclass(frozen=True, slots=True)
class BreakerView:
    """A breaker as an operator sees it. Times in seconds; `opened_at` is ms since 1970."""

    scope: str
    status: BreakerStatus
    generation: int
    failures: int
    opened_at: int | None
    retry_after_s: float
    degraded: bool


class Breakers(Protocol):
    """Circuit breakers by scope (`tool::host`), with a two-step API: ask, call, report.

    A breaker opens after `threshold` consecutive failures, refuses for `cooldown_s`, then lets one
    probe in: success closes it, failure opens it again under a new generation.
    """

    async def allow(self, scope: str, holder: str, limit_s: float) -> Permit | Refused:
        """Ask before every call. `holder` says who announces what this causes: `run_id:epoch`.

        `limit_s`: what ends the call, at the latest. A probe is trusted that long.
        """
        ...

    async def report(self, permit: Permit, ok: bool | None, holder: str) -> Transition | None:
        """How the call went. None: no verdict (cancelled, or never made) only gives a probe back.

        A report of an earlier generation changes nothing.
        """
        ...

    async def views(self) -> list[BreakerView]:
        """Every breaker that is known, sorted by scope."""
        ...

    async def reset(self, scope: str) -> Transition | None:
        """Close the breaker by hand; None when it was closed, `KeyError` when it is not known."""
        ...

    async def unannounced(self) -> list[tuple[Transition, str]]:
        """Transitions of the shared store with their holders, until `forget` drops them."""
        ...

    async def forget(self, transitions: list[Transition]) -> None:
        """These are announced: their rows are durable."""
        ...

    async def aclose(self) -> None:
        """Let go of connections."""
        ...

    @property
    def is_degraded(self) -> bool:
        """The shared store is away, and this process judges alone."""
        ...


# --- wake-ups: store/notify.py and adapters/wake/redis.py -----------------------------------------


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
