"""Resuming a run that failed or was cancelled: a new run that keeps what the old one has done."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import httpx
import pytest
import pytest_asyncio

from app.kit.ids import id_at, new_id
from app.store.partitions import prune
from tests.conftest import make_settings
from tests.envelopes import chain, echo_node, graph
from tests.service import RunningService, running_service
from tests.shared_service import problem, register, rows, shared_service, until
from tests.sse import SseEvent
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

ADA = {"id": "ada", "display_name": None, "email": None}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def service(postgres_dsn: str) -> AsyncIterator[RunningService]:
    async with shared_service(postgres_dsn) as service:
        yield service


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def tool(service: RunningService) -> AsyncIterator[Tool]:
    """`fixed` fails until the gate opens, `cut` hangs up in the first round."""
    behaviours = {"answer": answer, "fixed": fails_at_gate, "cut": hang_up, "held": answer_at_gate}
    async with running_tool(**behaviours) as tool:
        await register_all(service, tool)
        yield tool


async def register_all(service: RunningService, tool: Tool) -> None:
    await register(
        service,
        http_capability(tool, "answer", "idempotent"),
        http_capability(tool, "fixed", "idempotent"),
        http_capability(tool, "cut", "at_most_once"),
        http_capability(tool, "held", "at_most_once"),
    )


@pytest.fixture(autouse=True)
def broken(tool: Tool) -> None:
    tool.gate.clear()


async def fails_at_gate(tool: Tool, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    """404 while the gate is closed: a failure that no repetition mends."""
    if tool.gate.is_set():
        await answer(tool, body, writer)
    else:
        respond(writer, 404, {"detail": "not there yet"})


def work(**more: Any) -> dict[str, Any]:
    """A and B are done at once, C fails until it is mended, D needs it."""
    return graph(
        echo_node("A", capability="test.answer"),
        echo_node("B", "A"),
        echo_node("C", "B", capability="test.fixed"),
        echo_node("D", "A", "C", capability="test.answer"),
        **more,
    )


async def failed(service: RunningService, envelope: dict[str, Any]) -> dict[str, Any]:
    run = await service.finished(envelope)
    assert run["status"] == "failed"
    return run


async def resume(
    service: RunningService, run_id: str, key: str | None = None, **body: Any
) -> httpx.Response:
    headers = {} if key is None else {"Idempotency-Key": key}
    return await service.client.post(f"/v1/runs/{run_id}/resume", json=body, headers=headers)


async def resumed(service: RunningService, run_id: str, **body: Any) -> str:
    """Resume a run that has ended; the id of the new one."""
    old = await shown(service, run_id)
    response = await resume(service, run_id, **body)
    assert response.status_code == 202, response.text
    new_run_id: str = response.json()["run_id"]
    assert response.json() == {
        "run_id": new_run_id,
        "signal_id": None,
        "resumed_from": {"run_id": run_id, "seq": old["last_seq"]},
    }
    assert response.headers["location"] == f"/v1/runs/{new_run_id}"
    assert new_run_id != run_id
    return new_run_id


async def shown(service: RunningService, run_id: str) -> dict[str, Any]:
    found: dict[str, Any] = (await service.client.get(f"/v1/runs/{run_id}")).json()
    return found


def story(events: list[SseEvent]) -> list[str]:
    """Types, with the node where there is one."""
    return [" ".join(filter(None, (e.event, e.json.get("node_id")))) for e in events]


def called(tool: Tool, run_id: str) -> list[str]:
    return [entry.node_id for entry in tool.ledger if entry.run_id == run_id]


async def test_what_was_done_is_kept_and_the_failed_node_starts_anew(
    service: RunningService, tool: Tool
) -> None:
    old = await failed(service, work(metadata={"label": "mended", "correlation_id": "c-1"}))
    tool.gate.set()
    run_id = await resumed(service, old["run_id"], operator=ADA, note="the record is there now")
    events = await service.events(run_id)
    assert story(events) == [
        *("RUN_QUEUED", "PLAN_GENERATED", "NODE_SKIPPED A", "NODE_SKIPPED B", "RUN_START"),
        *("NODE_START C", "NODE_DONE C", "NODE_START D", "NODE_DONE D", "RUN_DONE"),
    ]
    assert events[0].json["data"] == {
        "objective": "run the graph",
        "lane": "standard",
        "label": "mended",
        "resumed_from": {"run_id": old["run_id"], "seq": old["last_seq"]},
        "operator": ADA,
        "note": "the record is there now",
    }
    assert events[2].json["data"] == {"reason": "resume", "output": {"echo": {"start": 1}}}
    assert called(tool, old["run_id"]) == ["A", "C"]
    assert called(tool, run_id) == ["C", "D"]

    run = await shown(service, run_id)
    assert run["resumed_from"] == {"run_id": old["run_id"], "seq": old["last_seq"]}
    statuses = {node["node_id"]: node["status"] for node in run["nodes"]}
    assert statuses == {"A": "skipped", "B": "skipped", "C": "done", "D": "done"}
    a = {"echo": {"start": 1}}
    assert run["output"] == {"echo": {"A": a, "C": {"echo": {"B": {"A": a}}}}}
    assert run["metadata"] == {"label": "mended", "correlation_id": "c-1"}
    kept = await service.client.get(f"/v1/runs/{run_id}/nodes/A/output")
    assert kept.json()["output"] == a
    assert await shown(service, old["run_id"]) == old, "a finished run never changes"
    plans = [
        (await service.client.get(f"/v1/runs/{found}/plans/1")).json()["nodes"]
        for found in (old["run_id"], run_id)
    ]
    assert plans[0] == plans[1]


async def test_a_cancelled_run_goes_on_where_it_was_cut_off(
    service: RunningService, tool: Tool
) -> None:
    """Nobody knows what became of the call that was cut off, so it is not made again unasked."""
    calls = len(tool.ledger)
    old = await service.submit(
        graph(echo_node("A"), echo_node("H", "A", capability="test.held"), echo_node("Z", "H"))
    )
    await tool.reached(calls + 1)
    response = await service.client.post(f"/v1/runs/{old['run_id']}/cancel", json={})
    assert response.status_code == 202
    await until(service, old["run_id"], "RUN_CANCELLED")
    tool.gate.set()
    run_id = await resumed(service, old["run_id"])
    paused = await until(service, run_id, "RUN_PAUSED")
    assert paused.json["data"]["nodes"] == ["H"]
    assert called(tool, run_id) == []
    await resume(service, run_id, nodes={"H": {"decision": "retry"}})
    await until(service, run_id, "RUN_DONE", paused.seq)
    assert [entry.key for entry in tool.calls(run_id, "H")] == [f"{run_id}:H:2"]


async def test_an_unknown_outcome_stays_unknown_until_somebody_decides(
    service: RunningService, tool: Tool
) -> None:
    envelope = graph(
        echo_node("X", capability="test.cut"),
        echo_node("Y", capability="test.fixed"),
        echo_node("Z", "X", "Y"),
    )
    old = await failed(service, envelope)
    tool.gate.set()
    run_id = await resumed(service, old["run_id"])
    paused = await until(service, run_id, "RUN_PAUSED")
    assert paused.json["data"]["nodes"] == ["X"]
    [x, _, _] = (await shown(service, run_id))["nodes"]
    assert (x["status"], x["reason"], x["error"]["code"]) == (
        *("blocked", "unknown_outcome", "unknown_outcome"),
    )
    assert called(tool, run_id) == ["Y"]
    decision = {"X": {"decision": "done", "output": {"sent": True}}}
    assert (await resume(service, run_id, nodes=decision)).status_code == 202
    await until(service, run_id, "RUN_DONE", paused.seq)
    assert called(tool, run_id) == ["Y"]
    assert (await shown(service, run_id))["output"]["X"] == {"sent": True}


async def test_decisions_are_for_runs_that_ask_for_them(
    service: RunningService, tool: Tool
) -> None:
    old = await failed(service, work())
    nodes = {"C": {"decision": "done", "output": {}}}
    [fault] = problem(await resume(service, old["run_id"], nodes=nodes), 422, "invalid_request")
    assert (fault["code"], fault["pointer"]) == ("NODE_NOT_WAITING", "/nodes")
    stale = await resume(service, old["run_id"], expected_plan_version=2)
    problem(stale, 409, "stale_plan_version")


async def test_a_successor_can_have_a_successor(service: RunningService, tool: Tool) -> None:
    first = await failed(service, work())
    second = await resumed(service, first["run_id"])
    assert (await until(service, second, "RUN_FAILED")).json["data"]["failed_nodes"] == ["C"]
    tool.gate.set()
    third = await resumed(service, second)
    await until(service, third, "RUN_DONE")
    assert called(tool, second) == ["C"]
    assert called(tool, third) == ["C", "D"]
    assert (await shown(service, third))["resumed_from"]["run_id"] == second


async def test_a_run_that_never_had_a_plan_is_planned_anew(service: RunningService) -> None:
    facet = {"name": "omen", "title": "Omen", "schema": {"type": "string"}, "semantics": "see"}
    assert (await service.client.post("/v1/facets", json=facet)).status_code == 201
    contract = {"mode": "facets", "facets": ["omen"]}
    envelope = {"objective": "foretell", "output_contract": contract}
    old = await failed(service, envelope)
    assert old["error"]["code"] == "plan_rejected"

    async def see(tool: Tool, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        respond(writer, 200, {"omen": "good"})

    async with running_tool(see=see) as seer:
        await register(service, http_capability(seer, "see", "pure", output_contract=contract))
        run_id = await resumed(service, old["run_id"])
        events = await service.events(run_id)
    assert story(events)[:4] == ["RUN_QUEUED", "RUN_START", "PLAN_REQUESTED", "PLAN_GENERATED"]
    assert events[-1].json["data"]["output"] == {"omen": "good"}


async def test_the_same_key_makes_one_new_run(service: RunningService, tool: Tool) -> None:
    old = (await failed(service, work()))["run_id"]
    tool.gate.set()
    body = {"operator": ADA, "note": "again"}
    responses = await asyncio.gather(*(resume(service, old, "again", **body) for _ in range(10)))
    assert {response.status_code for response in responses} == {202}
    [run_id] = {response.json()["run_id"] for response in responses}
    [resumed_from] = {str(response.json()["resumed_from"]) for response in responses}
    assert old in resumed_from
    replayed = [response.headers.get("idempotency-replayed") for response in responses]
    assert replayed.count(None) == 1
    await until(service, run_id, "RUN_DONE")
    again = await resume(service, old, "again", **body)
    assert (again.status_code, again.json()["run_id"]) == (202, run_id)
    assert again.headers["location"] == f"/v1/runs/{run_id}"
    problem(await resume(service, old, "again", note="other"), 422, "idempotency_key_reused")
    [counted] = await rows(service, "select count(*) from runs where resumed_from = $1", UUID(old))
    assert counted["count"] == 1


async def test_a_run_that_is_done_is_not_resumed(service: RunningService) -> None:
    done = await service.finished(chain(1))
    response = await resume(service, done["run_id"])
    problem(response, 409, "invalid_run_state")
    assert response.json()["run_status"] == "done"


async def test_big_results_are_copied_and_outlive_the_old_run(
    postgres_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    big = "ü\n" * 50_000
    envelope = graph(
        echo_node("big", inputs={"big": {"value": big}}),
        echo_node("C", capability="test.fixed"),
        echo_node("Z", "C", inputs={"copy": {"from": "big", "pointer": "/big"}}),
    )
    today = datetime.now(UTC).date()
    async with (
        shared_service(postgres_dsn) as service,
        running_tool(answer=answer, fixed=fails_at_gate, cut=hang_up, held=answer) as tool,
    ):
        await register_all(service, tool)
        with monkeypatch.context() as yesterday:
            yesterday.setattr("app.orchestrator.commands.new_id", _yesterdays_id)
            old = await failed(service, envelope)
            forgotten = await failed(service, work())
            done = await service.finished(chain(1))
        tool.gate.set()
        run_id = await resumed(service, old["run_id"])
        await until(service, run_id, "RUN_DONE")

        [dropped] = [day for day in await prune(service.services.database, today) if day.dropped]
        assert dropped.runs == 3
        events = await service.events(run_id)
        [skipped] = [event.json["data"] for event in events if event.event == "NODE_SKIPPED"]
        assert skipped.keys() == {"reason", "output_ref"}
        output = await service.client.get(f"/v1/runs/{run_id}/nodes/big/output")
        assert output.json()["output"] == {"big": big}
        assert (await shown(service, run_id))["output"] == {"copy": big}

        response = await resume(service, forgotten["run_id"])
        problem(response, 409, "missing_snapshot")
        response = await resume(service, done["run_id"])
        problem(response, 409, "invalid_run_state")
        assert response.json()["run_status"] == "done"


def _yesterdays_id() -> UUID:
    """A fresh run id of the day before."""
    at = datetime.now(UTC) - timedelta(days=1)
    random_part = new_id().int & ((1 << 62) - 1)
    return UUID(int=id_at(int(at.timestamp() * 1000)).int | random_part)


async def test_a_process_that_drives_nothing_accepts_it_and_another_one_goes_on(dsn: str) -> None:
    async with (
        running_service(make_settings(), dsn, "api") as api,
        running_tool(answer=answer, fixed=fails_at_gate, cut=hang_up, held=answer) as tool,
    ):
        async with running_service(make_settings(), dsn) as first:
            await register_all(first, tool)
            old = await failed(first, work())
        tool.gate.set()
        run_id = await resumed(api, old["run_id"])
        run = await shown(api, run_id)
        assert (run["status"], run["resumed_from"]["run_id"]) == ("queued", old["run_id"])
        assert [node["status"] for node in run["nodes"]] == [
            *("skipped", "skipped", "pending", "pending"),
        ]
        async with running_service(make_settings(), dsn):
            await until(api, run_id, "RUN_DONE")
        assert called(tool, run_id) == ["C", "D"]
        assert story(await api.events(run_id))[:6] == [
            *("RUN_QUEUED", "PLAN_GENERATED", "NODE_SKIPPED A", "NODE_SKIPPED B", "RUN_START"),
            "NODE_START C",
        ]


async def test_the_newest_run_of_an_envelope_that_did_not_end_well_is_found(
    service: RunningService, tool: Tool
) -> None:
    async def find(envelope: dict[str, Any]) -> httpx.Response:
        return await service.client.post("/v1/runs/find", json=envelope)

    envelope = work(objective="be found")
    problem(await find(envelope), 404, "run_not_found")
    older = await failed(service, envelope)
    newest = await failed(service, envelope)
    await failed(service, work(objective="be found", metadata={"label": "another"}))
    # Order of members and defaults make no difference.
    spelled_out = {"constraints": {"max_parallel": 16}, **dict(reversed(envelope.items()))}
    for body in (envelope, spelled_out):
        found = await find(body)
        assert (found.status_code, found.json()["run_id"]) == (200, newest["run_id"])
        assert found.json()["status"] == "failed"

    # One of another version, which this one can not read, is no reason to find nothing.
    unreadable = await failed(service, envelope)
    sql = 'update runs set envelope = \'{"of": "another version"}\' where run_id = $1 returning 1'
    await rows(service, sql, UUID(unreadable["run_id"]))
    assert (await find(envelope)).json()["run_id"] == newest["run_id"]

    successor = await resumed(service, newest["run_id"])
    await until(service, successor, "RUN_FAILED")
    assert (await find(envelope)).json()["run_id"] == successor
    tool.gate.set()
    await until(service, await resumed(service, successor), "RUN_DONE")
    # Those that went on elsewhere, and the one that is done, are not meant.
    assert (await find(envelope)).json()["run_id"] == older["run_id"]
