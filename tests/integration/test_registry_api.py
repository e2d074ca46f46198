"""Capabilities, facets and the compiler over HTTP, with all ways in which a request is wrong."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import httpx
import jsonschema_rs
import pytest
from fastapi import FastAPI
from sqlalchemy import text

from app.adapters.capabilities.builtin import BuiltinAdapter
from app.api import capabilities, contracts, facets
from app.api.errors import install_error_handlers
from app.api.openapi import install_openapi
from app.domain.capability import CapabilityKind, Registration
from app.ports import CapabilityAdapter
from app.registry.registry import Registry
from app.store.database import Database
from app.store.registry import RegistryStore
from tests.conftest import make_settings
from tests.registries import AnyHttp

JSON = {"content-type": "application/json"}
PROBLEM = "application/problem+json"


def facet_body(name: str, schema: Any = None, **metadata: Any) -> dict[str, Any]:
    return {
        "name": name,
        "title": name.title(),
        "schema": {"type": "string"} if schema is None else schema,
        "semantics": f"The {name}.",
        "metadata": metadata,
    }


def capability_body(capability_id: str = "far.side", **changes: Any) -> dict[str, Any]:
    return {
        "capability_id": capability_id,
        "version": "1.0.0",
        "display_name": "Far side",
        "summary": "A server under test.",
        "kind": "http",
        "effect": "idempotent",
        "input_contract": {"facets": ["text"]},
        "output_contract": {"facets": ["summary"]},
        "config": {"url": "https://tools.example.com"},
        **changes,
    }


@pytest.fixture
async def app(database: Database) -> AsyncIterator[FastAPI]:
    registry = Registry(
        RegistryStore(database),
        {
            CapabilityKind.BUILTIN: BuiltinAdapter([]),
            CapabilityKind.HTTP: cast(CapabilityAdapter, AnyHttp()),
        },
        sweep_s=3600,
    )
    await registry.start()
    app = FastAPI(title="Registry", version="0", redirect_slashes=False)
    app.state.services = SimpleNamespace(
        registry=registry, settings=make_settings(), database=database
    )
    install_error_handlers(app)
    for module in (capabilities, facets, contracts):
        app.include_router(module.router)
    install_openapi(app)
    yield app
    await registry.close()


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://flexrun.test") as client:
        for name in ("text", "summary"):
            assert (await client.post("/v1/facets", json=facet_body(name))).status_code == 201
        yield client


def problem(response: httpx.Response, status: int, code: str) -> list[dict[str, Any]]:
    """Check that the response is this problem, and give its faults."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == PROBLEM
    body = response.json()
    assert (body["status"], body["code"]) == (status, code)
    assert body["type"] == f"urn:flexrun:problem:{code}"
    assert body["title"]
    assert body["detail"]
    faults: list[dict[str, Any]] = body["errors"]
    return faults


async def test_a_capability_is_registered_shown_and_registered_again(
    client: httpx.AsyncClient,
) -> None:
    body = capability_body(heartbeat={"interval_s": 30})
    first = await client.post("/v1/capabilities", json=body)
    assert first.status_code == 201
    assert first.headers["location"] == "/v1/capabilities/far.side"
    record = first.json()
    assert record["status"] == "active"
    assert record["input_facets"] == ["text"]
    assert record["output_facets"] == ["summary"]
    assert record["max_attempts"] == 3
    assert record["timeout_s"] == 60
    output = record["contracts"]["output"]
    assert output["required"] == ["summary"]
    assert output["instructions"] == "The summary."
    assert output["provenance"] == [
        {"facet": "summary", "title": "Summary", "direction": "output", "pointer": "/summary"}
    ]
    again = await client.post("/v1/capabilities", json={**body, "summary": "Other words."})
    assert again.status_code == 200
    assert again.json()["registered_at"] == record["registered_at"]
    assert again.json()["last_seen_at"] > record["last_seen_at"]
    shown = await client.get("/v1/capabilities/far.side")
    assert shown.json() == again.json()
    assert (await client.get("/v1/capabilities/far.side?version=1.0.0")).json() == shown.json()


