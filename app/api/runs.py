"""Runs over HTTP: submit, list, look at, debug. What operators order is in `orders.py`.

`POST /v1/runs` is the hot route: it reads the bytes once, answers with ready bytes, and leaves
routing aside nothing to FastAPI; its schema goes into OpenAPI by hand.
"""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from datetime import datetime
from functools import partial
from typing import Annotated, Any
from uuid import UUID

import orjson
from fastapi import APIRouter, Query, Request, Response

from app.api.bodies import read_body, validated
from app.api.deps import services_of, tenant_of
from app.api.errors import PROBLEMS
from app.api.negotiate import NO_NUL, accepts_stream, preferred_wait_s
from app.api.paging import decode_cursor, encode_cursor
from app.api.run_schemas import (
    DebugView,
    NodeOutput,
    RunList,
    RunResource,
)
from app.api.run_views import accepted_view, debug_view, run_view, summary_view
from app.api.stream import check_room, open_stream, stream_of
from app.bootstrap import Services
from app.domain.envelope import Envelope
from app.domain.errors import BadInput, ContractError, NotFound, PlanRejected, Unavailable
from app.domain.run import RunStatus
from app.journal.feed import Filter
from app.kit.ids import id_at, parse_id
from app.orchestrator.commands import SUBMIT_ROUTE, Once, Submission, canonical, once_of
from app.orchestrator.resume import StoredRun, event_value, load_run
from app.store.signals import all_signals
from app.store.workers import worker_of

router = APIRouter(tags=["runs"])

KEY = re.compile(r'(")?([\x21\x23-\x7e]{1,200})(?(1)")')

_SUBMIT_DOC: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Envelope"}}},
    },
    "parameters": [
        {
            "name": "Idempotency-Key",
            "in": "header",
            "schema": {"type": "string", "maxLength": 200},
            "description": "The same key and body give the same run; another body is 422.",
        },
        {
            "name": "Prefer",
            "in": "header",
            "schema": {"type": "string"},
            "description": "`wait=N`: answer with the finished run if it ends within N (≤ 60) s.",
        },
    ],
}

_STREAM_CONTENT = {"text/event-stream": {"schema": {"type": "string"}}}
_RUN_CONTENT = {"application/json": {"schema": {"$ref": "#/components/schemas/RunResource"}}}


@router.post(
    "/v1/runs",
    status_code=202,
    summary="Submit a run",
    response_class=Response,
    responses={
        200: {
            "description": "The event stream, or the finished run for `Prefer: wait`.",
            "content": {**_STREAM_CONTENT, **_RUN_CONTENT},
        },
        202: {"description": "The run is durable and on its way.", "content": _RUN_CONTENT},
        **PROBLEMS(400, 413, 415, 422, 503),
    },
    openapi_extra=_SUBMIT_DOC,
)
async def submit_run(request: Request) -> Response:
    services = services_of(request)
    headers = request.headers
    if services.drain.is_draining:
        raise Unavailable("This process is shutting down.", code="draining")
    body = await read_body(request, services.settings.envelope_bytes_max)
    envelope = await validated(body, Envelope)
    tenant = tenant_of(request)
    key = idempotency_key(headers.get("idempotency-key"))
    # Only a request with a key pays for the canonical form of its envelope.
    once = None if key is None else once_of(SUBMIT_ROUTE, key, canonical(envelope))
    wants_stream = accepts_stream(headers.get("accept", ""))
    if wants_stream:
        check_room(services)  # before the run is accepted, not after
    if once is not None:
        earlier = await services.commands.replayed(tenant, once)
        if earlier is not None:
            return await _replay(services, tenant, earlier, headers)
    submission = await _submission(
        services, tenant, envelope, body.decode(), once, headers.get("traceparent")
    )
    run_id = submission.run_id
    # Entered before the first commit, so that the stream is fed from memory from seq 1 on.
    channel = services.feed.enter(run_id, 0, listens=wants_stream)
    stream = None
    try:
        earlier = await services.commands.accepted(submission, tenant, once)
        if earlier is not None:
            return await _replay(services, tenant, earlier, headers)
        if wants_stream:
            stream = stream_of(services, channel, 0, Filter(), _location(run_id))
            return stream
        wait_s = preferred_wait_s(headers.get("prefer"))
        if wait_s:
            # It is accepted, whatever becomes of the wait: a 503 would have it sent again.
            with suppress(Unavailable):
                return await _after_waiting(services, tenant, run_id, wait_s)
        return json_response(202, accepted_view(submission.run), _location(run_id))
    finally:
        if stream is None:
            services.feed.leave(channel, listens=wants_stream)


async def _submission(
    services: Services,
    tenant: str,
    envelope: Envelope,
    body: str,
    once: Once | None,
    traceparent: str | None,
) -> Submission:
    """Plan and queue the run; what is refused is tried again if the registry was behind.

    What is missing here may have been registered through another process just now.
    """
    submit = partial(
        services.commands.submit_run, tenant, envelope, body, once=once, traceparent=traceparent
    )
    image = services.registry.image(tenant)
    try:
        return submit(image)
    except (PlanRejected, ContractError):
        await services.registry.refresh()
        fresh = services.registry.image(tenant)
        if fresh.revision == image.revision:
            raise
        return submit(fresh)


def _location(run_id: UUID) -> dict[str, str]:
    return {"Location": f"/v1/runs/{run_id}"}


def json_response(status: int, content: Any, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(content), status, headers, media_type="application/json")


