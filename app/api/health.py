"""Probes: `livez` is about the process alone, `readyz` about its needs, `startupz` about start."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response

from app.api.deps import services_of
from app.bootstrap import Services
from app.domain.errors import FlexrunError
from app.store.partitions import days_prepared
from app.store.revisions import current_revision, is_behind

router = APIRouter(tags=["probes"])

DISPENSABLE = ("redis", "models")
"""Without it runs go on: wake-ups are polled for, and every process has breakers of its own."""

_PROBE: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {"schema": {"type": "object"}}}},
    503: {
        "description": "Not (yet, any more) able to serve.",
        "content": {"application/json": {"schema": {"type": "object"}}},
    },
}


@router.get("/livez", summary="The process answers", responses=_PROBE, response_class=Response)
async def livez() -> Response:
    return _answer({"status": "ok"}, ok=True)


@router.get("/startupz", summary="Start is over", responses=_PROBE, response_class=Response)
async def startupz(request: Request) -> Response:
    started = getattr(request.app.state, "services", None) is not None
    return _answer({"status": "ok" if started else "starting"}, ok=started)


@router.get(
    "/readyz",
    summary="Postgres answers, the schema is at head, the lease is held, nothing drains",
    responses=_PROBE,
    response_class=Response,
)
async def readyz(request: Request) -> Response:
    services = services_of(request)
    checks = await _checks(services)
    ok = all(check["ok"] for name, check in checks.items() if name not in DISPENSABLE)
    status = "unavailable" if not ok else "ok"
    if ok and not all(check["ok"] for check in checks.values()):
        status = "degraded"
    return _answer({"status": status, "checks": checks}, ok=ok)


async def _checks(services: Services) -> dict[str, dict[str, Any]]:
    checks: dict[str, dict[str, Any]] = {
        "draining": {"ok": not services.drain.is_draining},
        "lease": {"ok": services.lease.held, "worker_id": services.lease.worker_id},
    }
    if services.catalog.providers:
        checks["models"] = _models(services)
    if services.settings.redis_url is not None:
        await services.breakers.views()  # asks Redis, so that the next line knows
        checks["redis"] = {"ok": not services.breakers.is_degraded}
    try:
        revision = await current_revision(services.database)
        days = await days_prepared(services.database, datetime.now(UTC).date())
    except FlexrunError as error:
        checks["postgres"] = {"ok": False, "detail": error.detail}
        return checks
    checks["postgres"] = {"ok": True}
    checks["migrations"] = {"ok": not is_behind(revision), "revision": revision}
    checks["partitions"] = {"ok": days >= 1, "days_ahead": days}
    return checks


def _models(services: Services) -> dict[str, Any]:
    """Whether a prompt has a chance, as far as it is known without a call. Where no provider can be
    called by its configuration, that is how it is meant."""
    access = services.catalog.providers.values()
    return {
        "ok": not services.providers or services.commands.models_up(),
        "providers": {found.name: found.unavailable or "configured" for found in access},
    }


def _answer(content: dict[str, Any], *, ok: bool) -> Response:
    return Response(
        orjson.dumps(content),
        200 if ok else 503,
        {"Cache-Control": "no-store"},
        media_type="application/json",
    )