async def test_a_heartbeat_revives(client: httpx.AsyncClient, app: FastAPI) -> None:
    await client.post("/v1/capabilities", json=capability_body(heartbeat={"interval_s": 1}))
    database: Database = app.state.services.database
    async with database.transaction() as connection:
        await connection.execute(text("update capabilities set expires_at = now() - interval '1s'"))
    await app.state.services.registry.sweep()
    assert (await client.get("/v1/capabilities/far.side")).json()["status"] == "inactive"
    inactive = await client.get("/v1/capabilities?status=inactive")
    assert len(inactive.json()["capabilities"]) == 1
    beaten = await client.post("/v1/capabilities/far.side/heartbeat")
    assert beaten.status_code == 200
    assert beaten.json()["status"] == "active"
    assert (await client.get("/v1/capabilities?status=inactive")).json()["capabilities"] == []


async def test_secrets_are_not_shown(client: httpx.AsyncClient) -> None:
    config = {
        "url": "https://user:hunter2@tools.example.com",
        "headers": {"X-Api-Key": "hunter2", "accept": "text/plain"},
        "secret_headers": {"Authorization": "hunter2"},
    }
    body = capability_body(config=config, metadata={"password": "hunter2"})
    answers = [
        await client.post("/v1/capabilities", json=body),
        await client.get("/v1/capabilities/far.side"),
        await client.get("/v1/capabilities"),
    ]
    for answer in answers:
        assert answer.is_success
        assert "hunter2" not in answer.text
    assert answers[0].json()["config"]["headers"]["accept"] == "text/plain"


async def test_lists_are_paged_by_cursor(client: httpx.AsyncClient) -> None:
    for number in range(5):
        assert (
            await client.post("/v1/capabilities", json=capability_body(f"c{number}"))
        ).status_code == 201
    for url, name, key, expected in (
        ("/v1/capabilities", "capabilities", "capability_id", [f"c{n}" for n in range(5)]),
        ("/v1/facets", "facets", "name", ["summary", "text"]),
    ):
        found: list[str] = []
        query = {"limit": "2"} if name == "capabilities" else {"limit": "1"}
        while True:
            page = (await client.get(url, params=query)).json()
            found += [entry[key] for entry in page[name]]
            if page["next_cursor"] is None:
                break
            query["cursor"] = page["next_cursor"]
        assert found == expected
        for cursor in ("", "!", "bnVsbA", "WyJhIl1", "WyJhIiwiYlx1MDAwMCJd", "a" * 5000):
            response = await client.get(url, params={"cursor": cursor})
            if (name, cursor) != ("facets", "WyJhIl1"):  # '["a"]' is a good cursor of facets
                problem(response, 400, "bad_cursor")
        for limit in ("0", "201", "x"):
            (fault,) = problem(
                await client.get(url, params={"limit": limit}), 422, "invalid_request"
            )
            assert fault["pointer"] == "/query/limit"


async def test_facets_are_added_replaced_and_kept(client: httpx.AsyncClient) -> None:
    same = await client.post("/v1/facets", json=facet_body("text"))
    assert same.status_code == 200
    shown = await client.get("/v1/facets/text")
    assert shown.json() == same.json()
    assert shown.json()["semantics"]["instruction"] == "The text."
    changed = facet_body("text", {"type": "integer"})
    problem(await client.post("/v1/facets", json=changed), 409, "facet_version_conflict")
    newer = facet_body("text", {"type": "integer"}, version="2.0.0")
    assert (await client.post("/v1/facets", json=newer)).status_code == 200
    assert (await client.get("/v1/facets/text")).json()["schema"] == {"type": "integer"}
    problem(await client.get("/v1/facets/no.such"), 404, "facet_not_found")
    await client.post("/v1/capabilities", json=capability_body())
    breaking = facet_body("summary", version="2.0.0", direction="input")
    (fault,) = problem(await client.post("/v1/facets", json=breaking), 409, "facet_in_use")
    assert fault["capability_id"] == "far.side"


