"""Models over HTTP: the catalog, and which of them a call would get."""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Self

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from app.api.bodies import documented_body, read_json_model
from app.api.deps import Services, services_of
from app.api.errors import PROBLEMS
from app.api.paging import LIMIT_DEFAULT, Cursor, Limit, decode_cursor, encode_cursor
from app.api.runs import json_response
from app.domain.chat import ModelRole
from app.domain.errors import Unprocessable
from app.llm.catalog import Catalog, Model
from app.llm.models_file import CostTier, Prices, ProviderKind
from app.llm.selector import Need, Reason, Rejected, Selection, Why, select
from app.ports import BreakerStatus

router = APIRouter(tags=["models"])

NAMES_MAX = 100

Names = Annotated[list[str], Field(max_length=NAMES_MAX)]


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ModelResource(_Shape):
    """A model of the catalog. `reason` says why it is not available."""

    name: str
    provider: str
    kind: ProviderKind
    vendor_name: str = Field(description="What the provider calls it.")
    ctx_window: int = Field(description="Tokens of prompt and answer together.")
    output_tokens_max: int
    json_mode: bool
    function_calling: bool
    cost_tier: CostTier
    prices: Prices
    roles: list[ModelRole]
    available: bool
    reason: str | None

    @classmethod
    def of(cls, catalog: Catalog, model: Model) -> Self:
        """A model as it is shown: without addresses and headers of its provider."""
        provider = catalog.providers[model.provider]
        return cls(
            **model.model_dump(exclude={"model", "tokenizer"}),
            kind=provider.kind,
            available=not provider.unavailable,
            reason=provider.unavailable or None,
        )


class ModelList(_Shape):
    """A page by name. `next_cursor` is null at the end."""

    models: list[ModelResource]
    next_cursor: str | None


class SelectBody(_Shape):
    """What a call needs of its model. Names are those of the catalog."""

    role: ModelRole = ModelRole.CHAT
    json_mode: bool = False
    function_calling: bool = False
    text: str = Field("", description="All that would be sent; its tokens are counted.")
    output_tokens: int | None = Field(
        None, ge=1, description="The limit of the answer; without one a short answer is assumed."
    )
    preferred: Names = Field(default_factory=list, description="Best first.")
    forbidden: Names = Field(default_factory=list)
    tried: Names = Field(default_factory=list, description="Asked before, in vain.")
    cost_tier_max: CostTier = CostTier.HIGH


class RejectedShape(_Shape):
    """A model that was passed over. `numbers` are those that decided."""

    model: str
    why: str = Field(description=", ".join(f"`{why}`" for why in Why) + ".")
    numbers: dict[str, float]


class SelectionResource(_Shape):
    """The chosen model. `projected_tokens` are those of prompt and answer, and 5 %."""

    chosen: str
    provider: str
    reason: Reason
    prompt_tokens: int
    output_tokens: int
    projected_tokens: int
    cost_usd: str = Field(description="Of the projected call, as a decimal.")
    rejected: list[RejectedShape] = Field(description="Those that were looked at before.")


SELECT_EXAMPLE: dict[str, Any] = {
    "role": "planning",
    "json_mode": True,
    "text": "Plan the release.",
    "output_tokens": 2000,
    "cost_tier_max": "medium",
}


@router.get(
    "/v1/models",
    summary="List the models of the catalog by name",
    response_model=ModelList,
    responses=PROBLEMS(400, 422),
)
async def list_models(
    request: Request, limit: Limit = LIMIT_DEFAULT, cursor: Cursor = None
) -> ModelList:
    catalog = services_of(request).catalog
    after = "" if cursor is None else decode_cursor(cursor)[0]
    rest = (model for name, model in catalog.models.items() if name > after)
    page = list(itertools.islice(rest, limit + 1))
    return ModelList(
        models=[ModelResource.of(catalog, model) for model in page[:limit]],
        next_cursor=encode_cursor((page[limit - 1].name,)) if len(page) > limit else None,
    )


@router.post(
    "/v1/models/select",
    summary="Which model a call would get, and why",
    description="Nothing is called. Providers with an open breaker are passed over, as in a run. "
    "When no model fits it is 422 `no_compatible_model`, with all models in `rejected`.",
    response_model=SelectionResource,
    responses=PROBLEMS(400, 413, 415, 422),
    openapi_extra=documented_body(SelectBody, SELECT_EXAMPLE),
)
async def select_model(request: Request) -> Response:
    services = services_of(request)
    body = await read_json_model(request, SelectBody, services.settings.envelope_bytes_max)
    need = Need(
        role=body.role,
        json_mode=body.json_mode,
        function_calling=body.function_calling,
        texts=(body.text,),
        output_tokens=body.output_tokens,
        preferred=tuple(body.preferred),
        forbidden=frozenset(body.forbidden),
        cost_tier_max=body.cost_tier_max,
    )
    found = select(
        services.catalog,
        need,
        passed_over=dict.fromkeys(body.tried, Why.TRIED),
        open_breakers=await _open_breakers(services),
    )
    return json_response(200, _view(services.catalog, found))


async def _open_breakers(services: Services) -> dict[str, float]:
    """The providers that are not worth calling now, as this process sees their breakers."""
    waits = {
        view.scope: view.retry_after_s
        for view in await services.breakers.views()
        if view.status is BreakerStatus.OPEN and view.retry_after_s > 0
    }
    return {
        name: waits[provider.breaker_scope]
        for name, provider in services.catalog.providers.items()
        if provider.breaker_scope in waits
    }


def _view(catalog: Catalog, found: Selection) -> dict[str, Any]:
    """The choice; raises `Unprocessable` when there is none."""
    rejected = [_rejected(one) for one in found.rejected]
    if found.chosen is None or found.projection is None:
        raise Unprocessable(
            "No model of the catalog can take this call.",
            code="no_compatible_model",
            extra={"rejected": rejected},
        )
    return {
        "chosen": found.chosen,
        "provider": catalog.models[found.chosen].provider,
        "reason": found.reason,
        "prompt_tokens": found.projection.prompt_tokens,
        "output_tokens": found.projection.output_tokens,
        "projected_tokens": found.projection.tokens,
        "cost_usd": format(found.projection.cost_usd, "f"),
        "rejected": rejected,
    }


def _rejected(one: Rejected) -> dict[str, Any]:
    return {"model": one.model, "why": one.why, "numbers": one.numbers}