async def _replay(services: Services, tenant: str, run_id: UUID, headers: Any) -> Response:
    """The answer to a repeated POST: the run that the key made, as it is now."""
    more = {**_location(run_id), "Idempotency-Replayed": "true"}
    if accepts_stream(headers.get("accept", "")):
        return open_stream(services, run_id, 0, Filter(), more)
    wait_s = preferred_wait_s(headers.get("prefer"))
    if wait_s:
        return await _after_waiting(services, tenant, run_id, wait_s, more)
    stored = await _stored(services, tenant, run_id)
    return json_response(202, await run_view(services, stored), more)


async def _after_waiting(
    services: Services,
    tenant: str,
    run_id: UUID,
    wait_s: float,
    headers: dict[str, str] | None = None,
) -> Response:
    """200 with the finished run if it ends in time, else 202 with the run as it is.

    A run that waits for a human is answered at once: it may wait for days.
    """
    channel = services.feed.enter(run_id, 0)
    services.feed.nudge()
    try:
        async with asyncio.timeout(wait_s):
            while not (channel.rests or services.drain.is_draining):
                await channel.wait()
    except TimeoutError:
        pass
    finally:
        services.feed.leave(channel)
    stored = await _stored(services, tenant, run_id)
    status = 200 if stored.state.status.is_terminal else 202
    view = await run_view(services, stored)
    return json_response(status, view, headers or _location(run_id))


def idempotency_key(header: str | None) -> str | None:
    """The key, quoted or bare. Raises `BadInput` for one that is empty, long or not printable."""
    if header is None:
        return None
    match = KEY.fullmatch(header)
    if match is None:
        raise BadInput(
            "Idempotency-Key must be 1 to 200 printable ASCII characters.",
            code="bad_idempotency_key",
        )
    return match[2]


async def _stored(services: Services, tenant: str, run_id: UUID | None) -> StoredRun:
    stored = None if run_id is None else await load_run(services.reader, tenant, run_id)
    if stored is None:
        raise NotFound("There is no such run.", code="run_not_found")
    return stored


@router.get(
    "/v1/runs",
    summary="List runs, newest first",
    response_model=RunList,
    responses=PROBLEMS(400, 422, 503),
)
async def list_runs(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[str | None, Query(max_length=500)] = None,
    status: Annotated[list[RunStatus] | None, Query()] = None,
    label: Annotated[str | None, Query(max_length=200, pattern=NO_NUL)] = None,
    created_after: Annotated[datetime | None, Query()] = None,
    created_before: Annotated[datetime | None, Query()] = None,
) -> Response:
    services = services_of(request)
    before = None
    if cursor is not None:
        before = parse_id(decode_cursor(cursor, 1)[0])
        if before is None:
            raise BadInput("The cursor is not one of ours.", code="bad_cursor")
    rows = await services.reader.list_runs(
        tenant_of(request),
        before=before,
        limit=limit + 1,
        status=[str(value) for value in status or ()],
        label=label,
        created_after=id_bound(created_after),
        created_before=id_bound(created_before),
    )
    more = len(rows) > limit
    runs = [summary_view(row) for row in rows[:limit]]
    next_cursor = encode_cursor((runs[-1]["run_id"],)) if more else None
    return json_response(200, {"runs": runs, "next_cursor": next_cursor})


def id_bound(at: datetime | None) -> UUID | None:
    """A time as the smallest run id of that ms: ids are ordered by time."""
    if at is None:
        return None
    try:
        return id_at(int(at.timestamp() * 1000))
    except (ValueError, OverflowError):
        raise BadInput("The time is out of range.", code="bad_time") from None


@router.get(
    "/v1/runs/{run_id}",
    summary="One run, with its nodes and output",
    response_model=RunResource,
    responses=PROBLEMS(404, 503),
)
async def get_run(request: Request, run_id: str) -> Response:
    services = services_of(request)
    stored = await _stored(services, tenant_of(request), parse_id(run_id))
    return json_response(200, await run_view(services, stored))


@router.get(
    "/v1/runs/{run_id}/nodes/{node_id}/output",
    summary="The output of a node, however big",
    response_model=NodeOutput,
    responses=PROBLEMS(404, 503),
)
async def get_node_output(request: Request, run_id: str, node_id: str) -> Response:
    services = services_of(request)
    parsed = parse_id(run_id)
    stored = await _stored(services, tenant_of(request), parsed)
    node = stored.state.nodes.get(node_id)
    if node is None:
        raise NotFound(f"The plan has no node {node_id!r}.", code="node_not_found")
    if node.done_seq is None:
        raise NotFound(f"Node {node_id!r} is {node.status}, it has no output.", code="no_output")
    assert parsed is not None
    bodies = await services.reader.events_at(parsed, [node.done_seq])
    data = orjson.loads(bodies[node.done_seq])["data"]
    output = await event_value(services.reader, parsed, data)
    return json_response(200, {"run_id": str(parsed), "node_id": node_id, "output": output})


@router.get(
    "/v1/runs/{run_id}/debug",
    summary="The operator's view: plans, attempts, lease, snapshot, signals; secrets redacted",
    response_model=DebugView,
    responses=PROBLEMS(404, 503),
)
async def debug_run(request: Request, run_id: str) -> Response:
    services = services_of(request)
    parsed = parse_id(run_id)
    stored = await _stored(services, tenant_of(request), parsed)
    assert parsed is not None
    view = await debug_view(
        services,
        stored,
        await all_signals(services.database, parsed),
        await worker_of(services.database, stored.owner),
    )
    return json_response(200, view, {"Cache-Control": "no-store"})