async def test_every_fault_of_a_registration_has_its_pointer(client: httpx.AsyncClient) -> None:
    await client.post("/v1/facets", json=facet_body("only_in", direction="input"))
    body = capability_body(
        input_contract={"facets": ["text", "unknown"]}, output_contract={"facets": ["only_in"]}
    )
    faults = problem(await client.post("/v1/capabilities", json=body), 422, "contract_invalid")
    assert [(fault["code"], fault["pointer"], fault["facet"]) for fault in faults] == [
        ("FACET_NOT_FOUND", "/input_contract/facets/1", "unknown"),
        ("DIRECTION_MISMATCH", "/output_contract/facets/0", "only_in"),
    ]
    wrong = capability_body(
        timeout_s=0, surprise=1, output_contract={"mode": "facets", "facets": ["a", 7], "b": 1}
    )
    del wrong["effect"]
    faults = problem(await client.post("/v1/capabilities", json=wrong), 422, "invalid_request")
    assert {(fault["code"], fault["pointer"]) for fault in faults} == {
        ("missing", "/effect"),
        ("extra_forbidden", "/surprise"),
        ("greater_than", "/timeout_s"),
        ("string_type", "/output_contract/facets/1"),
        ("extra_forbidden", "/output_contract/b"),
    }


async def test_fields_that_flexrun_makes_are_not_taken(client: httpx.AsyncClient) -> None:
    record = (await client.post("/v1/capabilities", json=capability_body())).json()
    made = record.keys() - Registration.model_fields.keys()
    assert {"status", "registered_at", "last_seen_at", "contracts"} <= made
    for name in made:
        body = {**capability_body(), name: record[name]}
        response = await client.post("/v1/capabilities", json=body)
        (fault,) = problem(response, 422, "invalid_request")
        assert (fault["code"], fault["pointer"]) == ("extra_forbidden", f"/{name}")


async def test_builtins_are_not_registered_from_outside(client: httpx.AsyncClient) -> None:
    body = capability_body(kind="builtin", config={})
    (fault,) = problem(
        await client.post("/v1/capabilities", json=body), 422, "registration_invalid"
    )
    assert fault["pointer"] == "/kind"


async def test_the_compiler_compiles_and_registers_nothing(client: httpx.AsyncClient) -> None:
    body = {"input_contract": {"facets": ["text", "summary"]}}
    response = await client.post("/v1/contracts/compile", json=body)
    assert response.status_code == 200
    assert response.json()["output"] is None
    compiled = response.json()["input"]
    assert compiled["schema"]["additionalProperties"] is True
    assert compiled["required"] == ["text", "summary"]
    assert [found["pointer"] for found in compiled["provenance"]] == ["/text", "/summary"]
    assert (await client.get("/v1/capabilities")).json()["capabilities"] == []


@pytest.mark.parametrize(
    ("code", "second", "side"),
    [
        ("FACET_NOT_FOUND", None, "input"),
        ("DIRECTION_MISMATCH", facet_body("second", direction="output"), "input"),
        ("TYPE_MISMATCH", facet_body("second", {"type": "integer"}, property_key="k"), "output"),
        ("ENUM_CONFLICT", facet_body("second", {"enum": ["c"]}, property_key="k"), "output"),
        ("MERGE_UNSUPPORTED", facet_body("second", {"$ref": "#/$defs/x", "$defs": {"x": {}}},
                                         property_key="k"), "output"),
    ],
)  # fmt: skip
async def test_the_compiler_has_five_codes(
    client: httpx.AsyncClient, code: str, second: dict[str, Any] | None, side: str
) -> None:
    first = facet_body("first", {"type": "string", "enum": ["a", "b"]}, property_key="k")
    for body in (first, second):
        if body is not None:
            assert (await client.post("/v1/facets", json=body)).status_code == 201
    body = {f"{side}_contract": {"facets": ["first", "second"]}}
    response = await client.post("/v1/contracts/compile", json=body)
    (fault,) = problem(response, 422, "contract_invalid")
    assert fault["code"] == code
    assert fault["facet"] == "second"
    assert fault["pointer"] == f"/{side}_contract/facets/1"
    assert fault["message"]


