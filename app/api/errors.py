"""Every error of the HTTP API as `application/problem+json` (RFC 9457).

One table maps the errors of the domain to a status. Texts of libraries, SQL and stack traces never
leave the process: what is not in the table is a 500 that says nothing and is logged in full.

    {"type": "urn:flexrun:problem:<code>", "title", "status", "detail", "code",
     "errors": [{"code", "pointer", "message", "facet"?, "node_id"?, "capability_id"?}],
     "trace_id"?}

The type is a URN: it names the problem for ever and promises no page.
"""

from __future__ import annotations

import http
import logging
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from app.api.faults import faults_of_validation
from app.api.inline import inlined_schema
from app.domain.errors import (
    BadInput,
    Conflict,
    ContractError,
    Fault,
    FlexrunError,
    IdempotencyMismatch,
    NotFound,
    PlanRejected,
    TooLarge,
    Unavailable,
    Unprocessable,
)
from app.kit.ids import new_traceparent
from app.kit.json_gate import JsonRefused

log = logging.getLogger("flexrun.api")

MEDIA_TYPE = "application/problem+json"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
CLIENT_LEFT = 499

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")


class FaultShape(BaseModel):
    """One broken rule. `pointer` is a JSON pointer into the body, or /query/… and /path/…"""

    code: str
    pointer: str
    message: str
    facet: str | None = None
    node_id: str | None = None
    capability_id: str | None = None


class Problem(BaseModel):
    """What every error of this API looks like. Some problems have members of their own."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(description="`urn:flexrun:problem:` and the code.")
    title: str
    status: int
    detail: str
    code: str = Field(description="Stable: programs may branch on it.")
    errors: list[FaultShape]
    trace_id: str | None = Field(None, description="The trace of the request, as in the logs.")


_PROBLEM_SCHEMA = inlined_schema(Problem)


class UnsupportedMediaType(FlexrunError):
    """The body is not what this route reads."""

    code = "unsupported_media_type"


class RequestTimeout(FlexrunError):
    """The body did not arrive in time."""

    code = "request_timeout"


class ProviderFailed(FlexrunError):
    """Who had to be asked gave no usable answer."""

    code = "llm_unavailable"


class TooSlow(FlexrunError):
    """There is no answer in the time that a client is kept waiting."""

    code = "no_answer_in_time"


STATUS_AND_TITLE: dict[type[FlexrunError], tuple[int, str]] = {
    BadInput: (400, "The request can not be understood"),
    Unprocessable: (422, "The request breaks a rule"),
    ContractError: (422, "The contracts do not compile"),
    PlanRejected: (422, "The plan was rejected"),
    IdempotencyMismatch: (422, "The idempotency key was used with another body"),
    TooLarge: (413, "The request is over a limit"),
    NotFound: (404, "There is no such thing"),
    Conflict: (409, "The state does not allow this"),
    UnsupportedMediaType: (415, "The media type is not supported"),
    RequestTimeout: (408, "The request took too long to arrive"),
    ProviderFailed: (502, "A provider gave no usable answer"),
    Unavailable: (503, "Try again later"),
    TooSlow: (504, "It took too long"),
    FlexrunError: (500, "Internal error"),
}
_TITLE_OF_STATUS = {
    status: title
    for kind, (status, title) in STATUS_AND_TITLE.items()
    if FlexrunError in kind.__bases__
}
_EXAMPLE_OF_STATUS: dict[int, tuple[str, str, tuple[Fault, ...]]] = {
    400: (
        "malformed_json",
        "The body is not strict JSON.",
        (Fault("JSON_DUPLICATE_KEY", "the key 'name' stands twice"),),
    ),
    404: ("not_found", "There is no such thing.", ()),
    409: ("conflict", "Another body is stored under this version.", ()),
    413: ("body_too_large", "The body is larger than 1048576 bytes.", ()),
    415: ("unsupported_media_type", "Send application/json, without a content encoding.", ()),
    422: (
        "invalid_request",
        "The body is not valid.",
        (Fault("missing", "Field required", "/objective"),),
    ),
    502: ("llm_unavailable", "Provider near answered 500.", ()),
    503: ("database_unreachable", "The journal is out of reach.", ()),
    504: ("no_answer_in_time", "There was no answer within 30 s.", ()),
}
_CODE_OF_STATUS = {404: "route_not_found", 405: "method_not_allowed"}


def PROBLEMS(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that may answer these problems. 408 and 500 go without saying."""
    return {
        status: {
            "description": f"{_TITLE_OF_STATUS[status]}.",
            "content": {
                MEDIA_TYPE: {
                    "schema": _PROBLEM_SCHEMA,
                    "example": _example(status),
                }
            },
        }
        for status in statuses
    }


