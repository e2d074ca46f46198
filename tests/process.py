"""The service as processes of their own, to be killed; they speak to the test's database."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

from app.settings import Role

READY = re.compile(r"ready at (http://\S+)")
START_S = 30.0
END_S = 20.0


@dataclass
class ServiceProcess:
    """A running process of the service. `url` is None when it died before it was ready."""

    process: asyncio.subprocess.Process
    url: str | None
    lines: list[str] = field(default_factory=list)
    _reader: asyncio.Task[None] | None = None

    async def wait_dead(self) -> int:
        """Its exit code, -9 after SIGKILL; fails the test when it lives on."""
        code = await asyncio.wait_for(self.process.wait(), END_S)
        if self._reader is not None:
            await self._reader
        return code

    async def kill(self) -> None:
        """kill -9, unless it is dead already."""
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGKILL)
        await self.wait_dead()

    async def stop(self) -> int:
        """SIGTERM and wait for an orderly end; one that does not come is forced."""
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return await self.wait_dead()
        except TimeoutError:
            await self.kill()
            raise


async def start_service(dsn: str, role: Role = "serve", /, **settings: str) -> ServiceProcess:
    """Start it on a free port and wait until it is ready, or dead."""
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
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "app.cli.main", role, "--port", "0"),
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    service = ServiceProcess(process, None)
    ready = asyncio.Event()
    service._reader = asyncio.create_task(_read(service, ready))
    async with asyncio.timeout(START_S):
        await ready.wait()
    return service


async def _read(service: ServiceProcess, ready: asyncio.Event) -> None:
    """Keep the output, find the address, and notice the end."""
    assert service.process.stdout is not None
    async for line in service.process.stdout:
        text = line.decode(errors="replace").rstrip()
        service.lines.append(text)
        if service.url is None and (match := READY.search(text)):
            service.url = match[1]
            ready.set()
    ready.set()


@asynccontextmanager
async def service_process(
    dsn: str, role: Role = "serve", /, **settings: str
) -> AsyncIterator[ServiceProcess]:
    """A process that is gone at the end, however the test ends."""
    service = await start_service(dsn, role, **settings)
    try:
        yield service
    finally:
        await service.stop()


@asynccontextmanager
async def service_processes(
    dsn: str, *roles: Role, **settings: str
) -> AsyncIterator[list[ServiceProcess]]:
    """Several at once, in the order of their roles."""
    async with AsyncExitStack() as stack:
        starting = [
            asyncio.create_task(
                stack.enter_async_context(service_process(dsn, role, **settings)), name=role
            )
            for role in roles
        ]
        yield await asyncio.gather(*starting)
