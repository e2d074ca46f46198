"""Cancel, pause and resume over real HTTP: what they do, what they refuse, and what races come to.

Resuming a run that has ended makes a new one: see `test_successors.py`.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
import pytest_asyncio

from app.domain.events import TERMINAL_EVENTS
from app.kit.ids import new_id
from tests.conftest import make_settings
from tests.envelopes import chain, echo_node, graph
from tests.far_side import Exchange, far_side
from tests.process import service_process
from tests.redis_kit import until as eventually
from tests.service import RunningService, running_service
from tests.shared_service import problem, register, rows, shared_service, until
from tests.tools import (
    Tool,
    answer,
    answer_at_gate,
    hang_up,
    http_capability,
    respond,
    running_tool,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

NO_RUN = "0190a5b0-0000-7000-8000-000000000000"
ADA = {"id": "ada", "display_name": "Ada", "email": "ada@example.org"}
ORDERS = ("cancel", "pause", "resume")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def service(postgres_dsn: str) -> AsyncIterator[RunningService]:
    async with shared_service(postgres_dsn) as service:
        yield service


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def tool(service: RunningService) -> AsyncIterator[Tool]:
    """`gated` answers when the gate is open, `cut` hangs up in the first round."""
    async with running_tool(gated=answer_at_gate, cut=hang_up, quick=answer, no=refuse) as tool:
        await register(
            service,
            http_capability(tool, "gated", "idempotent"),
            http_capability(tool, "cut", "at_most_once"),
            http_capability(tool, "quick", "idempotent"),
            http_capability(tool, "no", "pure"),
        )
        yield tool


@pytest.fixture
def gate(tool: Tool) -> asyncio.Event:
    """The gate of the tool, closed."""
    tool.gate.clear()
    return tool.gate


async def refuse(tool: Tool, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    respond(writer, 404, {"detail": "there is no such record"})


async def hold(writer: asyncio.StreamWriter, exchange: Exchange) -> None:
    """Never answer; the call ends when its caller hangs up."""
    await exchange.reader.read()
    raise ConnectionError


async def give(
    service: RunningService, run_id: str, order: str, key: str | None = None, **body: Any
) -> httpx.Response:
    headers = {} if key is None else {"Idempotency-Key": key}
    return await service.client.post(f"/v1/runs/{run_id}/{order}", json=body, headers=headers)


async def given(service: RunningService, run_id: str, order: str, **body: Any) -> str:
    """Give an order that is accepted; the id of its signal."""
    response = await give(service, run_id, order, **body)
    assert response.status_code == 202, response.text
    assert response.headers["location"] == f"/v1/runs/{run_id}"
    accepted = response.json()
    assert accepted == {"run_id": run_id, "signal_id": accepted["signal_id"]}
    signal_id: str = accepted["signal_id"]
    return signal_id


async def shown(service: RunningService, run_id: str) -> dict[str, Any]:
    found: dict[str, Any] = (await service.client.get(f"/v1/runs/{run_id}")).json()
    return found


async def signals_of(service: RunningService, run_id: str) -> list[dict[str, Any]]:
    """The audit trail."""
    view = (await service.client.get(f"/v1/runs/{run_id}/debug")).json()
    found: list[dict[str, Any]] = view["signals"]
    return found


async def types_of(service: RunningService, run_id: str) -> list[str]:
    """The journal as it is, without following it."""
    page = (await service.client.get(f"/v1/runs/{run_id}/events", params={"limit": 1_000})).json()
    return [event["type"] for event in page["events"]]


async def is_parked(service: RunningService, run_id: str) -> bool:
    sql = "select owner from run_heads where run_id = $1"
    [head] = await rows(service, sql, UUID(run_id))
    return head["owner"] is None


async def under_way(service: RunningService, tool: Tool, *more: dict[str, Any]) -> str:
    """A run whose node A is being called and does not end before the gate opens."""
    before = len(tool.ledger)
    run = await service.submit(graph(echo_node("A", capability="test.gated"), *more))
    await tool.reached(before + 1)
    return str(run["run_id"])


async def paused(service: RunningService, tool: Tool) -> str:
    """A run that an operator paused while A was under way; B comes after it."""
    run_id = await under_way(service, tool, echo_node("B", "A", capability="test.quick"))
    await given(service, run_id, "pause")
    await until(service, run_id, "RUN_PAUSED")
    return run_id


async def awaiting_human(service: RunningService) -> str:
    """A run that does not know what became of its node A."""
    run = await service.submit(graph(echo_node("A", capability="test.cut"), echo_node("B", "A")))
    await until(service, run["run_id"], "RUN_PAUSED")
    return str(run["run_id"])


# Cancel


@pytest.mark.parametrize(("effect", "unknown"), [("pure", []), ("at_most_once", ["A"])])
async def test_a_cancel_cuts_off_what_is_under_way(
    service: RunningService, effect: str, unknown: list[str]
) -> None:
    async with far_side() as side:
        side.behave = hold
        held = http_capability(Tool(), f"held_{effect}", effect, config={"url": side.url})
        await register(service, held)
        run = await service.submit(
            graph(echo_node("A", capability=held["capability_id"]), echo_node("B", "A"))
        )
        run_id = run["run_id"]
        await side.arrived.wait()
        signal_id = await given(service, run_id, "cancel", operator=ADA, note="wrong document")
        cancelled = await until(service, run_id, "RUN_CANCELLED")
        async with asyncio.timeout(10):
            await side.gone.wait()
        assert len(side.exchanges) == 1
    assert cancelled.json["level"] == "WARN"
    assert cancelled.json["data"] == {
        "signal_id": signal_id,
        "operator": ADA,
        "note": "wrong document",
        "unfinished_nodes": ["A", "B"],
        "unknown_outcomes": unknown,
    }
    run = await shown(service, run_id)
    assert (run["status"], run["last_seq"], run["output"]) == (*("cancelled", cancelled.seq, None),)
    assert run["finished_at"] is not None
    assert await service.events(run_id, **{"Last-Event-ID": str(cancelled.seq)}) == []
    [signal] = await signals_of(service, run_id)
    assert (signal["kind"], signal["outcome"]) == ("cancel", "applied")
    assert signal["body"] == {"operator": ADA, "note": "wrong document"}


async def test_a_run_that_waits_can_be_cancelled(
    service: RunningService, tool: Tool, gate: asyncio.Event
) -> None:
    for run_id in (await paused(service, tool), await awaiting_human(service)):
        await given(service, run_id, "cancel")
        await until(service, run_id, "RUN_CANCELLED")
        assert (await types_of(service, run_id))[-2:] == ["RUN_PAUSED", "RUN_CANCELLED"]
    gate.set()


@pytest.mark.parametrize("order", ["cancel", "pause"])
async def test_a_queued_run_is_stopped_before_it_calls_anybody(
    postgres_dsn: str, order: str
) -> None:
    """The only place is taken: the order does not wait for it, and nothing of the run starts."""
    async with (
        shared_service(postgres_dsn, runs_max=1) as full,
        running_tool(gated=answer_at_gate) as tool,
    ):
        await register(full, http_capability(tool, "gated", "pure"))
        first = await under_way(full, tool)
        queued = (await full.submit(graph(echo_node("A", capability="test.gated"))))["run_id"]
        assert (await shown(full, queued))["status"] == "queued"
        await given(full, queued, order)
        await until(full, queued, "RUN_CANCELLED" if order == "cancel" else "RUN_PAUSED")
        assert "NODE_START" not in await types_of(full, queued)
        assert len(tool.ledger) == 1
        tool.gate.set()
        await until(full, first, "RUN_DONE")
        if order == "pause":
            await given(full, queued, "resume")
            await until(full, queued, "RUN_DONE")


@pytest.mark.parametrize("order", ["cancel", "pause"])
async def test_an_order_through_a_process_that_drives_nothing_is_carried_out_by_another(
    dsn: str, order: str
) -> None:
    ended = {"cancel": "RUN_CANCELLED", "pause": "RUN_PAUSED"}[order]
    async with running_service(make_settings(), dsn, "api") as api:
        run_id = (await api.submit(chain(2)))["run_id"]
        await given(api, run_id, order)
        assert await types_of(api, run_id) == ["RUN_QUEUED"]
        async with running_service(make_settings(), dsn):
            await until(api, run_id, ended)
            assert await types_of(api, run_id) == [
                *("RUN_QUEUED", "RUN_START", "PLAN_GENERATED", ended),
            ]
            if order == "pause":
                await given(api, run_id, "resume")
                await until(api, run_id, "RUN_DONE")


# The same key


@pytest.mark.parametrize("order", ["cancel", "pause"])
async def test_an_order_that_is_sent_many_times_under_one_key_is_one_order(
    service: RunningService, tool: Tool, gate: asyncio.Event, order: str
) -> None:
    run_id = await under_way(service, tool)
    body = {"operator": ADA, "note": "once"}
    responses = await asyncio.gather(
        *(give(service, run_id, order, "key-1", **body) for _ in range(20))
    )
    assert {response.status_code for response in responses} == {202}
    [signal_id] = {response.json()["signal_id"] for response in responses}
    replayed = [response.headers.get("idempotency-replayed") for response in responses]
    assert sorted(replayed, key=str) == [None, *["true"] * 19]
    await until(service, run_id, "RUN_CANCELLED" if order == "cancel" else "RUN_PAUSED")
    assert [signal["signal_id"] for signal in await signals_of(service, run_id)] == [signal_id]

    other = await give(service, run_id, order, "key-1", **{**body, "note": "twice"})
    problem(other, 422, "idempotency_key_reused")
    if order == "pause":
        await given(service, run_id, "cancel")
        await until(service, run_id, "RUN_CANCELLED")
    # The run has ended, and the answer to this key is still what it was.
    again = await give(service, run_id, order, "key-1", **body)
    assert (again.status_code, again.json()["signal_id"]) == (202, signal_id)
    problem(await give(service, run_id, order, "key-2", **body), 409, "invalid_run_state")
    problem(await give(service, run_id, order, "not a key"), 400, "bad_idempotency_key")
    gate.set()


async def test_a_resume_under_one_key_counts_for_the_pause_that_it_answered(
    service: RunningService, tool: Tool, gate: asyncio.Event
) -> None:
    run_id = await paused(service, tool)
    first = await give(service, run_id, "resume", "go-on")
    resumed = await until(service, run_id, "RUN_RESUMED")
    await given(service, run_id, "pause")
    again_paused = await until(service, run_id, "RUN_PAUSED", resumed.seq)
    again = await give(service, run_id, "resume", "go-on")
    assert again.json() == first.json()
    assert again.headers["idempotency-replayed"] == "true"
    assert (await shown(service, run_id))["last_seq"] == again_paused.seq
    await given(service, run_id, "resume")
    gate.set()
    await until(service, run_id, "RUN_DONE", again_paused.seq)


# What is refused


async def test_an_order_that_does_not_fit_the_run_says_where_the_run_stands(
    service: RunningService, tool: Tool, gate: asyncio.Event
) -> None:
    done = (await service.finished(chain(1)))["run_id"]
    failed = (await service.finished(graph(echo_node("A", capability="test.no"))))["run_id"]
    running = await under_way(service, tool)
    stopped = await paused(service, tool)
    waiting = await awaiting_human(service)
    for run_id, order, status in (
        *((done, order, "done") for order in ORDERS),
        *((failed, order, "failed") for order in ("cancel", "pause")),
        *((running, "resume", "running"), (stopped, "pause", "paused")),
        (waiting, "pause", "awaiting_human"),
    ):
        before = await shown(service, run_id)
        response = await give(service, run_id, order)
        problem(response, 409, "invalid_run_state")
        assert response.json()["run_status"] == status
        assert await shown(service, run_id) == before
    gate.set()
    for run_id in (stopped, waiting):
        await given(service, run_id, "cancel")
        await until(service, run_id, "RUN_CANCELLED")
    await until(service, running, "RUN_DONE")


@pytest.mark.parametrize("order", ORDERS)
async def test_an_order_about_another_plan_is_refused(
    service: RunningService, tool: Tool, gate: asyncio.Event, order: str
) -> None:
    run_id = await (paused if order == "resume" else under_way)(service, tool)
    response = await give(service, run_id, order, expected_plan_version=7)
    problem(response, 409, "stale_plan_version")
    assert (response.json()["expected"], response.json()["current"]) == (7, 1)
    await given(service, run_id, order, expected_plan_version=1)
    if order == "pause":
        await until(service, run_id, "RUN_PAUSED")
        await given(service, run_id, "resume")
    if order != "cancel":
        gate.set()
    await until(service, run_id, "RUN_CANCELLED" if order == "cancel" else "RUN_DONE")
    gate.set()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("run_id", [NO_RUN, "nobody"])
async def test_an_order_for_a_run_that_does_not_exist_is_refused(
    service: RunningService, order: str, run_id: str
) -> None:
    problem(await give(service, run_id, order), 404, "run_not_found")
    problem(await give(service, run_id, order, expected_plan_version=1), 404, "run_not_found")
    problem(await give(service, run_id, order, "some-key"), 404, "run_not_found")


# Pause and resume


async def test_a_paused_run_ends_its_calls_starts_nothing_and_goes_on_when_told(
    service: RunningService, tool: Tool, gate: asyncio.Event
) -> None:
    run_id = await under_way(service, tool, echo_node("B", "A"), echo_node("C"))
    signal_id = await given(service, run_id, "pause", operator=ADA, note="wait")
    pause = await until(service, run_id, "RUN_PAUSED")
    assert pause.json["data"] == {
        "status": "paused",
        "reason": "operator",
        "nodes": ["A"],
        "signal_id": signal_id,
        "operator": ADA,
        "note": "wait",
    }
    assert not await is_parked(service, run_id), "held until its call has ended"
    gate.set()
    ended = await until(service, run_id, "NODE_DONE", pause.seq)
    await eventually(lambda: is_parked(service, run_id), "the run is given back")
    run = await shown(service, run_id)
    assert (run["status"], run["last_seq"]) == ("paused", ended.seq)
    view = (await service.client.get(f"/v1/runs/{run_id}/debug")).json()
    assert (view["lease"]["owner"], view["lease"]["worker"]) == (None, None)
    assert view["snapshot"] == {"seq": ended.seq}
    assert (view["completed_nodes"], view["pending_nodes"]) == (["A", "C"], ["B"])

    await given(service, run_id, "resume", operator=ADA, note="go")
    await until(service, run_id, "RUN_DONE", ended.seq)
    assert (await types_of(service, run_id))[pause.seq - 1 :] == [
        *("RUN_PAUSED", "NODE_DONE", "RUN_RESUMED", "NODE_START", "NODE_DONE", "RUN_DONE"),
    ]
    assert [(s["kind"], s["outcome"]) for s in await signals_of(service, run_id)] == [
        *(("pause", "applied"), ("resume", "applied")),
    ]
    assert (await shown(service, run_id))["timings"]["paused_ms"] > 0


async def test_a_run_that_is_resumed_while_its_call_is_under_way_does_not_call_again(
    service: RunningService, tool: Tool, gate: asyncio.Event
) -> None:
    run_id = await paused(service, tool)
    await given(service, run_id, "resume")
    await until(service, run_id, "RUN_RESUMED")
    gate.set()
    await until(service, run_id, "RUN_DONE")
    assert len(tool.calls(run_id, "A")) == 1


async def test_the_deadline_does_not_count_while_a_run_is_paused(
    service: RunningService, tool: Tool, gate: asyncio.Event
) -> None:
    before = len(tool.ledger)
    node = echo_node("A", capability="test.gated")
    envelope = graph(node, echo_node("B", "A"), constraints={"deadline_s": 3})
    run_id = (await service.submit(envelope))["run_id"]
    await tool.reached(before + 1)
    await given(service, run_id, "pause")
    await until(service, run_id, "RUN_PAUSED")
    gate.set()

    async def is_past_its_deadline() -> bool:
        sql = "select clock_timestamp() > created_at + interval '3.1 s' from runs where run_id = $1"
        [[found]] = await rows(service, sql, UUID(run_id))
        return bool(found)

    await eventually(is_past_its_deadline, "the time is over")
    await given(service, run_id, "resume")
    await until(service, run_id, "RUN_DONE")


async def _two_calls_and_a_pause(service: RunningService, tool: Tool) -> str:
    """A paused run with a call of an `idempotent` and one of an `at_most_once` node under way."""
    await register(
        service,
        http_capability(tool, "gated", "idempotent"),
        http_capability(tool, "gated_once", "at_most_once"),
    )
    run = await service.submit(
        graph(
            echo_node("I", capability="test.gated"),
            echo_node("O", capability="test.gated_once"),
            echo_node("Z", "I", "O"),
        )
    )
    await tool.reached(2)
    await given(service, run["run_id"], "pause")
    await until(service, run["run_id"], "RUN_PAUSED")
    return str(run["run_id"])


async def _goes_on(service: RunningService, tool: Tool, run_id: str) -> None:
    """Its process is gone: the run stays paused, and calls again what it may only when told."""

    async def knows_what_it_does_not_know() -> bool:
        nodes = {node["node_id"]: node for node in (await shown(service, run_id))["nodes"]}
        return nodes["O"]["status"] == "blocked" and await is_parked(service, run_id)

    await eventually(knows_what_it_does_not_know, "the run is taken up and given back")
    run = await shown(service, run_id)
    assert (run["status"], len(tool.ledger)) == ("paused", 2)
    [fault] = problem(await give(service, run_id, "resume"), 422, "invalid_request")
    assert fault["code"] == "DECISION_MISSING"
    tool.gate.set()
    decision = {"O": {"decision": "done", "output": {"said": "so"}}}
    await given(service, run_id, "resume", nodes=decision)
    await until(service, run_id, "RUN_DONE", run["last_seq"])
    calls = [(call.attempt, call.key) for call in tool.calls(run_id, "I")]
    assert calls == [(1, f"{run_id}:I:1")] * 2
    assert len(tool.calls(run_id, "O")) == 1


async def test_a_drain_during_a_pause_hands_the_run_over_paused(dsn: str) -> None:
    async with running_tool(gated=answer_at_gate, gated_once=answer_at_gate) as tool:
        async with running_service(make_settings(drain_grace_s=0.0), dsn) as first:
            run_id = await _two_calls_and_a_pause(first, tool)
        async with running_service(make_settings(), dsn) as second:
            await _goes_on(second, tool, run_id)
            recovered = await until(second, run_id, "RUN_RECOVERED")
            assert recovered.json["data"]["from_worker"] is None, "handed over, not lost"


async def test_a_kill_during_a_pause_leaves_the_run_paused(dsn: str) -> None:
    async with running_tool(gated=answer_at_gate, gated_once=answer_at_gate) as tool:
        async with (
            service_process(dsn) as process,
            running_service(make_settings(), dsn, "api") as api,
        ):
            run_id = await _two_calls_and_a_pause(api, tool)
            await process.kill()
        async with running_service(make_settings(), dsn) as second:
            await _goes_on(second, tool, run_id)
            recovered = await until(second, run_id, "RUN_RECOVERED")
            assert recovered.json["data"]["from_worker"] is not None


async def test_a_paused_run_may_learn_that_an_outcome_is_unknown(service: RunningService) -> None:
    """The call breaks off during the pause: the resume has to say what became of it."""
    async with running_tool(cut_at_gate=cut_at_gate) as tool:
        await register(service, http_capability(tool, "cut_at_gate", "at_most_once"))
        run = await service.submit(graph(echo_node("A", capability="test.cut_at_gate")))
        run_id = run["run_id"]
        await tool.reached(1)
        await given(service, run_id, "pause")
        pause = await until(service, run_id, "RUN_PAUSED")
        tool.gate.set()
        await until(service, run_id, "NODE_BLOCKED", pause.seq)
        problem(await give(service, run_id, "resume"), 422, "invalid_request")
        nodes = {"A": {"decision": "done", "output": {"ok": 1}}}
        await given(service, run_id, "resume", nodes=nodes)
        await until(service, run_id, "RUN_DONE")
        assert len(tool.ledger) == 1


async def cut_at_gate(tool: Tool, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    await tool.gate.wait()
    writer.transport.abort()


# Too late, and at the same time


async def test_a_signal_that_came_too_late_is_told_why_it_did_nothing(
    service: RunningService,
) -> None:
    run_id = (await service.finished(chain(1)))["run_id"]
    for kind in ORDERS:  # accepted a moment before the end, and found after it
        await rows(
            service,
            """insert into signals (signal_id, run_id, tenant_id, kind, body, created_at)
            values ($1, $2, 'default', $3, $4, now())""",
            new_id(),
            UUID(run_id),
            kind,
            json.dumps({"note": "late", "paused_seq": 1}),
        )

    async def are_judged() -> bool:
        return all(signal["outcome"] for signal in await signals_of(service, run_id))

    await eventually(are_judged, "every signal has an outcome")
    outcomes = {signal["outcome"] for signal in await signals_of(service, run_id)}
    assert outcomes == {"discarded: the run is done"}
    assert (await types_of(service, run_id))[-1] == "RUN_DONE"


def _racing(number: int) -> tuple[dict[str, Any], list[str]]:
    """A run, and the orders that race against it and each other."""
    metadata = {"label": "race"}
    node = echo_node("A", capability="test.drowsy")
    match number % 4:
        case 0:
            return graph(node, metadata=metadata), ["cancel"]
        case 1:
            return graph(node, metadata=metadata, constraints={"deadline_s": 0.02}), ["cancel"]
        case 2:
            return graph(node, echo_node("B", "A"), metadata=metadata), ["pause", "cancel"]
    orders = ["pause", "resume", "cancel", "cancel"]
    return graph(node, echo_node("B", "A"), metadata=metadata), orders


@pytest.mark.usefixtures("untraced")
async def test_races_of_orders_and_ends_come_to_one_end_and_every_order_has_an_outcome(
    service: RunningService,
) -> None:
    places = asyncio.Semaphore(16)

    async def race(number: int) -> None:
        envelope, orders = _racing(number)
        async with places:
            run_id = (await service.submit(envelope))["run_id"]
            given = await asyncio.gather(*(give(service, run_id, order) for order in orders))
            assert {response.status_code for response in given} <= {202, 409}

    async def are_over() -> bool:
        """Those that were left paused are cancelled."""
        sql = """select run_id, status from run_heads join runs using (run_id)
            where label = 'race' and status not in ('done', 'failed', 'cancelled')"""
        unfinished = await rows(service, sql)
        for row in unfinished:
            if row["status"] == "paused":
                await give(service, str(row["run_id"]), "cancel", "clean up")
        return not unfinished

    async def are_judged() -> bool:
        sql = """select count(*) from signals join runs using (run_id)
            where label = 'race' and outcome is null"""
        [[count]] = await rows(service, sql)
        return bool(count == 0)

    async with running_tool(drowsy=drowsy) as tool:
        await register(service, http_capability(tool, "drowsy", "pure"))
        await asyncio.gather(*(race(number) for number in range(200)))
        await eventually(are_over, "every run has ended")
    await eventually(are_judged, "every signal has an outcome")

    journals = await rows(
        service,
        """select resumed_from is null, array_agg(e.type order by e.seq) as types,
            (select array_agg(s.kind) from signals s
                where s.run_id = r.run_id and s.outcome = 'applied') as applied
        from events e join runs r using (run_id) where label = 'race' group by r.run_id""",
    )
    ends = [types[-1] for _, types, _ in journals]
    for _, types, applied in journals:
        assert [found for found in types if found in TERMINAL_EVENTS] == types[-1:]
        for kind, event_type in (
            *(("cancel", "RUN_CANCELLED"), ("pause", "RUN_PAUSED"), ("resume", "RUN_RESUMED")),
        ):
            assert (applied or []).count(kind) == types.count(event_type), (applied, types)
    # A resume that came after the cancel made a run of its own.
    assert sum(is_submitted for is_submitted, _, _ in journals) == 200
    assert set(ends) == set(TERMINAL_EVENTS), "each side won some of the races"


_dice = random.Random(11)


async def drowsy(tool: Tool, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    """Answers after a while that nobody can foretell: 1 ms to 1 s, every magnitude as likely, so
    that on any machine some calls are faster than an order and some are slower."""
    await asyncio.sleep(0.001 * 1_000 ** _dice.random())
    await answer(tool, body, writer)


# What an operator sees


async def test_the_debug_view_says_who_drives_the_run_and_what_it_was_told(
    service: RunningService, tool: Tool, gate: asyncio.Event
) -> None:
    run_id = await under_way(service, tool)
    view = (await service.client.get(f"/v1/runs/{run_id}/debug")).json()
    lease = view["lease"]
    assert lease["owner"] == service.services.lease.worker_id
    assert lease["worker"]["role"] == "serve"
    assert (lease["epoch"], lease["takes"], lease["wake_at"]) == (1, 0, None)
    assert view["attempts"]["A"]["attempt"] == 1
    assert view["signals"] == []
    gate.set()
    await until(service, run_id, "RUN_DONE")


async def test_a_known_secret_is_hidden_wherever_it_stands(
    postgres_dsn: str, tmp_path: Path
) -> None:
    secret = "correct-horse-battery"
    file = tmp_path / "secrets.json"
    file.write_text(json.dumps({"tool_key": {"value": secret, "hosts": ["127.0.0.1"]}}))
    async with (
        shared_service(postgres_dsn, secrets_file=file) as service,
        running_tool(cut=hang_up) as tool,
    ):
        await register(service, http_capability(tool, "cut", "at_most_once"))
        words = {"text": f"key: {secret}!", secret: ["x", {"deep": secret}]}
        run = await service.submit(
            graph(
                echo_node("A", capability="test.cut", inputs={"words": {"value": words}}),
                objective=f"use {secret}",
                metadata={"label": secret},
            )
        )
        run_id = run["run_id"]
        await until(service, run_id, "RUN_PAUSED")
        nodes = {"A": {"decision": "done", "output": {"said": secret}}}
        operator = {"id": secret}
        await given(
            service, run_id, "resume", nodes=nodes, operator=operator, note=f"it is {secret}"
        )
        await until(service, run_id, "RUN_DONE")
        response = await service.client.get(f"/v1/runs/{run_id}/debug")
        assert secret not in response.text
        [signal] = response.json()["signals"]
        assert (signal["body"]["note"], signal["outcome"]) == ("it is [secret]", "applied")
        assert response.json()["run"]["output"] == {"said": "[secret]"}
