"""The service as a process of its own, with its default durable settings."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
READY = re.compile(rb"ready at http://\S+:(\d+)")
START_S = 60.0
STOP_S = 90.0


class DidNotStart(RuntimeError):
    """The process ended, or said nothing, before it was ready. The text is what it printed."""


@dataclass(slots=True)
class Service:
    """A running `flexrun serve`. `spawned_at` is wall-clock time, `ready_s` seconds since then."""

    process: asyncio.subprocess.Process
    port: int
    spawned_at: float
    ready_s: float
    _drain: asyncio.Task[None] | None = field(default=None, repr=False)

    @property
    def rss(self) -> int:
        """Resident bytes of the process itself; Postgres is not in it."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    async def stop(self) -> None:
        """SIGTERM, then SIGKILL for one that does not end."""
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(self.process.wait(), STOP_S)
            except TimeoutError:
                await self.kill()
        await self._ended()

    async def kill(self) -> None:
        """kill -9."""
        if self.process.returncode is None:
            self.process.kill()
        await self._ended()

    async def _ended(self) -> None:
        await self.process.wait()
        if self._drain is not None:
            await self._drain


async def start(
    *, data_dir: Path | None = None, database_url: str | None = None, **settings: str
) -> Service:
    """Start the service on a free port of loopback and wait until it says that it is ready."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("FLEXRUN_") and name not in ("DATABASE_URL", "REDIS_URL")
    }
    environment |= {f"FLEXRUN_{name.upper()}": value for name, value in settings.items()}
    command = [sys.executable, "-m", "app.cli.main", "serve", "--port", "0"]
    if database_url is not None:
        environment["DATABASE_URL"] = database_url
    if data_dir is not None:
        command += ["--data-dir", str(data_dir)]
    spawned_at, started = time.time(), time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        *command,
        env=environment,
        cwd=ROOT,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        port = await asyncio.wait_for(_port(process), START_S)
    except BaseException:
        if process.returncode is None:
            process.kill()
        await process.wait()
        raise
    service = Service(process, port, spawned_at, time.perf_counter() - started)
    service._drain = asyncio.create_task(_read_on(process))
    return service


async def _port(process: asyncio.subprocess.Process) -> int:
    assert process.stdout is not None
    said = []
    async for line in process.stdout:
        said.append(line.decode(errors="replace"))
        if found := READY.search(line):
            return int(found[1])
    raise DidNotStart("".join(said) or "(nothing was printed)")


async def _read_on(process: asyncio.subprocess.Process) -> None:
    """An unread pipe would stop the process when it is full."""
    assert process.stdout is not None
    while await process.stdout.read(1 << 16):
        pass


@asynccontextmanager
async def running(
    *, data_dir: Path | None = None, database_url: str | None = None, **settings: str
) -> AsyncIterator[Service]:
    """A service for the time of the block."""
    service = await start(data_dir=data_dir, database_url=database_url, **settings)
    try:
        yield service
    finally:
        await service.stop()


@asynccontextmanager
async def scratch() -> AsyncIterator[Path]:
    """A folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="flexrun-bench-", ignore_cleanup_errors=True) as name:
        yield Path(name)
