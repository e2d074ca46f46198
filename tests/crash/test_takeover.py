"""Runs change hands: after kill -9, a freeze, an orderly stop, a lost lease, a lost database."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest

from app.bootstrap import Services
from app.orchestrator.lease import FENCE_S
from app.store.embedded import EmbeddedPostgres
from app.store.embedded_files import remove_data
from tests.crash.checker import ClientLog, check
from tests.envelopes import diamond, echo_node, graph
from tests.process import ServiceProcess, service_process
from tests.service import RunningService, past_its_fence
from tests.tools import Tool, answer, answer_at_gate, http_capability, running_tool

PATIENCE_S = 40.0
WAITS = {"Prefer": "wait=20"}


@pytest.fixture
async def tool() -> AsyncIterator[Tool]:
    async with running_tool(gate=answer_at_gate, once_gate=answer_at_gate, quick=answer) as tool:
        yield tool


def gated(capability: str = "test.gate") -> dict[str, Any]:
    """A is done at once, B waits at the tool's gate, C follows."""
    return graph(echo_node("A"), echo_node("B", "A", capability=capability), echo_node("C", "B"))


async def begin(service: ServiceProcess, tool: Tool, envelope: dict[str, Any]) -> str:
    """Register the tool, submit, and return when B's call has reached the tool."""
    assert service.url is not None
    async with httpx.AsyncClient(base_url=service.url, timeout=10) as http:
        for name, effect in (("gate", "idempotent"), ("once_gate", "at_most_once")):
            await http.post("/v1/capabilities", json=http_capability(tool, name, effect))
        response = await http.post("/v1/runs", json=envelope)
        assert response.status_code == 202, response.text
    await asyncio.wait_for(tool.called.wait(), PATIENCE_S)
    tool.called.clear()
    run_id: str = response.json()["run_id"]
    return run_id


async def wait_for(dsn: str, run_id: str, event_type: str) -> None:
    """Until the journal has an event of this type."""
    connection = await asyncpg.connect(dsn)
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not await connection.fetchval(
                "select exists(select from events where run_id = $1::uuid and type = $2)",
                run_id,
                event_type,
            ):
                await asyncio.sleep(0.02)
    finally:
        await connection.close()


def of_type(journal: list[dict[str, Any]], event_type: str) -> list[dict[str, Any]]:
    return [event for event in journal if event["type"] == event_type]


async def test_a_living_worker_takes_the_runs_of_a_killed_one(dsn: str, tool: Tool) -> None:
    async with service_process(dsn) as first, service_process(dsn) as second:
        run_id = await begin(first, tool, gated())
        await first.kill()
        await asyncio.wait_for(tool.called.wait(), PATIENCE_S)
        tool.gate.set()
        await wait_for(dsn, run_id, "RUN_DONE")
        assert second.process.poll() is None

    journal = (await check(dsn, ClientLog({run_id}), tool.ledger))[run_id]
    recovered = of_type(journal, "RUN_RECOVERED")
    assert [event["data"]["called_again"] for event in recovered] == [["B"]]
    assert recovered[0]["data"]["from_worker"] is not None
    calls = tool.calls(run_id, "B")
    assert [call.attempt for call in calls] == [1, 1]
    assert len({call.key for call in calls}) == 1
    assert len(of_type(journal, "NODE_START")) == 3


async def test_an_at_most_once_call_of_a_killed_worker_waits_for_a_human(
    dsn: str, tool: Tool
) -> None:
    async with service_process(dsn) as first, service_process(dsn) as second:
        run_id = await begin(first, tool, gated("test.once_gate"))
        await first.kill()
        await wait_for(dsn, run_id, "RUN_PAUSED")
        assert second.url is not None
        async with httpx.AsyncClient(base_url=second.url) as http:
            body = {"nodes": {"B": {"decision": "done", "output": {"by": "hand"}}}}
            response = await http.post(f"/v1/runs/{run_id}/resume", json=body)
            assert response.status_code == 202, response.text
        await wait_for(dsn, run_id, "RUN_DONE")

    journal = (await check(dsn, ClientLog({run_id}), tool.ledger))[run_id]
    blocked = of_type(journal, "NODE_BLOCKED")
    assert [(e["node_id"], e["data"]["reason"]) for e in blocked] == [("B", "unknown_outcome")]
    assert len(tool.calls(run_id, "B")) == 1
    assert of_type(journal, "RUN_DONE")[0]["data"]["output"] == {"B": {"by": "hand"}}


