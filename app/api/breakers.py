"""Breakers over HTTP: how they stand, and closing one by hand."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict

from app.api.deps import services_of
from app.api.errors import PROBLEMS
from app.api.runs import json_response
from app.domain.errors import NotFound
from app.kit.rfc3339 import rfc3339
from app.orchestrator.announce import announce_transition
from app.ports import BreakerStatus, BreakerView

router = APIRouter(tags=["breakers"])


class BreakerShape(BaseModel):
    """A breaker of one far side (`tool::host`). `degraded`: this process's own, Redis is away."""

    model_config = ConfigDict(extra="forbid")

    scope: str
    status: BreakerStatus
    generation: int
    failures: int
    opened_at: str | None
    retry_after_s: float
    degraded: bool


class BreakerList(BaseModel):
    """What this process sees. `degraded`: only its own breakers, because Redis is away."""

    degraded: bool
    breakers: list[BreakerShape]


@router.get(
    "/v1/breakers",
    summary="Every breaker that is known",
    response_model=BreakerList,
    responses=PROBLEMS(503),
)
async def list_breakers(request: Request) -> Response:
    breakers = services_of(request).breakers
    views = [_view(view) for view in await breakers.views()]  # which finds out if Redis is away
    return json_response(200, {"degraded": breakers.is_degraded, "breakers": views})


@router.post(
    "/v1/breakers/{scope:path}/reset",
    summary="Close a breaker by hand: the next call goes through",
    response_model=BreakerShape,
    responses=PROBLEMS(404, 503),
)
async def reset_breaker(request: Request, scope: str) -> Response:
    services = services_of(request)
    try:
        transition = await services.breakers.reset(scope)
    except KeyError:
        raise NotFound(f"There is no breaker {scope!r}.", code="breaker_not_found") from None
    if transition is not None:
        await announce_transition(services.database, transition)
    views = {view.scope: view for view in await services.breakers.views()}
    if scope not in views:
        raise NotFound(f"There is no breaker {scope!r}.", code="breaker_not_found")
    return json_response(200, _view(views[scope]))


def _view(view: BreakerView) -> dict[str, Any]:
    return {
        "scope": view.scope,
        "status": view.status,
        "generation": view.generation,
        "failures": view.failures,
        "opened_at": None if view.opened_at is None else rfc3339(view.opened_at),
        "retry_after_s": round(view.retry_after_s, 3),
        "degraded": view.degraded,
    }
