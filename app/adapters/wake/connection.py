"""What everything has in common that talks or listens through Redis for as long as a process lives.

A Redis that is away is tried again for ever, and never waited for. The address holds a password, so
it is never logged.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

log = logging.getLogger("flexrun.wake")

CONNECT_S = 10.0
PAUSE_FIRST_S = 0.1
PAUSE_MAX_S = 2.0


def make_client(url: str) -> Redis:
    """A client that waits as long as its caller does and leaves retries to it."""
    return Redis.from_url(
        url,
        retry=Retry(NoBackoff(), 0),
        socket_timeout=None,
        socket_connect_timeout=CONNECT_S,
        protocol=2,
        driver_info=None,
        decode_responses=True,
        encoding_errors="replace",
    )


async def next_message(listener: PubSub, quiet_s: float) -> dict[str, Any]:
    """The next message. A connection that says nothing for so long is asked for a sign of life,
    once; raises `TimeoutError` if it gives none."""
    message = await listener.get_message(timeout=quiet_s)
    if message is None:
        await listener.ping()
        message = await listener.get_message(timeout=quiet_s)
    if message is None:
        raise TimeoutError
    return dict(message)


async def for_ever(serve: Callable[[Callable[[], None]], Awaitable[None]], failing: str) -> None:
    """Serve, and after each failure again, with a growing pause that a success ends.

    `failing`: what the log says of a failure, with a place for the kind of error.
    """
    pause_s = PAUSE_FIRST_S

    def is_well() -> None:
        nonlocal pause_s
        pause_s = PAUSE_FIRST_S

    while True:
        try:
            await serve(is_well)
        except Exception as error:  # whatever the driver raises: nobody is stopped by it
            if pause_s == PAUSE_FIRST_S:
                log.warning(failing, type(error).__name__)
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, PAUSE_MAX_S)
