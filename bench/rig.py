"""What all workloads share: a scratch folder, one Postgres, the service under test, the book."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg

from app.store.embedded import EmbeddedPostgres, EmbeddedPostgresError
from app.store.embedded_files import remove_data
from bench import process
from bench.process import Running
from bench.stats import Book


@dataclass(slots=True)
class Rig:
    """Opens what is asked for when it is first asked for; `stack` closes it all in the end.

    `kept` is where workloads keep what they prepared once for all rounds.
    """

    scratch: Path
    book: Book
    stack: AsyncExitStack
    scale: float = 1.0
    kept: dict[str, Any] = field(default_factory=dict)

    def count(self, full: int, least: int = 1) -> int:
        """How often to do something at the scale that was asked for."""
        return max(least, int(full * self.scale))

    async def service(self) -> Running:
        """The service under test: `flexrun serve` on its own Postgres, every setting as it is."""
        if "service" not in self.kept:
            await self.server()
            self.kept["service"] = await self.stack.enter_async_context(
                process.running(data_dir=self._data_dir)
            )
        found: Running = self.kept["service"]
        return found

    async def server(self) -> EmbeddedPostgres:
        """The Postgres of the service, with its durable settings; stopped by its last user."""
        if "server" not in self.kept:
            server = await asyncio.to_thread(EmbeddedPostgres.start, self._data_dir)
            self.stack.push_async_callback(asyncio.to_thread, server.stop)
            self.kept["server"] = server
        found: EmbeddedPostgres = self.kept["server"]
        return found

    async def database(self, name: str, *, migrated: bool = True) -> str:
        """The address of another database on the same server, made anew."""
        dsn = (await self.server()).dsn
        await make_database(dsn, name)
        address = with_database(dsn, name)
        if migrated:
            await process.migrate(address)
        return address

    @property
    def _data_dir(self) -> Path:
        return self.scratch / "data"


def with_database(dsn: str, name: str) -> str:
    """The same server, another database."""
    return f"{dsn.rpartition('/')[0]}/{name}"


async def make_database(dsn: str, name: str) -> None:
    """An empty database of this name, whatever was there before."""
    admin = await asyncpg.connect(dsn)
    try:
        await admin.execute(f'drop database if exists "{name}" with (force)')
        await admin.execute(f'create database "{name}"')
    finally:
        await admin.close()


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder that is gone afterwards, with every database whose data folder was made in it."""
    with tempfile.TemporaryDirectory(prefix="flexrun-bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o711)  # as root, the server runs as another user, who has to pass
        try:
            yield folder
        finally:
            for data_dir in folder.iterdir():
                forget_data(data_dir)


def forget_data(data_dir: Path) -> None:
    """Remove a database of ours, which as root may lie outside of its folder."""
    if data_dir.is_dir():
        with contextlib.suppress(EmbeddedPostgresError, OSError):
            remove_data(data_dir)
