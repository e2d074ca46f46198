"""What tests of the cache of model answers share: a model that waits for its order, and caches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Protocol

import asyncpg

from app.domain.chat import ChatAnswer, StopReason, ToolCall, Usage
from app.llm.cache import AnswerCache, Make
from app.store.database import Database

KEY = "ab" * 32
ANSWER = ChatAnswer(
    "forty-two \0 😀", StopReason.TOOLS, Usage(7, 3, 2), (ToolCall("c", "find", '{"q": 1}'),)
)


class Model:
    """Counts its calls. With `waits` it answers after `go_on`; the first calls fail as given."""

    def __init__(
        self, *failures: Exception, said: ChatAnswer = ANSWER, waits: bool = False
    ) -> None:
        self.calls = 0
        self.at_once = 0
        self.at_once_max = 0
        self.called = asyncio.Event()
        self.go_on = asyncio.Event()
        if not waits:
            self.go_on.set()
        self._failures = list(failures)
        self._said = said

    async def __call__(self) -> ChatAnswer:
        self.calls += 1
        self.at_once += 1
        self.at_once_max = max(self.at_once_max, self.at_once)
        self.called.set()
        try:
            await self.go_on.wait()
            await asyncio.sleep(0)
            if self._failures:
                raise self._failures.pop(0)
            return self._said
        finally:
            self.at_once -= 1


class StoredAtOnce(AnswerCache):
    """The cache, but who fetches comes back when the answer is stored: tests look at once."""

    async def fetch(self, key: str, tenant_id: str, make: Make) -> tuple[ChatAnswer, bool]:
        found = await super().fetch(key, tenant_id, make)
        await self.stored()
        return found


class Open(Protocol):
    async def __call__(self, **options: Any) -> AnswerCache: ...


@asynccontextmanager
async def opened_caches(dsn: str) -> AsyncIterator[Open]:
    """Makes caches that have a database of their own each, as in processes of their own."""
    async with AsyncExitStack() as stack:

        async def open_one(**options: Any) -> AnswerCache:
            database = await Database.open(dsn)
            stack.push_async_callback(database.close)
            cache = StoredAtOnce(database, **options)
            stack.push_async_callback(cache.aclose)
            return cache

        yield open_one


@asynccontextmanager
async def sql_session(dsn: str) -> AsyncIterator[Any]:
    """A connection of the test's own. Untyped, because asyncpg is."""
    connection = await asyncpg.connect(dsn)
    try:
        yield connection
    finally:
        await connection.close()


async def stored(sql: Any) -> int:
    """How many answers are stored."""
    return int(await sql.fetchval("select count(*) from llm_answers where body is not null"))


async def rows(sql: Any) -> int:
    """How many rows there are: answers and leases."""
    return int(await sql.fetchval("select count(*) from llm_answers"))
