"""What tests do to a real Redis: kill it, freeze it, bring it back, move the time of a breaker.

For tests of the adapters that use Redis. Call from the main thread, like `servers.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import redis.asyncio

from tests.servers import DIE_WITH_PARENT, HOST, eventually, free_port, redis_binary

PATIENCE_S = 20.0
TIME_FIELDS = ("opened_at", "probe_at", "probe_until")


def make_client(url: str) -> Any:
    """A client of the test's own. Untyped, because half of redis-py is."""
    return redis.asyncio.Redis.from_url(url, decode_responses=True)


async def elapse(client: Any, scope: str, seconds: float) -> None:
    """Time passes for one breaker: Redis has no clock to turn, so its times move back."""
    key = f"flexrun:cb:{{{scope}}}"
    for name in TIME_FIELDS:
        if await client.hexists(key, name):
            await client.hincrby(key, name, -round(seconds * 1000))


async def until(is_true: Callable[[], bool | Awaitable[bool]], what: str) -> None:
    """Wait for a condition of this loop, and fail with its name rather than hang."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                found = is_true()
                if found if isinstance(found, bool) else await found:
                    return
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"not within {PATIENCE_S:.0f} s: {what}") from None


class MortalRedis:
    """A redis-server that a test kills and starts again on the same port, empty each time."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.port = free_port()
        self.url = f"redis://{HOST}:{self.port}/0"
        self._folder = folder
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-I", "-S", "-c", DIE_WITH_PARENT, str(os.getpid())]
        command += [str(redis_binary()), "--port", str(self.port), "--bind", HOST]
        command += ["--dir", str(self._folder), "--save", "", "--appendonly", "no"]
        self._process = subprocess.Popen(
            [*command, *self._options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        eventually(self._answers, "redis-server answers")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def _answers(self) -> bool:
        with (
            contextlib.suppress(OSError),
            socket.create_connection((HOST, self.port), timeout=1) as connection,
        ):
            connection.sendall(b"PING\r\n")
            return connection.recv(16)[:1] in (b"+", b"-")  # a refusal is an answer
        return False

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()
