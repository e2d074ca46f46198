"""The facet catalog over HTTP."""

from __future__ import annotations

from bisect import bisect_right

from fastapi import APIRouter, Request, Response

from app.api.bodies import documented_body, read_json_model
from app.api.deps import services_of, tenant_of
from app.api.errors import PROBLEMS
from app.api.paging import LIMIT_DEFAULT, Cursor, Limit, decode_cursor, encode_cursor
from app.api.registry_schemas import FACET_EXAMPLE, FacetList, FacetResource, facet_view
from app.domain.facet import Facet

router = APIRouter(tags=["facets"])


@router.get(
    "/v1/facets",
    summary="List facets by name",
    response_model=FacetList,
    responses=PROBLEMS(400, 422, 503),
)
async def list_facets(
    request: Request, limit: Limit = LIMIT_DEFAULT, cursor: Cursor = None
) -> FacetList:
    registry = services_of(request).registry
    await registry.refresh()
    facets = registry.facets(tenant_of(request))
    names = sorted(facets)
    start = 0 if cursor is None else bisect_right(names, decode_cursor(cursor)[0])
    page = names[start : start + limit]
    return FacetList(
        facets=[facet_view(facets[name]) for name in page],
        next_cursor=encode_cursor((page[-1],)) if start + limit < len(names) else None,
    )


@router.post(
    "/v1/facets",
    status_code=201,
    summary="Add a facet, or replace it by a new version",
    description="One version has one body. What uses the facet is compiled anew; if that fails, "
    "409 `facet_in_use` names the capabilities and nothing changes.",
    response_model=FacetResource,
    responses={
        200: {"model": FacetResource, "description": "A facet of this name was there before."},
        **PROBLEMS(400, 409, 413, 415, 422, 503),
    },
    openapi_extra=documented_body(Facet, FACET_EXAMPLE),
)
async def put_facet(request: Request, response: Response) -> FacetResource:
    services = services_of(request)
    given = await read_json_model(request, Facet, services.settings.envelope_bytes_max)
    facet, is_new = await services.registry.put_facet(tenant_of(request), given)
    response.status_code = 201 if is_new else 200
    response.headers["Location"] = f"/v1/facets/{facet.name}"
    return facet_view(facet)


@router.get(
    "/v1/facets/{name}",
    summary="One facet",
    response_model=FacetResource,
    responses=PROBLEMS(404, 503),
)
async def get_facet(request: Request, name: str) -> FacetResource:
    return facet_view(await services_of(request).registry.facet(tenant_of(request), name))
