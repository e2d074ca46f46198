"""Breakers: what `adapters/breakers/local.py` and `redis.py` are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


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
