"""Wake-ups between processes: quick, few, and only for those who have company."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest

from app.journal import feed
from app.ports import Topic
from app.store import notify
from app.store.database import connect
from app.store.notify import CHANNELS, NotifyWakeUps
from tests.conftest import make_settings
from tests.envelopes import chain, diamond, echo_node, graph
from tests.service import RunningService, running_service
from tests.shared_service import register
from tests.tools import answer_at_gate, http_capability, running_tool

PATIENCE_S = 20.0


async def see_each_other(*services: RunningService) -> None:
    """Until every worker has seen that it is not alone."""
    async with asyncio.timeout(PATIENCE_S):
        while not all(s.services.lease.has_company for s in services):  # noqa: ASYNC110 - untold
            await asyncio.sleep(0.01)


async def test_a_stream_elsewhere_needs_no_poll(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "POLL_S", 3_600.0)
    async with (
        running_tool(gate=answer_at_gate) as tool,
        running_service(make_settings(), dsn) as driver,
        running_service(make_settings(), dsn) as other,
    ):
        await see_each_other(driver, other)
        body = http_capability(tool, "gate", "idempotent")
        await driver.client.post("/v1/capabilities", json=body)
        nodes = (echo_node("A"), echo_node("B", "A", capability="test.gate"), echo_node("C", "B"))
        run = await driver.submit(graph(*nodes))
        following = asyncio.create_task(other.events(run["run_id"]))
        await asyncio.wait_for(tool.called.wait(), PATIENCE_S)
        tool.gate.set()
        events = await asyncio.wait_for(following, PATIENCE_S)

    assert events[-1].event == "RUN_DONE"


async def test_many_commits_make_few_notifications_and_none_alone(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify, "COALESCE_S", 0.1)
    heard: list[int] = []
    listener = await asyncpg.connect(dsn)
    await listener.add_listener(CHANNELS[Topic.COMMITS], lambda *_: heard.append(1))
    async with running_service(make_settings(), dsn) as first:
        assert (await first.finished(diamond()))["status"] == "done"
        await listener.fetchval("select 1")
        assert heard == []

        async with running_service(make_settings(), dsn) as second:
            await see_each_other(first, second)
            loop = asyncio.get_running_loop()
            began, before = loop.time(), first.services.journal.commits
            await first.finished(chain(100))
            assert first.services.journal.commits - before >= 100
            async with asyncio.timeout(PATIENCE_S):
                while not heard:
                    await listener.fetchval("select 1")
            windows = (loop.time() - began) / notify.COALESCE_S
            assert len(heard) <= windows + 1
    await listener.close()


LISTENERS = """select pid from pg_stat_activity where datname = current_database()
    and query ~* '^(listen|notify)'"""
BACK = """select count(*) from pg_stat_activity where datname = current_database()
    and query ~* '^(listen .*work|notify)' and state = 'idle' and pid <> all($1::int[])"""


async def test_wake_ups_come_back_after_the_connection_was_cut(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "POLL_S", 3_600.0)
    monkeypatch.setattr(notify, "LOOK_S", 0.1)
    async with (
        running_tool(gate=answer_at_gate) as tool,
        running_service(make_settings(), dsn) as driver,
        running_service(make_settings(runs_max=0), dsn) as other,
        asyncio.timeout(PATIENCE_S),
    ):
        await see_each_other(driver, other)
        await register(driver, http_capability(tool, "gate", "idempotent"))
        nodes = (echo_node("A", capability="test.gate"), echo_node("B", "A"), echo_node("C", "B"))
        run = await driver.submit(graph(*nodes))
        following = asyncio.create_task(other.events(run["run_id"]))
        await tool.reached(1)
        # To open a stream is one more look; what comes behind that has to be told.
        channels = other.services.feed._channels
        while not any(c.is_live for c in channels.values()):  # noqa: ASYNC110 - untold
            await asyncio.sleep(0.01)

        admin = await asyncpg.connect(dsn)
        while len(found := await admin.fetch(LISTENERS)) < 2:  # noqa: ASYNC110 - untold
            await asyncio.sleep(0.01)
        cut = [row["pid"] for row in found]
        await admin.execute("select pg_terminate_backend(pid) from unnest($1::int[]) pid", cut)
        while await admin.fetchval(BACK, cut) < 2:  # noqa: ASYNC110 - untold
            await asyncio.sleep(0.01)
        await admin.close()
        tool.gate.set()
        events = await following

    assert events[-1].event == "RUN_DONE"


async def test_topics_are_told_apart_and_the_sender_hears_neither(dsn: str) -> None:
    heard: dict[str, list[Topic]] = {"first": [], "second": []}
    first, second = (
        NotifyWakeUps(lambda: connect(dsn), on_wake=heard[name].append, has_company=lambda: True)
        for name in ("first", "second")
    )
    first.start()
    second.start()
    async with asyncio.timeout(PATIENCE_S):
        while not all(len(topics) == 2 for topics in heard.values()):  # noqa: ASYNC110 - untold
            await asyncio.sleep(0.01)
        first.announce(Topic.WORK)
        while heard["second"][2:] != [Topic.WORK]:  # noqa: ASYNC110 - untold
            await asyncio.sleep(0.01)
        second.announce(Topic.COMMITS)
        while heard["first"][2:] != [Topic.COMMITS]:  # noqa: ASYNC110 - untold
            await asyncio.sleep(0.01)
    await first.aclose()
    await second.aclose()

    assert heard["first"][:2] == heard["second"][:2] == list(Topic), "what was missed before"
    assert heard["second"][2:] == [Topic.WORK]