def nested(depth: int) -> bytes:
    return b'{"input_contract":' + b"[" * depth + b"]" * depth + b"}"


NOT_STRICT = [
    (b"", "JSON_EMPTY"),
    (b"{", "JSON_SYNTAX"),
    (b'{"a":1,"a":2}', "JSON_DUPLICATE_KEY"),
    (b'{"a":NaN}', "JSON_NOT_FINITE"),
    (b'{"a":1e400}', "JSON_NOT_FINITE"),
    (b'{"a":"\\u0000"}', "JSON_NUL"),
    (b'{"a":"\\ud800"}', "JSON_SURROGATE"),
    (b'{"a":9007199254740993}', "JSON_INTEGER_TOO_LARGE"),
    (b'{"a":"\xff"}', "JSON_NOT_UTF8"),
    (nested(5_000), "JSON_TOO_DEEP"),
    (nested(100_000), "JSON_TOO_DEEP"),
]


async def test_only_strict_json_gets_in(client: httpx.AsyncClient) -> None:
    for url in ("/v1/capabilities", "/v1/facets", "/v1/contracts/compile"):
        for body, code in NOT_STRICT:
            response = await client.post(url, content=body, headers=JSON)
            (fault,) = problem(response, 400, "malformed_json")
            assert fault["code"] == code


async def test_a_body_over_the_limit_is_refused_announced_or_not(
    client: httpx.AsyncClient,
) -> None:
    big = json.dumps({"title": "x" * 2 * 1024 * 1024}).encode()

    async def chunked() -> AsyncIterator[bytes]:
        for start in range(0, len(big), 65_536):
            yield big[start : start + 65_536]

    for content in (big, chunked()):
        response = await client.post("/v1/facets", content=content, headers=JSON)
        problem(response, 413, "body_too_large")


async def test_other_media_types_are_refused(client: httpx.AsyncClient) -> None:
    for headers in (
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/json", "content-encoding": "gzip"},
        {},
    ):
        response = await client.post("/v1/facets", content=b"{}", headers=headers)
        problem(response, 415, "unsupported_media_type")
    for media_type in (
        "application/json; charset=utf-8",
        "application/ld+json",
        "Application/JSON",
    ):
        response = await client.post(
            "/v1/facets", content=b"{}", headers={"content-type": media_type}
        )
        problem(response, 422, "invalid_request")


async def test_unknown_routes_and_methods_are_problems(client: httpx.AsyncClient) -> None:
    problem(await client.get("/v1/no-such"), 404, "route_not_found")
    problem(await client.get("/v1/capabilities/"), 404, "route_not_found")
    for url, allowed in (
        ("/v1/capabilities", "GET, POST"),
        ("/v1/capabilities/a", "GET"),
        ("/v1/contracts/compile", "POST"),
    ):
        response = await client.delete(url)
        problem(response, 405, "method_not_allowed")
        assert response.headers["allow"] == allowed


async def test_strange_ids_are_not_found(client: httpx.AsyncClient) -> None:
    for url in (
        "/v1/capabilities/no.such",
        "/v1/capabilities/%00",
        "/v1/capabilities/a%0Ab",
        "/v1/capabilities/a?version=%00",
        "/v1/capabilities/" + "a" * 5_000,
    ):
        problem(await client.get(url), 404, "capability_not_found")
    problem(await client.post("/v1/capabilities/%00/heartbeat"), 404, "capability_not_found")
    problem(await client.get("/v1/facets/%00"), 404, "facet_not_found")


