"""Processes under measurement: the service with its default durable settings, and stand-ins."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from app.settings import Role

ROOT = Path(__file__).resolve().parent.parent
READY = re.compile(rb"ready at http://\S+:(\d+)")
START_S = 60.0
STOP_S = 90.0
MIGRATE = ("-m", "app.cli.main", "migrate")


class DidNotStart(RuntimeError):
    """The process ended before it was ready. The text is what it printed."""


@dataclass(slots=True)
class Running:
    """A process that listens. `spawned_at` is wall-clock time, `ready_s` seconds since then."""

    process: asyncio.subprocess.Process
    port: int
    spawned_at: float
    ready_s: float
    _drain: asyncio.Task[None] | None = field(default=None, repr=False)

    @property
    def rss(self) -> int:
        """Resident bytes of the process itself; Postgres is not in it."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    @property
    def cpu_s(self) -> float:
        """Seconds of CPU that the process has used, its own and the kernel's for it."""
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL for one that does not end."""
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(self.process.wait(), STOP_S)
            except TimeoutError:
                self.process.kill()
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


async def spawn(arguments: Sequence[str], environment: Mapping[str, str]) -> Running:
    """Start Python with these arguments and wait until it prints where it is ready."""
    spawned_at, started = time.time(), time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
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
    running = Running(process, port, spawned_at, time.perf_counter() - started)
    running._drain = asyncio.create_task(_read_on(process))
    return running


async def start(
    role: Role = "serve",
    *,
    data_dir: Path | None = None,
    database_url: str | None = None,
    **settings: str,
) -> Running:
    """Start the service on a free port of loopback and wait until it says that it is ready."""
    arguments = ["-m", "app.cli.main", role, "--port", "0"]
    if data_dir is not None:
        arguments += ["--data-dir", str(data_dir)]
    return await spawn(arguments, clean_environment(database_url, **settings))


@asynccontextmanager
async def running(
    role: Role = "serve",
    *,
    data_dir: Path | None = None,
    database_url: str | None = None,
    **settings: str,
) -> AsyncIterator[Running]:
    """A service for the time of the block."""
    service = await start(role, data_dir=data_dir, database_url=database_url, **settings)
    try:
        yield service
    finally:
        await service.stop()


async def migrate(database_url: str) -> None:
    """Bring a database to the newest schema, as an operator would. Raises `DidNotStart`."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *MIGRATE,
        env=clean_environment(database_url),
        cwd=ROOT,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    if process.returncode != 0:
        raise DidNotStart(said.decode(errors="replace"))


def clean_environment(database_url: str | None = None, **settings: str) -> dict[str, str]:
    """The caller's environment without its settings of the service, and these instead.

    Byte code is written at the first start, whatever the caller has against it: an installation
    has it, too.
    """
    found = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("FLEXRUN_", "OTEL_", "LANGFUSE_"))
        and name not in ("DATABASE_URL", "REDIS_URL", "PYTHONDONTWRITEBYTECODE")
    }
    found |= {f"FLEXRUN_{name.upper()}": value for name, value in settings.items()}
    if database_url is not None:
        found["DATABASE_URL"] = database_url
    return found


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
