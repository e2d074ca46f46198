"""One daemon thread beside an event loop, for work that blocks and may never come back.

The executors of the standard library are joined when the process ends; a far side that hangs would
keep it from leaving. This thread is not waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

Job = Callable[[], None]


class SideThread:
    """Runs one function at a time, in the order in which they were given."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    async def run(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises. Cancelling this does not stop the work."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def job() -> None:
            try:
                found = work()
            except Exception as error:
                _tell(loop, _settle, future, error)
            else:
                _tell(loop, _settle, future, None, found)

        self._jobs.put(job)
        return await future

    def stop(self) -> None:
        """End the thread when its work is done; nobody waits for that."""
        self._jobs.put(None)

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


def _settle(future: asyncio.Future[Any], error: Exception | None, found: Any = None) -> None:
    if future.done():
        return  # nobody waits any more
    if error is None:
        future.set_result(found)
    else:
        future.set_exception(error)


def _tell(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *arguments: object) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: the process is leaving
        loop.call_soon_threadsafe(call, *arguments)
