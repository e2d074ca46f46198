"""Runs over real HTTP: submit, stream, wait, look, resume, and how runs go and end."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import httpx
import pytest
import pytest_asyncio

from app.adapters.capabilities.builtin import Pack
from app.adapters.capabilities.pack import standard_packs
from app.api import negotiate
from app.api.run_schemas import DebugView, RunList, RunResource
from app.domain.capability import Effect
from app.kit.ids import new_id
from app.ports import Call
from tests.envelopes import chain, diamond, echo_node, graph
from tests.far_side import answer as answer_bytes
from tests.far_side import far_side
from tests.redis_kit import until as eventually
from tests.service import RunningService
from tests.shared_service import codes, problem, register, rows, shared_service, until
from tests.sse import SseEvent
from tests.tools import (
    Behaviour,
    Tool,
    answer,
    answer_at_gate,
    hang_up,
    http_capability,
    respond,
    running_tool,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

DIAMOND_EVENTS = [
    *("RUN_QUEUED", "RUN_START", "PLAN_GENERATED", "NODE_START", "NODE_DONE", "NODE_START"),
    *("NODE_START", "NODE_DONE", "NODE_DONE", "NODE_START", "NODE_DONE", "RUN_DONE"),
]
NO_RUN = "0190a5b0-0000-7000-8000-000000000000"
SSE = {"Accept": "text/event-stream"}
TALKATIVE = Pack("talkative")


@TALKATIVE.capability(
    capability_id="test.talk",
    version="1.0.0",
    display_name="Talk",
    summary="Says what it does.",
    input_schema={"type": "object"},
    output_schema={"type": "object"},
    effect=Effect.PURE,
)
async def talk(call: Call) -> dict[str, Any]:
    call.emit("LOG", {"message": "begun\nid: 99", "step": 1})
    await asyncio.sleep(0)
    call.emit("LOG", {"message": "ended", "level": "WARN"})
    return {}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def service(postgres_dsn: str) -> AsyncIterator[RunningService]:
    async with shared_service(postgres_dsn) as service:
        yield service


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def other(postgres_dsn: str) -> AsyncIterator[RunningService]:
    """A service without the latency record, with a builtin that logs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("app.bootstrap.standard_packs", lambda t: (*standard_packs(t), TALKATIVE))
        async with shared_service(postgres_dsn, latency_record=False) as service:
            yield service


def seq_of(events: list[SseEvent], event_type: str, node_id: str) -> int:
    """Where the one event of this type and node stands."""
    [found] = [e.seq for e in events if (e.event, e.json.get("node_id")) == (event_type, node_id)]
    return found


def of_node(events: list[SseEvent], node_id: str) -> list[tuple[str, int | None]]:
    """Type and attempt of a node's events, in order."""
    return [(e.event, e.json.get("attempt")) for e in events if e.json.get("node_id") == node_id]


def assert_diamond_order(events: list[SseEvent]) -> None:
    for earlier, later in (("A", "B"), ("A", "C"), ("B", "D"), ("C", "D")):
        assert seq_of(events, "NODE_DONE", earlier) < seq_of(events, "NODE_START", later)


