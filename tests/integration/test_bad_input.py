"""What clients and tools get wrong: each mistake has one clear answer, and no run hangs on it.

Requests are answered with a problem that names the place; misbehaving tools become events, by the
effect of their capability. The journal of the whole file is audited when its service stops.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import pytest
import pytest_asyncio

from app.api import bodies
from tests.envelopes import diamond, echo_node, graph
from tests.far_side import FarSide, far_side
from tests.far_side import answer as answer_bytes
from tests.service import RunningService
from tests.shared_service import codes, problem, register, rows, shared_service, until
from tests.tools import (
    Behaviour,
    Tool,
    answer,
    answer_at_gate,
    http_capability,
    running_tool,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

JSON = {"content-type": "application/json"}
NO_RUN = "0190a5b0-0000-7000-8000-000000000000"


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def service(postgres_dsn: str) -> AsyncIterator[RunningService]:
    async with shared_service(postgres_dsn) as service:
        yield service


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def canary() -> AsyncIterator[FarSide]:
    """A server that nobody may ask anything."""
    async with far_side() as side:
        side.behave = answer_bytes(body=b"{}")
        yield side


async def count_runs(service: RunningService) -> int:
    [row] = await rows(service, "select count(*) from runs")
    found: int = row["count"]
    return found


def wanting(schema: Any) -> dict[str, Any]:
    """A small envelope whose output must satisfy a schema."""
    return graph(echo_node("A"), output_contract={"mode": "json_schema", "schema": schema})


# Bodies that are not JSON


NOT_JSON: dict[str, tuple[bytes, tuple[str, str]]] = {
    "NaN": (b'{"objective": NaN}', ("JSON_NOT_FINITE", "")),
    "-Infinity": (b'{"objective": -Infinity}', ("JSON_NOT_FINITE", "")),
    "1e400": (b'{"constraints": {"deadline_s": 1e400}}', ("JSON_NOT_FINITE", "")),
    "huge int": (b'{"a": 123456789012345678901234567890}', ("JSON_INTEGER_TOO_LARGE", "")),
    "100,000 digits": (b'{"a":' + b"9" * 100_000 + b"}", ("JSON_INTEGER_TOO_LARGE", "")),
    "duplicate key": (b'{"objective": "a", "objective": "b"}', ("JSON_DUPLICATE_KEY", "")),
    "duplicate by escape": (b'{"a": 1, "\\u0061": 2}', ("JSON_DUPLICATE_KEY", "")),
    "5,000 arrays": (b"[" * 5_000 + b"]" * 5_000, ("JSON_TOO_DEEP", "")),
    "5,000 objects": (b'{"a":' * 5_000 + b"1" + b"}" * 5_000, ("JSON_TOO_DEEP", "")),
    "5,000 open arrays": (b"[" * 5_000, ("JSON_TOO_DEEP", "")),
    "lone surrogate": (b'{"objective": "\\ud800"}', ("JSON_SURROGATE", "/objective")),
    "NUL": (b'{"inputs": {"a/b": "\\u0000"}}', ("JSON_NUL", "/inputs/a~1b")),
    "raw NUL": (b'{"objective": "\x00"}', ("JSON_SYNTAX", "")),
    "trailing garbage": (b"{} x", ("JSON_SYNTAX", "")),
    "two values": (b"{}{}", ("JSON_SYNTAX", "")),
    "cut off": (b'{"objective": "a', ("JSON_SYNTAX", "")),
    "empty": (b"", ("JSON_EMPTY", "")),
    "white space": (b" \n", ("JSON_EMPTY", "")),
    "byte order mark": (b"\xef\xbb\xbf{}", ("JSON_BOM", "")),
    "Latin-1": (b'{"objective": "\xe9"}', ("JSON_NOT_UTF8", "")),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), ("JSON_NOT_UTF8", "")),
    "comment": (b"{/* x */}", ("JSON_SYNTAX", "")),
    "single quotes": (b"{'a': 1}", ("JSON_SYNTAX", "")),
}
JSON_ROUTES = (
    "/v1/runs",
    "/v1/plans/preview",
    "/v1/capabilities",
    "/v1/facets",
    "/v1/contracts/compile",
    "/v1/runs/find",
    f"/v1/runs/{NO_RUN}/cancel",
    f"/v1/runs/{NO_RUN}/pause",
    f"/v1/runs/{NO_RUN}/resume",
)


@pytest.mark.parametrize("path", JSON_ROUTES)
async def test_a_body_that_is_not_strict_json_is_refused(
    service: RunningService, path: str
) -> None:
    before = await count_runs(service)
    for name, (body, expected) in NOT_JSON.items():
        response = await service.client.post(path, content=body, headers=JSON)
        assert codes(problem(response, 400, "malformed_json")) == [expected], name
    assert await count_runs(service) == before


@pytest.mark.parametrize("path", JSON_ROUTES)
async def test_a_body_over_the_limit_or_of_another_type_is_refused(
    service: RunningService, path: str
) -> None:
    post = service.client.post
    big = b'{"objective": "' + b"x" * (2 << 20) + b'"}'

    async def in_chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(big), 1 << 16):
            yield big[start : start + (1 << 16)]

    for content in (big, in_chunks()):
        response = await post(path, content=content, headers=JSON)
        problem(response, 413, "body_too_large")
        assert response.json()["limit"] == 1_048_576

    body = json.dumps(diamond()).encode()
    for headers in (
        {},
        {"content-type": "text/plain"},
        {"content-type": "text/json"},
        {"content-type": "multipart/form-data; boundary=x"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/jsonp"},
        {**JSON, "content-encoding": "gzip"},
    ):
        response = await post(path, content=body, headers=headers)
        problem(response, 415, "unsupported_media_type")


async def test_other_spellings_of_the_json_type_are_understood(service: RunningService) -> None:
    body = json.dumps(diamond()).encode()
    for media_type in (
        *("application/json; charset=utf-8", "Application/JSON", "application/vnd.flexrun+json"),
    ):
        response = await service.client.post(
            "/v1/plans/preview", content=body, headers={"content-type": media_type}
        )
        assert response.status_code == 200, media_type


async def test_a_body_that_does_not_arrive_is_not_waited_for(
    service: RunningService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "ARRIVAL_S", 0.1)
    parts = urlsplit(service.url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(
        b"POST /v1/runs HTTP/1.1\r\nHost: flexrun\r\nContent-Type: application/json\r\n"
        b'Content-Length: 100\r\n\r\n{"objective": '
    )
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert b"application/problem+json" in head
    writer.close()
    await writer.wait_closed()


# Envelopes that break a rule


FEW_EDGES = [echo_node(f"n{i}") for i in range(110)]
MANY_EDGES = [echo_node(f"m{i}", *(f"n{j}" for j in range(110)), inputs={}) for i in range(100)]
INVALID: dict[str, tuple[Any, tuple[str, str]]] = {
    "no objective": (
        {"output_contract": {"mode": "freeform", "instructions": "x"}},
        ("missing", "/objective"),
    ),
    "an array": ([], ("model_type", "")),
    "a string": ("run", ("model_type", "")),
    "wrong type": (graph(echo_node("A"), objective=5), ("string_type", "/objective")),
    "unknown field": (graph(echo_node("A"), odd=1), ("extra_forbidden", "/odd")),
    "unknown field of a node": (
        graph(echo_node("A", retries=1)),
        ("extra_forbidden", "/goal_graph/nodes/0/retries"),
    ),
    "no nodes": (graph(), ("too_short", "/goal_graph/nodes")),
    "bad node id": (
        graph(echo_node("A"), echo_node("a b")),
        ("string_pattern_mismatch", "/goal_graph/nodes/1/id"),
    ),
    "runtime policy": (
        graph(echo_node("A"), policies={"runtime": [{"trigger": "cost"}]}),
        ("model_type", "/policies/runtime/0/trigger"),
    ),
    "goal condition": (
        graph(echo_node("A"), goal_conditions=[{}]),
        ("too_long", "/goal_conditions"),
    ),
    "durability": (
        graph(echo_node("A"), constraints={"durability": "pipelined"}),
        ("literal_error", "/constraints/durability"),
    ),
    "lane": (
        graph(echo_node("A"), constraints={"lane": "fast"}),
        ("enum", "/constraints/lane"),
    ),
    "past deadline": (
        graph(echo_node("A"), constraints={"deadline_s": -1}),
        ("greater_than", "/constraints/deadline_s"),
    ),
    "too parallel": (
        graph(echo_node("A"), constraints={"max_parallel": 257}),
        ("less_than_equal", "/constraints/max_parallel"),
    ),
}
REJECTED: dict[str, tuple[dict[str, Any], tuple[str, str]]] = {
    "cycle": (
        graph(echo_node("S"), echo_node("A", "S", "C"), echo_node("B", "A"), echo_node("C", "B")),
        ("CYCLE", "/goal_graph/nodes/1/requires/1"),
    ),
    "cycle of one": (graph(echo_node("A", "A")), ("CYCLE", "/goal_graph/nodes/0/requires/0")),
    "cycle by a binding": (
        graph(
            echo_node("A", inputs={"x": {"from": "B", "pointer": ""}}),
            echo_node("B", "A", inputs={}),
        ),
        ("CYCLE", "/goal_graph/nodes/0/inputs/x/from"),
    ),
    "unknown requires": (
        graph(echo_node("A"), echo_node("B", "A", "Z", inputs={})),
        ("UNKNOWN_NODE", "/goal_graph/nodes/1/requires/1"),
    ),
    "unknown source": (
        graph(echo_node("A", inputs={"x": {"from": "Z"}})),
        ("UNKNOWN_NODE", "/goal_graph/nodes/0/inputs/x/from"),
    ),
    "unknown capability": (
        graph(echo_node("A", capability="no.such")),
        ("CAPABILITY_NOT_REGISTERED", "/goal_graph/nodes/0/capability"),
    ),
    "unknown version": (
        graph(echo_node("A", capability_version="9.9.9")),
        ("CAPABILITY_NOT_REGISTERED", "/goal_graph/nodes/0/capability_version"),
    ),
    "unknown facet": (
        {"objective": "x", "output_contract": {"mode": "facets", "facets": ["brief", "nope"]}},
        ("UNKNOWN_FACET", "/output_contract/facets/1"),
    ),
    "unbound input": (
        graph({"id": "A", "capability": "json.query", "inputs": {"query": {"value": "a"}}}),
        ("INPUT_UNBOUND", "/goal_graph/nodes/0/inputs"),
    ),
    "nothing there": (
        graph(
            echo_node("A", inputs={"x": {"from": "inputs", "pointer": "/a/b"}}), inputs={"a": {}}
        ),
        ("INPUT_UNBOUND", "/goal_graph/nodes/0/inputs/x"),
    ),
    "value of a wrong type": (
        graph(
            {
                "id": "A",
                "capability": "json.query",
                "inputs": {"query": {"value": 5}, "json_value": {"value": 1}},
            }
        ),
        ("INPUT_MISMATCH", "/goal_graph/nodes/0/inputs/query/value"),
    ),
    "2,001 nodes": (
        graph(*(echo_node(f"n{i}") for i in range(2_001))),
        ("LIMIT_EXCEEDED", "/goal_graph/nodes"),
    ),
    "11,000 edges": (graph(*FEW_EDGES, *MANY_EDGES), ("LIMIT_EXCEEDED", "/goal_graph/nodes")),
    "node id inputs": (graph(echo_node("inputs")), ("RESERVED_NODE_ID", "/goal_graph/nodes/0/id")),
    "duplicate ids": (
        graph(echo_node("A"), echo_node("A")),
        ("DUPLICATE_NODE", "/goal_graph/nodes/1/id"),
    ),
    "forbidden capability": (
        graph(echo_node("A"), policies={"planner": {"selection": {"forbid": ["util.echo"]}}}),
        ("SELECTION_CONFLICT", "/goal_graph/nodes/0/capability"),
    ),
    "too weak a proof": (
        graph(
            echo_node("A"),
            {
                "id": "B",
                "requires": ["A"],
                "capability": "json.query",
                "inputs": {
                    "query": {"from": "A", "pointer": "/start"},
                    "json_value": {"value": 1},
                },
            },
            constraints={"proof": "strict"},
        ),
        ("PROOF_TOO_WEAK", "/goal_graph/nodes/1/inputs/query"),
    ),
    "schema that is none": (
        wanting({"type": "nonsense"}),
        ("SCHEMA_INVALID", "/output_contract/schema/type"),
    ),
    "look-around": (
        wanting({"type": "object", "properties": {"a": {"pattern": "^(?=a)"}}}),
        ("SCHEMA_INVALID", "/output_contract/schema/properties/a/pattern"),
    ),
    "enum of 60,000": (
        wanting({"enum": [f"value {i}" for i in range(60_000)]}),
        ("SCHEMA_TOO_LARGE", "/output_contract/schema"),
    ),
    "2^40 references": (
        wanting(
            {
                "$ref": "#/$defs/d0",
                "$defs": {
                    "d40": {},
                    **{f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)},
                },
            }
        ),
        ("SCHEMA_TOO_LARGE", "/output_contract/schema/$defs/d28"),
    ),
    "file reference": (
        wanting({"$ref": "file:///etc/passwd"}),
        ("SCHEMA_REF_REFUSED", "/output_contract/schema/$ref"),
    ),
}


@pytest.mark.parametrize("path", ["/v1/runs", "/v1/plans/preview"])
async def test_an_envelope_that_breaks_a_rule_is_refused(
    service: RunningService, path: str
) -> None:
    before = await count_runs(service)
    for status_code, cases in (("invalid_request", INVALID), ("plan_rejected", REJECTED)):
        for name, (envelope, expected) in cases.items():
            response = await service.client.post(path, json=envelope)
            assert expected in codes(problem(response, 422, status_code)), (name, response.text)
    assert await count_runs(service) == before


async def test_a_key_or_a_stream_makes_no_difference_to_a_refusal(service: RunningService) -> None:
    for headers in (
        {"Accept": "text/event-stream"},
        {"Prefer": "wait=5"},
        {"Idempotency-Key": "k"},
    ):
        response = await service.client.post(
            "/v1/runs", json=graph(echo_node("A", "A")), headers=headers
        )
        problem(response, 422, "plan_rejected")


async def test_only_the_broken_part_of_a_binding_is_named(service: RunningService) -> None:
    envelope = graph(echo_node("A", inputs={"x": {"from": "inputs", "pointer": "no-slash"}}))
    response = await service.client.post("/v1/runs", json=envelope)
    faults = problem(response, 422, "invalid_request")
    assert ("string_pattern_mismatch", "/goal_graph/nodes/0/inputs/x/pointer") in codes(faults)


async def test_a_reference_to_a_url_is_refused_and_not_followed(
    service: RunningService, canary: FarSide
) -> None:
    for reference in (canary.url, canary.url.replace("127.0.0.1", "localhost"), "//other/x#/a"):
        for schema in (
            {"$ref": reference},
            {"type": "object", "properties": {"a": {"items": {"$ref": reference}}}},
            {"$defs": {"x": {"$dynamicRef": reference}}},
            {"$schema": reference, "type": "object"},
        ):
            response = await service.client.post("/v1/runs", json=wanting(schema))
            assert response.status_code == 422, response.text
            contract = {"mode": "json_schema", "schema": schema}
            for side in ("input_contract", "output_contract"):
                body = http_capability(Tool(), "refers", "pure", **{side: contract})
                body["config"] = {"url": canary.url}
                response = await service.client.post("/v1/capabilities", json=body)
                [fault, *_] = problem(response, 422, "contract_invalid")
                assert fault["pointer"].startswith(f"/{side}/schema")
                compiled = await service.client.post("/v1/contracts/compile", json={side: contract})
                problem(compiled, 422, "contract_invalid")
            facet = {"name": "refers", "title": "x", "schema": schema, "semantics": "x"}
            response = await service.client.post("/v1/facets", json=facet)
            assert response.status_code == 422, response.text
    assert canary.exchanges == []
    assert canary.connections == 0


async def test_a_pattern_can_not_take_long(service: RunningService) -> None:
    schema = {"type": "object", "properties": {"s": {"type": "string", "pattern": "^(a+)+$"}}}
    node = echo_node("A", inputs={"s": {"value": "a" * 5_000 + "b"}})
    async with asyncio.timeout(5):
        run = await service.finished({**wanting(schema), "goal_graph": {"nodes": [node]}})
    assert run["status"] == "failed"
    assert run["error"]["code"] == "invalid_output"


async def test_a_schema_that_contains_itself_ends(service: RunningService) -> None:
    for schema in (
        {"$ref": "#"},
        {"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"$ref": "#"}}},
    ):
        response = await service.client.post(
            "/v1/runs", json=wanting(schema), headers={"Prefer": "wait=10"}
        )
        assert response.status_code in (200, 422), response.text


async def test_the_largest_plan_is_judged_quickly(service: RunningService) -> None:
    nodes = [echo_node("n0"), echo_node("n1", "n0")]
    nodes += [echo_node(f"n{i}", f"n{i - 1}", f"n{i - 2}", inputs={}) for i in range(2, 2_000)]
    async with asyncio.timeout(10):
        response = await service.client.post("/v1/plans/preview", json=graph(*nodes))
    assert response.status_code == 200
    assert len(response.json()["nodes"]) == 2_000


# Tools that misbehave


async def hang(tool: Tool, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


async def close(tool: Tool, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


def sends(status: int, body: bytes, *headers: str) -> Behaviour:
    """Always this answer."""

    async def behave(tool: Tool, given: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", *headers]
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)

    return behave


IS_JSON = "Content-Type: application/json"
AGAIN = ["NODE_START", "NODE_RETRY", "NODE_START", "NODE_FAILED"]
ONCE = ["NODE_START", "NODE_FAILED"]
UNKNOWN = ["NODE_START", "NODE_BLOCKED"]
WRONG_AGAIN = [
    *("NODE_START", "VALIDATION_ERROR", "NODE_RETRY"),
    *("NODE_START", "VALIDATION_ERROR", "NODE_FAILED"),
]
WRONG_ONCE = ["NODE_START", "VALIDATION_ERROR", "NODE_FAILED"]

# behaviour, codes of the error, events of a node that may be repeated, events of one that may not
MISBEHAVIOUR: dict[str, tuple[Behaviour, set[str], list[str], list[str]]] = {
    "hangs": (hang, {"timeout", "capability_timeout"}, AGAIN, UNKNOWN),
    "closes": (close, {"capability_connection_lost"}, AGAIN, UNKNOWN),
    "half": (
        sends(200, b'{"n": 1}', IS_JSON, "Content-Length: 90"),
        {"capability_connection_lost"},
        AGAIN,
        UNKNOWN,
    ),
    "no_http": (
        sends(200, b"", "bad header without colon"),
        {"capability_connection_lost"},
        AGAIN,
        UNKNOWN,
    ),
    "fails": (sends(500, b"oops"), {"capability_unavailable"}, AGAIN, UNKNOWN),
    "is_busy": (sends(429, b"{}", "Retry-After: 0"), {"capability_overloaded"}, AGAIN, AGAIN),
    "babbles": (
        sends(200, b"<html>", "Content-Type: text/html"),
        {"capability_garbage"},
        AGAIN,
        ONCE,
    ),
    "not_json": (sends(200, b"{n: 1}", IS_JSON), {"capability_garbage"}, AGAIN, ONCE),
    "nan": (sends(200, b'{"n": NaN}', IS_JSON), {"capability_garbage"}, AGAIN, ONCE),
    "surrogate": (sends(200, b'{"n": "\\ud800"}', IS_JSON), {"capability_garbage"}, AGAIN, ONCE),
    "twice": (sends(200, b'{"n": 1, "n": 2}', IS_JSON), {"capability_garbage"}, AGAIN, ONCE),
    "deep": (
        sends(200, b'{"n":' + b"[" * 999 + b"]" * 999 + b"}", IS_JSON),
        {"capability_garbage"},
        AGAIN,
        ONCE,
    ),
    "array": (sends(200, b"[1]", IS_JSON), {"capability_garbage"}, AGAIN, ONCE),
    "empty": (sends(200, b"", IS_JSON), {"capability_garbage"}, AGAIN, ONCE),
    "3_mib": (
        sends(200, b'{"s": "' + b"x" * (3 << 20) + b'"}', IS_JSON),
        {"capability_garbage"},
        AGAIN,
        ONCE,
    ),
    "wrong_shape": (
        sends(200, b'{"n": "one"}', IS_JSON),
        {"invalid_output"},
        WRONG_AGAIN,
        WRONG_ONCE,
    ),
    "not_found": (
        sends(404, b'{"title": "t", "detail": "no such thing"}', IS_JSON),
        {"capability_refused"},
        ONCE,
        ONCE,
    ),
}
SHAPE = {
    "mode": "json_schema",
    "schema": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]},
}


async def misbehaved(
    service: RunningService, tool: Tool, name: str, effect: str
) -> tuple[list[str], dict[str, Any], str, int]:
    """The node's events, its last error, the run's last event and how often it was called."""
    capability_id = f"test.{name}.{effect}"
    body = http_capability(
        tool, name, effect, capability_id=capability_id, output_contract=SHAPE, max_attempts=2
    )
    await register(service, body)
    node = echo_node("A", capability=capability_id, timeout_s=1.0 if name == "hangs" else 10)
    run = await service.submit(graph(node, echo_node("B", "A")))
    run_id = run["run_id"]
    last = "RUN_FAILED"
    if effect == "at_most_once" and MISBEHAVIOUR[name][3] is UNKNOWN:
        last = "RUN_PAUSED"
    await until(service, run_id, last)
    page = (await service.client.get(f"/v1/runs/{run_id}/events")).json()["events"]
    of_node = [event for event in page if event.get("node_id") == "A"]
    return (
        [event["type"] for event in of_node],
        of_node[-1]["data"]["error"],
        page[-1]["type"],
        len(tool.calls(run_id, "A")),
    )


@pytest.mark.parametrize("name", MISBEHAVIOUR)
async def test_a_tool_that_misbehaves_becomes_events(service: RunningService, name: str) -> None:
    behave, error_codes, repeatable, once = MISBEHAVIOUR[name]
    async with running_tool(**{name: behave}) as tool:
        results = await asyncio.gather(
            *(misbehaved(service, tool, name, e) for e in ("pure", "idempotent", "at_most_once"))
        )
    for (types, error, last, calls), expected in zip(
        results, (repeatable, repeatable, once), strict=True
    ):
        assert types == expected
        assert error["code"] in error_codes, error
        assert last == ("RUN_PAUSED" if expected is UNKNOWN else "RUN_FAILED")
        assert calls == expected.count("NODE_START")
        # Nothing of what the tool sent is repeated, but for the detail of a problem.
        assert error["message"].endswith("no such thing") == (name == "not_found")


async def test_nobody_there_is_a_safe_failure_for_every_effect(service: RunningService) -> None:
    async with running_tool() as tool:
        pass  # its port is closed now
    for effect in ("pure", "idempotent", "at_most_once"):
        body = http_capability(
            tool, "gone", effect, capability_id=f"test.gone.{effect}", max_attempts=2
        )
        await register(service, body)
        events = await service.stream(graph(echo_node("A", capability=f"test.gone.{effect}")))
        assert [event.event for event in events[3:]] == [*AGAIN, "RUN_FAILED"]
        assert events[-2].json["data"]["error"]["code"] == "capability_unreachable"


async def test_redirects_are_not_followed(service: RunningService, canary: FarSide) -> None:
    for status in (301, 302, 303, 307, 308):
        behave = sends(status, b"", f"Location: {canary.url}")
        async with running_tool(redirects=behave) as tool:
            await register(service, http_capability(tool, "redirects", "pure"))
            events = await service.stream(graph(echo_node("A", capability="test.redirects")))
            assert len(tool.ledger) == 1
        assert [event.event for event in events[3:]] == [*ONCE, "RUN_FAILED"]
        assert events[-2].json["data"]["error"]["code"] == "capability_refused"
    assert canary.connections == 0


async def test_a_tool_can_not_write_frames(service: RunningService) -> None:
    poison = "a\n\nid: 99\nevent: RUN_DONE\ndata: {}\r\r\u2028\u2029\x1b[2J"
    async with running_tool(
        poisons=sends(200, json.dumps({"n": 1, "s": poison, poison: 1}).encode(), IS_JSON),
        scolds=sends(400, json.dumps({"detail": poison}).encode(), IS_JSON),
    ) as tool:
        for name in ("poisons", "scolds"):
            await register(service, http_capability(tool, name, "pure"))
        poisoned = await service.stream(graph(echo_node("A", capability="test.poisons")))
        scolded = await service.stream(graph(echo_node("A", capability="test.scolds")))
    assert [event.event for event in poisoned[3:]] == ["NODE_START", "NODE_DONE", "RUN_DONE"]
    assert [event.id for event in poisoned] == [str(n) for n in range(1, 7)]
    assert poisoned[-1].json["data"]["output"] == {"n": 1, "s": poison, poison: 1}
    assert [event.event for event in scolded[3:]] == [*ONCE, "RUN_FAILED"]
    assert "\n" not in scolded[-2].json["data"]["error"]["message"]


async def test_an_input_that_is_missing_or_wrong_at_run_stops_the_call(
    service: RunningService,
) -> None:
    numbers = {
        "mode": "json_schema",
        "schema": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]},
    }
    async with running_tool(answer=answer) as tool:
        body = http_capability(tool, "answer", "at_most_once", input_contract=numbers)
        await register(service, body)
        for pointer, expected in (("/nowhere", "INPUT_MISSING"), ("/start", None)):
            node = echo_node(
                "B", "A", capability="test.answer", inputs={"n": {"from": "A", "pointer": pointer}}
            )
            events = await service.stream(
                graph(echo_node("A", inputs={"start": {"value": "text"}}), node)
            )
            assert [event.event for event in events[-4:]] == [*WRONG_ONCE, "RUN_FAILED"]
            broken = events[-3].json["data"]
            assert broken["scope"] == "capability_input"
            [(code, where)] = codes(broken["errors"])
            assert where == "/n"
            assert expected in (None, code)
            assert events[-2].json["data"]["error"]["code"] == "invalid_input"
        assert tool.ledger == []


async def test_an_output_over_the_limit_fails_its_node(service: RunningService) -> None:
    copies = {f"c{i}": {"from": "inputs", "pointer": "/big"} for i in range(3)}
    envelope = graph(echo_node("A", inputs=copies), inputs={"big": "x" * 900_000})
    events = await service.stream(envelope)
    assert [event.event for event in events[-2:]] == ["NODE_FAILED", "RUN_FAILED"]
    assert events[-2].json["data"]["error"]["code"] == "value_too_large"


async def test_a_plan_goes_on_with_a_capability_that_fell_silent(service: RunningService) -> None:
    async with running_tool(gated=answer_at_gate, answer=answer) as tool:
        silent = http_capability(
            tool,
            "answer",
            "pure",
            capability_id="test.silent",
            heartbeat={"interval_s": 3_600},
        )
        await register(service, http_capability(tool, "gated", "pure"), silent)
        envelope = graph(
            echo_node("A", capability="test.gated"), echo_node("B", "A", capability="test.silent")
        )
        run = await service.submit(envelope)
        await until(service, run["run_id"], "NODE_START")
        await rows(
            service,
            """update capabilities set expires_at = now() - interval '1 s'
            where capability_id = 'test.silent'""",
        )
        await service.services.registry.sweep()
        shown = (await service.client.get("/v1/capabilities/test.silent?version=1.0.0")).json()
        assert shown["status"] == "inactive"
        refused = await service.client.post("/v1/runs", json=envelope)
        assert codes(problem(refused, 422, "plan_rejected")) == [
            ("CAPABILITY_INACTIVE", "/goal_graph/nodes/1/capability")
        ]
        tool.gate.set()
        await until(service, run["run_id"], "RUN_DONE")
        assert len(tool.calls(run["run_id"], "B")) == 1


async def test_after_all_that_the_service_is_well(service: RunningService) -> None:
    assert (await service.finished(diamond()))["status"] == "done"
    ready = await service.client.get("/readyz")
    assert ready.status_code == 200, ready.text
