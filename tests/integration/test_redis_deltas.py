"""Deltas by a real Redis: heard by others, never waited for, and back after an outage."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from uuid import UUID

import orjson
import pytest

from app.adapters.wake import deltas as redis_deltas
from app.adapters.wake.deltas import CHANNEL, DUE_CHARS_MAX, RedisDeltas
from app.ports import Delta
from tests.redis_kit import MortalRedis, make_client, until
from tests.servers import RunningRedis, free_port


def delta(piece: int, text: str = "oats \u2028 🚀") -> Delta:
    return Delta(UUID(int=1), 7, "A", 1, 2, piece, text)


class Process:
    """The deltas of one process, and what it heard."""

    def __init__(self, url: str, *, has_company: bool = True) -> None:
        self.heard: list[Delta] = []
        self.has_listeners = True
        self.has_company = has_company
        self.relay = RedisDeltas(
            url,
            hear=self.heard.append,
            has_listeners=lambda: self.has_listeners,
            has_company=lambda: self.has_company,
            budget_s=1.0,
        )

    async def listens(self) -> None:
        self.relay.listen()
        await until(lambda: self.relay.is_listening, "it listens")


@asynccontextmanager
async def processes(url: str, number: int = 2) -> AsyncIterator[list[Process]]:
    async with AsyncExitStack() as stack:
        made = [Process(url) for _ in range(number)]
        for process in made:
            process.relay.start()
            stack.push_async_callback(process.relay.aclose)
        yield made


async def test_who_listens_is_known_and_hears_all_but_itself(redis_server: RunningRedis) -> None:
    async with processes(redis_server.url) as (worker, api):
        assert not await worker.relay.is_heard()
        await worker.listens()
        assert not await worker.relay.is_heard(), "it does not count itself"
        assert await api.relay.is_heard()
        await api.listens()
        assert await worker.relay.is_heard()

        said = [delta(number) for number in range(100)]
        for one in said:
            worker.relay.send(one)
        api.relay.send(delta(1_000))
        await until(lambda: len(api.heard) == 100 and len(worker.heard) == 1, "it is through")
        assert (api.heard, worker.heard) == (said, [delta(1_000)])


async def test_nothing_is_asked_and_sent_without_company(redis_server: RunningRedis) -> None:
    async with processes(redis_server.url) as (worker, api):
        await api.listens()
        worker.has_company = False
        assert not await worker.relay.is_heard()
        worker.relay.send(delta(1))
        worker.has_company = True
        worker.relay.send(delta(2))
        await until(lambda: bool(api.heard), "with company it sends")
        assert api.heard == [delta(2)]


async def test_who_has_no_streams_stops_to_listen(
    redis_server: RunningRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_deltas, "LINGER_S", 0.05)
    monkeypatch.setattr(redis_deltas, "QUIET_S", 0.2)
    async with processes(redis_server.url) as (worker, api):

        async def is_unheard() -> bool:
            return not await worker.relay.is_heard()

        await api.listens()
        api.has_listeners = False
        await until(lambda: not api.relay.is_listening, "it has no streams")
        await until(is_unheard, "Redis knows of it")
        api.has_listeners = True
        await api.listens()
        await until(worker.relay.is_heard, "heard again")


@pytest.mark.parametrize(
    "message",
    [
        b"\xff\xfe",
        b"[]",
        b'["other", [{"run_id": "no id", "text": 7}]]',
        orjson.dumps(["other", [{"run_id": str(UUID(int=1)), "seq": "7\nid: 9", "text": "x"}]]),
    ],
)
async def test_strange_messages_are_passed_over(redis_server: RunningRedis, message: bytes) -> None:
    client = make_client(redis_server.url)
    async with processes(redis_server.url) as (worker, api):
        await api.listens()
        await client.publish(CHANNEL, message)
        worker.relay.send(delta(1))
        await until(lambda: bool(api.heard), "it goes on")
        assert api.heard == [delta(1)]
    await client.aclose()


async def test_an_id_of_the_database_driver_is_an_id(redis_server: RunningRedis) -> None:
    class DriverId(UUID):
        pass

    async with processes(redis_server.url) as (worker, api):
        await api.listens()
        worker.relay.send(Delta(DriverId(int=1), 7, "A", 1, None, 1, "x"))
        await until(lambda: bool(api.heard), "it is sent")
        assert api.heard == [Delta(UUID(int=1), 7, "A", 1, None, 1, "x")]


async def test_a_frozen_redis_is_not_waited_for_and_costs_no_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_deltas, "PUBLISH_S", 0.1)
    monkeypatch.setattr(redis_deltas, "REST_S", 3_600.0)
    with MortalRedis(tmp_path) as server:
        async with processes(server.url) as (worker, api):
            await api.listens()
            assert await worker.relay.is_heard()
            server.freeze()
            try:
                assert not await worker.relay.is_heard(), "within its budget"
                worker.relay.send(delta(1))
                await until(lambda: "not sent" in caplog.text, "it gives up for now")
                for number in range(1_000):
                    worker.relay.send(delta(number, "x" * 1_000))
                assert worker.relay.due_chars <= DUE_CHARS_MAX + 1_000
            finally:
                server.thaw()
            assert not await worker.relay.is_heard(), "Redis has a rest"


async def test_killed_and_started_again(tmp_path: Path) -> None:
    with MortalRedis(tmp_path) as server:
        async with processes(server.url) as (worker, api):
            await api.listens()
            server.kill()
            await until(lambda: not api.relay.is_listening, "it notices")
            worker.relay.send(delta(1))
            server.start()
            await api.listens()

            def is_through() -> bool:
                worker.relay.send(delta(2))
                return delta(2) in api.heard

            await until(is_through, "heard again")


async def test_nothing_is_logged_that_is_secret(caplog: pytest.LogCaptureFixture) -> None:
    process = Process(f"redis://:s3cret@127.0.0.1:{free_port()}/0")
    process.relay.start()
    process.relay.listen()
    process.relay.send(delta(1, "a secret answer"))
    assert not await process.relay.is_heard()
    await until(lambda: len(caplog.records) >= 2, "both sides complain")
    await process.relay.aclose()
    assert "s3cret" not in caplog.text
    assert "a secret answer" not in caplog.text
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("deltas-")]
