"""Waiting with a limit, in a way that can always be cancelled.

`asyncio.wait_for` of Python 3.11 swallows a cancellation that arrives together with the result; a
loop that waits with it may then never end.
"""

from __future__ import annotations

import asyncio


async def wait_at_most(event: asyncio.Event, seconds: float) -> bool:
    """Wait for the event, at most so long. Whether it was set."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True