def problem(
    status: int,
    code: str,
    title: str,
    detail: str,
    *,
    faults: Iterable[Fault] = (),
    extra: Mapping[str, Any] | None = None,
    trace_id: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """A problem response; `extra` members never replace the standard ones."""
    body = _body(status, code, title, detail, faults)
    for name, value in (extra or {}).items():
        body.setdefault(name, value)
    if trace_id is not None:
        body["trace_id"] = trace_id
    return Response(
        orjson.dumps(body, default=str),
        status_code=status,
        media_type=MEDIA_TYPE,
        headers=None if headers is None else dict(headers),
    )


def _body(
    status: int, code: str, title: str, detail: str, faults: Iterable[Fault]
) -> dict[str, Any]:
    return {
        "type": f"urn:flexrun:problem:{code}",
        "title": title,
        "status": status,
        "detail": detail,
        "code": code,
        "errors": [fault.as_dict() for fault in faults],
    }


def _example(status: int) -> dict[str, Any]:
    code, detail, faults = _EXAMPLE_OF_STATUS[status]
    return _body(status, code, _TITLE_OF_STATUS[status], detail, faults)


def problem_of(error: FlexrunError, trace_id: str | None = None) -> Response:
    """The response of a domain error; also for routes that answer without raising."""
    mapped = next(kind for kind in type(error).__mro__ if kind in STATUS_AND_TITLE)
    status, title = STATUS_AND_TITLE[mapped]
    headers = {"Retry-After": str(error.retry_after_s)} if isinstance(error, Unavailable) else None
    return problem(
        status,
        error.code,
        title,
        error.detail,
        faults=error.faults,
        extra=error.extra,
        trace_id=trace_id,
        headers=headers,
    )


def malformed_json(refused: JsonRefused) -> BadInput:
    """A body that did not pass the strict gate."""
    return BadInput(
        "The body is not strict JSON.",
        code="malformed_json",
        faults=[Fault(refused.code, refused.detail, refused.pointer)],
    )


def install_error_handlers(app: FastAPI) -> None:
    """Make every error of the app a problem."""
    for kind, handler in _HANDLERS.items():
        app.add_exception_handler(kind, handler)
    app.add_exception_handler(Exception, _unexpected)


def trace_id_of(request: Request) -> str | None:
    """The trace that the caller said this request belongs to."""
    found = _TRACEPARENT.fullmatch(request.headers.get("traceparent", ""))
    return None if found is None else found[1]


async def answer_error(request: Request, error: Exception) -> Response:
    """The problem for whatever a route raised: for routes that FastAPI does not call."""
    for kind, handler in _HANDLERS.items():
        if isinstance(error, kind):
            return await handler(request, error)
    return await _unexpected(request, error)


async def _domain_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, FlexrunError)
    response = problem_of(error, trace_id_of(request))
    if response.status_code == http.HTTPStatus.INTERNAL_SERVER_ERROR:
        return await _unexpected(request, error)
    return response


async def _json_refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, JsonRefused)
    return problem_of(malformed_json(error), trace_id_of(request))


async def _invalid_request(request: Request, error: Exception) -> Response:
    """Parameters of path, query and headers; bodies are read by `bodies.read_json_model`."""
    assert isinstance(error, RequestValidationError)
    invalid = Unprocessable(
        "Parameters of the request are not valid.", faults=faults_of_validation(error)
    )
    return problem_of(invalid, trace_id_of(request))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status = error.status_code
    phrase = http.HTTPStatus(status).phrase if status in _STATUSES else "Error"
    code = _CODE_OF_STATUS.get(status, re.sub(r"\W+", "_", phrase).lower())
    headers = dict(error.headers or {})
    detail = f"{phrase}."
    if status == http.HTTPStatus.NOT_FOUND:
        detail = "There is no such route."
    elif status == http.HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = ", ".join(_allowed(request))
        detail = f"This route allows {headers['Allow']}."
    return problem(status, code, phrase, detail, trace_id=trace_id_of(request), headers=headers)


async def _client_left(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_LEFT)


async def _unexpected(request: Request, error: Exception) -> Response:
    """The trace id is what joins the caller's report with the log line."""
    trace_id = trace_id_of(request) or new_traceparent()[1]
    log.error(
        "unexpected error on %s %r, trace_id=%s",
        request.method,
        request.url.path,
        trace_id,
        exc_info=error,
    )
    return problem(
        500,
        "internal_error",
        "Internal error",
        "Something went wrong here. The trace_id names the log line that tells what.",
        trace_id=trace_id,
    )


_HANDLERS: dict[type[Exception], Callable[[Request, Exception], Awaitable[Response]]] = {
    FlexrunError: _domain_error,
    JsonRefused: _json_refused,
    RequestValidationError: _invalid_request,
    HTTPException: _http_error,
    ClientDisconnect: _client_left,
}
_STATUSES = frozenset(http.HTTPStatus)


def _allowed(request: Request) -> list[str]:
    """All methods of this path. The router names those of the first route that matches only."""
    kept = {name: request.scope[name] for name in ("type", "path", "root_path", "headers")}
    return [
        method
        for method in METHODS
        if any(
            route.matches({**kept, "method": method})[0] is Match.FULL
            for route in request.app.router.routes
        )
    ]
