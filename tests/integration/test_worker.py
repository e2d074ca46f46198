"""The worker within one process: who counts as dead, what is claimed again, what is given up."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from sqlalchemy import make_url

from app import worker as worker_module
from app.kit.ids import new_id
from app.kit.processes import ProcessAddress
from app.orchestrator import lease as lease_module
from app.orchestrator.lease import FENCE_S, Lease
from app.store.claims import Claim, Fairness, Wanted, claim_runs
from app.store.database import connect
from app.store.leases import forget_workers, leave, register_worker, resign
from tests.chaos.proxy import Weather, running_proxy
from tests.conftest import make_settings
from tests.envelopes import diamond, echo_node, graph
from tests.servers import RunningRedis
from tests.service import RunningService, running_service
from tests.shared_service import register, rows, until
from tests.tools import Tool, answer, answer_at_gate, http_capability, running_tool

PATIENCE_S = 30.0
DEAD = "elsewhere:1:dead"
ELSEWHERE = ProcessAddress("elsewhere", 1)


@pytest.fixture
async def tool() -> AsyncIterator[Tool]:
    late = asyncio.Event()

    async def answer_late(tool: Tool, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await late.wait()
        await answer(tool, body, writer)

    async with running_tool(gate=answer_at_gate, late=answer_late) as tool:
        yield tool
        late.set()


def gated(*more: dict[str, Any]) -> dict[str, Any]:
    """A is done at once, B waits at the tool's gate."""
    return graph(echo_node("A"), echo_node("B", "A", capability="test.gate"), *more)


async def begin(
    service: RunningService, tool: Tool, *envelopes: dict[str, Any], calls: int = 0
) -> list[str]:
    """Submit these, and return when each has a call waiting at the tool."""
    await register(
        service,
        http_capability(tool, "gate", "idempotent"),
        http_capability(tool, "late", "idempotent"),
    )
    found = [await service.submit(envelope) for envelope in envelopes]
    await reached(tool, calls + len(envelopes))
    return [run["run_id"] for run in found]


