"""A run that only waits for a time to come holds no place of its worker, and goes on by itself."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

from app.orchestrator.loop import PARK_MS_MIN
from tests.conftest import make_settings
from tests.envelopes import echo_node, graph
from tests.redis_kit import until as eventually
from tests.service import RunningService, running_service
from tests.shared_service import register, rows, until
from tests.tools import Tool, answer, answer_at_gate, http_capability, respond, running_tool

LATER_S = PARK_MS_MIN // 1000 + 1


async def busy_at_first(tool: Tool, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    """Too much to do on the first attempt: come back later."""
    if body["attempt"] == 1:
        respond(writer, 429, {"detail": "later"}, f"Retry-After: {LATER_S}\r\n")
    else:
        await answer(tool, body, writer)


async def parked(service: RunningService, run_id: str) -> None:
    """Until nobody drives the run, which waits for its time."""
    sql = "select owner is null and wake_at > now() from run_heads where run_id = $1"

    async def is_parked() -> bool:
        found: bool = (await rows(service, sql, UUID(run_id)))[0][0]
        return found

    await eventually(is_parked, "the run is parked")


async def test_a_run_that_waits_for_long_leaves_its_place_to_others(dsn: str) -> None:
    async with (
        running_service(make_settings(runs_max=1), dsn) as service,
        running_tool(busy=busy_at_first) as tool,
    ):
        await register(service, http_capability(tool, "busy", "idempotent", max_attempts=2))
        waits = (await service.submit(graph(echo_node("A", capability="test.busy"))))["run_id"]
        retry = await until(service, waits, "NODE_RETRY")
        await parked(service, waits)

        other = await service.finished(graph(echo_node("A")))
        assert other["status"] == "done", "the only place was free"
        run = (await service.client.get(f"/v1/runs/{waits}")).json()
        assert (run["status"], run["last_seq"]) == ("running", int(retry.id or 0))

        events = await service.events(waits)
        kinds = [event.event for event in events]
        assert kinds[-3:] == ["NODE_START", "NODE_DONE", "RUN_DONE"]
        assert "RUN_RECOVERED" not in kinds, "nothing was lost"
        assert len(tool.calls(waits, "A")) == 2


async def test_a_parked_run_is_cancelled_at_once_also_by_a_full_worker(dsn: str) -> None:
    async with (
        running_service(make_settings(runs_max=1), dsn) as service,
        running_tool(busy=busy_at_first, gate=answer_at_gate) as tool,
    ):
        await register(
            service,
            http_capability(tool, "busy", "idempotent", max_attempts=2),
            http_capability(tool, "gate", "idempotent"),
        )
        waits = (await service.submit(graph(echo_node("A", capability="test.busy"))))["run_id"]
        await parked(service, waits)
        other = await service.submit(graph(echo_node("A", capability="test.gate")))
        await until(service, other["run_id"], "NODE_START")

        response = await service.client.post(f"/v1/runs/{waits}/cancel", json={})
        assert response.status_code == 202
        assert (await service.events(waits))[-1].event == "RUN_CANCELLED"
        assert len(tool.calls(waits, "A")) == 1
        tool.gate.set()
        assert (await service.events(other["run_id"]))[-1].event == "RUN_DONE"
