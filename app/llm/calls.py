"""One call of one model, with all that surrounds it: budget, breaker, time limit, retries, records.

The order is always the same: hold what the call can cost at most, ask the breaker, call, judge the
answer, tell the breaker, settle, record. Every try counts once for the breaker and once in the
journal. Retries are made here and nowhere else; another model is the gateway's to choose.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from app.domain.budget import Account, BudgetExhausted, Spent
from app.domain.chat import (
    ChatAnswer,
    Embeddings,
    LlmUnavailableError,
    ModelRole,
    PromptFailed,
    Usage,
)
from app.domain.events import Event, EventType, Level
from app.kit.background import Background
from app.llm.answers import BadAnswer
from app.llm.catalog import Catalog, Model
from app.ports import Breakers, Permit, Provider, Refused, Transition

Reply = TypeVar("Reply", ChatAnswer, Embeddings)
OnText = Callable[[str], None]


def _unheard(call: int) -> AbstractAsyncContextManager[OnText | None]:
    return nullcontext()


@dataclass(slots=True)
class Asker:
    """On whose behalf models are called: an attempt of a node, or a client of the API.

    `holder` says who announces what the calls do to breakers: `run_id:epoch`. `deadline` is a time
    of the event loop. `say` takes the records of the calls, `heard` the changes of breakers.
    `answers` gives, for a call by its number, where the pieces of its answer go while they come;
    None where nobody wants them.
    """

    tenant_id: str
    holder: str
    account: Account
    deadline: float
    say: Callable[[Event], None]
    heard: Callable[[Transition], None]
    answers: Callable[[int], AbstractAsyncContextManager[OnText | None]] = _unheard
    calls: int = field(default=0, init=False)

    def tell(self, event_type: EventType, data: dict[str, Any], level: Level = Level.INFO) -> None:
        self.say(Event(event_type, data, level=level))

    def told_exhausted(self, over: BudgetExhausted) -> PromptFailed:
        """Tell that a call did not fit the budget; what its caller is to be told."""
        data = {"resource": over.resource, "limit": str(over.limit), "spent": str(over.spent)}
        self.tell(EventType.BUDGET_EXHAUSTED, data, Level.ERROR)
        return PromptFailed("budget_exhausted", str(over))

    @property
    def left_s(self) -> float:
        return self.deadline - asyncio.get_running_loop().time()


@dataclass(frozen=True, slots=True)
class ModelRequest(Generic[Reply]):
    """One request to one model, and how its reply is read.

    `role` is what the model was chosen for. `prompt_tokens` are projected; `output_tokens_max` are
    all that the reply can have. `output_tokens` counts those of a reply whose provider does not.
    `judge` gives the value of a reply, or raises `BadAnswer`.
    """

    model: Model
    role: ModelRole
    prompt_tokens: int
    output_tokens_max: int
    timeout_s: float
    send: Callable[[Provider], Awaitable[Reply]]
    output_tokens: Callable[[Reply], int]
    judge: Callable[[Reply], Any]


class BreakerOpenError(Exception):
    """The provider is not worth calling now."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__("breaker_open")
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """`tries` of one model; full jitter between them (Brooker, AWS, 2015), times in ms."""

    tries: int = 3
    backoff_base_ms: int = 200
    backoff_max_ms: int = 30_000

    def delay_s(self, failed: int, retry_after_s: float | None) -> float:
        """How long to wait behind so many failures, and what the far side asks for on top."""
        ceiling = min(self.backoff_base_ms * 2 ** (failed - 1), self.backoff_max_ms)
        return random.uniform(0, ceiling) / 1000 + (retry_after_s or 0.0)


