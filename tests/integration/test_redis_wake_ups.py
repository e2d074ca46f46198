"""Wake-ups by a real Redis: heard by others, few, and back after every kind of outage."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from app.adapters.wake import redis as redis_wake_ups
from app.adapters.wake.redis import CHANNELS, COALESCE_S, RedisWakeUps
from app.ports import Topic
from tests.redis_kit import MortalRedis, make_client, until
from tests.servers import RunningRedis, free_port


class Ear:
    """One process's wake-ups, and how often it woke up for what."""

    def __init__(self, url: str, has_company: Callable[[], bool] | None = None) -> None:
        self.heard: Counter[Topic] = Counter()
        self.wake_ups = RedisWakeUps(url, on_wake=self._wake, has_company=has_company)

    def _wake(self, topic: Topic) -> None:
        self.heard[topic] += 1

    async def subscribed(self, times: int = 1) -> None:
        await until(lambda: min(self.heard[t] for t in Topic) >= times, "it listens")


@asynccontextmanager
async def ears(url: str, number: int = 2) -> AsyncIterator[list[Ear]]:
    """That many processes, all of them listening."""
    async with AsyncExitStack() as stack:
        made = [Ear(url) for _ in range(number)]
        for ear in made:
            ear.wake_ups.start()
            stack.push_async_callback(ear.wake_ups.aclose)
        for ear in made:
            await ear.subscribed()
        yield made


async def test_others_hear_each_topic_and_the_sender_does_not(redis_server: RunningRedis) -> None:
    async with ears(redis_server.url) as (first, second):
        first.wake_ups.announce(Topic.WORK)
        await until(lambda: second.heard[Topic.WORK] == 2, "the other one wakes up")
        second.wake_ups.announce(Topic.COMMITS)
        await until(lambda: first.heard[Topic.COMMITS] == 2, "and tells, too")

        assert first.heard == {Topic.COMMITS: 2, Topic.WORK: 1}
        assert second.heard == {Topic.COMMITS: 1, Topic.WORK: 2}


async def test_many_announcements_are_few_messages(redis_server: RunningRedis) -> None:
    async with ears(redis_server.url, 3) as (first, second, third):
        loop = asyncio.get_running_loop()
        began = loop.time()
        for _ in range(100):
            for _ in range(100):
                first.wake_ups.announce(Topic.COMMITS)
            await asyncio.sleep(0)
        third.wake_ups.announce(Topic.WORK)
        await until(lambda: second.heard[Topic.WORK] == 2, "all of it is through")
        await until(lambda: second.heard[Topic.COMMITS] > 1, "the commits, too")

        windows = (loop.time() - began) / COALESCE_S
        assert second.heard[Topic.COMMITS] - 1 <= windows + 1


async def test_nothing_is_sent_without_company(redis_server: RunningRedis) -> None:
    company = [False]
    async with ears(redis_server.url, 1) as (listener,):
        alone = Ear(redis_server.url, lambda: company[0])
        alone.wake_ups.start()
        await alone.subscribed()
        alone.wake_ups.announce(Topic.COMMITS)
        await until(lambda: not alone.wake_ups.is_telling, "it is dealt with")
        company[0] = True
        alone.wake_ups.announce(Topic.WORK)
        await until(lambda: listener.heard[Topic.WORK] == 2, "with company it tells")
        await alone.wake_ups.aclose()

        assert listener.heard[Topic.COMMITS] == 1


async def test_strange_messages_wake_up_and_break_nothing(redis_server: RunningRedis) -> None:
    client = make_client(redis_server.url)
    async with ears(redis_server.url, 1) as (listener,):
        await client.publish(CHANNELS[Topic.WORK], b"\xff\xfe")
        await until(lambda: listener.heard[Topic.WORK] == 2, "it wakes up")
    await client.aclose()


async def test_killed_and_started_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with MortalRedis(tmp_path) as server:
        async with ears(server.url) as (first, second):
            server.kill()
            for _ in range(1_000):
                first.wake_ups.announce(Topic.WORK)
            await until(lambda: len(caplog.records) >= 3, "all noticed")
            tasks = len(asyncio.all_tasks())
            for _ in range(1_000):
                first.wake_ups.announce(Topic.WORK)
            assert len(asyncio.all_tasks()) == tasks, "nothing piles up"

            server.start()
            await first.subscribed(2)
            await second.subscribed(2)
            await until(lambda: not first.wake_ups.is_telling, "what was due is told")
            before = first.heard[Topic.COMMITS], second.heard[Topic.WORK]
            first.wake_ups.announce(Topic.WORK)
            second.wake_ups.announce(Topic.COMMITS)
            await until(lambda: second.heard[Topic.WORK] > before[1], "second hears first")
            await until(lambda: first.heard[Topic.COMMITS] > before[0], "first hears second")
    assert all(record.levelno == logging.WARNING for record in caplog.records)


async def test_a_redis_that_was_never_there_is_waited_for(tmp_path: Path) -> None:
    server = MortalRedis(tmp_path)
    first, second = Ear(server.url), Ear(server.url)
    async with AsyncExitStack() as stack:
        for ear in (first, second):
            ear.wake_ups.start()
            stack.push_async_callback(ear.wake_ups.aclose)
            ear.wake_ups.announce(Topic.WORK)
        with server:
            await first.subscribed()
            await second.subscribed()


async def test_a_frozen_redis_holds_nobody_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with MortalRedis(tmp_path) as server:
        async with ears(server.url) as (first, second):
            server.freeze()
            try:
                first.wake_ups.announce(Topic.WORK)
                await until(lambda: "not told" in caplog.text, "it gives up for now")
            finally:
                server.thaw()
            await until(lambda: second.heard[Topic.WORK] >= 2, "it arrives late")


async def test_a_silent_connection_is_asked_and_then_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_wake_ups, "QUIET_S", 1.0)
    with MortalRedis(tmp_path) as server:
        client: Any = make_client(server.url)
        async with ears(server.url, 1) as (listener,):
            await until(lambda: has_pings(client, 3), "it asks for a sign of life")
            assert listener.heard == {Topic.COMMITS: 1, Topic.WORK: 1}, "and keeps its connection"
            server.freeze()
            try:
                await until(lambda: not listener.wake_ups.is_listening, "it gives up")
            finally:
                server.thaw()
            await listener.subscribed(2)
        await client.aclose()


async def has_pings(client: Any, number: int) -> bool:
    stats = (await client.info("commandstats")).get("cmdstat_ping", {"calls": 0})
    return int(stats["calls"]) >= number


async def test_a_cut_connection_is_made_anew(tmp_path: Path) -> None:
    with MortalRedis(tmp_path) as server:
        client: Any = make_client(server.url)
        async with ears(server.url) as (first, second):
            await client.client_kill_filter(_type="pubsub")
            await first.subscribed(2)
            await second.subscribed(2)
            second.wake_ups.announce(Topic.COMMITS)
            await until(lambda: first.heard[Topic.COMMITS] == 3, "heard again")
        await client.aclose()


async def test_nothing_is_logged_that_is_secret(caplog: pytest.LogCaptureFixture) -> None:
    ear = Ear(f"redis://:s3cret@127.0.0.1:{free_port()}/0")
    ear.wake_ups.start()
    ear.wake_ups.announce(Topic.WORK)
    await until(lambda: len(caplog.records) >= 2, "both sides complain")
    await ear.wake_ups.aclose()

    assert "s3cret" not in caplog.text
