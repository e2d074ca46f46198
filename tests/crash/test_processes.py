"""API and worker processes on one database: who does what, and what a lost one leaves to others."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest

from app.orchestrator.lease import FENCE_S
from app.store.migrate import migrate
from tests.chaos.servers import ChaosPostgres
from tests.crash.checker import ClientLog, check
from tests.envelopes import diamond, echo_node, graph
from tests.process import ServiceProcess, service_process, service_processes
from tests.shared_service import problem
from tests.sse import SseEvent, SseParser
from tests.tools import Tool, answer, answer_at_gate, http_capability, running_tool

PATIENCE_S = 60.0
LEFT_S = FENCE_S / 2
"""What is at least left of its lease to a worker that renews it in time."""
HOLDER = """select w.worker_id, w.pid, w.lease_until from run_heads h
    join workers w on w.worker_id = h.owner where h.run_id = $1::uuid"""


class Follower:
    """A client that follows one run over one API, and keeps what it is shown."""

    def __init__(self, client: httpx.AsyncClient, run_id: str, log: ClientLog) -> None:
        self.events: list[SseEvent] = []
        self._run_id = run_id
        self._log = log
        self._news = asyncio.Event()
        self.task = asyncio.create_task(self._follow(client))

    async def _follow(self, client: httpx.AsyncClient) -> None:
        parser = SseParser()
        headers = {"Accept": "text/event-stream"}
        url = f"/v1/runs/{self._run_id}/events"
        async with client.stream("GET", url, headers=headers) as response:
            assert response.status_code == 200, await response.aread()
            async for chunk in response.aiter_bytes():
                parser.feed(chunk)
                for event in parser.events:
                    self._log.saw(self._run_id, event)
                self.events += parser.events
                parser.events = []
                self._news.set()

    async def seen(self, event_type: str, node_id: str | None = None) -> dict[str, Any]:
        """The first such event, as soon as it is shown."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                for event in self.events:
                    if event.event == event_type and event.json.get("node_id") == node_id:
                        return event.json
                self._news.clear()
                await self._news.wait()

    async def to_the_end(self) -> list[str]:
        """The types of all events, when the stream has ended."""
        await asyncio.wait_for(self.task, PATIENCE_S)
        return [event.event for event in self.events]


@asynccontextmanager
async def client_of(process: ServiceProcess) -> AsyncIterator[httpx.AsyncClient]:
    assert process.url is not None, process.lines
    async with httpx.AsyncClient(base_url=process.url, timeout=PATIENCE_S) as client:
        yield client


@pytest.fixture
async def tool() -> AsyncIterator[Tool]:
    async with running_tool(gate=answer_at_gate, answer=answer) as tool:
        yield tool


def gated() -> dict[str, Any]:
    """A is answered at once, B waits at the tool's gate, C follows."""
    return graph(
        echo_node("A", capability="test.answer"),
        echo_node("B", "A", capability="test.gate"),
        echo_node("C", "B"),
    )


async def register(client: httpx.AsyncClient, tool: Tool, *names: str) -> None:
    for name in names:
        body = http_capability(tool, name, "idempotent")
        response = await client.post("/v1/capabilities", json=body)
        assert response.status_code in (200, 201), response.text


async def submit(client: httpx.AsyncClient, envelope: dict[str, Any], log: ClientLog) -> str:
    response = await client.post("/v1/runs", json=envelope)
    assert response.status_code == 202, response.text
    run_id: str = response.json()["run_id"]
    log.accepted.add(run_id)
    return run_id


