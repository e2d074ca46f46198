"""The one door for every call of a model: a prompt goes in, a completion or a failure comes out.

    select a model -> cache -> budget -> breaker -> call -> judge -> repair -> next model

A model that gives no answer is followed by the next compatible one. One that answers badly is told
what is wrong, once; if that does not help, a model of the role `reliable` is asked, once. Nothing
else is repeated here: what a single call goes through is in `calls.py`.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from app.domain.budget import BudgetExhausted
from app.domain.chat import (
    ChatAnswer,
    ChatRequest,
    Completion,
    ModelRole,
    Prompt,
    PromptFailed,
)
from app.domain.events import EventType
from app.llm.answers import BadAnswer, repair_of, value_of, without_names
from app.llm.cache import AnswerCache, cache_key
from app.llm.calls import Asker, BreakerOpenError, ModelCalls, ModelRequest
from app.llm.catalog import Catalog, Model
from app.llm.embedding import embed
from app.llm.search import MODELS_MAX, NO_ANSWER, ModelSearch
from app.llm.selector import Need
from app.llm.tokens import texts_of
from app.ports import Embedded, Provider

PLAN_TOKENS_MAX = 16_000
REPAIRED = ("invalid_json", "schema_validation_failed")


class Gateway:
    """One a process, for all tenants. `timeout_s` limits a call whose provider sets no limit."""

    def __init__(
        self,
        catalog: Catalog,
        calls: ModelCalls,
        cache: AnswerCache | None = None,
        *,
        timeout_s: float = 60.0,
    ) -> None:
        self._catalog = catalog
        self._calls = calls
        self._cache = cache
        self._timeout_s = timeout_s
        self._answering = frozenset(
            model.provider
            for model in catalog.models.values()
            if ModelRole.CHAT in model.roles and model.json_mode and not catalog.unavailable(model)
        )
        self._refused_until: dict[str, float] = {}

    @property
    def is_up(self) -> bool:
        """Whether a prompt has a chance now, as far as this process knows. No I/O.

        Some model has to chat in JSON, at a provider whose breaker is not known to be open.
        """
        if not self._refused_until:
            return bool(self._answering)
        now = time.monotonic()
        return any(self._refused_until.get(name, now) <= now for name in self._answering)

    async def complete(self, prompt: Prompt, asker: Asker) -> Completion:
        """What a model makes of the prompt. Raises `PromptFailed`."""
        try:
            return await self._complete(prompt, asker)
        except BudgetExhausted as over:
            raise asker.told_exhausted(over) from None

    async def embed(self, text: str, models: Sequence[str], asker: Asker) -> Embedded:
        """The vector of a text by the first of these models, of any when none is named.

        Raises `PromptFailed`. See `embedding.py`.
        """
        try:
            return await embed(self._catalog, self._calls, self._timeout_s, text, models, asker)
        except BudgetExhausted as over:
            raise asker.told_exhausted(over) from None

    async def _complete(self, prompt: Prompt, asker: Asker) -> Completion:
        search = ModelSearch(self._catalog, Need.of(prompt), asker)
        for _ in range(MODELS_MAX):
            model = search.next()
            if model is None:
                break
            try:
                return await self._ask(model, prompt, asker)
            except NO_ANSWER as error:
                search.gave_none(model, error)
            except BadAnswer as bad:
                if bad.code not in REPAIRED:
                    raise _bad(bad, model, prompt) from None
                return await self._escalate(prompt, bad, model, search, asker)
        raise search.failure()

    async def _escalate(
        self, prompt: Prompt, bad: BadAnswer, first: Model, search: ModelSearch, asker: Asker
    ) -> Completion:
        """Two bad answers of one model: a reliable one is asked, once."""
        search.passed_over[first.name] = bad.code
        model = search.next(ModelRole.RELIABLE)
        if model is None:
            raise _bad(bad, first, prompt)
        try:
            repair = replace(prompt, role=ModelRole.RELIABLE, messages=repair_of(prompt, bad))
            found = await self._once(model, repair, asker)
        except BadAnswer as worse:
            raise _bad(worse, model, prompt) from None
        except NO_ANSWER as error:
            search.gave_none(model, error)
            raise search.failure() from None
        return replace(found, is_escalated=True)

    async def _ask(self, model: Model, prompt: Prompt, asker: Asker) -> Completion:
        """The prompt, and once more with what was wrong with the answer."""
        try:
            return await self._once(model, prompt, asker)
        except BadAnswer as bad:
            if bad.code not in REPAIRED:
                raise
            repair = replace(prompt, messages=repair_of(prompt, bad))
        return await self._once(model, repair, asker)

    async def _once(self, model: Model, prompt: Prompt, asker: Asker) -> Completion:
        """The completion of one request: known already, or called for."""
        request = self._request(model, prompt, asker)
        values: list[Any] = []

        async def make() -> ChatAnswer:
            call = self._call_of(model, prompt, request, asker)
            answer, value = await self._called(call, asker)
            values.append(value)
            return answer

        if self._cache is None:
            answer, is_hit = await make(), False
        else:
            answer, is_hit = await self._fetch(self._cache, model, prompt, request, make, asker)
        return Completion(
            model=model.name,
            text=answer.text,
            value=value_of(prompt, answer) if is_hit else values[-1],
            tool_calls=answer.tool_calls,
            is_cached=is_hit,
        )

    async def _called(self, call: ModelRequest[ChatAnswer], asker: Asker) -> tuple[ChatAnswer, Any]:
        """The reply; what the call tells of the provider's breaker is remembered for `is_up`."""
        provider = call.model.provider
        try:
            found = await self._calls.call(call, asker)
        except BreakerOpenError as refused:
            self._refused_until[provider] = time.monotonic() + refused.retry_after_s
            raise
        self._refused_until.pop(provider, None)
        return found

    async def _fetch(
        self,
        cache: AnswerCache,
        model: Model,
        prompt: Prompt,
        request: ChatRequest,
        make: Callable[[], Awaitable[ChatAnswer]],
        asker: Asker,
    ) -> tuple[ChatAnswer, bool]:
        """The answer through the cache, and whether it was there."""
        key = cache_key(
            request,
            provider=model.provider,
            tenant_id=asker.tenant_id,
            inputs_sha256=prompt.inputs_sha256,
        )
        who = {"cache_key": key, "model": model.name}

        async def miss() -> ChatAnswer:
            asker.tell(EventType.CACHE_MISS, who)
            return await make()

        answer, is_hit = await cache.fetch(key, asker.tenant_id, miss)
        if is_hit:
            asker.tell(EventType.CACHE_HIT, who)
        return answer, is_hit

    def _request(self, model: Model, prompt: Prompt, asker: Asker) -> ChatRequest:
        return ChatRequest(
            model=model.vendor_name,
            messages=prompt.messages,
            timeout_s=self._calls.timeout_s(model, self._timeout_s, asker),
            output_tokens_max=_output_tokens_max(model, prompt),
            temperature=prompt.temperature,
            form=prompt.form,
            schema=prompt.schema,
            tools=prompt.tools,
        )

    def _call_of(
        self, model: Model, prompt: Prompt, request: ChatRequest, asker: Asker
    ) -> ModelRequest[ChatAnswer]:
        counter = self._catalog.counters[model.name]
        return ModelRequest(
            model=model,
            role=prompt.role,
            prompt_tokens=counter(texts_of(prompt.messages, prompt.tools, prompt.schema)),
            output_tokens_max=request.output_tokens_max or model.output_tokens_max,
            timeout_s=request.timeout_s,
            send=lambda provider: _chat(provider, request, asker),
            output_tokens=lambda answer: counter([answer.text]),
            judge=partial(value_of, prompt),
        )


def _output_tokens_max(model: Model, prompt: Prompt) -> int | None:
    """What the prompt says. A plan is no book: all that a model could write, at its price, would
    count against the budget before it has written a word."""
    if prompt.output_tokens_max is None and prompt.role is ModelRole.PLANNING:
        return min(model.output_tokens_max, PLAN_TOKENS_MAX)
    return prompt.output_tokens_max


async def _chat(provider: Provider, request: ChatRequest, asker: Asker) -> ChatAnswer:
    """The answer, streamed where somebody wants to see it grow."""
    async with asker.answers(asker.calls) as on_text:
        return await provider.chat(request, on_text)


def _bad(bad: BadAnswer, model: Model, prompt: Prompt) -> PromptFailed:
    faults = tuple(without_names(fault, prompt.schema) for fault in bad.faults)
    return PromptFailed(
        bad.code, f"The answer of model {model.name} can not be used.", faults=faults
    )
