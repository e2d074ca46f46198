"""Requests to models without an envelope: answered at once, or taken from the queue; and the record
of every call of a model that the journal has.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Query, Request, Response

from app.api.bodies import documented_body, read_json_model
from app.api.deps import Services, services_of, tenant_of
from app.api.errors import PROBLEMS
from app.api.orders import Key
from app.api.paging import LIMIT_DEFAULT, Cursor, Limit, decode_cursor, encode_cursor
from app.api.runs import id_bound, idempotency_key, json_response
from app.api.slm_runs import (
    EMBED,
    INFER,
    NOW_S,
    Work,
    answer_of,
    models_asked,
    request_view,
    stored_request,
    submit,
)
from app.api.slm_schemas import (
    EMBEDDING_EXAMPLE,
    INFER_EXAMPLE,
    REQUEST_EXAMPLE,
    EmbeddingAnswer,
    EmbeddingBody,
    EmbeddingPayload,
    InferAnswer,
    InferBody,
    InferPayload,
    ModelCallList,
    RequestAccepted,
    RequestBody,
    RequestResource,
)
from app.domain.chat import ModelRole
from app.domain.envelope import Lane
from app.domain.errors import BadInput
from app.kit.ids import parse_id
from app.store.model_calls import CallRow, model_calls

router = APIRouter(tags=["slm"])

_NOW = (
    "It is a run of one node that is waited for, so that its calls are in the journal; "
    "Content-Location names it. A provider that gives no usable answer is 502, with the code that "
    "says why; all breakers open is 503 with Retry-After; no answer in "
    f"{NOW_S:g} s is 504. Nothing of what failed happens later."
)


@router.post(
    "/v1/infer_sync",
    summary="Ask a model and wait for its answer",
    description=_NOW,
    response_model=InferAnswer,
    responses=PROBLEMS(400, 413, 415, 422, 502, 503, 504),
    openapi_extra=documented_body(InferBody, INFER_EXAMPLE),
)
async def infer_sync(request: Request) -> Response:
    services = services_of(request)
    body = await read_json_model(request, InferBody, services.settings.envelope_bytes_max)
    return await _answered(request, _infer(services, body, None, body.model))


@router.post(
    "/v1/embedding",
    summary="Embed a text and wait for its vector",
    description=_NOW,
    response_model=EmbeddingAnswer,
    responses=PROBLEMS(400, 413, 415, 422, 502, 503, 504),
    openapi_extra=documented_body(EmbeddingBody, EMBEDDING_EXAMPLE),
)
async def embedding(request: Request) -> Response:
    services = services_of(request)
    body = await read_json_model(request, EmbeddingBody, services.settings.envelope_bytes_max)
    return await _answered(request, _embed(services, body, None, body.model))


async def _answered(request: Request, work: Work) -> Response:
    services, tenant = services_of(request), tenant_of(request)
    envelope = work.envelope(Lane.INTERACTIVE, NOW_S)
    traceparent = request.headers.get("traceparent")
    run_id = await submit(services, tenant, envelope, traceparent=traceparent)
    answer = await answer_of(services, tenant, run_id)
    return json_response(200, answer, {"Content-Location": f"/v1/requests/{run_id}"})


@router.post(
    "/v1/requests",
    status_code=202,
    summary="Queue a prompt or a text for a worker",
    description="The request is a run: it survives its workers, and waits for a breaker. Its id "
    "is the id of the run, which `/v1/runs` shows and cancels.",
    response_model=RequestAccepted,
    responses=PROBLEMS(400, 413, 415, 422, 503),
    openapi_extra=documented_body(RequestBody, REQUEST_EXAMPLE),
)
async def queue_request(request: Request, key: Key = None) -> Response:
    services = services_of(request)
    body = await read_json_model(request, RequestBody, services.settings.envelope_bytes_max)
    asked = body.root
    if asked.mode == "infer_sync":
        work = _infer(services, asked.payload, asked.provider, asked.model)
    else:
        work = _embed(services, asked.payload, asked.provider, asked.model)
    run_id = await submit(
        services,
        tenant_of(request),
        work.envelope(Lane.STANDARD),
        key=idempotency_key(key),
        traceparent=request.headers.get("traceparent"),
    )
    accepted = {"request_id": str(run_id), "status": "queued"}
    return json_response(202, accepted, {"Location": f"/v1/requests/{run_id}"})


@router.get(
    "/v1/requests/{request_id}",
    summary="Where a request stands, with its result or error",
    response_model=RequestResource,
    responses=PROBLEMS(404, 503),
)
async def get_request(request: Request, request_id: str) -> Response:
    services = services_of(request)
    stored = await stored_request(services, tenant_of(request), parse_id(request_id))
    return json_response(200, await request_view(services, stored))


@router.get(
    "/v1/slm/metrics",
    summary="List the calls of models, newest run first",
    description="A reading of the journal: one record for each LLM_RESPONSE. `since` is a time; "
    "calls of runs that were accepted before it are left out.",
    response_model=ModelCallList,
    responses=PROBLEMS(400, 422, 503),
)
async def list_model_calls(
    request: Request,
    limit: Limit = LIMIT_DEFAULT,
    cursor: Cursor = None,
    since: Annotated[datetime | None, Query()] = None,
) -> Response:
    services, tenant = services_of(request), tenant_of(request)
    rows = await model_calls(
        services.database,
        tenant,
        before=None if cursor is None else _call_of(cursor),
        since=id_bound(since),
        limit=limit + 1,
    )
    shown = rows[:limit]
    page = {
        "calls": [_record(tenant, row) for row in shown],
        "next_cursor": encode_cursor((str(shown[-1].run_id), str(shown[-1].seq)))
        if len(rows) > limit
        else None,
    }
    return json_response(200, page)


def _infer(
    services: Services, asked: InferPayload, provider: str | None, model: str | None
) -> Work:
    inputs = asked.model_dump(
        include={"prompt", "role", "output_tokens_max", "temperature"}, exclude_none=True
    )
    models = models_asked(services.catalog, asked.role, provider, model)
    return Work(INFER, {**inputs, "models": models})


def _embed(
    services: Services, asked: EmbeddingPayload, provider: str | None, model: str | None
) -> Work:
    models = models_asked(services.catalog, ModelRole.EMBEDDING, provider, model)
    return Work(EMBED, {"text": asked.text, "models": models})


def _call_of(cursor: str) -> tuple[Any, int]:
    run_id, seq = decode_cursor(cursor, 2)
    parsed = parse_id(run_id)
    if parsed is None or not (seq.isascii() and seq.isdigit() and len(seq) <= 9):
        raise BadInput("The cursor is not one that this list gave out.", code="bad_cursor")
    return parsed, int(seq)


def _record(tenant: str, row: CallRow) -> dict[str, Any]:
    event = orjson.loads(row.body)
    data = event["data"]
    return {
        "model_id": data["model"],
        "provider": data["provider"],
        "role": data["role"],
        "tenant_id": tenant,
        "tokens_in": data["tokens_in"],
        "tokens_out": data["tokens_out"],
        "latency_ms": data["duration_ms"],
        "outcome": data["outcome"],
        "refusal": data["outcome"] == "refused",
        "run_id": event["run_id"],
        "node_id": event.get("node_id"),
        "ts": event["ts"],
    }