async def reached(tool: Tool, count: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        await tool.reached(count)


async def until_found(dsn: str, sql: str, *arguments: Any) -> asyncpg.Record:
    """The first row of a query, as soon as there is one."""
    connection = await asyncpg.connect(dsn)
    try:
        async with asyncio.timeout(PATIENCE_S):
            while (row := await connection.fetchrow(sql, *arguments)) is None:
                await asyncio.sleep(0.02)
        return row
    finally:
        await connection.close()


async def driven_by(client: httpx.AsyncClient) -> float:
    """How many runs a process drives, as its metrics say."""
    page = (await client.get("/metrics")).text
    [line] = [line for line in page.splitlines() if line.startswith("flexrun_runs_driven ")]
    return float(line.split()[1])


async def test_apis_accept_and_stream_what_a_worker_drives(dsn: str, tool: Tool) -> None:
    log = ClientLog()
    async with (
        service_processes(dsn, "api", "api", executed=True) as (first, second),
        client_of(first) as api,
        client_of(second) as other,
    ):
        await register(api, tool, "answer", "gate")
        run_id = await submit(api, gated(), log)
        followers = [Follower(client, run_id, log) for client in (api, other)]
        for follower in followers:
            await follower.seen("RUN_QUEUED")
        assert (await other.get(f"/v1/runs/{run_id}")).json()["status"] == "queued"

        async with (
            service_process(dsn, "worker", executed=True) as process,
            client_of(process) as worker,
        ):
            for follower in followers:
                await follower.seen("NODE_START", "B")
            # Shown live, over both: the tool has not answered yet.
            assert (await other.get(f"/v1/runs/{run_id}")).json()["status"] == "running"
            assert [await driven_by(client) for client in (api, other, worker)] == [0, 0, 1]
            for client in (api, other, worker):
                assert (await client.get("/readyz")).json()["status"] == "ok"
            refused = await worker.post("/v1/runs", json=diamond())
            problem(refused, 404, "route_not_found")
            tool.gate.set()
            ends = [await follower.to_the_end() for follower in followers]
            assert ends[0] == ends[1]
            assert ends[0][-1] == "RUN_DONE"
            assert "RUN_RECOVERED" not in ends[0]
            answers = await asyncio.gather(
                *(
                    client.post("/v1/runs", json=diamond(), headers={"Prefer": "wait=30"})
                    for client in (api, other) * 5
                )
            )
            log.accepted |= {answer.json()["run_id"] for answer in answers}
            assert {answer.json()["status"] for answer in answers} == {"done"}
            assert await process.stop() == 0
    await check(dsn, log, tool.ledger)


async def test_a_run_goes_from_a_killed_worker_to_one_that_stops_to_a_third(
    dsn: str, tool: Tool
) -> None:
    log = ClientLog()
    async with (
        service_processes(dsn, "worker", "worker", "worker", "api", drain_grace_s="0.2") as (
            *workers,
            front,
        ),
        client_of(front) as api,
    ):
        by_pid = {worker.process.pid: worker for worker in workers}
        await register(api, tool, "answer", "gate")
        run_id = await submit(api, gated(), log)
        follower = Follower(api, run_id, log)
        await reached(tool, 2)
        killed = await until_found(dsn, HOLDER, run_id)
        await by_pid[killed["pid"]].kill()

        await reached(tool, 3)
        first = await follower.seen("RUN_RECOVERED")
        assert first["data"] == {
            "epoch": 2,
            "from_worker": killed["worker_id"],
            "called_again": ["B"],
        }
        stopped = await until_found(dsn, HOLDER, run_id)
        assert stopped["pid"] != killed["pid"]
        assert await by_pid[stopped["pid"]].stop() == 0

        await reached(tool, 4)
        last = await until_found(dsn, HOLDER, run_id)
        assert last["pid"] not in (killed["pid"], stopped["pid"])
        tool.gate.set()
        assert (await follower.to_the_end())[-1] == "RUN_DONE"

    journal = (await check(dsn, log, tool.ledger))[run_id]
    _, second = [event for event in journal if event["type"] == "RUN_RECOVERED"]
    # One that stopped in order had given it back: nobody waited for its lease.
    assert (second["data"]["epoch"] > 2, second["data"]["from_worker"]) == (True, None)
    assert len(tool.calls(run_id, "A")) == 1, "what is recorded is not called again"
    assert [call.attempt for call in tool.calls(run_id, "B")] == [1, 1, 1]
    assert len({call.key for call in tool.calls(run_id, "B")}) == 1


async def test_a_restart_of_postgres_takes_no_run_from_a_living_worker(
    tmp_path: Path, tool: Tool
) -> None:
    postgres = ChaosPostgres(tmp_path / "server")
    try:
        await postgres.start()
        dsn = postgres.dsn()
        await migrate(dsn)
        log = ClientLog()
        async with (
            service_processes(dsn, "worker", "worker", "api") as (*workers, front),
            client_of(front) as api,
        ):
            await register(api, tool, "answer", "gate")
            run_ids = [await submit(api, gated(), log) for _ in range(4)]
            await reached(tool, 8)
            killed_at = time.monotonic()
            postgres.kill()
            await postgres.start()
            back_at = await everybody_is_back(dsn, processes=3)
            away_s = time.monotonic() - killed_at
            await everybody_looked(dsn, back_at, processes=3)
            tool.gate.set()
            for run_id in run_ids:
                assert (await Follower(api, run_id, log).to_the_end())[-1] == "RUN_DONE"
            lost = sum([await lease_losses(worker) for worker in workers])
        journals = await check(dsn, log, tool.ledger)
        types = {event["type"] for run_id in run_ids for event in journals[run_id]}
        if lost and away_s > LEFT_S:
            return  # the machine stood still: past its own lease a worker has to let go
        assert "RUN_RECOVERED" not in types
        assert len(tool.ledger) == 8, "no call was repeated"
    finally:
        postgres.stop()


async def lease_losses(worker: ServiceProcess) -> float:
    async with client_of(worker) as client:
        page = (await client.get("/metrics")).text
    [line] = [x for x in page.splitlines() if x.startswith("flexrun_lease_losses_total ")]
    return float(line.split()[1])


async def everybody_is_back(dsn: str, processes: int) -> datetime:
    """Until each has taken part anew; the newest end of their leases."""
    anew = """select max(lease_until) as at from workers
        where pg_start = pg_postmaster_start_time() having count(*) = $1"""
    found: datetime = (await until_found(dsn, anew, processes))["at"]
    return found


async def everybody_looked(dsn: str, back_at: datetime, processes: int) -> None:
    """Until each has renewed its lease after it was back: it looked in between."""
    renewed = """select from workers where lease_until > $1::timestamptz + interval '1 second'
        having count(*) = $2"""
    await until_found(dsn, renewed, back_at, processes)


async def test_a_run_that_kills_its_workers_is_given_up_and_harms_nobody(dsn: str) -> None:
    victims: list[int] = []

    async def kill_the_caller(
        tool: Tool, body: dict[str, Any], writer: asyncio.StreamWriter
    ) -> None:
        holder = await until_found(dsn, HOLDER, body["run_id"])
        victims.append(holder["pid"])
        os.kill(holder["pid"], signal.SIGKILL)

    log = ClientLog()
    async with (
        running_tool(gate=answer_at_gate, answer=answer, poison=kill_the_caller) as tool,
        service_processes(dsn, "worker", "worker", "worker", "worker", "api") as (*workers, front),
        client_of(front) as api,
    ):
        await register(api, tool, "answer", "gate", "poison")
        neighbours = [await submit(api, gated(), log) for _ in range(6)]
        await reached(tool, 12)
        poison = graph(echo_node("A"), echo_node("B", "A", capability="test.poison"))
        run_id = await submit(api, poison, log)
        log.poison.add(run_id)
        async with asyncio.timeout(PATIENCE_S):
            while not victims:
                await asyncio.sleep(0.01)
        tool.gate.set()
        assert (await Follower(api, run_id, log).to_the_end())[-1] == "RUN_FAILED"
        for neighbour in neighbours:
            assert (await Follower(api, neighbour, log).to_the_end())[-1] == "RUN_DONE"
        killed = [worker.process for worker in workers if worker.process.pid in victims]
        await asyncio.gather(*(asyncio.to_thread(process.wait, PATIENCE_S) for process in killed))
        dead = [worker.process.pid for worker in workers if worker.process.poll() is not None]
        assert sorted(dead) == sorted(victims)
        assert len(set(victims)) == 3, "the third loss is the last"

    journals = await check(dsn, log, tool.ledger)
    failed = journals[run_id][-1]["data"]["error"]
    assert failed["code"] == "poison_run"
    lost = [int(worker_id.split(":")[-2]) for worker_id in failed["lost_workers"]]
    assert lost == victims
    assert len(tool.calls(run_id, "B")) == 3
    for neighbour in neighbours:
        assert len(tool.calls(neighbour, "A")) == 1