async def reached(tool: Tool, count: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        await tool.reached(count)


async def head_of(service: RunningService, run_id: str) -> asyncpg.Record:
    [row] = await rows(service, "select * from run_heads where run_id = $1", UUID(run_id))
    return row


async def lose(service: RunningService, run_id: str, *, takes: int) -> None:
    """Let it look as if the worker that drove this run had died, and `takes` others before."""
    _, task = service.services.runner._driven[UUID(run_id)]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await rows(
        service,
        "update run_heads set owner = $2, takes = $3 where run_id = $1",
        UUID(run_id),
        DEAD,
        takes,
    )


class TestWhoIsDead:
    async def test_a_free_lock_counts_when_it_is_seen_twice(self, dsn: str) -> None:
        lease = Lease(lambda: connect(dsn))
        await lease.register()
        other = await connect(dsn)
        assert await register_worker(other, "other", "worker", 4711, ELSEWHERE)
        again = await connect(dsn)
        assert not await register_worker(again, "other", "worker", 4711, ELSEWHERE)
        assert await lease.dead_workers() == []
        assert lease.has_company

        await other.close()
        async with asyncio.timeout(PATIENCE_S):
            while not lease.suspects_somebody:
                assert await lease.dead_workers() == []
        assert await lease.dead_workers() == ["other"]
        assert await register_worker(again, "other", "worker", 4711, ELSEWHERE)
        assert await lease.dead_workers() == [], "it came back in time"
        await again.close()
        await lease.close()

    async def test_a_free_lock_counts_at_once_when_its_process_is_gone_from_here(
        self, dsn: str
    ) -> None:
        """Also from the same pids of another machine: nobody takes those for ours."""
        own = ProcessAddress.own()
        child = await asyncio.create_subprocess_exec(sys.executable, "-c", "input()", stdin=PIPE)
        here = replace(own, pid=child.pid)
        workers = {
            "here": here,
            "lives": own,
            "far": replace(here, pid_space=f"{here.pid_space}, another"),
            "old": replace(here, pid_space=None),
        }
        lease, sessions = Lease(lambda: connect(dsn)), []
        await lease.register()
        for key, (name, process) in enumerate(workers.items()):
            sessions.append(await connect(dsn))
            assert await register_worker(sessions[-1], name, "worker", key, process)
        child.kill()
        await child.wait()
        assert await lease.dead_workers() == [], "all locks are held"

        await sessions[0].close()
        async with asyncio.timeout(PATIENCE_S):
            while not (dead := await lease.dead_workers()):  # until the server has let go of it
                assert not lease.suspects_somebody
            assert dead == ["here"]
            for session in sessions[1:]:
                await session.close()
            while set(dead) != set(workers):
                suspects = set(lease._suspects)
                dead = await lease.dead_workers()
                assert set(dead) <= suspects
        await lease.close()

    async def test_locks_say_nothing_after_the_server_was_restarted(self, dsn: str) -> None:
        lease = Lease(lambda: connect(dsn))
        await lease.register()
        session = lease.session
        for name in ("lives", "over"):
            gone = await connect(dsn)
            assert await register_worker(gone, name, "worker", 4711, ELSEWHERE)
            await gone.close()
        await session.execute(
            "update workers set pg_start = pg_start - interval '1 day' where worker_id <> $1",
            lease.worker_id,
        )
        await session.execute(
            "update workers set lease_until = now() - interval '1 s' where worker_id = 'over'"
        )
        for _ in range(3):
            assert await lease.dead_workers() == [], "they may be about to come back"
        lease._session_since -= FENCE_S
        for _ in range(3):
            assert await lease.dead_workers() == ["over"]
        await lease.close()

    async def test_a_lost_session_is_noticed_at_once_and_replaced(self, dsn: str) -> None:
        lease = Lease(lambda: connect(dsn))
        lost = asyncio.Event()
        lease.on_lost = lost.set
        await lease.register()
        worker_id = lease.worker_id
        pid = lease.session.get_server_pid()
        async with connected(dsn) as other:
            await other.execute("select pg_terminate_backend($1)", pid)
        async with asyncio.timeout(PATIENCE_S):
            await lost.wait()
        assert not lease.held
        assert not lease.fenced
        await lease.renew()
        assert lease.held
        assert lease.worker_id == worker_id
        await lease.close()

    async def test_a_session_that_never_answers_is_replaced_in_time(self, dsn: str) -> None:
        async with running_proxy(make_url(dsn).port or 0) as line:
            through = make_url(dsn).set(port=line.port).render_as_string(hide_password=False)
            lease = Lease(lambda: connect(through))
            await lease.register()
            line.set(Weather(stalled=True))
            lease._renewed_at = 0.0
            with pytest.raises(TimeoutError):
                await lease.renew()
            assert not lease.held
            assert not lease.fenced
            line.clear()
            async with asyncio.timeout(PATIENCE_S):
                while not lease.held:
                    with contextlib.suppress(ConnectionError):  # our old session has the lock
                        await lease.renew()
            await lease.close()

    async def test_who_comes_back_under_another_name_lets_its_runs_go_at_once(
        self, dsn: str
    ) -> None:
        lease, other = (Lease(lambda: connect(dsn)) for _ in range(2))
        await lease.register()
        await other.register()
        before = lease.worker_id
        await other.session.execute(
            """insert into run_heads (run_id, tenant_id, epoch, seq, owner, status, lane)
            values ($1, 'default', 1, 1, $2, 'running', 'standard')""",
            new_id(),
            before,
        )
        assert await other.dead_workers() == []
        await lease.forget_ourselves()
        await lease.register()
        assert await other.dead_workers() == [before]
        await lease.close()
        await other.close()

    async def test_an_owner_that_is_no_worker_is_dead_until_it_owns_nothing(self, dsn: str) -> None:
        lease = Lease(lambda: connect(dsn))
        await lease.register()
        session = lease.session
        heads = [(new_id(), owner) for owner in ("a", "a", "b", "b", lease.worker_id, None)]
        await session.executemany(
            """insert into run_heads (run_id, tenant_id, epoch, seq, owner, status, lane)
            values ($1, 'default', 1, 1, $2, 'running', 'standard')""",
            heads,
        )
        assert await lease.dead_workers() == ["a", "b"]
        await forget_workers(session, ["a", "b", lease.worker_id])
        assert await lease.dead_workers() == ["a", "b"]
        assert await session.fetchval("select count(*) from workers") == 1, "it owns a run"
        await resign(session, [lease.worker_id])
        assert await lease.dead_workers() == ["a", "b"], "it is not dead to itself"
        assert await leave(session, lease.worker_id) == 1
        await lease.close()


@asynccontextmanager
async def connected(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await connect(dsn)
    try:
        yield connection
    finally:
        await connection.close()


class TestClaimedAgain:
    async def test_a_claim_that_was_read_too_late_disturbs_no_newer_one(
        self, service: RunningService, tool: Tool
    ) -> None:
        [run_id] = await begin(service, tool, gated())
        runner = service.services.runner
        run, task = runner._driven[UUID(run_id)]
        runner.start(replace(run, handle=replace(run.handle, epoch=run.handle.epoch - 1)))
        assert runner._driven[UUID(run_id)][1] is task
        tool.gate.set()
        assert (await service.events(run_id))[-1].event == "RUN_DONE"

    async def test_a_run_of_ours_that_nobody_here_drives(
        self, service: RunningService, tool: Tool
    ) -> None:
        [run_id] = await begin(service, tool, gated())
        _, task = service.services.runner._driven[UUID(run_id)]
        task.cancel()
        await reached(tool, 2)
        tool.gate.set()
        events = await service.events(run_id)

        [recovered] = [event for event in events if event.event == "RUN_RECOVERED"]
        assert recovered.json["data"] == {
            "epoch": 2,
            "from_worker": None,  # no worker was lost
            "called_again": ["B"],
        }
        assert events[-1].event == "RUN_DONE"
        assert [(call.node_id, call.attempt) for call in tool.ledger] == [("B", 1), ("B", 1)]

    async def test_a_run_whose_owner_is_no_worker_any_more(
        self, service: RunningService, tool: Tool
    ) -> None:
        [run_id] = await begin(service, tool, gated())
        await lose(service, run_id, takes=0)
        await reached(tool, 2)
        assert (await head_of(service, run_id))["takes"] == 1
        tool.gate.set()
        events = await service.events(run_id)

        [recovered] = [event for event in events if event.event == "RUN_RECOVERED"]
        assert (recovered.json["data"]["epoch"], recovered.json["data"]["from_worker"]) == (2, DEAD)
        assert events[-1].event == "RUN_DONE"

    async def test_while_an_earlier_drive_of_it_still_waits_here(
        self, service: RunningService, tool: Tool
    ) -> None:
        """Others held it in between, and its first driver never noticed."""
        [run_id] = await begin(service, tool, gated())
        owner = "update run_heads set owner = $2 where run_id = $1"
        await rows(service, owner, UUID(run_id), DEAD)
        await reached(tool, 2)
        tool.gate.set()
        events = await service.events(run_id)

        assert [event.event for event in events].count("RUN_RECOVERED") == 1
        assert [event.event for event in events].count("NODE_DONE") == 2
        assert events[-1].event == "RUN_DONE"
        assert len(tool.ledger) == 2
        async with asyncio.timeout(PATIENCE_S):
            while service.services.runner.driven:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)

    async def test_a_driver_that_lost_its_run_writes_nothing_and_lets_go(
        self, service: RunningService, tool: Tool, dsn: str
    ) -> None:
        [run_id] = await begin(service, tool, gated())
        services = service.services
        other = await connect(dsn)
        assert await register_worker(other, "other", "worker", 4711, ELSEWHERE)
        wanted = Wanted(10, 1, [services.lease.worker_id], [], [])
        [taken] = await claim_runs(other, "other", wanted, Fairness())
        assert _facts(taken) == (run_id, 2, services.lease.worker_id, 1)
        before = await head_of(service, run_id)
        tool.gate.set()
        async with asyncio.timeout(PATIENCE_S):
            while services.runner.driven:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)
        assert await head_of(service, run_id) == before
        assert services.metrics.stale_writes == 1

        assert await leave(other, "other") == 1
        await other.close()
        events = await service.events(run_id)
        assert events[-1].event == "RUN_DONE"
        [recovered] = [event for event in events if event.event == "RUN_RECOVERED"]
        assert recovered.json["data"]["from_worker"] is None, "handed over, not lost"
        assert len(tool.ledger) == 2


