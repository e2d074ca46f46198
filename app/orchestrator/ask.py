"""What a call under way asks of models, on behalf of its run: the way from `Call.complete` and
`Call.embed` to the gateway. What the gateway has to tell goes to the run's loop at once, and into
its next append.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from decimal import Decimal
from functools import partial

from app.domain.chat import Completion, Prompt
from app.domain.events import Event, EventType
from app.journal.deltas import Deltas
from app.kit.metrics import Metrics
from app.llm.calls import Asker
from app.llm.gateway import Gateway
from app.orchestrator.run import DrivenRun, Said
from app.ports import Embedded, Transition


class Asking:
    """One attempt of a node, as models are asked for it. `timeout_s` is what it has from now on.
    Answers go to `deltas` while they are made.

    Made for every call, and most call no model: who asks is made at the first question.
    """

    __slots__ = ("_asker", "_attempt", "_deadline", "_deltas", "_gateway", "_node_id", "_run")

    def __init__(
        self,
        gateway: Gateway,
        deltas: Deltas,
        run: DrivenRun,
        node_id: str,
        attempt: int,
        timeout_s: float,
    ) -> None:
        self._gateway = gateway
        self._deltas = deltas
        self._run = run
        self._node_id = node_id
        self._attempt = attempt
        self._deadline = asyncio.get_running_loop().time() + timeout_s
        self._asker: Asker | None = None

    async def complete(self, prompt: Prompt) -> Completion:
        """Raises `PromptFailed`."""
        return await self._gateway.complete(prompt, self._who())

    async def embed(self, text: str, models: Sequence[str] = ()) -> Embedded:
        """Raises `PromptFailed`."""
        return await self._gateway.embed(text, models, self._who())

    def _who(self) -> Asker:
        if self._asker is None:
            self._asker = asker_of(self._run, self._node_id, self._attempt, self._deadline)
            self._asker.answers = partial(
                self._deltas.answer, self._run.handle, self._node_id, self._attempt
            )
        return self._asker


def asker_of(run: DrivenRun, node_id: str | None, attempt: int | None, deadline: float) -> Asker:
    """Who asks for a run: an attempt of a node, or its planner. `deadline` in the loop's time."""

    def say(event: Event) -> None:
        event.node_id, event.attempt = node_id, attempt
        run.inbox.put(Said((event,)))

    def heard(transition: Transition) -> None:
        run.inbox.put(Said(transitions=(transition,)))

    return Asker(
        tenant_id=run.tenant_id,
        holder=f"{run.handle.text_id}:{run.handle.epoch}",
        account=run.budget(),
        deadline=deadline,
        say=say,
        heard=heard,
    )


def count_models(said: Said, metrics: Metrics) -> None:
    """Add what a call tells of models and tools to what this process counts."""
    for event in said.events:
        data = event.data
        if event.type is EventType.MODEL_SELECTED:
            metrics.model_selections[data["reason"]] += 1
        elif event.type is EventType.LLM_RESPONSE:
            provider = data["provider"]
            metrics.llm_calls[provider, data["outcome"]] += 1
            metrics.llm_tokens[provider, "in"] += data["tokens_in"]
            metrics.llm_tokens[provider, "out"] += data["tokens_out"]
            metrics.llm_cost_usd[provider] += Decimal(data["cost_usd"])
            metrics.llm_durations.observe(provider, data["duration_ms"] / 1000)
        elif event.type is EventType.TOOL_CALLED and data["duration_ms"] > 0:
            metrics.calls.observe(data["capability_id"], data["duration_ms"] / 1000)
