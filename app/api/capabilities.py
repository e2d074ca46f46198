"""Capabilities over HTTP: register, look up, heartbeat."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from app.api.bodies import documented_body, read_json_model
from app.api.deps import services_of, tenant_of
from app.api.errors import PROBLEMS
from app.api.paging import LIMIT_DEFAULT, Cursor, Limit, decode_cursor, encode_cursor
from app.api.registry_schemas import (
    REGISTRATION_EXAMPLE,
    CapabilityList,
    CapabilityResource,
    capability_view,
)
from app.domain.capability import CapabilityKind, CapabilityStatus, Registration
from app.domain.errors import Fault, Unprocessable

router = APIRouter(tags=["capabilities"])

Version = Annotated[
    str | None, Query(max_length=64, description="Without it the newest active version.")
]


@router.get(
    "/v1/capabilities",
    summary="List capabilities by id and version",
    response_model=CapabilityList,
    responses=PROBLEMS(400, 422, 503),
)
async def list_capabilities(
    request: Request,
    limit: Limit = LIMIT_DEFAULT,
    cursor: Cursor = None,
    status: Annotated[CapabilityStatus | None, Query()] = None,
) -> CapabilityList:
    registry, tenant = services_of(request).registry, tenant_of(request)
    after = None
    if cursor is not None:
        capability_id, version = decode_cursor(cursor, parts=2)
        after = (capability_id, version)
    page, last = await registry.page(tenant, after=after, limit=limit, status=status)
    facets = registry.facets(tenant)
    return CapabilityList(
        capabilities=[capability_view(capability, facets) for capability in page],
        next_cursor=None if last is None else encode_cursor(last),
    )


@router.post(
    "/v1/capabilities",
    status_code=201,
    summary="Register a capability, or register it again",
    description="Registering again is the heartbeat; what changed is taken over.",
    response_model=CapabilityResource,
    responses={
        200: {"model": CapabilityResource, "description": "It was registered before."},
        **PROBLEMS(400, 409, 413, 415, 422, 503),
    },
    openapi_extra=documented_body(Registration, REGISTRATION_EXAMPLE),
)
async def register_capability(request: Request, response: Response) -> CapabilityResource:
    services, tenant = services_of(request), tenant_of(request)
    limit = services.settings.envelope_bytes_max
    registration = await read_json_model(request, Registration, limit)
    if registration.kind is CapabilityKind.BUILTIN:
        raise Unprocessable(
            "Builtins come with the program, they are not registered from outside.",
            code="registration_invalid",
            faults=[Fault("builtin_not_registrable", "use kind http", "/kind")],
        )
    settings = services.settings
    registration = registration.with_defaults(
        timeout_s=settings.provider_timeout_s, attempts_max=settings.max_retries + 1
    )
    capability, is_new = await services.registry.register(tenant, registration)
    response.status_code = 201 if is_new else 200
    response.headers["Location"] = f"/v1/capabilities/{capability.capability_id}"
    return capability_view(capability, services.registry.facets(tenant))


@router.get(
    "/v1/capabilities/{capability_id}",
    summary="One capability",
    response_model=CapabilityResource,
    responses=PROBLEMS(404, 422, 503),
)
async def get_capability(
    request: Request, capability_id: str, version: Version = None
) -> CapabilityResource:
    registry, tenant = services_of(request).registry, tenant_of(request)
    capability = await registry.get(tenant, capability_id, version)
    return capability_view(capability, registry.facets(tenant))


@router.post(
    "/v1/capabilities/{capability_id}/heartbeat",
    summary="Say that a capability is alive",
    description="Lighter than registering again. Takes no body; revives an inactive capability.",
    response_model=CapabilityResource,
    responses=PROBLEMS(404, 422, 503),
)
async def beat_capability(
    request: Request, capability_id: str, version: Version = None
) -> CapabilityResource:
    registry, tenant = services_of(request).registry, tenant_of(request)
    capability = await registry.heartbeat(tenant, capability_id, version)
    return capability_view(capability, registry.facets(tenant))
