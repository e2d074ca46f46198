"""The contract compiler over HTTP."""

from __future__ import annotations

from fastapi import APIRouter, Request

from app.api.bodies import documented_body, read_json_model
from app.api.deps import services_of, tenant_of
from app.api.errors import PROBLEMS
from app.api.registry_schemas import (
    COMPILE_EXAMPLE,
    CompileBody,
    CompiledContracts,
    contract_view,
)

router = APIRouter(tags=["contracts"])


@router.post(
    "/v1/contracts/compile",
    summary="Compile contracts without registering anything",
    response_model=CompiledContracts,
    responses=PROBLEMS(400, 413, 415, 422, 503),
    openapi_extra=documented_body(CompileBody, COMPILE_EXAMPLE),
)
async def compile_contracts(request: Request) -> CompiledContracts:
    services, tenant = services_of(request), tenant_of(request)
    body = await read_json_model(request, CompileBody, services.settings.envelope_bytes_max)
    await services.registry.refresh()
    compiled = services.registry.compile(tenant, body.input_contract, body.output_contract)
    facets = services.registry.facets(tenant)
    return CompiledContracts(
        input=contract_view(compiled[0], facets), output=contract_view(compiled[1], facets)
    )
