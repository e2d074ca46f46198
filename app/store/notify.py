"""Wake-ups between the processes of one database: NOTIFY without data, on a connection of its own.

Never inside a data transaction: a NOTIFY there serialises commits. At most one every 10 ms goes
out, however many commits there were, and none while nobody else takes part. A lost wake-up costs
the poll interval of whoever waits, and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from app.kit.waiting import wait_at_most
from app.store.database import REFUSED, TRANSIENT, HotConnection

log = logging.getLogger("flexrun.notify")

CHANNEL = "flexrun_commits"
COALESCE_S = 0.01
LOOK_S = 1.0


class WakeUps:
    """Tells other processes that something was committed, and is told by them."""

    def __init__(
        self,
        connect: Callable[[], Awaitable[HotConnection]],
        *,
        on_wake: Callable[[], None],
        has_company: Callable[[], bool],
    ) -> None:
        self._connect = connect
        self._on_wake = on_wake
        self._has_company = has_company
        self._pending = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def announce(self) -> None:
        """Something is durable now. Costs nothing that the caller waits for."""
        self._pending.set()

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="wake-ups")

    async def close(self) -> None:
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
            await connection.add_listener(CHANNEL, self._heard)
            self._on_wake()  # what was missed before this connection listened
            while not connection.is_closed():
                if await wait_at_most(self._pending, LOOK_S):
                    self._pending.clear()
                    if self._has_company():
                        await connection.execute(f"notify {CHANNEL}")
                    await asyncio.sleep(COALESCE_S)
        finally:
            connection.terminate()

    def _heard(self, connection: Any, pid: int, _channel: str, _payload: object) -> None:
        if pid != connection.get_server_pid():
            self._on_wake()
