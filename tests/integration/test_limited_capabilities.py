"""A run that must not start anything does not compete for the slots of a limited capability.

It is held while its calls are under way, with nodes that only lack a slot. A loop that asks for a
slot which it may not use is woken at once, and again, and blocks the whole process: besides a time
limit in the event loop, each test has one that ends the process from another thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import pytest

from tests.conftest import make_settings
from tests.envelopes import echo_node, graph
from tests.redis_kit import until as eventually
from tests.service import RunningService, running_service
from tests.shared_service import audit, register, rows, until
from tests.tools import Tool, answer, answer_at_gate, http_capability, running_tool

pytestmark = pytest.mark.timeout(30, method="thread")

LIMIT = 2
WIDTH = 10
PATIENCE_S = 20


class Turnstile:
    """Lets the calls of a tool end one by one, in the order in which they came."""

    def __init__(self) -> None:
        self.turns = asyncio.Semaphore(0)

    def let_pass(self, count: int = 1) -> None:
        for _ in range(count):
            self.turns.release()

    async def __call__(
        self, tool: Tool, body: dict[str, Any], writer: asyncio.StreamWriter
    ) -> None:
        await self.turns.acquire()
        await answer(tool, body, writer)


@pytest.fixture
def turnstile() -> Turnstile:
    return Turnstile()


@pytest.fixture
async def tool(turnstile: Turnstile) -> AsyncIterator[Tool]:
    async with running_tool(turn=turnstile, gated=answer_at_gate, quick=answer) as tool:
        yield tool


def fan_out(width: int, *more: dict[str, Any]) -> dict[str, Any]:
    return graph(*(echo_node(f"n{i}", capability="test.turn") for i in range(width)), *more)


async def under_way(service: RunningService, tool: Tool, width: int = WIDTH) -> str:
    """A run that has taken all slots of the capability; more of its nodes wait for one."""
    await register(service, http_capability(tool, "turn", "idempotent", concurrency=LIMIT))
    run_id: str = (await service.submit(fan_out(width)))["run_id"]
    await tool.reached(LIMIT)
    return run_id


async def order(service: RunningService, run_id: str, kind: str) -> None:
    response = await service.client.post(f"/v1/runs/{run_id}/{kind}", json={})
    assert response.status_code == 202, response.text


async def count(service: RunningService, run_id: str, event_type: str) -> int:
    """How many events of a type the journal has; streams end when a process drains."""
    sql = "select count(*) from events where run_id = $1 and type = $2"
    [[found]] = await rows(service, sql, UUID(run_id), event_type)
    return int(found)


async def has_ended(service: RunningService, run_id: str, calls: int) -> None:
    """Until so many calls of the run have ended."""

    async def is_recorded() -> bool:
        return await count(service, run_id, "NODE_DONE") == calls

    await eventually(is_recorded, f"{calls} calls have ended")


async def is_given_back(service: RunningService, run_id: str) -> bool:
    sql = "select owner is null from run_heads where run_id = $1"
    [[found]] = await rows(service, sql, UUID(run_id))
    return bool(found)


async def test_a_pause_during_a_fan_out(dsn: str, tool: Tool, turnstile: Turnstile) -> None:
    async with (
        asyncio.timeout(PATIENCE_S),
        running_service(make_settings(), dsn) as service,
    ):
        run_id = await under_way(service, tool)
        await order(service, run_id, "pause")
        await until(service, run_id, "RUN_PAUSED")

        turnstile.let_pass()
        await has_ended(service, run_id, 1)
        assert not await is_given_back(service, run_id), "held until its last call has ended"
        turnstile.let_pass()
        await has_ended(service, run_id, LIMIT)
        await eventually(lambda: is_given_back(service, run_id), "the run is given back")
        assert await count(service, run_id, "NODE_START") == LIMIT

        turnstile.let_pass(WIDTH)
        await order(service, run_id, "resume")
        await until(service, run_id, "RUN_DONE")
        assert len(tool.ledger) == WIDTH
    assert await audit(dsn) == 1


async def test_a_resume_while_a_call_is_under_way(
    dsn: str, tool: Tool, turnstile: Turnstile
) -> None:
    """The slot that became free during the pause is used at once, and the others are asked for."""
    async with (
        asyncio.timeout(PATIENCE_S),
        running_service(make_settings(), dsn) as service,
    ):
        run_id = await under_way(service, tool)
        await order(service, run_id, "pause")
        await until(service, run_id, "RUN_PAUSED")
        turnstile.let_pass()
        await has_ended(service, run_id, 1)

        await order(service, run_id, "resume")
        await tool.reached(LIMIT + 1)
        turnstile.let_pass(WIDTH)
        await until(service, run_id, "RUN_DONE")
        assert len(tool.ledger) == WIDTH
    assert await audit(dsn) == 1


async def test_a_drain_during_a_fan_out(dsn: str, tool: Tool, turnstile: Turnstile) -> None:
    async with asyncio.timeout(PATIENCE_S):
        async with running_service(make_settings(drain_grace_s=15.0), dsn) as leaves:
            run_id = await under_way(leaves, tool)
            drains = asyncio.create_task(leaves.services.runner.drain(15.0))
            await eventually(lambda: leaves.services.runner.drive.is_leaving, "it drains")

            turnstile.let_pass()
            await has_ended(leaves, run_id, 1)
            assert not await is_given_back(leaves, run_id), "held until its last call has ended"
            turnstile.let_pass()
            await drains
            assert await is_given_back(leaves, run_id)
            assert await count(leaves, run_id, "NODE_DONE") == LIMIT
            assert await count(leaves, run_id, "NODE_START") == LIMIT

        turnstile.let_pass(WIDTH)
        async with running_service(make_settings(), dsn) as goes_on:
            await until(goes_on, run_id, "RUN_DONE")
        assert len(tool.ledger) == WIDTH, "no call was cut off and made again"
    assert await audit(dsn) == 1


async def test_a_paused_run_leaves_a_slot_to_the_next_in_line(
    dsn: str, tool: Tool, turnstile: Turnstile
) -> None:
    """It waits longest, so that it is woken, and has filled its `max_parallel` meanwhile.

    The run that gives the slot back is paused as well: it does not look who else waits.
    """
    async with (
        asyncio.timeout(PATIENCE_S),
        running_service(make_settings(), dsn) as service,
    ):
        busy = await under_way(service, tool, LIMIT)
        await register(
            service,
            http_capability(tool, "quick", "idempotent"),
            http_capability(tool, "gated", "idempotent"),
        )
        full = graph(
            echo_node("limited", capability="test.turn"),
            echo_node("quick", capability="test.quick"),
            *(echo_node(name, "quick", capability="test.gated") for name in ("B", "C")),
            constraints={"max_parallel": 2},
        )
        paused = (await service.submit(full))["run_id"]
        await tool.reached(LIMIT + 3)
        for run_id in (busy, paused):
            await order(service, run_id, "pause")
            await until(service, run_id, "RUN_PAUSED")
        other = (await service.submit(fan_out(1)))["run_id"]
        await until(service, other, "PLAN_GENERATED")

        turnstile.let_pass()
        await tool.reached(LIMIT + 4)
        assert len(tool.calls(other, "n0")) == 1
        for run_id in (busy, paused):
            assert not await is_given_back(service, run_id), "its own calls are under way"
            await order(service, run_id, "resume")

        turnstile.let_pass(LIMIT + 1)
        tool.gate.set()
        for run_id in (busy, paused, other):
            await until(service, run_id, "RUN_DONE")
    assert await audit(dsn) == 3


async def test_paused_runs_do_not_wake_each_other_without_end(
    dsn: str, tool: Tool, turnstile: Turnstile
) -> None:
    """Two of them are in line and held by another call: who comes after both gets the slot."""
    async with (
        asyncio.timeout(PATIENCE_S),
        running_service(make_settings(), dsn) as service,
    ):
        await under_way(service, tool)
        await register(service, http_capability(tool, "gated", "idempotent"))
        held = fan_out(1, echo_node("held", capability="test.gated"))
        paused = [(await service.submit(held))["run_id"] for _ in range(2)]
        await tool.reached(LIMIT + 2)
        for run_id in paused:
            await order(service, run_id, "pause")
            await until(service, run_id, "RUN_PAUSED")

        turnstile.let_pass(2 * WIDTH)
        await tool.reached(WIDTH + 2)
        other = await service.finished(fan_out(1))
        assert other["status"] == "done"
        assert not any([await is_given_back(service, run_id) for run_id in paused])

        tool.gate.set()
        for run_id in paused:
            await order(service, run_id, "resume")
            await until(service, run_id, "RUN_DONE")
        assert not service.services.runner.drive.executor.slots._waiting
    assert await audit(dsn) == 4
