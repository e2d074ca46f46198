"""Runs scripts in Redis over one connection: what is asked while it is busy goes out together.

For `redis.py` only. Steps of many callers share a round trip, so that a hundred nodes that start at
once cost one, and no caller waits for a connection. A caller that is cancelled leaves its step
behind: the reply is read in its place and dropped, so no reply can reach another caller. A round
trip over its budget takes the connection along. The address holds a password: never log it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError

from app.adapters.breakers.scripts import Script

BATCH_MAX = 128


class StoodStillError(Exception):
    """The time was over because this process did not run, which says nothing about Redis."""


@dataclass(frozen=True, slots=True)
class _Step:
    script: Script
    arguments: tuple[Any, ...]  # the key first
    answer: asyncio.Future[Any]


class ScriptRunner:
    """One round trip at a time, each within `budget_s`."""

    def __init__(self, url: str, budget_s: float) -> None:
        # No retries: a report that is sent twice counts twice. No time limits inside: the budget is
        # the limit.
        self._client = Redis.from_url(
            url,
            retry=Retry(NoBackoff(), 0),
            socket_timeout=None,
            socket_connect_timeout=None,
            protocol=2,
            driver_info=None,
            decode_responses=True,
            encoding_errors="replace",
        )
        self._budget_s = budget_s
        self._waiting: deque[_Step] = deque()
        self._sending: asyncio.Task[None] | None = None

    async def run(self, script: Script, key: str, *arguments: Any) -> Any:
        """What the script returns. Raises whatever the driver raises, or `StoodStillError`."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Step(script, (key, *arguments), answer))
        if self._sending is None or self._sending.done():
            self._sending = asyncio.create_task(self._send(), name="breakers-send")
        return await answer

    async def connect(self) -> None:
        """Have a connection, which may take longer than a step."""
        await self._client.ping()

    async def aclose(self) -> None:
        if self._sending is not None:
            self._sending.cancel()
            await asyncio.gather(self._sending, return_exceptions=True)
        for step in self._waiting:
            step.answer.cancel()
        await self._client.aclose()

    async def _send(self) -> None:
        while self._waiting:
            batch = self._next_batch()
            try:
                answers = await self._round_trip(batch)
            except asyncio.CancelledError:  # we are closed
                self._waiting.extendleft(batch)
                raise
            except Exception as error:
                # Those who wait behind the batch would only wait for the same failure.
                for step in (*batch, *self._waiting):
                    _fail(step, error)
                self._waiting.clear()
                continue
            for step, answer in zip(batch, answers, strict=True):
                if isinstance(answer, Exception):
                    _fail(step, answer)
                elif not step.answer.done():
                    step.answer.set_result(answer)

    def _next_batch(self) -> list[_Step]:
        batch: list[_Step] = []
        while self._waiting and len(batch) < BATCH_MAX:
            step = self._waiting.popleft()
            if not step.answer.done():  # else its caller was cancelled
                batch.append(step)
        return batch

    async def _round_trip(self, batch: list[_Step]) -> list[Any]:
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with asyncio.timeout(self._budget_s):
                answers = await self._execute(
                    [(step, "EVALSHA", step.script.sha) for step in batch]
                )
                unknown = [n for n, one in enumerate(answers) if isinstance(one, NoScriptError)]
                again = [(batch[n], "EVAL", batch[n].script.text) for n in unknown]
                for n, answer in zip(unknown, await self._execute(again), strict=True):
                    answers[n] = answer
                return answers
        except TimeoutError as error:
            if loop.time() - began > 2 * self._budget_s:  # a timer that late is our own fault
                raise StoodStillError from error
            raise

    async def _execute(self, steps: list[tuple[_Step, str, str]]) -> list[Any]:
        if not steps:
            return []
        pipeline = self._client.pipeline(transaction=False)
        for step, command, script in steps:
            pipeline.execute_command(command, script, 1, *step.arguments)
        return await pipeline.execute(raise_on_error=False)


def _fail(step: _Step, error: Exception) -> None:
    if not step.answer.done():
        step.answer.set_exception(error)
        step.answer.exception()  # seen: a caller that is cancelled right now never looks
