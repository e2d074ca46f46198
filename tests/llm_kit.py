"""A catalog of three models at two providers, and providers that answer by script."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from app.adapters.breakers.local import LocalBreakers
from app.domain.budget import Account
from app.domain.chat import (
    ChatAnswer,
    ChatRequest,
    ChatRole,
    Embeddings,
    LlmUnavailableError,
    Message,
    StopReason,
    Usage,
)
from app.domain.envelope import Budget
from app.domain.events import Event
from app.llm.calls import Asker, ModelCalls, RetryPolicy
from app.llm.catalog import Catalog, load_catalog
from app.llm.gateway import Gateway
from app.ports import Transition

MODELS = """
providers:
  near: {kind: openai, base_url: "http://127.0.0.1:1/v1"}
  far: {kind: openai, base_url: "http://127.0.0.1:2/v1"}
models:
  small:
    provider: near
    ctx_window: 1000
    output_tokens_max: 200
    json_mode: true
    function_calling: false
    cost_tier: low
    prices: {input_usd_per_mtok: "1", output_usd_per_mtok: "2"}
    roles: [chat]
  middle:
    provider: near
    ctx_window: 8000
    output_tokens_max: 1000
    json_mode: true
    function_calling: true
    cost_tier: medium
    prices: {input_usd_per_mtok: "2", output_usd_per_mtok: "4"}
    roles: [chat]
  large:
    provider: far
    ctx_window: 100000
    output_tokens_max: 4000
    json_mode: true
    function_calling: true
    cost_tier: high
    prices: {input_usd_per_mtok: "10", output_usd_per_mtok: "30"}
    roles: [chat, reliable]
"""

VECTOR = Embeddings(((0.5, 0.25),), Usage(7, 0))

Step = ChatAnswer | Exception | Callable[[ChatRequest], ChatAnswer]


def catalog_of(folder: Path, text: str = MODELS) -> Catalog:
    path = folder / "models.yaml"
    path.write_text(text)
    return load_catalog(path, lambda name: None)


def answer(text: str, tokens_in: int = 10, tokens_out: int = 5) -> ChatAnswer:
    return ChatAnswer(text, StopReason.END, Usage(tokens_in, tokens_out))


def busy(retry_after_s: float | None = None) -> LlmUnavailableError:
    return LlmUnavailableError(
        "provider_busy",
        "Provider near answered 429.",
        retryable=True,
        target_failed=True,
        status=429,
        retry_after_s=retry_after_s,
    )


def refused() -> LlmUnavailableError:
    return LlmUnavailableError(
        "provider_refused",
        "Provider near answered 401.",
        retryable=False,
        target_failed=False,
        status=401,
    )


@dataclass
class ScriptedProvider:
    """Answers each request with the next step; the last one stays. With a `gate` it waits there.

    `embedded` are the model and the texts of each embedding, answered by the next of `vectors`.
    """

    steps: list[Step]
    requests: list[ChatRequest] = field(default_factory=list)
    vectors: list[Embeddings | Exception] = field(default_factory=lambda: [VECTOR])
    embedded: list[tuple[str, list[str]]] = field(default_factory=list)
    gate: asyncio.Event | None = None
    called: asyncio.Event = field(default_factory=asyncio.Event)

    async def chat(
        self, request: ChatRequest, on_text: Callable[[str], None] | None = None
    ) -> ChatAnswer:
        self.requests.append(request)
        self.called.set()
        if self.gate is not None:
            await self.gate.wait()
        step = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
        if isinstance(step, Exception):
            raise step
        found = step if isinstance(step, ChatAnswer) else step(request)
        if on_text is not None:
            on_text(found.text)
        return found

    async def embed(self, model: str, texts: Sequence[str], timeout_s: float) -> Embeddings:
        self.embedded.append((model, list(texts)))
        step = self.vectors.pop(0) if len(self.vectors) > 1 else self.vectors[0]
        if isinstance(step, Exception):
            raise step
        return step

    async def models(self, timeout_s: float) -> list[str]:
        return []

    async def aclose(self) -> None:
        return


class Desk:
    """A gateway over scripted providers, and one who asks it; `told` is what was recorded."""

    def __init__(
        self,
        folder: Path,
        near: list[Step],
        far: list[Step] | None = None,
        *,
        threshold: int = 100,
        budget: Budget | None = None,
        deadline_s: float = 30.0,
        models: str = MODELS,
    ) -> None:
        self.near = ScriptedProvider(near)
        self.far = ScriptedProvider(far or [answer("far")])
        self.catalog = catalog_of(folder, models)
        self.breakers = LocalBreakers(
            threshold=threshold, cooldown_s=30, worker_id_of=lambda: "tests"
        )
        providers = {"near": self.near, "far": self.far}
        retries = RetryPolicy(tries=3, backoff_base_ms=1, backoff_max_ms=2)
        calls = ModelCalls(self.catalog, providers, self.breakers, retries)
        self.gateway = Gateway(self.catalog, calls)
        self.account = Account(budget or Budget())
        self.told: list[Event] = []
        self.heard: list[Transition] = []
        self._deadline_s = deadline_s

    def asker(self) -> Asker:
        """Made inside of the loop, whose clock the deadline is of."""
        return Asker(
            tenant_id="default",
            holder="run:1",
            account=self.account,
            deadline=asyncio.get_running_loop().time() + self._deadline_s,
            say=self.told.append,
            heard=self.heard.append,
        )

    def types(self) -> list[str]:
        return [str(event.type) for event in self.told]

    def outcomes(self) -> list[tuple[str, str]]:
        """Model and outcome of every call, in order."""
        return [
            (event.data["model"], event.data["outcome"])
            for event in self.told
            if event.type == "LLM_RESPONSE"
        ]


def user(text: str) -> tuple[Message, ...]:
    return (Message(ChatRole.USER, text),)