def drowsy(service: RunningService, seed: int) -> Behaviour:
    """Answers after a while that nobody can foretell; of every other run C first, of the rest B."""
    dice, turns = random.Random(seed), itertools.cycle("BC")
    last_of: defaultdict[str, str] = defaultdict(lambda: next(turns))

    async def is_done(run_id: str, node_id: str) -> bool:
        sql = "select from events where run_id = $1 and node_id = $2 and type = 'NODE_DONE'"
        return bool(await rows(service, sql, UUID(run_id), node_id))

    async def behave(tool: Tool, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(dice.uniform(0, 0.02))
        run_id, node_id = body["run_id"], body["node_id"]
        if node_id == last_of[run_id]:
            other = "C" if node_id == "B" else "B"
            await eventually(lambda: is_done(run_id, other), "the other one is done")
        await answer(tool, body, writer)

    return behave


def failing(times: int) -> Behaviour:
    """503 for the first attempts of a node, then 200."""

    async def behave(tool: Tool, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if body["attempt"] <= times:
            respond(writer, 503, {"detail": "not yet"})
        else:
            await answer(tool, body, writer)

    return behave


async def refuse(tool: Tool, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    respond(writer, 404, {"title": "no", "detail": "there is no such record"})


class Turnstile:
    """A behaviour that counts how many calls are under way at once. They end one by one."""

    def __init__(self, hold_s: float = 0.04) -> None:
        self.inside = 0
        self.inside_max = 0
        self._hold_s = hold_s
        self._dice = random.Random(11)

    async def __call__(
        self, tool: Tool, body: dict[str, Any], writer: asyncio.StreamWriter
    ) -> None:
        self.inside += 1
        self.inside_max = max(self.inside_max, self.inside)
        await asyncio.sleep(self._dice.uniform(0, self._hold_s))
        self.inside -= 1
        await answer(tool, body, writer)


# Submitting


async def test_a_post_that_accepts_sse_streams_the_whole_run(service: RunningService) -> None:
    events = await service.stream(diamond())

    assert [event.event for event in events] == DIAMOND_EVENTS
    assert [event.seq for event in events] == list(range(1, 13))
    assert [event.id for event in events] == [str(n) for n in range(1, 13)]
    assert_diamond_order(events)


async def test_the_diamond_keeps_its_order_however_long_the_nodes_take(
    service: RunningService,
) -> None:
    async with running_tool(drowsy=drowsy(service, 7)) as tool:
        await register(service, http_capability(tool, "drowsy", "pure"))
        envelope = diamond()
        for node in envelope["goal_graph"]["nodes"]:
            node["capability"] = "test.drowsy"
        streams = await asyncio.gather(*(service.stream(envelope) for _ in range(12)))
    for events in streams:
        assert_diamond_order(events)
        assert events[-1].event == "RUN_DONE"
    ends = {
        seq_of(events, "NODE_DONE", "B") < seq_of(events, "NODE_DONE", "C") for events in streams
    }
    assert ends == {True, False}, "B and C end in either order"


async def test_the_answer_to_a_post_is_the_run_resource(service: RunningService) -> None:
    envelope = diamond(metadata={"label": "shape", "correlation_id": "c-1"})
    response = await service.client.post("/v1/runs", json=envelope)

    assert response.status_code == 202
    accepted = response.json()
    assert response.headers["location"] == accepted["links"]["self"]
    assert set(accepted) == set(RunResource.model_fields)
    RunResource.model_validate(accepted)
    assert (accepted["status"], accepted["last_seq"], accepted["plan_version"]) == ("queued", 1, 1)
    assert [node["status"] for node in accepted["nodes"]] == ["pending"] * 4

    await service.events(accepted["run_id"])
    shown = (await service.client.get(accepted["links"]["self"])).json()
    RunResource.model_validate(shown)
    assert shown["status"] == "done"
    assert shown["last_seq"] == 12
    assert [node["status"] for node in shown["nodes"]] == ["done"] * 4
    assert shown["output"] == {"B": {"A": {"start": 1}}, "C": {"A": {"start": 1}}}
    assert shown["created_at"] == accepted["created_at"] <= shown["finished_at"]
    assert shown["metadata"] == {"label": "shape", "correlation_id": "c-1"}
    for name in ("run_id", "objective", "links", "metadata"):
        assert shown[name] == accepted[name]


@pytest.mark.parametrize(
    ("accept", "is_stream"),
    [
        (None, False),
        ("", False),
        ("*/*", False),
        ("application/json", False),
        ("text/html", False),
        ("text/event-stream", True),
        ("Text/Event-Stream", True),
        ("text/event-stream; charset=utf-8", True),
        ("text/event-stream, application/json", True),
        ("application/json, text/event-stream", True),
        ("application/json;q=0.9, text/event-stream;q=0.9", True),
        ("text/event-stream, */*;q=0.1", True),
        ("text/event-stream, */*", True),
        ("application/json;q=0.2,text/event-stream;q=0.5", True),
        ("application/json, text/event-stream;q=0.5", False),
        ("text/event-stream;q=0.5, */*", False),
        ("text/event-stream;q=0.5, application/*;q=0.8", False),
        ("text/event-stream;q=0.5, application/json;q=0.2, */*", True),
        ("text/event-stream;q=0", False),
        ("text/event-stream;q=nan", False),
        ("text/event-stream;q=loud", False),
    ],
)
async def test_accept_decides_between_json_and_a_stream(
    service: RunningService, accept: str | None, is_stream: bool
) -> None:
    request = service.client.build_request("POST", "/v1/runs", json=chain(1))
    del request.headers["accept"]
    if accept is not None:
        request.headers["accept"] = accept
    response = await service.client.send(request)

    kind = response.headers["content-type"].partition(";")[0]
    if is_stream:
        assert (response.status_code, kind) == (200, "text/event-stream")
        assert response.headers["location"].startswith("/v1/runs/")
        assert response.headers["cache-control"] == "no-store, no-transform"
    else:
        assert (response.status_code, kind) == (202, "application/json")


async def test_prefer_wait_answers_with_the_finished_run_or_with_202(
    service: RunningService, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = await service.client.post("/v1/runs", json=diamond(), headers={"Prefer": "wait=20"})
    assert done.status_code == 200
    assert RunResource.model_validate(done.json()).status == "done"
    assert done.headers["location"] == done.json()["links"]["self"]

    async with running_tool(gated=answer_at_gate) as tool:
        await register(service, http_capability(tool, "gated", "pure"))
        gated = graph(echo_node("A", capability="test.gated"))
        late = await service.client.post(
            "/v1/runs", json=gated, headers={"Prefer": "respond-async, wait=1"}
        )
        assert late.status_code == 202
        assert RunResource.model_validate(late.json()).status == "running"

        monkeypatch.setattr(negotiate, "WAIT_MAX_S", 0.2)
        capped = await service.client.post("/v1/runs", json=gated, headers={"Prefer": "wait=9999"})
        assert capped.status_code == 202

        no_wait = await service.client.post("/v1/runs", json=gated, headers={"Prefer": "wait=0"})
        assert (no_wait.status_code, no_wait.json()["last_seq"]) == (202, 1)
        tool.gate.set()
        for response in (late, capped, no_wait):
            await until(service, response.json()["run_id"], "RUN_DONE")


async def test_the_longest_wait_is_a_minute() -> None:
    assert negotiate.WAIT_MAX_S == 60
    assert negotiate.preferred_wait_s("wait=61") == 60
    assert negotiate.preferred_wait_s('wait="5"') == 5
    assert negotiate.preferred_wait_s("wait=soon") == 0
    assert negotiate.preferred_wait_s("respond-async") == 0


# Idempotency keys


async def test_the_same_key_and_body_give_the_same_run(service: RunningService) -> None:
    envelope = diamond(metadata={"label": "replayed"})
    first = await service.client.post(
        "/v1/runs", json=envelope, headers={"Idempotency-Key": "same-1"}
    )
    assert first.status_code == 202
    assert "idempotency-replayed" not in first.headers
    run_id = first.json()["run_id"]
    await service.events(run_id)

    # Order of keys, defaults and quotes around the key make no difference.
    reordered = {**dict(reversed(envelope.items())), "constraints": {"max_parallel": 16}}
    for body, key in ((envelope, "same-1"), (reordered, "same-1"), (envelope, '"same-1"')):
        again = await service.client.post("/v1/runs", json=body, headers={"Idempotency-Key": key})
        assert again.status_code == 202
        assert again.headers["idempotency-replayed"] == "true"
        assert again.headers["location"] == first.headers["location"]
        assert RunResource.model_validate(again.json()).run_id == run_id

    async with service.client.stream(
        "POST", "/v1/runs", json=envelope, headers={"Idempotency-Key": "same-1", **SSE}
    ) as stream:
        assert stream.status_code == 200
        assert stream.headers["idempotency-replayed"] == "true"
        assert stream.headers["location"] == first.headers["location"]
        await stream.aread()
        assert stream.text.count("\nid: ") == 12
        assert "id: 1\nevent: RUN_QUEUED\n" in stream.text

    waited = await service.client.post(
        "/v1/runs", json=envelope, headers={"Idempotency-Key": "same-1", "Prefer": "wait=5"}
    )
    assert (waited.status_code, waited.json()["status"]) == (200, "done")
    assert waited.headers["idempotency-replayed"] == "true"
    [counted] = await rows(service, "select count(*) from runs where label = 'replayed'")
    assert counted["count"] == 1


async def test_a_key_with_another_body_is_refused(service: RunningService) -> None:
    headers = {"Idempotency-Key": "other-body"}
    await service.submit(chain(1), **headers)
    response = await service.client.post("/v1/runs", json=chain(2), headers=headers)
    problem(response, 422, "idempotency_key_reused")


async def test_a_body_that_is_wrong_does_not_use_its_key_up(service: RunningService) -> None:
    headers = {"Idempotency-Key": "second-thoughts"}
    wrong = await service.client.post("/v1/runs", json={**chain(1), "odd": 1}, headers=headers)
    problem(wrong, 422, "invalid_request")
    unplanned = graph(echo_node("A", capability="no.such"))
    problem(
        await service.client.post("/v1/runs", json=unplanned, headers=headers),
        422,
        "plan_rejected",
    )
    await service.submit(chain(1), **headers)


@pytest.mark.parametrize(
    "key", [b"", b'""', b"two words", b"x" * 201, b"caf\xc3\xa9", b'"open', b'open"', b'a"b']
)
async def test_a_key_that_is_no_key_is_refused(service: RunningService, key: bytes) -> None:
    response = await service.client.post(
        "/v1/runs", json=chain(1), headers=[(b"Idempotency-Key", key)]
    )
    problem(response, 400, "bad_idempotency_key")


async def test_a_hundred_identical_posts_make_one_run(service: RunningService) -> None:
    envelope = diamond(metadata={"label": "hundred"})
    headers = {"Idempotency-Key": "hundred"}

    async def post() -> httpx.Response:
        return await service.client.post("/v1/runs", json=envelope, headers=headers)

    responses = await asyncio.gather(*(post() for _ in range(100)))
    assert {response.status_code for response in responses} == {202}
    [run_id] = {response.json()["run_id"] for response in responses}
    replayed = [response.headers.get("idempotency-replayed") for response in responses]
    assert replayed.count(None) == 1
    await service.events(run_id)
    assert (await post()).json()["run_id"] == run_id
    [counted] = await rows(
        service,
        """select (select count(*) from runs where label = 'hundred') as runs,
            (select count(*) from run_heads h join runs r using (run_id)
                where r.label = 'hundred') as heads,
            (select count(*) from idempotency_keys where key = 'hundred') as keys,
            (select count(*) from events e join runs r using (run_id)
                where r.label = 'hundred') as events""",
    )
    assert dict(counted) == {"runs": 1, "heads": 1, "keys": 1, "events": 12}


# Looking


async def test_runs_are_listed_in_pages_without_gaps_or_doubles(service: RunningService) -> None:
    label = {"metadata": {"label": "paged", "correlation_id": "c"}}
    made = [(await service.submit(chain(1, **label)))["run_id"] for _ in range(12)]
    await asyncio.gather(*(service.events(run_id) for run_id in made))

    found: list[str] = []
    cursor: str | None = None
    while True:
        query: dict[str, Any] = {
            "label": "paged",
            "limit": 5,
            **({"cursor": cursor} if cursor else {}),
        }
        page = (await service.client.get("/v1/runs", params=query)).json()
        RunList.model_validate(page)
        found += [run["run_id"] for run in page["runs"]]
        # Runs that arrive while somebody turns the pages do not shift them.
        await service.submit(chain(1, metadata={"label": "paged"}))
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert found == made[::-1]


async def test_the_list_is_filtered_by_status_label_and_time(service: RunningService) -> None:
    named = {"metadata": {"label": "filtered"}}
    first = await service.finished(chain(1, **named))
    failed_envelope = graph(echo_node("A"), output_contract=INTEGER_OUTPUT, **named)
    failed = await service.finished(failed_envelope)
    last = await service.finished(chain(1, **named))
    run_ids = {name: run["run_id"] for name, run in (("1", first), ("2", failed), ("3", last))}

    async def listed(**query: Any) -> list[str]:
        response = await service.client.get("/v1/runs", params={"label": "filtered", **query})
        assert response.status_code == 200, response.text
        names = {run_id: name for name, run_id in run_ids.items()}
        return [names[run["run_id"]] for run in response.json()["runs"]]

    assert await listed() == ["3", "2", "1"]
    assert await listed(status="failed") == ["2"]
    assert await listed(status=["failed", "done"]) == ["3", "2", "1"]
    assert await listed(status="queued") == []
    assert await listed(created_after=last["created_at"]) == ["3"]
    assert await listed(created_before=failed["created_at"]) == ["1"]
    assert await listed(label="nobody") == []


@pytest.mark.parametrize(
    ("query", "status", "code"),
    [
        ({"cursor": "%%%"}, 400, "bad_cursor"),
        ({"cursor": "WyJ4Il0"}, 400, "bad_cursor"),
        ({"limit": "0"}, 422, "invalid_request"),
        ({"limit": "201"}, 422, "invalid_request"),
        ({"status": "sleeping"}, 422, "invalid_request"),
        ({"label": "\x00"}, 422, "invalid_request"),
        ({"created_after": "yesterday"}, 422, "invalid_request"),
        ({"created_after": "1900-01-01T00:00:00Z"}, 400, "bad_time"),
    ],
)
async def test_a_list_that_can_not_be_made_is_a_problem(
    service: RunningService, query: dict[str, str], status: int, code: str
) -> None:
    faults = problem(await service.client.get("/v1/runs", params=query), status, code)
    if status == 422:
        [fault] = faults
        assert fault["pointer"].startswith(f"/query/{next(iter(query))}")


async def test_a_big_output_is_stored_beside_the_events(service: RunningService) -> None:
    big = "ü\n" * 50_000
    envelope = graph(
        echo_node("A", inputs={"big": {"value": big}}),
        echo_node(
            "B", "A", inputs={"size": {"value": 1}, "copy": {"from": "A", "pointer": "/big"}}
        ),
    )
    events = await service.stream(envelope)
    run_id = events[0].json["run_id"]
    [done] = [e.json for e in events if (e.event, e.json.get("node_id")) == ("NODE_DONE", "A")]
    assert "output" not in done["data"]
    assert done["data"]["output_ref"]["bytes"] == len(big.encode()) + len('{"big":""}') + 50_000
    assert max(len(event.data) for event in events) < 1_000
    assert events[-1].json["data"]["output_ref"]

    shown = await service.client.get(f"/v1/runs/{run_id}/nodes/A/output")
    assert shown.json() == {"run_id": run_id, "node_id": "A", "output": {"big": big}}
    run = (await service.client.get(f"/v1/runs/{run_id}")).json()
    assert run["output"] == {"size": 1, "copy": big}


async def test_a_small_output_is_in_the_event_and_behind_its_link(service: RunningService) -> None:
    run = await service.finished(diamond())
    shown = await service.client.get(f"/v1/runs/{run['run_id']}/nodes/D/output")
    assert shown.json()["output"] == run["output"]


async def test_plans_are_shown_compared_and_previewed(service: RunningService) -> None:
    before = await rows(service, "select (select count(*) from runs), count(*) from plan_versions")
    preview = await service.client.post("/v1/plans/preview", json=diamond())
    assert preview.status_code == 200
    assert before == await rows(
        service, "select (select count(*) from runs), count(*) from plan_versions"
    )

    run = await service.finished(diamond())
    url = f"/v1/runs/{run['run_id']}/plans"
    [plan] = (await service.client.get(url)).json()["plans"]
    assert plan == (await service.client.get(f"{url}/1")).json()
    assert (plan["run_id"], plan["version"], plan["author"]) == (run["run_id"], 1, "caller")
    for name in ("nodes", "metadata", "author", "version"):
        assert preview.json()[name] == plan[name]
    assert {step["fit"] for step in plan["metadata"]["proof"]} <= {"subsumed", "checked_at_run"}

    same = await service.client.get(f"{url}/diff", params={"from": 1, "to": 1})
    assert same.json() == {"from": 1, "to": 1, "added": [], "removed": [], "changed": []}
    problem(
        await service.client.get(f"{url}/diff", params={"from": 1, "to": 2}), 404, "plan_not_found"
    )
    problem(await service.client.get(f"{url}/2"), 404, "plan_not_found")
    assert codes(problem(await service.client.get(f"{url}/one"), 422, "invalid_request")) == [
        ("int_parsing", "/path/version")
    ]
    assert codes(problem(await service.client.get(f"{url}/diff"), 422, "invalid_request")) == [
        ("missing", "/query/from"),
        ("missing", "/query/to"),
    ]


@pytest.mark.parametrize(
    "run_id", [NO_RUN, "nobody", "%00", "ffffffff-ffff-ffff-ffff-ffffffffffff"]
)
async def test_what_does_not_exist_is_not_found(service: RunningService, run_id: str) -> None:
    base = f"/v1/runs/{run_id}"
    for path in ("", "/events", "/plans", "/plans/1", "/plans/diff?from=1&to=1", "/debug"):
        problem(await service.client.get(base + path), 404, "run_not_found")
    problem(await service.client.get(f"{base}/nodes/A/output"), 404, "run_not_found")
    problem(await service.client.post(f"{base}/resume", json={}), 404, "run_not_found")
    problem(await service.client.get(f"{base}/events", headers=SSE), 404, "run_not_found")


async def test_a_node_without_an_output_says_why(service: RunningService) -> None:
    async with running_tool(gated=answer_at_gate) as tool:
        await register(service, http_capability(tool, "gated", "pure"))
        run = await service.submit(graph(echo_node("A", capability="test.gated")))
        base = f"/v1/runs/{run['run_id']}/nodes"
        await until(service, run["run_id"], "NODE_START")
        response = await service.client.get(f"{base}/A/output")
        problem(response, 404, "no_output")
        assert "running" in response.json()["detail"]
        problem(await service.client.get(f"{base}/Z/output"), 404, "node_not_found")
        tool.gate.set()
        await until(service, run["run_id"], "RUN_DONE")


async def test_methods_that_a_route_has_not_are_refused(service: RunningService) -> None:
    for method, path, allowed in (
        ("DELETE", "/v1/runs", "GET, POST"),
        ("PUT", f"/v1/runs/{NO_RUN}", "GET"),
        ("GET", f"/v1/runs/{NO_RUN}/resume", "POST"),
    ):
        response = await service.client.request(method, path)
        problem(response, 405, "method_not_allowed")
        assert response.headers["allow"] == allowed
    problem(await service.client.get("/v1/nothing"), 404, "route_not_found")


async def test_a_trace_of_the_caller_is_continued(service: RunningService) -> None:
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    async with far_side() as side:
        side.behave = answer_bytes(body=b'{"ok": true}')
        body = http_capability(Tool(), "traced", "pure", config={"url": side.url})
        await register(service, body)
        envelope = graph(echo_node("A", capability="test.traced"))
        events = await service.stream(envelope, traceparent=f"00-{trace_id}-00f067aa0ba902b7-01")
        assert {event.json["trace_id"] for event in events} == {trace_id}
        [exchange] = side.exchanges
        version, called_trace, span, flags = exchange.headers["traceparent"].split("-")
        assert (version, called_trace, flags) == ("00", trace_id, "01")
        assert span != "00f067aa0ba902b7"
        assert exchange.headers["idempotency-key"] == exchange.json["idempotency_key"]

    for wrong in ("00-" + "0" * 32 + "-00f067aa0ba902b7-01", "garbage", "ff-" + trace_id):
        events = await service.stream(chain(1), traceparent=wrong)
        [own] = {event.json["trace_id"] for event in events}
        assert own != trace_id
        assert len(own) == 32
        assert int(own, 16)


async def test_the_operator_view_shows_everything_but_secrets(service: RunningService) -> None:
    secrets = ["s3cret-key", "hunter2", "t0ken", "p4ss"]
    envelope = graph(
        echo_node(
            "A",
            inputs={
                "api_key": {"value": "s3cret-key"},
                "nested": {"value": {"Password": ["hunter2"], "access_token": "t0ken"}},
                "address": {"value": "https://user:p4ss@example.org/x"},
                "max_tokens": {"value": 5},
            },
        ),
        echo_node("B", "A"),
        inputs={"secrets": {"a": "hunter2"}},
    )
    run = await service.finished(envelope)
    response = await service.client.get(f"/v1/runs/{run['run_id']}/debug")
    assert response.headers["cache-control"] == "no-store"
    assert not [secret for secret in secrets if secret in response.text]
    view = DebugView.model_validate(response.json())
    assert view.completed_nodes == ["A", "B"]
    assert view.pending_nodes == []
    assert view.lease["epoch"] == 1
    assert view.attempts["B"]["attempt"] == 1
    assert len(view.plans) == 1
    assert view.envelope is not None
    assert view.envelope["goal_graph"]["nodes"][0]["inputs"]["max_tokens"] == {"value": 5}


async def test_the_latency_record_tells_where_the_time_went(service: RunningService) -> None:
    run = await service.finished(diamond())
    timings = run["timings"]
    assert set(timings["nodes"]) == {"A", "B", "C", "D"}
    assert timings["total_ms"] >= timings["queue_ms"] >= 0
    assert timings["planning_ms"] > 0
    assert timings["paused_ms"] == 0


async def test_the_latency_record_can_be_switched_off(other: RunningService) -> None:
    events = await other.stream(diamond())
    assert "planning_ms" not in events[2].json["data"]
    run = (await other.client.get(f"/v1/runs/{events[0].json['run_id']}")).json()
    assert run["timings"] is None
    RunResource.model_validate(run)


async def test_a_builtin_can_write_to_the_log_of_its_run(other: RunningService) -> None:
    events = await other.stream(graph(echo_node("A", capability="test.talk")))
    assert of_node(events, "A") == [
        ("NODE_START", 1),
        ("LOG", 1),
        ("LOG", 1),
        ("NODE_DONE", 1),
    ]
    logs = [event.json for event in events if event.event == "LOG"]
    assert logs[0]["data"] == {"message": "begun\nid: 99", "step": 1}
    assert [log["level"] for log in logs] == ["INFO", "WARN"]


# A run that waits for a human


async def close(tool: Tool, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    """Whoever calls never learns what happened."""
    writer.transport.abort()


async def parked(service: RunningService, tool: Tool) -> tuple[str, int]:
    """A run whose node B has an unknown outcome; its id and the seq of its pause."""
    strict = {
        "mode": "json_schema",
        "schema": {
            "type": "object",
            "properties": {"ok": {"type": "integer"}},
            "required": ["ok"],
        },
    }
    body = http_capability(tool, "cut", "at_most_once", output_contract=strict)
    await register(service, body)
    run = await service.submit(
        graph(echo_node("A"), echo_node("B", "A", capability="test.cut"), echo_node("C", "B"))
    )
    paused = await until(service, run["run_id"], "RUN_PAUSED")
    assert paused.json["data"] == {
        "status": "awaiting_human",
        "reason": "unknown_outcome",
        "nodes": ["B"],
    }
    return run["run_id"], paused.seq


async def cut_once(tool: Tool, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    """The first round is cut off, later ones are answered."""
    if body["idempotency_key"].endswith(":1"):
        await hang_up(tool, body, writer)
    else:
        respond(writer, 200, {"ok": 2})


async def test_a_waiting_run_shows_what_it_waits_for(service: RunningService) -> None:
    async with running_tool(cut=cut_once) as tool:
        run_id, seq = await parked(service, tool)
        run = (await service.client.get(f"/v1/runs/{run_id}")).json()
        RunResource.model_validate(run)
        assert (run["status"], run["last_seq"]) == ("awaiting_human", seq)
        [waiting] = [node for node in run["nodes"] if node["node_id"] == "B"]
        assert (waiting["status"], waiting["reason"]) == ("blocked", "unknown_outcome")
        assert waiting["error"]["code"] == "capability_connection_lost"
        response = await service.client.post(
            f"/v1/runs/{run_id}/resume", json={"nodes": {"B": {"decision": "fail"}}}
        )
        assert response.status_code == 202
        await until(service, run_id, "RUN_FAILED", seq)


@pytest.mark.parametrize(
    ("answer_given", "types", "calls", "status"),
    [
        (
            {"decision": "done", "output": {"ok": 1}},
            ["RUN_RESUMED", "NODE_DONE", "NODE_START", "NODE_DONE", "RUN_DONE"],
            [":B:1"],
            "done",
        ),
        (
            {"decision": "retry"},
            [
                *("RUN_RESUMED", "NODE_RETRY", "NODE_START", "NODE_DONE"),
                *("NODE_START", "NODE_DONE", "RUN_DONE"),
            ],
            [":B:1", ":B:2"],
            "done",
        ),
        (
            {"decision": "fail"},
            ["RUN_RESUMED", "NODE_FAILED", "NODE_BLOCKED", "RUN_FAILED"],
            [":B:1"],
            "failed",
        ),
    ],
)
async def test_a_human_decides_what_became_of_a_node(
    service: RunningService,
    answer_given: dict[str, Any],
    types: list[str],
    calls: list[str],
    status: str,
) -> None:
    operator = {"id": "ops-1", "display_name": "Ops", "email": "ops@example.org"}
    async with running_tool(cut=cut_once) as tool:
        run_id, seq = await parked(service, tool)
        response = await service.client.post(
            f"/v1/runs/{run_id}/resume",
            json={
                "nodes": {"B": answer_given},
                "operator": operator,
                "note": "looked it up",
                "expected_plan_version": 1,
            },
        )
        assert response.status_code == 202
        assert response.headers["location"] == f"/v1/runs/{run_id}"
        events = await service.events(run_id, **{"Last-Event-ID": str(seq)})

    assert [event.event for event in events] == types
    resumed = events[0].json["data"]
    assert resumed["signal_id"] == response.json()["signal_id"]
    assert (resumed["operator"]["id"], resumed["note"]) == ("ops-1", "looked it up")
    assert [entry.key for entry in tool.calls(run_id, "B")] == [run_id + end for end in calls]
    run = (await service.client.get(f"/v1/runs/{run_id}")).json()
    assert run["status"] == status
    if status == "done":
        assert run["output"] == {"B": {"ok": len(calls)}}
    else:
        assert run["error"]["code"] == "node_failed"
        assert events[-1].json["data"]["failed_nodes"] == ["B"]
    [signal] = (await service.client.get(f"/v1/runs/{run_id}/debug")).json()["signals"]
    assert (signal["outcome"], signal["signal_id"]) == ("applied", response.json()["signal_id"])


WRONG_DECISIONS: list[tuple[dict[str, Any], list[tuple[str, str]]]] = [
    ({}, [("DECISION_MISSING", "/nodes")]),
    ({"B": {"decision": "done"}}, [("OUTPUT_MISSING", "/nodes/B")]),
    (
        {"B": {"decision": "retry"}, "A": {"decision": "retry"}},
        [("NODE_NOT_WAITING", "/nodes/A")],
    ),
    ({"B": {"decision": "retry"}, "Z": {"decision": "fail"}}, [("UNKNOWN_NODE", "/nodes/Z")]),
    (
        {"B": {"decision": "retry"}, "a/b~c": {"decision": "fail"}},
        [("UNKNOWN_NODE", "/nodes/a~1b~0c")],
    ),
    ({"B": {"decision": "perhaps"}}, [("literal_error", "/nodes/B/decision")]),
    ({"B": {"decision": "retry", "why": 1}}, [("extra_forbidden", "/nodes/B/why")]),
    ({"B": {}}, [("missing", "/nodes/B/decision")]),
]


async def test_decisions_that_do_not_fit_are_refused_and_change_nothing(
    service: RunningService,
) -> None:
    async with running_tool(cut=cut_once) as tool:
        run_id, seq = await parked(service, tool)
        url = f"/v1/runs/{run_id}/resume"
        for nodes, expected in WRONG_DECISIONS:
            response = await service.client.post(url, json={"nodes": nodes})
            assert codes(problem(response, 422, "invalid_request")) == expected, nodes

        wrong_output = {"B": {"decision": "done", "output": {"ok": "many"}}}
        response = await service.client.post(url, json={"nodes": wrong_output})
        [fault] = problem(response, 422, "invalid_request")
        assert fault["pointer"] == "/nodes/B/output/ok"

        stale = {"nodes": {"B": {"decision": "retry"}}, "expected_plan_version": 2}
        response = await service.client.post(url, json=stale)
        problem(response, 409, "stale_plan_version")
        assert (response.json()["expected"], response.json()["current"]) == (2, 1)

        assert (await service.client.get(f"/v1/runs/{run_id}")).json()["last_seq"] == seq
        right = {"nodes": {"B": {"decision": "done", "output": {"ok": 1}}}}
        assert (await service.client.post(url, json=right)).status_code == 202
        await until(service, run_id, "RUN_DONE", seq)
        problem(await service.client.post(url, json=right), 409, "invalid_run_state")


async def test_only_a_run_that_waits_can_be_resumed(service: RunningService) -> None:
    async with running_tool(gated=answer_at_gate) as tool:
        await register(service, http_capability(tool, "gated", "pure"))
        run = await service.submit(graph(echo_node("A", capability="test.gated")))
        await until(service, run["run_id"], "NODE_START")
        response = await service.client.post(f"/v1/runs/{run['run_id']}/resume", json={})
        problem(response, 409, "invalid_run_state")
        tool.gate.set()
        await until(service, run["run_id"], "RUN_DONE")


async def test_a_resume_that_is_sent_many_times_acts_once(service: RunningService) -> None:
    async with running_tool(cut=cut_once) as tool:
        run_id, seq = await parked(service, tool)
        body = {"nodes": {"B": {"decision": "retry"}}}
        responses = await asyncio.gather(
            *(service.client.post(f"/v1/runs/{run_id}/resume", json=body) for _ in range(10))
        )
        statuses = [response.status_code for response in responses]
        assert set(statuses) <= {202, 409}
        assert 202 in statuses
        events = await service.events(run_id, **{"Last-Event-ID": str(seq)})
        assert [event.event for event in events].count("RUN_RESUMED") == 1
        assert [event.event for event in events].count("NODE_RETRY") == 1
        assert len(tool.calls(run_id, "B")) == 2
    # What was not applied is told why, unless the run ended before anybody looked.
    signals = (await service.client.get(f"/v1/runs/{run_id}/debug")).json()["signals"]
    outcomes = [signal["outcome"] for signal in signals]
    assert len(outcomes) == statuses.count(202)
    assert outcomes.count("applied") == 1


async def test_an_answer_to_an_earlier_pause_does_not_count(service: RunningService) -> None:
    async with running_tool(cut=close) as tool:
        run_id, first = await parked(service, tool)
        url = f"/v1/runs/{run_id}/resume"
        body = {"nodes": {"B": {"decision": "retry"}}}
        assert (await service.client.post(url, json=body)).status_code == 202
        second = (await until(service, run_id, "RUN_PAUSED", first)).seq

        # It was accepted during the first pause, and is seen only now.
        late = {"nodes": {"B": {"decision": "done", "output": {"ok": 1}}}, "paused_seq": first}
        signal_id = new_id()
        await rows(
            service,
            """insert into signals (signal_id, run_id, tenant_id, kind, body, created_at)
            values ($1, $2, 'default', 'resume', $3, now())""",
            signal_id,
            UUID(run_id),
            json.dumps(late),
        )
        outcome = None
        async with asyncio.timeout(10):
            while outcome is None:
                sql = "select outcome from signals where signal_id = $1"
                [[outcome]] = await rows(service, sql, signal_id)
                await asyncio.sleep(0.02)
        assert outcome.startswith("discarded")
        run = (await service.client.get(f"/v1/runs/{run_id}")).json()
        assert (run["status"], run["last_seq"]) == ("awaiting_human", second)

        body = {"nodes": {"B": {"decision": "fail"}}}
        assert (await service.client.post(url, json=body)).status_code == 202
        await until(service, run_id, "RUN_FAILED", second)


# How nodes run


async def test_a_node_that_fails_twice_is_called_three_times_with_one_key(
    service: RunningService,
) -> None:
    async with running_tool(failing=failing(2)) as tool:
        await register(service, http_capability(tool, "failing", "idempotent"))
        events = await service.stream(graph(echo_node("A", capability="test.failing")))
        run_id = events[0].json["run_id"]
        calls = tool.calls(run_id, "A")
    assert [call.attempt for call in calls] == [1, 2, 3]
    assert {call.key for call in calls} == {f"{run_id}:A:1"}
    assert of_node(events, "A") == [
        *(("NODE_START", 1), ("NODE_RETRY", 1)),
        *(("NODE_START", 2), ("NODE_RETRY", 2)),
        *(("NODE_START", 3), ("NODE_DONE", 3)),
    ]
    retries = [event.json["data"] for event in events if event.event == "NODE_RETRY"]
    assert [retry["error"]["code"] for retry in retries] == ["capability_unavailable"] * 2
    assert all(0 <= retry["delay_ms"] <= 20 for retry in retries)
    assert all(later.at >= earlier.at for earlier, later in itertools.pairwise(calls))


async def test_a_node_gives_up_after_its_attempts(service: RunningService) -> None:
    async with running_tool(failing=failing(9)) as tool:
        await register(service, http_capability(tool, "failing", "pure"))
        node = echo_node("A", capability="test.failing", max_attempts=2)
        events = await service.stream(graph(node))
        assert len(tool.calls(events[0].json["run_id"], "A")) == 2
    assert of_node(events, "A")[-1] == ("NODE_FAILED", 2)
    assert events[-1].event == "RUN_FAILED"
    assert events[-1].json["data"]["failed_nodes"] == ["A"]
    assert events[-1].json["data"]["error"]["code"] == "node_failed"


async def test_a_node_that_takes_too_long_is_cut_off(service: RunningService) -> None:
    async with running_tool(gated=answer_at_gate) as tool:
        await register(service, http_capability(tool, "gated", "pure"))
        node = echo_node("A", capability="test.gated", timeout_s=1, max_attempts=2)
        events = await service.stream(graph(node))
        assert len(tool.calls(events[0].json["run_id"], "A")) == 2
    failed = events[-2].json
    assert (failed["type"], failed["attempt"]) == ("NODE_FAILED", 2)
    assert failed["data"]["error"]["code"] in ("timeout", "capability_timeout")
    assert failed["data"]["duration_ms"] >= 999


async def test_a_run_ends_at_its_deadline(service: RunningService) -> None:
    async with running_tool(gated=answer_at_gate) as tool:
        await register(service, http_capability(tool, "gated", "pure"))
        envelope = graph(
            echo_node("A", capability="test.gated"),
            echo_node("B", "A"),
            constraints={"deadline_s": 0.3},
        )
        run = await service.finished(envelope)
    assert run["status"] == "failed"
    assert run["error"]["code"] == "deadline_exceeded"
    assert 300 <= run["timings"]["total_ms"] < 5_000
    last = (await until(service, run["run_id"], "RUN_FAILED")).json
    assert last["data"]["unfinished_nodes"] == ["A"]


async def test_a_failed_node_blocks_what_follows_it_and_nothing_else(
    service: RunningService,
) -> None:
    async with running_tool(refuse=refuse, gated=answer_at_gate) as tool:
        await register(
            service, http_capability(tool, "refuse", "pure"), http_capability(tool, "gated", "pure")
        )
        run = await service.submit(
            graph(
                echo_node("A", capability="test.refuse"),
                echo_node("B", "A"),
                echo_node("C", "B"),
                echo_node("X", capability="test.gated"),
                echo_node("Y", "X"),
                echo_node("Z", "Y", "C"),
            )
        )
        await until(service, run["run_id"], "NODE_FAILED")
        tool.gate.set()
        events = await service.events(run["run_id"])
        assert len(tool.calls(run["run_id"], "A")) == 1
    assert of_node(events, "A") == [("NODE_START", 1), ("NODE_FAILED", 1)]
    for node_id in "BCZ":
        assert of_node(events, node_id) == [("NODE_BLOCKED", None)]
    for node_id in "XY":
        assert of_node(events, node_id) == [("NODE_START", 1), ("NODE_DONE", 1)]
    [failed] = [event.json["data"] for event in events if event.event == "NODE_FAILED"]
    assert failed["error"] == {
        "code": "capability_refused",
        "message": "answered 404: there is no such record",
    }
    assert events[-1].event == "RUN_FAILED"
    assert events[-1].json["data"]["failed_nodes"] == ["A"]


async def test_a_run_calls_no_more_nodes_at_once_than_it_may(service: RunningService) -> None:
    turnstile = Turnstile()
    async with running_tool(turn=turnstile) as tool:
        await register(service, http_capability(tool, "turn", "pure"))
        nodes = [echo_node(f"n{i}", capability="test.turn") for i in range(10)]
        run = await service.finished(graph(*nodes, constraints={"max_parallel": 3}))
        assert len(tool.ledger) == 10
    assert run["status"] == "done"
    assert turnstile.inside_max == 3


async def test_a_capability_is_called_no_more_at_once_than_it_bears(
    service: RunningService,
) -> None:
    turnstile = Turnstile()
    async with running_tool(turn=turnstile) as tool:
        await register(service, http_capability(tool, "turn", "pure", concurrency=2))
        envelope = graph(*(echo_node(f"n{i}", capability="test.turn") for i in range(5)))
        runs = await asyncio.gather(*(service.finished(envelope) for _ in range(3)))
        assert len(tool.ledger) == 15
    assert [run["status"] for run in runs] == ["done"] * 3
    assert turnstile.inside_max == 2


async def test_a_chain_of_one_limited_capability_does_not_wait_for_itself(
    service: RunningService,
) -> None:
    async with running_tool(turn=Turnstile(0)) as tool:
        await register(service, http_capability(tool, "turn", "pure", concurrency=1))
        nodes = [echo_node("n0", capability="test.turn")]
        nodes += [echo_node(f"n{i}", f"n{i - 1}", capability="test.turn") for i in range(1, 4)]
        run = await service.finished(graph(*nodes, constraints={"deadline_s": 5}))
    assert run["status"] == "done"


# How plans are made


INTEGER_OUTPUT = {
    "mode": "json_schema",
    "schema": {
        "type": "object",
        "properties": {"start": {"type": "string"}},
        "required": ["start"],
    },
}


async def test_an_output_that_breaks_the_contract_fails_the_run(service: RunningService) -> None:
    events = await service.stream(graph(echo_node("A"), output_contract=INTEGER_OUTPUT))
    assert [event.event for event in events[-2:]] == ["VALIDATION_ERROR", "RUN_FAILED"]
    broken = events[-2].json["data"]
    assert broken["scope"] == "final_output"
    assert codes(broken["errors"])[0][1] == "/start"
    assert events[-1].json["data"]["error"]["code"] == "invalid_output"
    run = (await service.client.get(f"/v1/runs/{events[0].json['run_id']}")).json()
    assert (run["status"], run["output"]) == ("failed", None)
    assert run["error"]["code"] == "invalid_output"


PAGE = b"# Release 2.1\n\nVersion 2.1 ships on 2026-03-01. It is 40 % faster than 2.0.\n"


async def test_what_is_at_hand_decides_the_plan(service: RunningService) -> None:
    async with far_side() as side:
        side.behave = answer_bytes(body=PAGE, media_type="text/markdown")
        wanted = {
            "objective": "Brief the team",
            "output_contract": {"mode": "facets", "facets": ["brief"]},
        }
        document = {"title": "Release", "text": PAGE.decode()}
        by_document = await service.finished({**wanted, "inputs": {"document": document}})
        by_url = await service.finished({**wanted, "inputs": {"url": side.url}})
        assert len(side.exchanges) == 1

    assert by_document["status"] == by_url["status"] == "done", (by_document, by_url)

    async def capabilities(run: dict[str, Any]) -> list[str]:
        plan = (await service.client.get(f"/v1/runs/{run['run_id']}/plans/1")).json()
        assert plan["author"] == "assembler"
        return [node["capability_id"] for node in plan["nodes"]]

    plan_of_document, plan_of_url = await capabilities(by_document), await capabilities(by_url)
    assert plan_of_url == ["http.fetch", *plan_of_document]
    assert by_document["output"]["brief"]["bullets"] == by_url["output"]["brief"]["bullets"]
    events = await service.events(by_url["run_id"])
    assert [event.event for event in events[:4]] == [
        *("RUN_QUEUED", "RUN_START", "PLAN_REQUESTED", "PLAN_GENERATED")
    ]


async def test_a_capability_that_is_gone_is_planned_around(service: RunningService) -> None:
    for name in ("claim", "verdict"):
        facet = {"name": name, "title": name, "schema": {"type": "string"}, "semantics": name}
        assert (await service.client.post("/v1/facets", json=facet)).status_code == 201

    async def judge(tool: Tool, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        respond(writer, 200, {"verdict": "fine"})

    def judging(tool: Tool, name: str, tier: int) -> dict[str, Any]:
        return http_capability(
            tool,
            name,
            "pure",
            input_contract={"mode": "facets", "facets": ["claim"]},
            output_contract={"mode": "facets", "facets": ["verdict"]},
            cost={"tier": tier},
            heartbeat={"interval_s": 3_600},
        )

    envelope = {
        "objective": "judge",
        "inputs": {"claim": "it works"},
        "output_contract": {"mode": "facets", "facets": ["verdict"]},
    }

    async def planned() -> list[str]:
        events = await service.stream(envelope)
        assert events[-1].event == "RUN_DONE"
        return [e.json["data"]["capability_id"] for e in events if e.event == "NODE_START"]

    async def silence(capability_id: str) -> None:
        """Let a capability have been silent for a day.

        Both of its times move back: what lies between them is its patience, also when it is back.
        """
        await rows(
            service,
            """update capabilities set last_seen_at = last_seen_at - interval '1 day',
            expires_at = expires_at - interval '1 day' where capability_id = $1""",
            capability_id,
        )
        await service.services.registry.sweep()

    async with running_tool(cheap=judge, dear=judge) as tool:
        await register(service, judging(tool, "cheap", 0), judging(tool, "dear", 5))
        assert await planned() == ["test.cheap"]
        await silence("test.cheap")
        assert await planned() == ["test.dear"]
        await silence("test.dear")
        events = await service.stream(envelope)
        assert [event.event for event in events] == [
            *("RUN_QUEUED", "RUN_START", "PLAN_REQUESTED", "PLAN_REJECTED", "RUN_FAILED")
        ]
        [fault] = events[3].json["data"]["diagnostics"]
        assert fault["code"] == "CAPABILITY_MISSING"
        assert events[4].json["data"]["error"]["code"] == "plan_rejected"

        beat = await service.client.post("/v1/capabilities/test.cheap/heartbeat")
        assert (beat.status_code, beat.json()["status"]) == (200, "active")
        assert await planned() == ["test.cheap"]


async def test_a_client_that_waits_is_answered_when_the_run_waits_for_a_human(
    service: RunningService,
) -> None:
    async with running_tool(cut=hang_up) as tool:
        body = http_capability(tool, "cut", "at_most_once")
        await register(service, body)
        envelope = graph(echo_node("A"), echo_node("B", "A", capability="test.cut"))
        async with asyncio.timeout(15):  # and not after the 60 s it is ready to wait
            response = await service.client.post(
                "/v1/runs", json=envelope, headers={"Prefer": "wait=60"}
            )

    assert response.status_code == 202
    assert response.json()["status"] == "awaiting_human"