class ModelCalls:
    """Makes the calls. One a process; `providers` by their names in the catalog."""

    def __init__(
        self,
        catalog: Catalog,
        providers: Mapping[str, Provider],
        breakers: Breakers,
        retries: RetryPolicy,
    ) -> None:
        self._catalog = catalog
        self._providers = providers
        self._breakers = breakers
        self._retries = retries
        self._reports = Background()

    def timeout_s(self, model: Model, default_s: float, asker: Asker) -> float:
        """How long a call of this model may take, within the time that its asker has."""
        limit_s = self._catalog.providers[model.provider].timeout_s or default_s
        return max(min(limit_s, asker.left_s), 0.0)

    async def call(self, request: ModelRequest[Reply], asker: Asker) -> tuple[Reply, Any]:
        """The reply and its value.

        Raises `BadAnswer`, `BreakerOpenError`, `BudgetExhausted`, and what the last try met:
        `TimeoutError` or `LlmUnavailableError`.
        """
        failed = 0
        while True:
            try:
                return await self._try(request, asker)
            except (TimeoutError, LlmUnavailableError) as error:
                failed += 1
                is_final = isinstance(error, LlmUnavailableError) and not error.retryable
                delay_s = self._retries.delay_s(failed, getattr(error, "retry_after_s", None))
                if is_final or failed >= self._retries.tries or delay_s >= asker.left_s:
                    raise
            await asyncio.sleep(delay_s)

    async def _try(self, request: ModelRequest[Reply], asker: Asker) -> tuple[Reply, Any]:
        prices = request.model.prices
        most = Usage(request.prompt_tokens, request.output_tokens_max)
        held = asker.account.hold(most.tokens_in + most.tokens_out, prices.cost_usd(most))
        cost = Spent()
        try:
            record, reply = await self._send(request, asker)
            is_estimated = reply.usage is None
            usage = reply.usage or Usage(request.prompt_tokens, request.output_tokens(reply))
            cost = Spent(prices.cost_usd(usage), usage.tokens_in + usage.tokens_out, 1)
            try:
                value = request.judge(reply)
            except BadAnswer as bad:
                record.ended(bad.code, usage, cost, is_estimated=is_estimated)
                raise
            record.ended("ok", usage, cost, is_estimated=is_estimated)
            return reply, value
        except (TimeoutError, LlmUnavailableError):
            cost = Spent(calls=1)  # as whoever takes the run over folds it from the record
            raise
        finally:
            asker.account.settle(held, cost)

    async def _send(self, request: ModelRequest[Reply], asker: Asker) -> tuple[_Record, Reply]:
        """The call itself, as the provider's breaker permits it."""
        provider = request.model.provider
        scope = self._catalog.providers[provider].breaker_scope
        permit = await self._breakers.allow(scope, asker.holder, request.timeout_s)
        if isinstance(permit, Refused):
            raise BreakerOpenError(permit.retry_after_s)
        record = _Record(request.model, request.role, asker)
        record.started(request.prompt_tokens)
        try:
            reply = await request.send(self._providers[provider])
        except (TimeoutError, LlmUnavailableError) as error:
            blamed = isinstance(error, TimeoutError) or error.target_failed
            await self._report(permit, not blamed, asker)
            record.ended(code_of(error), Usage(0, 0), Spent(), is_estimated=False)
            raise
        except BaseException:
            # Cut off, or a fault of ours: no verdict, but a probe must be given back.
            self._reports.run(self._breakers.report(permit, None, asker.holder))
            raise
        await self._report(permit, True, asker)
        return record, reply

    async def _report(self, permit: Permit, ok: bool, asker: Asker) -> None:
        reported = await self._breakers.report(permit, ok, asker.holder)
        for transition in (permit.transition, reported):
            if transition is not None:
                asker.heard(transition)


def code_of(error: TimeoutError | LlmUnavailableError) -> str:
    return "timeout" if isinstance(error, TimeoutError) else error.code


class _Record:
    """LLM_REQUEST and LLM_RESPONSE of one call."""

    def __init__(self, model: Model, role: ModelRole, asker: Asker) -> None:
        asker.calls += 1
        self._asker = asker
        self._who = {
            "provider": model.provider,
            "model": model.name,
            "role": role.value,
            "call": asker.calls,
        }
        self._started = time.perf_counter()

    def started(self, prompt_tokens: int) -> None:
        self._asker.tell(EventType.LLM_REQUEST, {**self._who, "prompt_tokens": prompt_tokens})

    def ended(self, outcome: str, usage: Usage, cost: Spent, *, is_estimated: bool) -> None:
        data = {
            **self._who,
            "outcome": outcome,
            "duration_ms": round((time.perf_counter() - self._started) * 1000, 3),
            "tokens_in": usage.tokens_in,
            "tokens_out": usage.tokens_out,
            "cost_usd": format(cost.usd, "f"),
            "is_estimated": is_estimated,
        }
        level = Level.INFO if outcome == "ok" else Level.WARN
        self._asker.tell(EventType.LLM_RESPONSE, data, level)
