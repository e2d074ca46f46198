"""Wake-ups between processes by Redis publish, for those who have a Redis.

Made by bootstrap instead of `store/notify.py`. A message carries no data but the number of its
sender, who does not listen to itself. Nobody waits for Redis here: what is announced while it is
away is one more look for everybody when it is back, because whoever subscribes anew wakes up for
every topic. The address holds a password, so it is never logged.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from app.ports import Topic

log = logging.getLogger("flexrun.wake")

CHANNELS = {topic: f"flexrun:{topic}" for topic in Topic}
TOPICS = {channel: topic for topic, channel in CHANNELS.items()}
COALESCE_S = 0.01
PUBLISH_S = 1.0
QUIET_S = 10.0
"""A connection that says nothing for so long, not even to a ping, is given up."""
PAUSE_FIRST_S = 0.1
PAUSE_MAX_S = 2.0


class RedisWakeUps:
    """Tells other processes to look now, and is told by them."""

    def __init__(
        self,
        url: str,
        *,
        on_wake: Callable[[Topic], None],
        has_company: Callable[[], bool] | None = None,
    ) -> None:
        self._on_wake = on_wake
        self._has_company = has_company
        self._sender = secrets.token_hex(8)
        self._client = Redis.from_url(
            url,
            retry=Retry(NoBackoff(), 0),
            socket_timeout=None,
            socket_connect_timeout=QUIET_S,
            protocol=2,
            driver_info=None,
            decode_responses=True,
            encoding_errors="replace",
        )
        self._command: Callable[..., Awaitable[Any]] = self._client.execute_command
        self._due: set[Topic] = set()
        self._pending = asyncio.Event()
        self._is_sending = False
        self._is_listening = False
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def is_telling(self) -> bool:
        """Something is announced that is not dealt with yet."""
        return self._pending.is_set() or self._is_sending

    @property
    def is_listening(self) -> bool:
        """What others announce is heard."""
        return self._is_listening

    def announce(self, topic: Topic) -> None:
        """Something is durable now. Costs nothing that the caller waits for."""
        self._due.add(topic)
        self._pending.set()

    def start(self) -> None:
        self._tasks = [
            asyncio.create_task(_for_ever(self._tell, "told"), name="wake-ups-tell"),
            asyncio.create_task(_for_ever(self._listen, "heard"), name="wake-ups-listen"),
        ]

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.aclose()

    async def _tell(self, is_well: Callable[[], None]) -> None:
        """Publish what is due, each topic at most once in 10 ms. What fails stays due."""
        while True:
            await self._pending.wait()
            if self._has_company is None or self._has_company():
                await self._publish()
                is_well()
            else:
                self._take_due()
            await asyncio.sleep(COALESCE_S)

    def _take_due(self) -> list[Topic]:
        topics = list(self._due)
        self._due.clear()
        self._pending.clear()
        return topics

    async def _publish(self) -> None:
        topics = self._take_due()
        self._is_sending = True
        try:
            async with asyncio.timeout(PUBLISH_S):
                for topic in topics:
                    await self._command("PUBLISH", CHANNELS[topic], self._sender)
        except Exception:
            for topic in topics:
                self.announce(topic)
            raise
        finally:
            self._is_sending = False

    async def _listen(self, is_well: Callable[[], None]) -> None:
        """Listen until the connection is lost, or says nothing any more."""
        listener = self._client.pubsub()
        try:
            async with asyncio.timeout(QUIET_S):
                await listener.subscribe(*TOPICS)
            while True:
                self._hear(await _next_message(listener))
                self._is_listening = True
                is_well()
        finally:
            self._is_listening = False
            await listener.aclose()  # type: ignore[no-untyped-call]  # redis-py has no types here

    def _hear(self, message: dict[str, Any]) -> None:
        """Wake up for what others did, and for all that was missed before this subscription."""
        if message["type"] == "message":
            is_news = message["data"] != self._sender
        else:
            is_news = message["type"] == "subscribe"
        if is_news:
            self._on_wake(TOPICS[message["channel"]])


async def _next_message(listener: PubSub) -> dict[str, Any]:
    """The next message; a silent connection is asked for a sign of life, once."""
    message = await listener.get_message(timeout=QUIET_S)
    if message is None:
        await listener.ping()
        message = await listener.get_message(timeout=QUIET_S)
    if message is None:
        raise TimeoutError
    return dict(message)


async def _for_ever(serve: Callable[[Callable[[], None]], Awaitable[None]], what: str) -> None:
    """Serve, and after each failure again, with a growing pause that a success ends."""
    pause_s = PAUSE_FIRST_S

    def is_well() -> None:
        nonlocal pause_s
        pause_s = PAUSE_FIRST_S

    while True:
        try:
            await serve(is_well)
        except Exception as error:  # whatever the driver raises: a wake-up stops nobody
            if pause_s == PAUSE_FIRST_S:
                log.warning(
                    "wake-ups by Redis are not %s (%s): others see commits later",
                    what,
                    type(error).__name__,
                )
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, PAUSE_MAX_S)
