"""Deltas to the streams of other processes by Redis publish, for those who have a Redis.

A process listens while it has streams and for a while after, so that who subscribes to the channel
says who wants deltas: where nobody does, models need not stream. Runs are not told apart: they are
many and short, and to subscribe to each would cost more than to hear of some in vain.

Redis sees the texts and keeps none. What can not be passed on at once is dropped.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from pydantic import TypeAdapter, ValidationError

from app.adapters.wake.connection import for_ever, make_client, next_message
from app.ports import Delta

CHANNEL = "flexrun:deltas"
BUDGET_S = 0.05
COALESCE_S = 0.01
PUBLISH_S = 1.0
REST_S = 1.0
"""After a failure Redis is not asked for so long who listens."""
QUIET_S = 10.0
LINGER_S = 30.0
"""Streams come and go: only who had none for so long stops to listen."""
DUE_CHARS_MAX = 262_144
NOT_SENT = "deltas by Redis are not sent (%s): streams of other processes go without"
NOT_HEARD = "deltas by Redis are not heard (%s): streams of runs elsewhere go without"

_Message = TypeAdapter(tuple[str, list[Delta]])
"""The number of its sender, who does not listen to itself, and what is said."""


class RedisDeltas:
    """The `DeltaRelay` of a process. `hear` gets what others send; `has_listeners` says whether
    there are streams here, `has_company` whether there are other processes at all."""

    def __init__(
        self,
        url: str,
        *,
        hear: Callable[[Delta], None],
        has_listeners: Callable[[], bool],
        has_company: Callable[[], bool],
        budget_s: float = BUDGET_S,
    ) -> None:
        self._hear = hear
        self._has_listeners = has_listeners
        self._has_company = has_company
        self._budget_s = budget_s
        self._sender = secrets.token_hex(8)
        self._client = make_client(url)
        self._command: Callable[..., Awaitable[Any]] = self._client.execute_command
        self._due: list[Delta] = []
        self.due_chars = 0  # how much text waits to be sent
        self._pending = asyncio.Event()
        self._wanted = asyncio.Event()
        self._is_listening = False
        self._rest_until = float("-inf")
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def is_listening(self) -> bool:
        """What others send is heard."""
        return self._is_listening

    async def is_heard(self) -> bool:
        """See `DeltaRelay`."""
        if not self._has_company() or time.monotonic() < self._rest_until:
            return False
        try:
            async with asyncio.timeout(self._budget_s):
                _, count = await self._command("PUBSUB", "NUMSUB", CHANNEL)
        except Exception:  # whatever the driver raises: the model is called without
            self._rest_until = time.monotonic() + REST_S
            return False
        return int(count) > self._is_listening

    def send(self, delta: Delta) -> None:
        """See `DeltaRelay`."""
        if self._has_company() and self.due_chars < DUE_CHARS_MAX:
            self._due.append(delta)
            self.due_chars += len(delta.text)
            self._pending.set()

    def listen(self) -> None:
        """See `DeltaRelay`."""
        self._wanted.set()

    def start(self) -> None:
        """See `DeltaRelay`."""
        self._tasks = [
            asyncio.create_task(for_ever(self._tell, NOT_SENT), name="deltas-send"),
            asyncio.create_task(for_ever(self._listen, NOT_HEARD), name="deltas-listen"),
        ]

    async def aclose(self) -> None:
        """See `DeltaRelay`."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.aclose()

    async def _tell(self, is_well: Callable[[], None]) -> None:
        """Publish what is due, of all runs at once, at most every 10 ms. What fails is dropped."""
        while True:
            await self._pending.wait()
            due, self._due, self.due_chars = self._due, [], 0
            self._pending.clear()
            # `default`: an id that a database driver made is a UUID of a class of its own.
            message = orjson.dumps([self._sender, due], default=str)
            async with asyncio.timeout(PUBLISH_S):
                await self._command("PUBLISH", CHANNEL, message)
            is_well()
            await asyncio.sleep(COALESCE_S)

    async def _listen(self, is_well: Callable[[], None]) -> None:
        while True:
            await self._wanted.wait()
            await self._listen_for_a_while(is_well)

    async def _listen_for_a_while(self, is_well: Callable[[], None]) -> None:
        """Listen until there were no streams for long, or the connection is lost."""
        needed_at = time.monotonic()
        listener = self._client.pubsub()
        try:
            async with asyncio.timeout(QUIET_S):
                await listener.subscribe(CHANNEL)
            while time.monotonic() - needed_at < LINGER_S:
                self._take(await next_message(listener, QUIET_S))
                is_well()
                if self._has_listeners():
                    needed_at = time.monotonic()
            self._wanted.clear()
        finally:
            self._is_listening = False
            await listener.aclose()  # type: ignore[no-untyped-call]  # redis-py has no types here

    def _take(self, message: dict[str, Any]) -> None:
        if message["type"] == "subscribe":
            self._is_listening = True
        elif message["type"] == "message":
            try:
                sender, deltas = _Message.validate_json(message["data"])
            except ValidationError:
                return  # of another release, or of somebody else
            if sender != self._sender:
                for delta in deltas:
                    self._hear(delta)