async def test_a_lost_database_is_503_and_nothing_of_it_leaks(
    client: httpx.AsyncClient, app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    database: Database = app.state.services.database

    def away() -> None:
        raise ConnectionRefusedError("postgres at 10.1.2.3 says no")

    monkeypatch.setattr(database.engine.pool, "connect", away)
    for response in (
        await client.get("/v1/capabilities"),
        await client.post("/v1/capabilities", json=capability_body()),
    ):
        problem(response, 503, "database_unreachable")
        assert response.headers["retry-after"] == "1"
        assert "10.1.2.3" not in response.text


async def test_an_error_of_postgres_is_a_500_that_says_nothing(
    client: httpx.AsyncClient, app: FastAPI, caplog: pytest.LogCaptureFixture
) -> None:
    database: Database = app.state.services.database
    async with database.transaction() as connection:
        await connection.execute(text("alter table capabilities rename to hidden"))
    response = await client.get(
        "/v1/capabilities", headers={"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
    )
    assert problem(response, 500, "internal_error") == []
    assert response.json()["trace_id"] == "a" * 32
    for word in ("capabilities", "sql", "relation", "Traceback"):
        assert word not in response.text
    assert "a" * 32 in caplog.text
    assert "does not exist" in caplog.text


async def test_answers_keep_what_openapi_promises(client: httpx.AsyncClient, app: FastAPI) -> None:
    document = app.openapi()
    assert document["openapi"].startswith("3.1")
    answers = [
        ("/v1/capabilities", await client.post("/v1/capabilities", json=capability_body())),
        ("/v1/capabilities", await client.post("/v1/capabilities", json=capability_body())),
        ("/v1/capabilities", await client.post("/v1/capabilities", json={})),
        ("/v1/capabilities", await client.post("/v1/capabilities", content=b"{", headers=JSON)),
        ("/v1/capabilities", await client.get("/v1/capabilities")),
        ("/v1/capabilities", await client.get("/v1/capabilities?cursor=x")),
        ("/v1/capabilities/{capability_id}", await client.get("/v1/capabilities/far.side")),
        ("/v1/capabilities/{capability_id}", await client.get("/v1/capabilities/no.such")),
        (
            "/v1/capabilities/{capability_id}/heartbeat",
            await client.post("/v1/capabilities/far.side/heartbeat"),
        ),
        ("/v1/facets", await client.get("/v1/facets")),
        ("/v1/facets", await client.post("/v1/facets", json=facet_body("new"))),
        ("/v1/facets", await client.post("/v1/facets", json=facet_body("new", {}))),
        ("/v1/facets", await client.post("/v1/facets", content=b"{}")),
        ("/v1/facets/{name}", await client.get("/v1/facets/text")),
        ("/v1/facets/{name}", await client.get("/v1/facets/no.such")),
        (
            "/v1/contracts/compile",
            await client.post(
                "/v1/contracts/compile", json={"output_contract": {"facets": ["text"]}}
            ),
        ),
    ]
    assert {path for path, _ in answers} == set(document["paths"])
    for path, response in answers:
        operation = document["paths"][path][response.request.method.lower()]
        described = operation["responses"][str(response.status_code)]
        media = described["content"][response.headers["content-type"]]
        schema = {**media["schema"], "components": document["components"]}
        jsonschema_rs.validator_for(schema).validate(response.json())


async def test_openapi_examples_of_bodies_keep_their_schemas(app: FastAPI) -> None:
    document = app.openapi()
    seen = 0
    for operations in document["paths"].values():
        for operation in operations.values():
            for media in operation.get("requestBody", {}).get("content", {}).values():
                schema = {**media["schema"], "components": document["components"]}
                jsonschema_rs.validator_for(schema).validate(media["example"])
                seen += 1
    assert seen == 3