async def test_an_orderly_stop_hands_runs_over_without_waiting_for_a_lease(
    dsn: str, tool: Tool
) -> None:
    async with service_process(dsn, drain_grace_s="0.2") as first, service_process(dsn):
        run_id = await begin(first, tool, gated())
        assert await first.stop() == 0
        await asyncio.wait_for(tool.called.wait(), PATIENCE_S)
        tool.gate.set()
        await wait_for(dsn, run_id, "RUN_DONE")

    journal = (await check(dsn, ClientLog({run_id}), tool.ledger))[run_id]
    assert [event["data"]["from_worker"] for event in of_type(journal, "RUN_RECOVERED")] == [None]


async def test_a_stop_lets_calls_end_within_the_grace(dsn: str, tool: Tool) -> None:
    async with service_process(dsn, drain_grace_s="20") as service:
        run_id = await begin(service, tool, gated())
        service.process.send_signal(signal.SIGTERM)
        tool.gate.set()
        assert await service.wait_dead() == 0

    journal = (await check(dsn, ClientLog({run_id}), tool.ledger))[run_id]
    assert of_type(journal, "RUN_RECOVERED") == []
    assert len(tool.calls(run_id, "B")) == 1


async def test_a_frozen_worker_that_wakes_up_writes_nothing(dsn: str, tool: Tool) -> None:
    async with service_process(dsn) as first, service_process(dsn):
        run_id = await begin(first, tool, gated())
        first.process.send_signal(signal.SIGSTOP)
        await end_lease_of_holder(dsn, run_id)
        await asyncio.wait_for(tool.called.wait(), PATIENCE_S)
        tool.gate.set()  # answers the frozen worker's call and the new one's
        first.process.send_signal(signal.SIGCONT)
        await wait_for(dsn, run_id, "RUN_DONE")
        assert first.url is not None
        async with httpx.AsyncClient(base_url=first.url, timeout=PATIENCE_S) as http:
            response = await http.post("/v1/runs", json=diamond(), headers=WAITS)
            while response.status_code == 503:  # it does not take part again yet
                response = await http.post("/v1/runs", json=diamond(), headers=WAITS)
            assert response.json()["status"] == "done", "the woken worker works on, as a new one"
            await noticed_its_loss(http)

    journal = (await check(dsn, ClientLog({run_id}), tool.ledger))[run_id]
    assert len(of_type(journal, "NODE_DONE")) == 3
    assert len(of_type(journal, "RUN_RECOVERED")) == 1


async def noticed_its_loss(client: httpx.AsyncClient) -> None:
    """Until a process has let its runs go: its write was refused, or it was past its own lease."""
    names = ("flexrun_journal_stale_writes_total", "flexrun_lease_losses_total")
    async with asyncio.timeout(PATIENCE_S):
        while True:
            lines = [line.split() for line in (await client.get("/metrics")).text.splitlines()]
            found = {line[0]: float(line[1]) for line in lines if line[0] in names}
            assert found.keys() == set(names)
            if sum(found.values()):
                return
            await asyncio.sleep(0.05)


async def end_lease_of_holder(dsn: str, run_id: str) -> None:
    """Let the lease of a run's worker run out now: on the database's clock, as others judge it."""
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(
            """update workers set lease_until = now() - interval '1 second'
            where worker_id = (select owner from run_heads where run_id = $1::uuid)""",
            run_id,
        )
    finally:
        await connection.close()


async def test_a_worker_whose_lease_ran_out_lets_go_and_takes_part_again(
    service: RunningService, tool: Tool, dsn: str
) -> None:
    await service.client.post("/v1/capabilities", json=http_capability(tool, "gate", "idempotent"))
    run = await service.submit(gated())
    await asyncio.wait_for(tool.called.wait(), PATIENCE_S)
    tool.called.clear()
    old_worker = service.services.lease.worker_id
    await end_lease_of_holder(dsn, run["run_id"])
    await past_its_fence(service.services)

    await asyncio.wait_for(tool.called.wait(), PATIENCE_S)
    tool.gate.set()
    events = await service.events(run["run_id"])

    assert [event.event for event in events][-1] == "RUN_DONE"
    recovered = next(event.json["data"] for event in events if event.event == "RUN_RECOVERED")
    assert recovered["from_worker"] == old_worker
    assert service.services.lease.worker_id != old_worker


async def sever(dsn: str) -> None:
    """Cut every session of the database but ours, as a restart of Postgres would."""
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(
            """select pg_terminate_backend(pid) from pg_stat_activity
            where datname = current_database() and pid <> pg_backend_pid()"""
        )
    finally:
        await connection.close()


