"""A request to a model as a run of one node: how it is submitted, awaited and read.

The id of the request is the id of the run, so that journal, workers, take-over and cancelling are
those of runs. What a client sees of a request is a reading of its journal.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from app.api.errors import ProviderFailed, TooSlow
from app.bootstrap import Services
from app.domain.chat import ModelRole
from app.domain.envelope import Envelope, Lane
from app.domain.errors import Conflict, Fault, NotFound, Unavailable, Unprocessable
from app.domain.events import EventType
from app.domain.run import RunStatus
from app.domain.signals import SignalKind
from app.journal.feed import Channel
from app.kit.clock import now_ms
from app.llm.catalog import Catalog
from app.orchestrator.commands import canonical, once_of
from app.orchestrator.resume import StoredRun, event_value, last_event, load_run

NOW_S = 30.0
"""A request that is waited for is given up after this time, by its client and by its run."""

INFER, EMBED = "models.infer", "models.embed"
QUEUE_ROUTE = "POST /v1/requests"
_OBJECTIVES = {INFER: "Ask a model for an answer.", EMBED: "Embed a text."}
_NODE = "call"


@dataclass(frozen=True, slots=True)
class Work:
    """What a model is to do: a capability of the program with its inputs."""

    capability_id: str
    inputs: dict[str, Any] = field(repr=False)

    def envelope(self, lane: Lane, timeout_s: float | None = None) -> Envelope:
        """The run that does it. Prompts stand in its inputs, never in what its events repeat."""
        bindings = {key: {"from": "inputs", "pointer": f"/{key}"} for key in self.inputs}
        node = {"id": _NODE, "capability": self.capability_id, "inputs": bindings}
        return Envelope.model_validate(
            {
                "objective": _OBJECTIVES[self.capability_id],
                "inputs": self.inputs,
                "output_contract": {"mode": "freeform", "instructions": "What the node gives."},
                "goal_graph": {"nodes": [{**node, "timeout_s": timeout_s}]},
                "constraints": {"lane": lane, "deadline_s": timeout_s},
            }
        )


def models_asked(
    catalog: Catalog, role: ModelRole, provider: str | None, model: str | None
) -> list[str]:
    """The models that a client named, best first: one, or those of a provider, the cheapest first.

    Raises `Unprocessable` (`unknown_model`, `unknown_provider`).
    """
    if model is not None:
        found = catalog.models.get(model)
        if found is None or provider not in (None, found.provider):
            raise _unknown("model", "The catalog has no such model.")
        return [model]
    if provider is None:
        return []
    able = [m for m in catalog.models.values() if m.provider == provider and role in m.roles]
    if not able:
        raise _unknown("provider", "The catalog has no such provider with models of this role.")
    return [m.name for m in sorted(able, key=lambda m: (m.cost_tier.rank, m.name))]


def _unknown(what: str, why: str) -> Unprocessable:
    fault = Fault(f"unknown_{what}", why, f"/{what}")
    return Unprocessable(why, code=f"unknown_{what}", faults=[fault])


async def submit(
    services: Services,
    tenant: str,
    envelope: Envelope,
    *,
    key: str | None = None,
    traceparent: str | None = None,
) -> UUID:
    """The run of an envelope, durable; the earlier one when its Idempotency-Key was used before."""
    if services.drain.is_draining:
        raise Unavailable("This process is shutting down.", code="draining")
    commands = services.commands
    once = None if key is None else once_of(QUEUE_ROUTE, key, canonical(envelope))
    if once is not None and (earlier := await commands.replayed(tenant, once)) is not None:
        return earlier
    submission = commands.submit_run(
        tenant,
        envelope,
        envelope.model_dump_json(by_alias=True, exclude_unset=True),
        services.registry.image(tenant),
        once=once,
        traceparent=traceparent,
    )
    return await commands.accepted(submission, tenant, once) or submission.run_id


# --- waiting --------------------------------------------------------------------------------------


async def answer_of(services: Services, tenant: str, run_id: UUID) -> dict[str, Any]:
    """What the run gives, once it has ended.

    Raises `ProviderFailed`, `Unprocessable` (`no_compatible_model`), `Unavailable`
    (`breaker_open`, `draining`) and `TooSlow`. Whatever is raised, nothing of it happens later.
    """
    met_breaker = await _settled(services, run_id)
    stored = await stored_request(services, tenant, run_id)
    if stored.state.status is RunStatus.DONE:
        return await _result(services, stored)
    if stored.state.status.is_terminal:
        raise _problem(stored, await _error(services, stored))
    await _give_up(services, stored)
    if met_breaker:
        raise Unavailable(
            "The providers of all compatible models are not worth calling now.",
            code="breaker_open",
            retry_after_s=_breaker_retry_s(stored),
        )
    if services.drain.is_draining:
        raise Unavailable("This process is shutting down.", code="draining")
    raise _too_slow(stored)


async def _settled(services: Services, run_id: UUID) -> bool:
    """Until the run rests or met an open breaker, at most `NOW_S`; whether it is the breaker."""
    channel = services.feed.enter(run_id, 0)
    services.feed.nudge()
    try:
        async with asyncio.timeout(NOW_S):
            while not (channel.rests or _met_breaker(channel) or services.drain.is_draining):
                await channel.wait()
    except TimeoutError:
        pass
    finally:
        services.feed.leave(channel)
    return _met_breaker(channel)


def _met_breaker(channel: Channel) -> bool:
    """Nothing else blocks the one node of a request, which has no dependencies and is pure."""
    return any(frame.type == EventType.NODE_BLOCKED for frame in channel.frames)


def _breaker_retry_s(stored: StoredRun) -> int:
    """The seconds until the breaker may let a call in; 1 when it did so meanwhile."""
    retry_at = stored.state.nodes[_NODE].retry_at
    return 1 if retry_at is None else max(math.ceil((retry_at - now_ms()) / 1000), 1)


async def _give_up(services: Services, stored: StoredRun) -> None:
    """Nobody waits for the answer any more: do not pay for it."""
    note = {"note": "the client that waited was told that there is no answer now"}
    with contextlib.suppress(Conflict):  # it has ended since
        await services.orders.stop(
            SignalKind.CANCEL, stored.tenant_id, stored.run_id, note, key=None
        )


def _problem(stored: StoredRun, error: dict[str, Any]) -> Exception:
    extra = {"request_id": str(stored.run_id)}
    match error["code"]:
        case "no_compatible_model":
            return Unprocessable(error["message"], code="no_compatible_model", extra=extra)
        case "deadline_exceeded":
            return _too_slow(stored)
    return ProviderFailed(error["message"], code=error["code"], extra=extra)


def _too_slow(stored: StoredRun) -> TooSlow:
    return TooSlow(
        f"There was no answer within {NOW_S:g} s. POST /v1/requests takes what needs longer.",
        extra={"request_id": str(stored.run_id)},
    )


# --- reading --------------------------------------------------------------------------------------


async def stored_request(services: Services, tenant: str, run_id: UUID | None) -> StoredRun:
    """The run of a request. Raises `NotFound`, also for other runs and for a pruned journal."""
    stored = None if run_id is None else await load_run(services.reader, tenant, run_id)
    if stored is None or _capability_of(stored) not in _OBJECTIVES:
        raise NotFound("There is no such request.", code="request_not_found")
    return stored


def _capability_of(stored: StoredRun) -> str | None:
    plan = stored.state.plans.get(1)
    if plan is None or list(plan.nodes) != [_NODE]:
        return None
    return plan.nodes[_NODE].capability_id


async def request_view(services: Services, stored: StoredRun) -> dict[str, Any]:
    """Where the request stands."""
    status = stored.state.status
    view: dict[str, Any] = {"request_id": str(stored.run_id), "status": "pending"}
    if status is RunStatus.DONE:
        view |= {"status": "completed", "result": await _result(services, stored)}
    elif status.is_terminal:
        view |= {"status": "error", "error": await _error(services, stored)}
    return view


async def _result(services: Services, stored: StoredRun) -> dict[str, Any]:
    event = await last_event(services.reader, stored.run_id, stored.state.seq)
    assert event is not None
    result: dict[str, Any] = await event_value(services.reader, stored.run_id, event["data"])
    if _capability_of(stored) == INFER:
        result["tokens_used"] = stored.state.spent.tokens
    return result


async def _error(services: Services, stored: StoredRun) -> dict[str, Any]:
    """Why it ended without a result: what its call met, else what ended the run."""
    if stored.state.status is RunStatus.CANCELLED:
        return {"code": "cancelled", "message": "The request was cancelled."}
    event = await last_event(services.reader, stored.run_id, stored.state.seq)
    assert event is not None
    error = event["data"]["error"]
    node = stored.state.nodes.get(_NODE)
    if error["code"] == "node_failed" and node is not None and node.error is not None:
        error = node.error
    return {"code": error["code"], "message": error["message"]}
