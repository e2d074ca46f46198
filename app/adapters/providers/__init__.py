"""Providers of models, one file a vendor, all on one kind of exchange (`exchange.py`).

Only `bootstrap/` may import this. The contract is `Provider` in `app/ports`; what the vendors
have in common is in `wire.py`, and what an exchange means that gave no answer in `failures.py`.
"""

from __future__ import annotations

from collections.abc import Callable

from app.adapters.providers.anthropic import AnthropicProvider
from app.adapters.providers.endpoint import Endpoint, OpenAiApi, ProviderKind
from app.adapters.providers.ollama import OllamaProvider
from app.adapters.providers.openai import OpenAiProvider
from app.adapters.providers.yandex import YandexProvider
from app.ports import Provider

__all__ = ["Endpoint", "OpenAiApi", "ProviderKind", "make_provider"]

_PROVIDERS: dict[ProviderKind, Callable[[Endpoint], Provider]] = {
    "openai": OpenAiProvider,
    "anthropic": AnthropicProvider,
    "ollama": OllamaProvider,
    "yandex": YandexProvider,
}


def make_provider(endpoint: Endpoint) -> Provider:
    """The provider of this endpoint. It connects on the first call, in one event loop only."""
    return _PROVIDERS[endpoint.kind](endpoint)