async def test_lost_database_sessions_cost_no_run_and_no_second_call(
    service: RunningService, tool: Tool, dsn: str
) -> None:
    await service.client.post("/v1/capabilities", json=http_capability(tool, "gate", "idempotent"))
    runs = [await service.submit(gated()) for _ in range(5)]
    async with asyncio.timeout(PATIENCE_S):
        await tool.reached(5)
    lease = service.services.lease
    cut, cut_at = lease._session, time.monotonic()
    await sever(dsn)
    tool.gate.set()
    async with asyncio.timeout(PATIENCE_S):
        while lease._session is cut:
            await asyncio.sleep(0.01)
    away_s = time.monotonic() - cut_at
    for run in runs:
        events = await service.events(run["run_id"])
        assert events[-1].event == "RUN_DONE"
        # If the machine stood still it may be past its own lease, and has to let go.
        if away_s < FENCE_S / 2 or service.services.metrics.lease_losses == 0:
            assert [e.event for e in events].count("RUN_RECOVERED") == 0
            assert len(tool.calls(run["run_id"], "B")) == 1
    assert (await service.finished(diamond()))["status"] == "done"


async def test_posts_while_sessions_are_cut_are_accepted_or_told_to_come_again(
    service: RunningService, dsn: str
) -> None:
    async def post(number: int) -> tuple[int, str]:
        headers = {"Idempotency-Key": f"k{number}", **WAITS}
        for _ in range(20):
            response = await service.client.post("/v1/runs", json=diamond(), headers=headers)
            if response.status_code == 503:
                assert response.headers["retry-after"]
                assert response.headers["content-type"] == "application/problem+json"
            elif response.status_code != 202:  # accepted, and then cut while it waited
                return response.status_code, response.json()["run_id"]
        raise AssertionError("never accepted")

    posts = asyncio.gather(*(post(number) for number in range(30)))
    for _ in range(3):
        await sever(dsn)
        await asyncio.sleep(0.05)
    results = await posts

    assert {status for status, _ in results} == {200}
    assert len({run_id for _, run_id in results}) == 30
    connection = await asyncpg.connect(dsn)
    assert await connection.fetchval("select count(*) from runs") == 30
    await connection.close()


async def test_a_process_that_takes_part_again_finds_its_lock(services: Services) -> None:
    """The lock session is cut; the worker registers under its old id and goes on."""
    worker_id = services.lease.worker_id
    await services.lease.session.close()
    async with asyncio.timeout(PATIENCE_S):
        while services.lease._session is None or services.lease._session.is_closed():
            await asyncio.sleep(0.01)
    assert services.lease.held
    assert services.lease.worker_id == worker_id


async def test_a_run_that_can_not_be_read_ends_and_holds_nobody_up(
    service: RunningService, tool: Tool, dsn: str
) -> None:
    await service.client.post("/v1/capabilities", json=http_capability(tool, "gate", "idempotent"))
    runs = [await service.submit(gated()) for _ in range(2)]
    async with asyncio.timeout(PATIENCE_S):
        await tool.reached(2)
    connection = await asyncpg.connect(dsn)
    spoil = 'update runs set envelope = \'{"from": "another time"}\' where run_id = $1::uuid'
    await connection.execute(spoil, runs[0]["run_id"])
    await connection.close()
    for run in runs:
        await end_lease_of_holder(dsn, run["run_id"])
    await past_its_fence(service.services)
    tool.gate.set()

    spoiled = await service.events(runs[0]["run_id"])
    assert spoiled[-1].json["data"]["error"]["code"] == "run_unreadable"
    assert (await service.events(runs[1]["run_id"]))[-1].event == "RUN_DONE"


async def test_a_service_that_owns_its_postgres_waits_for_no_lease_after_a_crash(
    tmp_path: Path, tool: Tool
) -> None:
    """Its Postgres died with it and came back with it: no earlier worker can be alive."""
    async with service_process("", executed=True, data_dir=str(tmp_path)) as first:
        run_id = await begin(first, tool, gated())
        with EmbeddedPostgres.start(tmp_path) as server:
            connection = await asyncpg.connect(server.dsn)
            await connection.execute("update workers set lease_until = now() + interval '1 hour'")
            await connection.close()
        await first.kill()
    async with service_process("", executed=True, data_dir=str(tmp_path)) as second:
        await asyncio.wait_for(tool.called.wait(), PATIENCE_S)
        tool.gate.set()
        assert second.url is not None
        async with httpx.AsyncClient(base_url=second.url) as http:
            page = (await http.get(f"/v1/runs/{run_id}/events")).json()["events"]
    assert len(of_type(page, "RUN_RECOVERED")) == 1
    remove_data(tmp_path)
