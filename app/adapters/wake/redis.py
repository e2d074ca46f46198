"""Wake-ups between processes by Redis publish, for those who have a Redis.

Made by bootstrap instead of `store/notify.py`. A message carries no data but the number of its
sender, who does not listen to itself. Nobody waits for Redis here: what is announced while it is
away is one more look for everybody when it is back, because whoever subscribes anew wakes up for
every topic.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

from app.adapters.wake.connection import for_ever, make_client, next_message
from app.ports import Topic

CHANNELS = {topic: f"flexrun:{topic}" for topic in Topic}
TOPICS = {channel: topic for topic, channel in CHANNELS.items()}
COALESCE_S = 0.01
PUBLISH_S = 1.0
QUIET_S = 10.0
"""A connection that says nothing for so long, not even to a ping, is given up."""
NOT_TOLD = "wake-ups by Redis are not told (%s): others see commits later"
NOT_HEARD = "wake-ups by Redis are not heard (%s): others see commits later"


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
        self._client = make_client(url)
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
            asyncio.create_task(for_ever(self._tell, NOT_TOLD), name="wake-ups-tell"),
            asyncio.create_task(for_ever(self._listen, NOT_HEARD), name="wake-ups-listen"),
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
                self._hear(await next_message(listener, QUIET_S))
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
