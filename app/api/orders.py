"""What operators order of a run: cancel, pause, resume; and finding the run to resume."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Header, Request, Response
from pydantic import ValidationError

from app.api.bodies import documented_body, read_json_model
from app.api.deps import services_of, tenant_of
from app.api.errors import PROBLEMS
from app.api.run_schemas import OrderAccepted, OrderBody, ResumeBody, RunSummary
from app.api.run_views import resumed_from_view, summary_view
from app.api.runs import idempotency_key, json_response
from app.domain.envelope import Envelope
from app.domain.errors import NotFound
from app.domain.signals import SignalKind
from app.kit.ids import parse_id
from app.orchestrator.commands import canonical
from app.orchestrator.orders import Ordered

router = APIRouter(tags=["runs"])

Key = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        max_length=202,
        description="The same key and body order once; another body is 422.",
    ),
]
_ORDER: dict[str, Any] = {
    "status_code": 202,
    "response_model": OrderAccepted,
    "responses": PROBLEMS(400, 404, 409, 413, 415, 422, 503),
}


@router.post(
    "/v1/runs/{run_id}/cancel",
    summary="End a run now; calls under way are cut off",
    openapi_extra=documented_body(OrderBody),
    **_ORDER,
)
async def cancel_run(request: Request, run_id: str, key: Key = None) -> Response:
    return await _stop(SignalKind.CANCEL, request, run_id, key)


@router.post(
    "/v1/runs/{run_id}/pause",
    summary="Start nothing new; calls under way may end",
    openapi_extra=documented_body(OrderBody),
    **_ORDER,
)
async def pause_run(request: Request, run_id: str, key: Key = None) -> Response:
    return await _stop(SignalKind.PAUSE, request, run_id, key)


async def _stop(kind: SignalKind, request: Request, run_id: str, key: str | None) -> Response:
    services = services_of(request)
    body = await read_json_model(request, OrderBody, services.settings.envelope_bytes_max)
    ordered = await services.orders.stop(
        kind,
        tenant_of(request),
        _parsed(run_id),
        body.model_dump(mode="json", exclude_unset=True),
        idempotency_key(key),
    )
    return _accepted(ordered)


@router.post(
    "/v1/runs/{run_id}/resume",
    summary="Go on with a run that waits; one that failed or was cancelled goes on as a new run",
    openapi_extra=documented_body(ResumeBody),
    **_ORDER,
)
async def resume_run(request: Request, run_id: str, key: Key = None) -> Response:
    services = services_of(request)
    body = await read_json_model(request, ResumeBody, services.settings.envelope_bytes_max)
    tenant = tenant_of(request)
    ordered = await services.orders.resume(
        tenant,
        _parsed(run_id),
        body.model_dump(mode="json", exclude_unset=True),
        services.registry.image(tenant),
        idempotency_key(key),
    )
    return _accepted(ordered)


def _parsed(run_id: str) -> UUID:
    found = parse_id(run_id)
    if found is None:
        raise NotFound("There is no such run.", code="run_not_found")
    return found


def _accepted(ordered: Ordered) -> Response:
    content: dict[str, Any] = {
        "run_id": str(ordered.run_id),
        "signal_id": None if ordered.signal_id is None else str(ordered.signal_id),
    }
    if ordered.resumed_from is not None:
        content["resumed_from"] = resumed_from_view(ordered.resumed_from)
    headers = {"Location": f"/v1/runs/{ordered.run_id}"}
    if ordered.is_replay:
        headers["Idempotency-Replayed"] = "true"
    return json_response(202, content, headers)


@router.post(
    "/v1/runs/find",
    summary="The newest run of this envelope that did not end well",
    response_model=RunSummary,
    responses=PROBLEMS(400, 404, 413, 415, 422, 503),
    openapi_extra=documented_body(Envelope),
)
async def find_run(request: Request) -> Response:
    """Unfinished, failed or cancelled, and submitted with the same envelope as the body."""
    services = services_of(request)
    envelope = await read_json_model(request, Envelope, services.settings.envelope_bytes_max)
    candidates = await services.reader.runs_for(tenant_of(request), envelope.objective)
    # Up to 100 envelopes of up to 1 MiB each: reading them must not hold up the loop.
    row = await asyncio.to_thread(_first_of, candidates, envelope)
    if row is None:
        raise NotFound(
            "No unfinished, failed or cancelled run has this envelope.", code="run_not_found"
        )
    return json_response(200, summary_view(row))


def _first_of(candidates: Iterable[Any], envelope: Envelope) -> Any:
    """The first run that was submitted with this envelope; None when none was."""
    wanted = canonical(envelope)
    for row in candidates:
        try:
            found = Envelope.model_validate_json(row["envelope"])
        except ValidationError:
            continue  # of another version, whose envelopes are not read here
        if canonical(found) == wanted:
            return row
    return None
