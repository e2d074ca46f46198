"""Circuit breakers that all processes share, in Redis; each alone while Redis is away.

Made by bootstrap when a Redis is configured. Redis is never authoritative: a round trip has 50 ms,
then `LocalBreakers` judges, and one task looks every second whether Redis is back. No call fails
because of Redis. The address holds a password, so it is never logged.

Scopes are found by an index, one sorted set that each process adds to before it first uses a scope
and every 10 s again. SCAN would need no second key, but it walks over everything that others keep
in the same Redis, from every process at every sweep.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

from app.adapters.breakers import scripts
from app.adapters.breakers.local import LocalBreakers
from app.adapters.breakers.policy import SCOPES_MAX, Policy, probe_s
from app.adapters.breakers.runner import BATCH_MAX, ScriptRunner, StoodStillError
from app.adapters.breakers.scripts import RANKS, Script
from app.ports import (
    BreakerStatus,
    BreakerView,
    Permit,
    Refused,
    Transition,
    TransitionKind,
)

log = logging.getLogger("flexrun.breakers")

BUDGET_S = 0.05
RETRY_S = 1.0
LIST_EVERY_S = 10.0
KEEP_S = 600.0
"""A breaker that nothing happens to is forgotten, but not before."""
UNRETURNED_MAX = 1_024
INDEX_KEY = "flexrun:cb:index"
CHECK_KEY = "flexrun:cb:check"


class _AwayError(Exception):
    """Redis gave no answer that could be used: judge alone."""


class RedisBreakers:
    """Breakers by scope in Redis, with the same policy in memory for outages."""

    def __init__(
        self,
        url: str,
        *,
        threshold: int,
        cooldown_s: float,
        worker_id_of: Callable[[], str],
        clock: Callable[[], float] = time.monotonic,
        budget_s: float = BUDGET_S,
    ) -> None:
        self._policy = Policy(threshold, cooldown_s)
        self._clock = clock
        self._local = LocalBreakers(
            threshold=threshold,
            cooldown_s=cooldown_s,
            worker_id_of=worker_id_of,
            clock=clock,
            stands_in=True,
        )
        self._runner = ScriptRunner(url, budget_s)
        self._is_away = False
        self._mending: asyncio.Task[None] | None = None
        self._token_prefix = secrets.token_hex(8)
        self._token_numbers = itertools.count(1)
        self._unreturned: dict[str, str] = {}  # token -> scope
        self._listed: OrderedDict[tuple[str, int], float] = OrderedDict()  # scope, TTL -> when
        self._newest_generation = 0

    @property
    def is_degraded(self) -> bool:
        return self._is_away

    async def allow(self, scope: str, holder: str, limit_s: float) -> Permit | Refused:
        if self._is_away:
            return await self._local.allow(scope, holder, limit_s)
        token = f"{self._token_prefix}-{next(self._token_numbers)}"
        try:
            ttl_ms = self._ttl_ms(limit_s)
            await self._list(scope, ttl_ms)
            arguments = (holder, token, _ms(probe_s(limit_s)), ttl_ms)
            answer = await self._ask(scripts.ALLOW, _key(scope), *arguments)
        except _AwayError:
            self._return_later(scope, token)
            return await self._local.allow(scope, holder, limit_s)
        except asyncio.CancelledError:
            self._return_later(scope, token)
            raise
        generation = self._seen(answer[1])
        match answer[0]:
            case "refused":
                return Refused(scope, generation, int(answer[2]) / 1000)
            case "probe":
                told = _told(scope, answer[2])
                return Permit(scope, generation, token, told, limit_s=limit_s)
        return Permit(scope, generation, limit_s=limit_s)

    async def report(self, permit: Permit, ok: bool | None, holder: str) -> Transition | None:
        if permit.is_local:
            return await self._local.report(permit, ok, holder)
        if ok is None and not permit.probe:
            return None
        try:
            answer = await self._tell(permit, ok, holder)
        except _AwayError:
            self._return_later(permit.scope, permit.probe)
            return None
        except asyncio.CancelledError:
            self._return_later(permit.scope, permit.probe)
            raise
        transition = _told(permit.scope, answer)
        if transition is not None:
            self._seen(transition.generation)
        return transition

    async def views(self) -> list[BreakerView]:
        try:
            return [_view(scope, row) for scope, row in await self._rows()]
        except _AwayError:
            return await self._local.views()

    async def reset(self, scope: str) -> Transition | None:
        try:
            if scope not in await self._scopes():
                raise KeyError(scope)
            return _told(scope, await self._ask(scripts.RESET, _key(scope), self._ttl_ms()))
        except _AwayError:
            return await self._local.reset(scope)

    async def unannounced(self) -> list[tuple[Transition, str]]:
        try:
            rows = await self._rows()
        except _AwayError:
            return []
        return [kept for scope, row in rows for kept in _kept(scope, row[5])]

    async def forget(self, transitions: list[Transition]) -> None:
        names = defaultdict(list)
        for transition in transitions:
            if not transition.degraded:
                names[transition.scope].append(_name(transition))
        try:
            for scope in names:
                await self._ask(scripts.FORGET, _key(scope), *names[scope])
        except _AwayError:
            return  # they are still there when Redis is back, and durable already

    async def aclose(self) -> None:
        if self._mending is not None:
            self._mending.cancel()
            await asyncio.gather(self._mending, return_exceptions=True)
        await self._runner.aclose()

    async def _tell(self, permit: Permit, ok: bool | None, holder: str) -> list[str]:
        key, ttl_ms = _key(permit.scope), self._ttl_ms(permit.limit_s)
        if ok is None:
            answer = await self._ask(scripts.RELEASE, key, permit.probe, ttl_ms)
        else:
            answer = await self._ask(
                *(scripts.REPORT, key, permit.generation, permit.probe, int(ok), holder),
                *(self._policy.threshold, _ms(self._policy.cooldown_s)),
                *(self._newest_generation, ttl_ms),
            )
        return list(answer)

    async def _scopes(self) -> list[str]:
        return sorted(await self._ask(scripts.SCOPES, INDEX_KEY))

    async def _rows(self) -> list[tuple[str, Any]]:
        """Every scope with its READ, in full batches but one by one: others want to ask between."""
        scopes = await self._scopes()
        rows: list[tuple[str, Any]] = []
        for start in range(0, len(scopes), BATCH_MAX):
            batch = scopes[start : start + BATCH_MAX]
            rows += zip(batch, await asyncio.gather(*map(self._read, batch)), strict=True)
        return rows

    async def _read(self, scope: str) -> Any:
        return await self._ask(scripts.READ, _key(scope))

    def _ttl_ms(self, limit_s: float = 0.0) -> int:
        """Of a breaker whose calls may take `limit_s`: they and its cool-down end long before."""
        return _ms(max(KEEP_S, 10 * self._policy.cooldown_s, 10 * probe_s(limit_s)))

    async def _list(self, scope: str, ttl_ms: int) -> None:
        """Put the scope into the index, before its breaker can change."""
        now, entry = self._clock(), (scope, ttl_ms)
        if now - self._listed.get(entry, float("-inf")) < LIST_EVERY_S:
            return
        await self._ask(scripts.LIST, INDEX_KEY, scope, ttl_ms, SCOPES_MAX)
        self._listed[entry] = now
        self._listed.move_to_end(entry)
        if len(self._listed) > SCOPES_MAX:
            self._listed.popitem(last=False)

    def _seen(self, generation: Any) -> int:
        number = int(generation)
        self._newest_generation = max(self._newest_generation, number)
        return number

    async def _ask(self, script: Script, key: str, *arguments: Any) -> Any:
        """One step in Redis, within the budget. Raises `_AwayError`, whatever went wrong."""
        if self._is_away:
            raise _AwayError
        try:
            return await self._runner.run(script, key, *arguments)
        except StoodStillError as error:
            raise _AwayError from error
        except Exception as error:
            self._lose(error)
            raise _AwayError from error

    def _lose(self, error: Exception) -> None:
        if not self._is_away:
            self._is_away = True
            log.warning(
                "Redis is away (%s): this process judges its breakers alone", type(error).__name__
            )
        self._mend_soon()

    def _return_later(self, scope: str, token: str) -> None:
        """Give a probe back that we may hold without knowing, or can not report on."""
        if token and len(self._unreturned) < UNRETURNED_MAX:  # else it is free when it expires
            self._unreturned[token] = scope
            self._mend_soon()

    def _mend_soon(self) -> None:
        if self._mending is None or self._mending.done():
            self._mending = asyncio.create_task(self._mend(), name="breakers-mend")

    async def _mend(self) -> None:
        """Until Redis is back and has every probe that is not under way."""
        while self._is_away or self._unreturned:
            if self._is_away:
                await asyncio.sleep(RETRY_S)
            try:
                async with asyncio.timeout(RETRY_S):
                    if self._is_away:
                        await self._runner.connect()
                    await self._runner.run(scripts.CHECK, CHECK_KEY)
                    for token, scope in list(self._unreturned.items()):
                        await self._runner.run(scripts.RELEASE, _key(scope), token, self._ttl_ms())
                        del self._unreturned[token]
            except Exception as error:
                self._lose(error)
            else:
                self._found()

    def _found(self) -> None:
        if self._is_away:
            self._is_away = False
            self._local.clear()  # else its openings of today would refuse calls at the next outage
            self._listed.clear()
            log.info("Redis is back: breakers are shared again")


def _key(scope: str) -> str:
    return f"flexrun:cb:{{{scope}}}"


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def _name(transition: Transition) -> str:
    return f"t:{transition.generation}:{RANKS[transition.kind]}:{transition.kind}"


def _told(scope: str, answer: list[str]) -> Transition | None:
    if not answer:
        return None
    kind, generation, cooldown = answer
    return Transition(scope, int(generation), TransitionKind(kind), int(cooldown) / 1000)


def _kept(scope: str, fields: list[str]) -> list[tuple[Transition, str]]:
    """Transitions of a READ, oldest first, with their holders. What is not ours is left out."""
    found = []
    for name, value in sorted(zip(fields[::2], fields[1::2], strict=True)):
        with contextlib.suppress(ValueError):
            _, generation, _, kind = name.split(":")
            cooldown, _, holder = value.partition(":")
            transition = _told(scope, [kind, generation, cooldown])
            if transition is not None:
                found.append((transition, holder))
    return found


def _view(scope: str, row: list[Any]) -> BreakerView:
    status = BreakerStatus(row[0])
    return BreakerView(
        scope=scope,
        status=status,
        generation=int(row[1]),
        failures=int(row[2]),
        opened_at=None if status is BreakerStatus.CLOSED else int(row[3]),
        retry_after_s=int(row[4]) / 1000,
        degraded=False,
    )
