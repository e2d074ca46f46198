"""The service as processes of their own, to be killed; they speak to the test's database."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

from app.settings import Role
from tests.forks import Process, launch

READY = re.compile(r"ready at (http://\S+)")
START_S = 30.0
END_S = 20.0


@dataclass
class ServiceProcess:
    """A running process of the service. `url` is None when it died before it was ready."""

    process: Process
    url: str | None = None
    lines: list[str] = field(default_factory=list)
    _reader: asyncio.Task[None] | None = None

    async def wait_dead(self) -> int:
        """Its exit code, -9 after SIGKILL; fails the test when it lives on."""
        code = await asyncio.to_thread(self.process.wait, END_S)
        if self._reader is not None:
            await self._reader
        return code

    async def kill(self) -> None:
        """kill -9, unless it is dead already."""
        self.process.send_signal(signal.SIGKILL)
        await self.wait_dead()

    async def stop(self) -> int:
        """SIGTERM and wait for an orderly end; one that does not come is forced."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return await self.wait_dead()
        except subprocess.TimeoutExpired:
            await self.kill()
            raise


async def start_service(
    dsn: str, role: Role = "serve", /, *, executed: bool = False, **settings: str
) -> ServiceProcess:
    """Start it on a free port and wait until it is ready, or dead. `executed`: see `forks.py`."""
    environment = {
        **os.environ,
        "DATABASE_URL": dsn,
        "FLEXRUN_ALLOW_UNSAFE_POSTGRES": "true",
        "FLEXRUN_EGRESS_ALLOW": "127.0.0.1",
        "FLEXRUN_BACKOFF_BASE_MS": "1",
        "FLEXRUN_BACKOFF_MAX_MS": "20",
        "FLEXRUN_DRAIN_GRACE_S": "2",
        **{f"FLEXRUN_{name.upper()}": value for name, value in settings.items()},
    }
    # What ends by SIGKILL is never measured: spare these processes the cost of being traced.
    environment.pop("COVERAGE_PROCESS_CONFIG", None)
    said, say = os.pipe()
    try:
        process = await asyncio.to_thread(
            launch,
            *(role, "--port", "0"),
            env=environment,
            stdout=say,
            stderr=say,
            executed=executed,
        )
    finally:
        os.close(say)
    service = ServiceProcess(process)
    ready = asyncio.Event()
    service._reader = asyncio.create_task(_read(service, said, ready))
    async with asyncio.timeout(START_S):
        await ready.wait()
    return service


async def _read(service: ServiceProcess, said: int, ready: asyncio.Event) -> None:
    """Keep the output, find the address, and notice the end."""
    stream = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(said, "rb")
    )
    async for line in stream:
        text = line.decode(errors="replace").rstrip()
        service.lines.append(text)
        if service.url is None and (match := READY.search(text)):
            service.url = match[1]
            ready.set()
    ready.set()


@asynccontextmanager
async def service_process(
    dsn: str, role: Role = "serve", /, *, executed: bool = False, **settings: str
) -> AsyncIterator[ServiceProcess]:
    """A process that is gone at the end, however the test ends."""
    service = await start_service(dsn, role, executed=executed, **settings)
    try:
        yield service
    finally:
        await service.stop()


@asynccontextmanager
async def service_processes(
    dsn: str, *roles: Role, executed: bool = False, **settings: str
) -> AsyncIterator[list[ServiceProcess]]:
    """Several at once, in the order of their roles."""
    async with AsyncExitStack() as stack:
        starting = [
            asyncio.create_task(
                stack.enter_async_context(
                    service_process(dsn, role, executed=executed, **settings)
                ),
                name=role,
            )
            for role in roles
        ]
        yield await asyncio.gather(*starting)
