"""The catalog of models, the providers that it names, and the way to them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AsyncExitStack

from app.bootstrap.redis import hot_answers
from app.llm.cache import AnswerCache
from app.llm.calls import ModelCalls, RetryPolicy
from app.llm.catalog import Catalog, load_catalog
from app.llm.gateway import Gateway
from app.llm.models_file import ModelsInvalid
from app.ports import Breakers, Provider
from app.settings import Settings, variable
from app.store.database import Database


def open_catalog(settings: Settings) -> Catalog:
    """The catalog of the operator's file, with the variables of this process. Raises
    `ModelsInvalid`."""
    return load_catalog(settings.models_file, variable, is_enabled=settings.models_enabled)


def open_providers(catalog: Catalog) -> dict[str, Provider]:
    """Those that can be called, by name; they connect on their first call, and have to be closed.

    Raises `ModelsInvalid` for an address or a key that HTTP can not carry.
    """
    able = [found for found in catalog.providers.values() if not found.unavailable]
    if not able:
        return {}
    from app.adapters.providers import Endpoint, make_provider  # noqa: PLC0415 - only with models

    try:
        endpoints = [
            Endpoint(p.name, p.kind, p.base_url, p.key, p.headers, p.project, p.api) for p in able
        ]
    except ValueError as error:  # it names the provider and the field, never a value
        raise ModelsInvalid(f"The file of models can not be used: {error}.") from None
    return {endpoint.name: make_provider(endpoint) for endpoint in endpoints}


def open_gateway(
    settings: Settings,
    catalog: Catalog,
    providers: Mapping[str, Provider],
    breakers: Breakers,
    database: Database,
    stack: AsyncExitStack,
) -> Gateway | None:
    """The way to models; None when no provider is configured."""
    if not providers:
        return None
    retries = RetryPolicy(
        settings.max_retries + 1, settings.backoff_base_ms, settings.backoff_max_ms
    )
    calls = ModelCalls(catalog, providers, breakers, retries)
    cache = None
    if settings.llm_cache_days:
        cache = AnswerCache(database, hot_answers(settings, stack))
        stack.push_async_callback(cache.aclose)
    return Gateway(catalog, calls, cache, timeout_s=settings.provider_timeout_s)
