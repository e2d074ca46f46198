"""Exact commit counts: by the writers' own count, and by the server's count of WAL flushes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import orjson
import pytest

from app.bootstrap import Services, open_services
from app.domain.envelope import Envelope
from app.store.migrate import migrate
from app.worker import Worker
from tests.conftest import make_settings
from tests.envelopes import chain, diamond, wide
from tests.servers import start_postgres


@pytest.fixture(scope="module")
def durable_postgres(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A Postgres that flushes as in service, so that flushes can be counted."""
    durable = {
        "fsync": "on",
        "synchronous_commit": "on",
        "full_page_writes": "on",
        "wal_buffers": "64MB",
    }
    with start_postgres(tmp_path_factory.mktemp("durable"), durable) as server:
        yield server


class WatchedWorker(Worker):
    """A worker that tells when it is between two turns."""

    def __init__(self, services: Services) -> None:
        super().__init__(services)
        self.services = services
        self.idle = asyncio.Event()

    async def _pause(self) -> None:
        self.idle.set()
        try:
            await super()._pause()
        finally:
            self.idle.clear()


@pytest.fixture
async def worker(durable_postgres: Any) -> AsyncIterator[WatchedWorker]:
    await migrate(durable_postgres.dsn)
    async with open_services(make_settings(sweep_s=3600.0), durable_postgres.dsn) as services:
        worker = WatchedWorker(services)
        await worker.start()
        yield worker
        await worker.drain(1.0)


async def run_to_end(worker: WatchedWorker, envelope: dict[str, Any], *, hand_off: bool) -> str:
    """Submit and wait; with `hand_off` there is no room until the run is queued.

    A claim that is under way does not know yet that the run is handed off, and may take it: that
    is one commit more.
    """
    services = worker.services
    model = Envelope.model_validate(envelope)
    while not worker.idle.is_set():
        await worker.idle.wait()
    services.runner.accepting = not hand_off
    submission = services.commands.submit_run(
        "default", model, orjson.dumps(envelope).decode(), services.registry.image("default")
    )
    services.runner.accepting = True
    channel = services.feed.enter(submission.run_id, 0)
    while not channel.ended:
        await channel.wait()
    services.feed.leave(channel)
    return channel.frames[-1].type


async def flushes(dsn: str) -> int:
    """WAL flushes of client sessions since the server started."""
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute("select pg_stat_force_next_flush()")
        version = connection.get_server_version().major
        if version >= 18:
            sql = """select sum(fsyncs) from pg_stat_io
                where object = 'wal' and backend_type = 'client backend'"""
        else:
            sql = "select wal_sync from pg_stat_wal"
        return int(await connection.fetchval(sql) or 0)
    finally:
        await connection.close()


async def settled_flushes(services: Services, dsn: str) -> int:
    """The count after the writers' sessions reported: a session does so when it is idle."""
    for writer in services.journal._writers:
        assert writer._connection is not None
        await writer._connection.execute("select pg_stat_force_next_flush()")
    return await flushes(dsn)


CASES = [
    pytest.param(diamond(), False, 4, id="diamond born claimed"),
    pytest.param(diamond(), True, 5, id="diamond by hand-off"),
    pytest.param(chain(100), False, 101, id="chain of 100"),
    pytest.param(wide(200), False, 4, id="200 wide"),
]


@pytest.mark.parametrize(("envelope", "hand_off", "expected"), CASES)
async def test_commits_by_the_writers_count(
    worker: WatchedWorker, envelope: dict[str, Any], hand_off: bool, expected: int
) -> None:
    journal = worker.services.journal
    await run_to_end(worker, diamond(), hand_off=False)
    before = journal.commits
    assert await run_to_end(worker, envelope, hand_off=hand_off) == "RUN_DONE"
    assert journal.commits - before == expected


@pytest.mark.parametrize(("envelope", "hand_off", "expected"), CASES)
async def test_commits_by_the_servers_count(
    worker: WatchedWorker,
    durable_postgres: Any,
    envelope: dict[str, Any],
    hand_off: bool,
    expected: int,
) -> None:
    runs = 3
    await run_to_end(worker, diamond(), hand_off=False)
    before = await settled_flushes(worker.services, durable_postgres.dsn)
    for _ in range(runs):
        await run_to_end(worker, envelope, hand_off=hand_off)
    counted = await settled_flushes(worker.services, durable_postgres.dsn) - before
    # Lease renewals do not wait for the disk. A full WAL buffer or segment may flush on its own.
    assert runs * expected <= counted <= runs * expected + 2