def _facts(claim: Claim) -> tuple[str, int, str | None, int]:
    return str(claim.run_id), claim.epoch, claim.from_worker, claim.takes


def rarely_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers look once, and then only when they are nudged; nor do they renew their leases."""
    monkeypatch.setattr(worker_module, "LOOK_EVERY_S", 3_600.0)
    monkeypatch.setattr(lease_module, "FENCE_S", 3_600.0)


async def late_cancel(service: RunningService, run_id: str) -> None:
    """A signal that was accepted a moment before the end of its run, and is found after it."""
    await rows(
        service,
        """insert into signals (signal_id, run_id, tenant_id, kind, body, created_at)
        values ($1, $2, 'default', 'cancel', '{}', now())""",
        new_id(),
        UUID(run_id),
    )


async def test_a_signal_that_came_too_late_is_answered(service: RunningService) -> None:
    run = await service.finished(diamond())
    await late_cancel(service, run["run_id"])
    outcomes: list[asyncpg.Record] = []
    async with asyncio.timeout(PATIENCE_S):
        while not outcomes:
            outcomes = await rows(service, "select outcome from signals where outcome is not null")
    assert [row["outcome"] for row in outcomes] == ["discarded: the run is done"]


async def test_a_worker_that_leaves_answers_the_signals_that_came_too_late(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rarely_looks(monkeypatch)
    async with running_service(make_settings(), dsn) as service:
        run = await service.finished(diamond())
        await late_cancel(service, run["run_id"])
    connection = await asyncpg.connect(dsn)
    assert await connection.fetchval("select outcome from signals") == "discarded: the run is done"
    await connection.close()


class TestPoison:
    async def test_the_third_loss_without_progress_fails_the_run(
        self, service: RunningService, tool: Tool
    ) -> None:
        run_id, neighbour = await begin(service, tool, gated(), gated())
        await lose(service, run_id, takes=2)
        events = await service.events(run_id)

        assert events[-1].event == "RUN_FAILED"
        error = events[-1].json["data"]["error"]
        assert (error["code"], error["lost_workers"]) == ("poison_run", [DEAD])
        assert "3 workers" in events[-1].json["data"]["error"]["message"]
        assert len(tool.calls(run_id, "B")) == 1, "it is not called once more"
        head = await head_of(service, run_id)
        assert (head["status"], head["owner"], head["takes"]) == ("failed", None, 3)

        await lose(service, neighbour, takes=0)
        await reached(tool, 3)
        tool.gate.set()
        assert (await service.events(neighbour))[-1].event == "RUN_DONE"
        assert (await service.finished(diamond()))["status"] == "done"

    async def test_progress_forgives_the_losses(self, service: RunningService, tool: Tool) -> None:
        after = echo_node("C", "B", capability="test.late")
        [run_id] = await begin(service, tool, gated(after))
        await lose(service, run_id, takes=1)
        await reached(tool, 2)
        assert (await head_of(service, run_id))["takes"] == 2
        tool.gate.set()
        await reached(tool, 3)
        head = await head_of(service, run_id)
        assert (head["takes"], head["status"]) == (0, "running")

        await lose(service, run_id, takes=head["takes"])
        await reached(tool, 4)
        assert (await head_of(service, run_id))["takes"] == 1

    async def test_of_those_that_lost_workers_one_is_driven_at_a_time(
        self, service: RunningService, tool: Tool
    ) -> None:
        first, second, healthy = await begin(service, tool, gated(), gated(), gated())
        await lose(service, first, takes=1)
        await reached(tool, 4)
        await lose(service, second, takes=1)
        await lose(service, healthy, takes=0)
        await reached(tool, 5)
        # One look found both of them dead, and took what it may.
        assert len(tool.calls(healthy, "B")) == 2
        assert len(tool.calls(second, "B")) == 1
        assert (await head_of(service, second))["owner"] == DEAD

        tool.gate.set()
        for run_id in (first, second, healthy):
            assert (await service.events(run_id))[-1].event == "RUN_DONE"
        heads = await rows(service, "select takes from run_heads")
        assert [head["takes"] for head in heads] == [0, 0, 0]


@pytest.mark.parametrize("transport", ["notify", "redis"])
async def test_a_worker_hears_of_runs_and_signals_without_a_poll(
    dsn: str,
    tool: Tool,
    redis_server: RunningRedis,
    transport: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After their first look neither of them looks again by itself."""
    rarely_looks(monkeypatch)
    more = {"redis_url": redis_server.url} if transport == "redis" else {}
    async with (
        running_service(make_settings(**more), dsn) as driver,
        running_service(make_settings(runs_max=0, **more), dsn) as api,
    ):
        async with asyncio.timeout(PATIENCE_S):
            while not api.services.lease.has_company:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)
        async with asyncio.timeout(PATIENCE_S):
            assert (await api.finished(diamond()))["status"] == "done"
            [run_id] = await begin(api, tool, gated())
            assert driver.services.runner.drives(UUID(run_id))
            response = await api.client.post(f"/v1/runs/{run_id}/cancel", json={})
            assert response.status_code == 202, response.text
            await until(api, run_id, "RUN_CANCELLED")
        assert api.services.runner.driven == 0


