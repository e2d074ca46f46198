"""Tasks that nobody waits for: they end by themselves, whoever stops waiting for them."""

from __future__ import annotations

import asyncio
import logging

import pytest

from app.kit.background import Background


async def test_who_stops_waiting_stops_none_of_it() -> None:
    background, gate, done = Background(), asyncio.Event(), asyncio.Event()

    async def work() -> None:
        await gate.wait()
        done.set()

    background.run(work())
    waiting = asyncio.create_task(background.ended())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    gate.set()
    async with asyncio.timeout(5):
        await background.ended()
        await done.wait()
    await background.ended()


async def test_what_it_raises_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    background = Background()

    async def work() -> None:
        raise ValueError

    background.run(work())
    await background.ended()
    await asyncio.sleep(0)
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
