"""Every kind of error as a problem."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from app.api import errors
from app.api.errors import PROBLEMS, STATUS_AND_TITLE, install_error_handlers
from app.domain import errors as domain
from app.domain.errors import Fault, FlexrunError
from app.kit.json_gate import JsonRefused

TRACE = "0af7651916cd43dd8448eb211c80319c"


class Unforeseen(FlexrunError):
    """Derived from nothing that the table knows."""


@pytest.fixture
def app() -> FastAPI:
    app = FastAPI()
    install_error_handlers(app)
    return app


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://flexrun.test") as client:
        yield client


def raising(app: FastAPI, error: Exception) -> None:
    @app.get("/raise")
    async def route(request: Request) -> None:
        raise error


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (domain.BadInput("d"), 400),
        (domain.Unprocessable("d"), 422),
        (domain.ContractError("d"), 422),
        (domain.PlanRejected("d"), 422),
        (domain.IdempotencyMismatch("d"), 422),
        (domain.TooLarge("d"), 413),
        (domain.NotFound("d"), 404),
        (domain.Conflict("d"), 409),
        (domain.Unavailable("d"), 503),
        (errors.UnsupportedMediaType("d"), 415),
        (errors.RequestTimeout("d"), 408),
    ],
)
async def test_domain_errors_have_their_status(
    app: FastAPI, client: httpx.AsyncClient, error: FlexrunError, status: int
) -> None:
    error.faults = (Fault("SOME_CODE", "a sentence", "/a/0", facet="f"),)
    error.extra = {"limit": 3, "status": "can not be replaced"}
    raising(app, error)
    response = await client.get(
        "/raise", headers={"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
    )
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json() == {
        "type": f"urn:flexrun:problem:{error.code}",
        "title": STATUS_AND_TITLE[type(error)][1],
        "status": status,
        "detail": "d",
        "code": error.code,
        "errors": [{"code": "SOME_CODE", "pointer": "/a/0", "message": "a sentence", "facet": "f"}],
        "limit": 3,
        "trace_id": TRACE,
    }
    assert response.headers.get("retry-after") == ("1" if status == 503 else None)


def test_every_domain_error_is_in_the_table() -> None:
    def below(kind: type[FlexrunError]) -> set[type[FlexrunError]]:
        return {kind}.union(*map(below, kind.__subclasses__()))

    known = {kind for kind in below(FlexrunError) if kind.__module__ == domain.__name__}
    assert known <= STATUS_AND_TITLE.keys()


@pytest.mark.parametrize("error", [ValueError("hunter2"), Unforeseen("hunter2")])
async def test_the_unexpected_says_nothing_and_is_logged(
    app: FastAPI, client: httpx.AsyncClient, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    raising(app, error)
    response = await client.get("/raise")
    assert response.status_code == 500
    assert "hunter2" not in response.text
    assert response.json()["code"] == "internal_error"
    assert response.json()["trace_id"] in caplog.text
    assert "hunter2" in caplog.text


@pytest.mark.parametrize(
    "traceparent",
    ["", "x", f"00-{'0' * 32}-00f067aa0ba902b7-01", f"00-{TRACE.upper()}-00f067aa0ba902b7-01"],
)
async def test_a_bad_traceparent_is_no_trace(
    app: FastAPI, client: httpx.AsyncClient, traceparent: str
) -> None:
    raising(app, domain.NotFound("d"))
    response = await client.get("/raise", headers={"traceparent": traceparent})
    assert "trace_id" not in response.json()


async def test_json_that_is_refused_is_400(app: FastAPI, client: httpx.AsyncClient) -> None:
    raising(app, JsonRefused("JSON_NUL", "a string contains the character U+0000", pointer="/a"))
    response = await client.get("/raise")
    assert response.status_code == 400
    assert response.json()["errors"][0]["pointer"] == "/a"


async def test_other_http_errors_keep_status_and_headers(
    app: FastAPI, client: httpx.AsyncClient
) -> None:
    raising(app, HTTPException(429, "text of a library", headers={"Retry-After": "7"}))
    response = await client.get("/raise")
    assert response.status_code == 429
    assert response.headers["retry-after"] == "7"
    assert response.json()["code"] == "too_many_requests"
    assert "library" not in response.text


async def test_a_client_that_left_gets_no_problem(
    app: FastAPI, client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    raising(app, ClientDisconnect())
    assert (await client.get("/raise")).status_code == 499
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_parameters_have_pointers_and_are_not_repeated(
    app: FastAPI, client: httpx.AsyncClient
) -> None:
    @app.get("/things/{number}")
    async def route(number: int, size: int) -> None: ...

    response = await client.get("/things/hunter2")
    assert response.status_code == 422
    assert [(fault["code"], fault["pointer"]) for fault in response.json()["errors"]] == [
        ("int_parsing", "/path/number"),
        ("missing", "/query/size"),
    ]
    assert "hunter2" not in response.text


async def test_a_wrong_method_is_told_all_right_ones(
    app: FastAPI, client: httpx.AsyncClient
) -> None:
    for method in ("PUT", "GET"):
        app.add_api_route("/things/{name}", lambda name: None, methods=[method])
    response = await client.post("/things/a")
    assert response.status_code == 405
    assert response.headers["allow"] == "GET, PUT"


def test_documented_problems_name_their_status() -> None:
    documented = PROBLEMS(400, 404, 409, 413, 415, 422, 503)
    for status, response in documented.items():
        example = response["content"]["application/problem+json"]["example"]
        assert example["status"] == status
        errors.Problem.model_validate(example)