async def test_a_suspect_that_is_still_being_read_is_driven_beside_no_other(
    service: RunningService,
) -> None:
    """Two that were lost together would else go on together, and the innocent one be lost again."""
    worker = worker_module.Worker(service.services)
    run_id = new_id()
    worker._suspect = (run_id, time.monotonic())
    assert worker._room_for_suspects() == 1
    reading = asyncio.create_task(asyncio.sleep(PATIENCE_S))
    worker._take_up._tasks[run_id] = reading
    try:
        assert worker._room_for_suspects() == 0
    finally:
        del worker._take_up._tasks[run_id]
        reading.cancel()


async def test_a_contract_that_no_longer_compiles_holds_up_nobody_else(
    dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Facets change; a run of the queue that can not be started is claimed together with others."""
    async with running_service(make_settings(runs_max=0), dsn) as api:
        bad, *good = [(await api.submit(diamond()))["run_id"] for _ in range(4)]
        await rows(
            api,
            """update runs set envelope = jsonb_set(envelope::jsonb, '{output_contract}', $2)::text
            where run_id = $1""",
            UUID(bad),
            '{"mode": "facets", "facets": ["gone.away"]}',
        )
        async with running_service(make_settings(), dsn) as driver:
            for run_id in good:
                [*_, last] = await driver.events(run_id)
                assert last.event == "RUN_DONE"
            [*_, last] = await driver.events(bad)
            assert last.json["data"]["error"]["code"] == "run_unreadable"
        assert "flexrun.worker" not in {record.name for record in caplog.records}
