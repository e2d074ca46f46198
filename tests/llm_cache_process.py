"""A process that asks the cache of model answers, to be raced and killed by tests.

`python -m tests.llm_cache_process ORDER` with an order in JSON says `ready`, waits for a line, then
starts all callers of one key at once and says `asking`. Its model is the HTTP server at `url`. At
the end it says as JSON how many calls it made, how many hits it had and what was answered.
"""

from __future__ import annotations

import asyncio
import json
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass

import httpx

from app.adapters.llm_cache.redis import RedisHotAnswers
from app.domain.chat import ChatAnswer, StopReason
from app.llm import cache as module
from app.llm.cache import AnswerCache
from app.store.database import Database

PATIENCE_S = 30.0


@dataclass(frozen=True)
class Order:
    dsn: str
    redis_url: str | None
    url: str
    key: str
    callers: int
    lease_s: float


@dataclass(frozen=True)
class Told:
    calls: int
    hits: int
    answers: list[str]


class AskingProcess:
    """The process as its test sees it."""

    def __init__(self, process: Process) -> None:
        self._process = process

    async def go(self) -> None:
        """Let all callers ask; returns when they do."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"go\n")
        assert await self._line() == "asking\n"

    async def told(self) -> Told:
        return Told(**json.loads(await self._line()))

    async def kill(self) -> None:
        """kill -9, unless it has ended."""
        if self._process.returncode is None:
            self._process.kill()
        await self._process.communicate()

    async def _line(self) -> str:
        assert self._process.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            return (await self._process.stdout.readline()).decode()


@asynccontextmanager
async def asking_process(order: Order) -> AsyncIterator[AskingProcess]:
    """Started and ready; gone at the end of the block."""
    command = (sys.executable, "-m", "tests.llm_cache_process", json.dumps(asdict(order)))
    asking = AskingProcess(await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE))
    try:
        assert await asking._line() == "ready\n"
        yield asking
    finally:
        await asking.kill()


async def _main(order: Order) -> None:
    database = await Database.open(order.dsn)
    hot = None if order.redis_url is None else RedisHotAnswers(order.redis_url)
    module.STATEMENT_S = PATIENCE_S  # a busy machine is no outage of Postgres
    cache = AnswerCache(database, hot, lease_s=order.lease_s)
    calls = 0

    async def make() -> ChatAnswer:
        nonlocal calls
        calls += 1
        response = await client.post(order.url)
        return ChatAnswer(response.text, StopReason.END)

    async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
        _say("ready")
        await asyncio.to_thread(sys.stdin.readline)
        asking = [
            asyncio.create_task(cache.fetch(order.key, "t1", make)) for _ in range(order.callers)
        ]
        await asyncio.sleep(0)
        _say("asking")
        found = await asyncio.gather(*asking)
    await cache.aclose()
    if hot is not None:
        await hot.aclose()
    await database.close()
    answers = sorted({answer.text for answer, _ in found})
    _say(json.dumps(asdict(Told(calls, sum(hit for _, hit in found), answers))))


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(_main(Order(**json.loads(sys.argv[1]))))
