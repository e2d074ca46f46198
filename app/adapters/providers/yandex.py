"""Yandex AI Studio: OpenAI's wire, with the folder that pays in a header.

https://yandex.cloud/en/docs/ai-studio/concepts/openai-compatibility
"""

from __future__ import annotations

from app.adapters.providers.endpoint import Endpoint
from app.adapters.providers.openai import OpenAiProvider


class YandexProvider(OpenAiProvider):
    """One folder of Yandex AI Studio. Implements `Provider`."""

    def __init__(self, endpoint: Endpoint) -> None:
        project = {} if endpoint.project is None else {"OpenAI-Project": endpoint.project}
        super().__init__(endpoint, project)
