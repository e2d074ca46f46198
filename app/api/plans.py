"""Plan versions of a run, what changed between them, and previews."""

from __future__ import annotations

from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Query, Request, Response

from app.api.bodies import read_json_model
from app.api.deps import services_of, tenant_of
from app.api.errors import PROBLEMS
from app.api.plan_schemas import PlanDiff, PlanList, PlanResource
from app.bootstrap import Services
from app.domain.envelope import Envelope
from app.domain.errors import NotFound
from app.domain.plan_diff import diff_plans
from app.domain.plan_json import plan_as_dict, plan_from_dict
from app.kit.clock import now_ms
from app.kit.ids import parse_id
from app.kit.rfc3339 import rfc3339
from app.planner.plan_envelope import plan_envelope

router = APIRouter(tags=["plans"])

PREVIEW_RUN_ID = "00000000-0000-0000-0000-000000000000"


@router.post(
    "/v1/plans/preview",
    summary="Plan and prove an envelope without running it",
    response_model=PlanResource,
    responses=PROBLEMS(400, 413, 415, 422, 503),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Envelope"}}},
        }
    },
)
async def preview_plan(request: Request) -> Response:
    services = services_of(request)
    envelope = await read_json_model(request, Envelope, services.settings.envelope_bytes_max)
    plan = plan_envelope(
        envelope,
        services.registry.image(tenant_of(request)),
        run_id=PREVIEW_RUN_ID,
        created_at=rfc3339(now_ms()),
        limits=services.commands.plan_limits,
        models_up=services.commands.models_up(),
    )
    return _json(plan_as_dict(plan))


@router.get(
    "/v1/runs/{run_id}/plans",
    summary="Every plan version of a run, with its proof",
    response_model=PlanList,
    responses=PROBLEMS(404, 503),
)
async def list_plans(request: Request, run_id: str) -> Response:
    services = services_of(request)
    plans = await _plans(services, tenant_of(request), run_id)
    return _json({"plans": list(plans.values())})


@router.get(
    "/v1/runs/{run_id}/plans/diff",
    summary="What changed between two plan versions",
    response_model=PlanDiff,
    responses=PROBLEMS(404, 422, 503),
)
async def diff_plan_versions(
    request: Request,
    run_id: str,
    from_version: Annotated[int, Query(alias="from", ge=1)],
    to_version: Annotated[int, Query(alias="to", ge=1)],
) -> Response:
    services = services_of(request)
    plans = await _plans(services, tenant_of(request), run_id)
    before, after = _version(plans, from_version), _version(plans, to_version)
    return _json(diff_plans(plan_from_dict(before), plan_from_dict(after)))


@router.get(
    "/v1/runs/{run_id}/plans/{version}",
    summary="One plan version, with its proof",
    response_model=PlanResource,
    responses=PROBLEMS(404, 422, 503),
)
async def get_plan(request: Request, run_id: str, version: int) -> Response:
    services = services_of(request)
    plans = await _plans(services, tenant_of(request), run_id)
    return _json(_version(plans, version))


async def _plans(services: Services, tenant: str, run_id: str) -> dict[int, dict[str, Any]]:
    parsed = parse_id(run_id)
    if parsed is None or await services.reader.head(tenant, parsed) is None:
        raise NotFound("There is no such run.", code="run_not_found")
    return {
        version: orjson.loads(body)
        for version, body in (await services.reader.plans(parsed)).items()
    }


def _version(plans: dict[int, dict[str, Any]], version: int) -> dict[str, Any]:
    if version not in plans:
        raise NotFound(f"The run has no plan version {version}.", code="plan_not_found")
    return plans[version]


def _json(content: Any) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")
