"""Wake-ups between the processes of one database: NOTIFY without data, on a connection of its own.

Made by bootstrap where no Redis is configured. Never inside a data transaction: a NOTIFY there
serialises commits. At most one per topic goes out every 10 ms, however many commits there were, and
none while nobody else takes part. A lost wake-up costs the poll interval of whoever waits, and
nothing else.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from app.kit.waiting import wait_at_most
from app.ports import Topic
from app.store.database import REFUSED, TRANSIENT, HotConnection

log = logging.getLogger("flexrun.notify")

CHANNELS = {Topic.COMMITS: "flexrun_commits", Topic.WORK: "flexrun_work"}
TOPICS = {channel: topic for topic, channel in CHANNELS.items()}
COALESCE_S = 0.01
LOOK_S = 1.0


class NotifyWakeUps:
    """Tells other processes to look now, and is told by them."""

    def __init__(
        self,
        connect: Callable[[], Awaitable[HotConnection]],
        *,
        on_wake: Callable[[Topic], None],
        has_company: Callable[[], bool],
    ) -> None:
        self._connect = connect
        self._on_wake = on_wake
        self._has_company = has_company
        self._due: set[Topic] = set()
        self._pending = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def announce(self, topic: Topic) -> None:
        """Something is durable now. Costs nothing that the caller waits for."""
        self._due.add(topic)
        self._pending.set()

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="wake-ups")

    async def aclose(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            try:
                await self._serve(await self._connect())
            except (*TRANSIENT, *REFUSED) as error:
                log.warning(
                    "wake-ups are away (%s): others see commits later", type(error).__name__
                )
            await asyncio.sleep(LOOK_S)

    async def _serve(self, connection: HotConnection) -> None:
        """Listen and tell until the connection is lost."""
        try:
            for channel, topic in TOPICS.items():
                await connection.add_listener(channel, self._heard)
                self._on_wake(topic)  # what was missed before this connection listened
            while not connection.is_closed():
                if await wait_at_most(self._pending, LOOK_S):
                    await self._tell(connection)
                    await asyncio.sleep(COALESCE_S)
        finally:
            connection.terminate()

    async def _tell(self, connection: HotConnection) -> None:
        """One NOTIFY for each topic that is due."""
        topics = list(self._due)
        self._due.clear()
        self._pending.clear()
        if topics and self._has_company():
            await connection.execute("; ".join(f"notify {CHANNELS[topic]}" for topic in topics))

    def _heard(self, connection: Any, pid: int, channel: str, _payload: object) -> None:
        if pid != connection.get_server_pid():
            self._on_wake(TOPICS[channel])
