"""Hot copies of model answers in Redis, for those who have one.

Made by bootstrap when a Redis is configured. A copy that can not be had within 50 ms is a miss, and
one that can not be made is none: nothing here raises. A command over its budget goes on by itself
for a while: a connection that takes longer to be made is there for the next one, and no reply can
reach another caller. The address holds a password, so it is never logged.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

log = logging.getLogger("flexrun.llm")

BUDGET_S = 0.05
TTL_S = 3_600
"""From when it is made, not from its last use: so the database hears of uses, too."""
BODY_BYTES_MAX = 262_144
AT_ONCE_MAX = 8
"""Commands, and so connections."""
PATIENCE_S = 5.0
REST_S = 1.0
"""After a failure Redis is not asked for so long."""
TELL_EVERY_S = 60.0


class RedisHotAnswers:
    """Answers by name, in the form that they are stored in."""

    def __init__(
        self,
        url: str,
        *,
        budget_s: float = BUDGET_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = Redis.from_url(
            url,
            retry=Retry(NoBackoff(), 0),
            socket_timeout=None,
            socket_connect_timeout=None,
            protocol=2,
            driver_info=None,
        )
        self._execute: Callable[..., Awaitable[Any]] = self._client.execute_command
        self._budget_s = budget_s
        self._clock = clock
        self._turns = asyncio.Semaphore(AT_ONCE_MAX)
        self._commands: set[asyncio.Task[Any]] = set()
        self._rest_until = float("-inf")
        self._tell_at = float("-inf")

    async def get(self, name: str) -> bytes | None:
        # Not GET: whatever somebody else put there, no more than the limit is read.
        body = await self._ask("GETRANGE", _key(name), 0, BODY_BYTES_MAX)
        return body if body and len(body) <= BODY_BYTES_MAX else None

    async def put(self, name: str, body: bytes) -> None:
        if len(body) <= BODY_BYTES_MAX:
            await self._ask("SET", _key(name), body, "EX", TTL_S)

    async def aclose(self) -> None:
        for command in self._commands:
            command.cancel()
        await asyncio.gather(*self._commands, return_exceptions=True)
        await self._client.aclose()

    async def _ask(self, *command: Any) -> Any:
        """The reply, or None when there is none within the budget."""
        if self._clock() < self._rest_until:
            return None
        asking = asyncio.create_task(self._command(command), name="llm-cache-redis")
        self._commands.add(asking)
        asking.add_done_callback(self._commands.discard)
        done, _ = await asyncio.wait({asking}, timeout=self._budget_s)
        if not done:
            self._rest("TimeoutError")
            return None
        return asking.result()

    async def _command(self, command: tuple[Any, ...]) -> Any:
        try:
            async with asyncio.timeout(PATIENCE_S), self._turns:
                return await self._execute(*command)
        except Exception as error:  # whatever the driver raises: a copy is only a copy
            self._rest(type(error).__name__)
            return None

    def _rest(self, reason: str) -> None:
        now = self._clock()
        self._rest_until = now + REST_S
        if now >= self._tell_at:
            self._tell_at = now + TELL_EVERY_S
            log.warning("Redis gives no hot copies of answers (%s)", reason)


def _key(name: str) -> str:
    return f"flexrun:llm:{name}"
