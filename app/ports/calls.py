"""What a capability gets and gives: the only seam between the engine and its adapters.

`orchestrator/execute.py` builds a `Call`, hands it to the adapter of the node's kind and reads the
outcome. Adapters import this and `domain`, never the journal, the gateway or each other.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from app.domain.capability import Capability
from app.domain.chat import Completion, Prompt, PromptFailed
from app.domain.errors import Fault
from app.kit.ids import span_id


def _no_emit(event_type: str, data: dict[str, Any]) -> None:
    """The default of `Call.emit`: for calls outside a run, such as tests of one capability."""


def _no_delta(text: str) -> None:
    """The default of `Call.delta`."""


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


class Tools(Protocol):
    """The registered capabilities that a call may call itself: `orchestrator/tools.py`."""

    def find(self, capability_id: str, version: str | None = None) -> Capability | None:
        """The one to call; without a version the newest active one. No I/O."""
        ...

    def invoke(
        self, call: Call, capability: Capability, inputs: Mapping[str, Any]
    ) -> Awaitable[dict[str, Any]]:
        """See `Call.invoke`."""
        ...


def _no_tools() -> CallFailed:
    text = "What is a tool itself can not call tools."
    return CallFailed("tool_has_tools", text, retryable=False, target_failed=None)


class _NoTools:
    """The default of `Call.tools`: for what is a tool itself, and for calls outside a run."""

    def find(self, capability_id: str, version: str | None = None) -> Capability | None:
        raise _no_tools()

    async def invoke(
        self, call: Call, capability: Capability, inputs: Mapping[str, Any]
    ) -> dict[str, Any]:
        raise _no_tools()


NO_TOOLS: Tools = _NoTools()


@dataclass(frozen=True, slots=True)
class Call:
    """One attempt of one node, as its capability sees it.

    `deadline_ms` is the time left in milliseconds when the call was built. `idempotency_key` is the
    same for every attempt of one round, so that the far side can recognise a repetition. `emit`
    puts an event (LOG, FILE_WRITTEN …) into the run's next append. `delta` shows a piece of text,
    from any thread, to whoever follows the run at this moment; it is stored nowhere. `complete` and
    `embed` ask a model, and raise `PromptFailed`. `tools` are the capabilities that it may call by
    `invoke`. A function that is run inline has none of these three.
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
    delta: Callable[[str], None] = field(default=_no_delta)
    complete: Callable[[Prompt], Awaitable[Completion]] = field(default=no_model)
    embed: Embed = field(default=no_embedding)
    tools: Tools = field(default=NO_TOOLS)

    async def invoke(self, capability: Capability, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The output of another capability, called within this attempt and its time.

        Both contracts hold, and the effect is not stronger than the caller's own. What is called
        has no tools itself. Raises `CallFailed`; with `unknown_outcome` its effect may have
        happened and must not be asked for again.
        """
        return await self.tools.invoke(self, capability, inputs)

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
