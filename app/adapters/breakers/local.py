"""Circuit breakers in the memory of one process.

Used by itself when no Redis is configured, and by `redis.py` while Redis is away. Every call
returns without waiting, so nothing can come between reading a breaker and changing it. It never
does I/O, and what it knows ends with the process: `unannounced` is always empty.
"""

from __future__ import annotations

import itertools
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from app.adapters.breakers.policy import SCOPES_MAX, Policy, look_s, probe_s
from app.kit.clock import now_ms
from app.ports import (
    BreakerStatus,
    BreakerView,
    Permit,
    Refused,
    Transition,
    TransitionKind,
)


@dataclass(slots=True)
class _Breaker:
    """One scope. Times of `clock`, except `opened_at`, which is for people."""

    status: BreakerStatus = BreakerStatus.CLOSED
    generation: int = 0
    failures: int = 0
    opened_at: int | None = None
    open_until: float = 0.0
    probe: str = ""
    probe_at: float = 0.0
    probe_until: float = 0.0

    def wait_s(self, now: float) -> float:
        """How long whoever asks now is refused; 0 when a call may be made."""
        if self.status is BreakerStatus.OPEN:
            return max(0.0, self.open_until - now)
        if self.probe and now < self.probe_until:
            return look_s(now - self.probe_at, self.probe_until - now)
        return 0.0


class LocalBreakers:
    """Breakers that this process alone knows; their transitions carry its worker id."""

    def __init__(
        self,
        *,
        threshold: int,
        cooldown_s: float,
        worker_id_of: Callable[[], str],
        clock: Callable[[], float] = time.monotonic,
        stands_in: bool = False,
    ) -> None:
        """`stands_in`: for a store that all processes share and that is away now."""
        self._policy = Policy(threshold, cooldown_s)
        self._worker_id_of = worker_id_of
        self._clock = clock
        self._stands_in = stands_in
        self._breakers: OrderedDict[str, _Breaker] = OrderedDict()
        self._probes = itertools.count(1)
        self._newest_generation = 0

    @property
    def is_degraded(self) -> bool:
        """Never: nobody was meant to share these."""
        return False

    async def allow(self, scope: str, holder: str, limit_s: float) -> Permit | Refused:
        breaker = self._known(scope)
        now = self._clock()
        if breaker.status is BreakerStatus.CLOSED:
            return Permit(scope, breaker.generation, is_local=True)
        if (wait_s := breaker.wait_s(now)) > 0:
            return Refused(scope, breaker.generation, wait_s)
        transition = None
        if breaker.status is BreakerStatus.OPEN:
            breaker.status = BreakerStatus.HALF_OPEN
            transition = self._transition(scope, breaker, TransitionKind.HALF_OPEN)
        breaker.probe = f"local-{next(self._probes)}"
        breaker.probe_at = now
        breaker.probe_until = now + probe_s(limit_s)
        return Permit(scope, breaker.generation, breaker.probe, transition, is_local=True)

    async def report(self, permit: Permit, ok: bool | None, holder: str) -> Transition | None:
        breaker = self._breakers.get(permit.scope)
        if breaker is None or breaker.generation != permit.generation:
            return None
        if permit.probe:
            return self._end_probe(permit, breaker, ok)
        if breaker.status is not BreakerStatus.CLOSED or ok is None:
            return None
        breaker.failures = 0 if ok else breaker.failures + 1
        if breaker.failures >= self._policy.threshold:
            return self._open(permit.scope, breaker)
        return None

    async def views(self) -> list[BreakerView]:
        now = self._clock()
        return [
            _view(scope, breaker, now, degraded=self._stands_in)
            for scope, breaker in sorted(self._breakers.items())
        ]

    async def reset(self, scope: str) -> Transition | None:
        breaker = self._breakers[scope]
        if breaker.status is BreakerStatus.CLOSED:
            breaker.failures = 0
            return None
        return self._close(scope, breaker)

    async def unannounced(self) -> list[tuple[Transition, str]]:
        return []

    async def forget(self, transitions: list[Transition]) -> None:
        """There is nothing to forget."""

    async def aclose(self) -> None:
        """There is nothing to let go of."""

    def clear(self) -> None:
        """Know nothing any more. Reports of permits that are out are then of no generation."""
        self._breakers.clear()

    def _known(self, scope: str) -> _Breaker:
        breaker = self._breakers.setdefault(scope, _Breaker())
        self._breakers.move_to_end(scope)
        if len(self._breakers) > SCOPES_MAX:
            self._breakers.popitem(last=False)
        return breaker

    def _end_probe(self, permit: Permit, breaker: _Breaker, ok: bool | None) -> Transition | None:
        if breaker.probe != permit.probe:
            return None  # it took too long, and another one took its place
        if ok is None:
            breaker.probe = ""
            return None
        return self._close(permit.scope, breaker) if ok else self._open(permit.scope, breaker)

    def _open(self, scope: str, breaker: _Breaker) -> Transition:
        if breaker.status is BreakerStatus.HALF_OPEN:
            breaker.failures += 1
        # Of the whole process, so that a scope that was forgotten does not start from below.
        self._newest_generation = max(self._newest_generation + 1, now_ms())
        breaker.status = BreakerStatus.OPEN
        breaker.generation = self._newest_generation
        breaker.opened_at = now_ms()
        breaker.open_until = self._clock() + self._policy.cooldown_s
        breaker.probe = ""
        return self._transition(scope, breaker, TransitionKind.TRIPPED)

    def _close(self, scope: str, breaker: _Breaker) -> Transition:
        breaker.status = BreakerStatus.CLOSED
        breaker.failures = 0
        breaker.opened_at = None
        breaker.probe = ""
        return self._transition(scope, breaker, TransitionKind.CLOSED)

    def _transition(self, scope: str, breaker: _Breaker, kind: TransitionKind) -> Transition:
        return Transition(
            scope,
            breaker.generation,
            kind,
            self._policy.cooldown_s,
            worker_id=self._worker_id_of(),
            degraded=self._stands_in,
        )


def _view(scope: str, breaker: _Breaker, now: float, *, degraded: bool) -> BreakerView:
    return BreakerView(
        scope=scope,
        status=breaker.status,
        generation=breaker.generation,
        failures=breaker.failures,
        opened_at=breaker.opened_at,
        retry_after_s=breaker.wait_s(now),
        degraded=degraded,
    )
