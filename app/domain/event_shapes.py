"""What the `data` of every event type holds: the one place that says it.

The OpenAPI union, the event table in `docs/EVENTS.md` and the tests read these models. The hot path
builds the same data as plain dicts; a test validates every event of real runs against them.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from app.domain.events import BlockReason, EventType, Level, SkipReason
from app.domain.plan import Author, PlanCause, PlanPhase
from app.domain.policy import TriggerKind
from app.domain.run import RunStatus


class EventData(BaseModel):
    """Base of all event data. The first line of each docstring says when the event occurs."""

    model_config = ConfigDict(extra="forbid")


class ErrorData(EventData):
    """A stable code and a sentence for people."""

    code: str
    message: str
    lost_workers: list[str] | None = Field(
        None, description="Of `poison_run`: the workers that were lost while they drove the run."
    )


class FaultData(EventData):
    """One broken rule and where it is."""

    code: str
    pointer: str
    message: str
    facet: str | None = None
    node_id: str | None = None
    capability_id: str | None = None


class ValueRef(EventData):
    """A value over 64 KiB: fetch it from `GET /v1/runs/{id}/nodes/{node_id}/output` or the run."""

    sha256: str
    bytes: int


class ResumedFrom(EventData):
    """A finished run, and how far its journal went."""

    run_id: str
    seq: int


class RunQueuedData(EventData):
    """The run was accepted and is durable."""

    objective: str = Field(description="the first 500 characters")
    lane: str
    label: str | None = None
    resumed_from: ResumedFrom | None = Field(None, description="the run whose results it keeps")
    operator: dict[str, Any] | None = Field(None, description="who resumed the earlier run")
    note: str | None = None


class RunStartData(EventData):
    """A worker drives the run for the first time."""


class RunRecoveredData(EventData):
    """A worker took the run over after a lost lease or a hand-over."""

    epoch: int
    from_worker: str | None = Field(description="who held it; null after an orderly hand-over")
    called_again: list[str] = Field(description="nodes whose attempt is called again")


class PlanRequestedData(EventData):
    """The planner was asked."""

    attempt: int
    phase: PlanPhase
    cause: PlanCause | None = Field(None, description="of a replan")
    policy_id: str | None = Field(None, description="the policy that asks for it")


class PlanRejectedData(EventData):
    """A proposed plan was refused, or none can be made."""

    attempt: int
    phase: PlanPhase
    diagnostics: list[FaultData]
    final: Literal[True] | None = Field(
        None, description="no further try follows; a plan that is in force stays in force"
    )


class PlanNodeData(EventData):
    """A node of a plan, as far as a watcher needs it."""

    id: str
    capability_id: str
    requires: list[str]


class PlanGeneratedData(EventData):
    """A proved plan version is in force."""

    version: int
    author: Author
    node_count: int
    nodes: list[PlanNodeData] | None = Field(None, description="left out over 256 nodes")
    planning_ms: float | None = None
    open_goals: list[str] | None = Field(
        None, description="goals that no node does yet: the next versions plan them"
    )


class PlanUpdatedData(EventData):
    """The plan that was just generated took the place of an earlier one. Lists end at 256 ids."""

    previous_version: int
    version: int
    cause: PlanCause
    policy_id: str | None = None
    kept: list[str] = Field(description="nodes that stay as they are, done ones with their results")
    added: list[str]
    removed: list[str]


class PolicyTriggeredData(EventData):
    """A runtime policy fired; what it does follows."""

    policy_id: str
    trigger: TriggerKind
    action: Literal["replan"]
    rationale: str | None = None


class NodeStartData(EventData):
    """An attempt of a node is about to be called; this intent is durable before the call."""

    capability_id: str
    round: int | None = Field(None, description="from 2 on: the node was ordered anew")


class NodeDoneData(EventData):
    """An attempt ended with a result that fits its contract."""

    output: Any = None
    output_ref: ValueRef | None = None
    duration_ms: float | None = None
    decided_by: dict[str, Any] | None = Field(None, description="the operator who supplied it")


class NodeFailedData(EventData):
    """A node gave up: no attempt is left, or a repetition can not help."""

    error: ErrorData
    duration_ms: float | None = None


class NodeRetryData(EventData):
    """An attempt failed and the node will be tried again, or an operator ordered it anew."""

    delay_ms: int
    error: ErrorData | None = None
    duration_ms: float | None = None
    round: int | None = None


class NodeBlockedData(EventData):
    """A node can not go on, for good or until its breaker closes."""

    reason: BlockReason
    error: ErrorData | None = None
    scope: str | None = Field(None, description="`tool::host` of the open breaker")
    delay_ms: int | None = Field(None, description="when the breaker is asked again")
    operator_prompt: str | None = Field(None, description="what a person is asked for")


class NodeSkippedData(EventData):
    """A node counts as done: its result was kept from the run that this one resumes."""

    reason: SkipReason
    output: Any = None
    output_ref: ValueRef | None = None


class BreakerTrippedData(EventData):
    """Too many failures in a row: calls to this far side are refused. Once per opening."""

    scope: str = Field(description="`tool::host`")
    generation: int
    cooldown_s: float
    degraded: bool = Field(description="only this process's breaker, because Redis is away")


class BreakerHalfOpenData(BreakerTrippedData):
    """The cool-down is over and one call may try. Once per opening."""


class BreakerClosedData(BreakerTrippedData):
    """The far side answers again. Once per opening."""


class ValidationErrorData(EventData):
    """A value broke its contract."""

    scope: str = Field(description="capability_input, capability_output or final_output")
    errors: list[FaultData]


class RunPausedData(EventData):
    """Nothing new starts until a human says so."""

    status: RunStatus
    reason: str = Field(description="unknown_outcome, awaiting_answer, or operator")
    nodes: list[str] = Field(description="that wait for a decision, or that still run")
    signal_id: str | None = None
    operator: dict[str, Any] | None = None
    note: str | None = None


class RunResumedData(EventData):
    """An operator's decisions took effect."""

    signal_id: str
    operator: dict[str, Any] | None
    note: str | None
    nodes: dict[str, str]


class RunDoneData(EventData):
    """The run ended; its output fits its contract."""

    output: Any = None
    output_ref: ValueRef | None = None


class RunFailedData(EventData):
    """The run ended without its output."""

    error: ErrorData
    failed_nodes: list[str]
    unknown_outcomes: list[str] | None = None
    unfinished_nodes: list[str] | None = None


class RunCancelledData(EventData):
    """The run was ended by an operator."""

    signal_id: str
    operator: dict[str, Any] | None
    note: str | None
    unfinished_nodes: list[str]
    unknown_outcomes: list[str] = Field(description="nodes whose effect may have happened")


class RejectedModel(EventData):
    """A model that was looked at before the chosen one, and why it was passed over."""

    model: str
    why: str


class ModelSelectedData(EventData):
    """A model was chosen for a call, or none fits."""

    chosen: str | None
    reason: str
    role: str
    rejected: list[RejectedModel]


class LlmRequestData(EventData):
    """A model is called."""

    provider: str
    model: str
    role: str = Field(description="what it was chosen for")
    prompt_tokens: int = Field(description="projected, before the call")
    call: int = Field(description="1, 2, 3 … of this attempt of the node")


class LlmResponseData(EventData):
    """A call of a model ended, well or not."""

    provider: str
    model: str
    role: str = Field(description="what it was chosen for")
    call: int
    outcome: str = Field(
        description="`ok`, `timeout`, `invalid_json`, `schema_validation_failed`, `refused`, "
        "`cut_off`, or the code of a provider that gave no answer"
    )
    duration_ms: float
    tokens_in: int
    tokens_out: int
    cost_usd: str = Field(description="decimal; 0 for a model without prices")
    is_estimated: bool = Field(description="the provider did not count: tokens are projected")


class ToolCalledData(EventData):
    """A call that a node made itself ended, well or not: a tool that its model asked for, say."""

    capability_id: str
    version: str
    call: int = Field(description="1, 2, 3 … of this attempt of the node")
    outcome: str = Field(
        description="`ok`, `invalid_input`, `breaker_open`, `timeout`, or the code of the failure"
    )
    duration_ms: float = Field(description="0 when it was not called")


class CacheHitData(EventData):
    """The answer of a model was known already; no call is made."""

    cache_key: str
    model: str


class CacheMissData(EventData):
    """No answer is known for this call."""

    cache_key: str
    model: str


class BudgetExhaustedData(EventData):
    """A call was not made because it could have gone over the budget of the run."""

    resource: Literal["usd", "tokens", "calls"]
    limit: str
    spent: str = Field(description="spent, and held for calls that are under way")


class LogData(BaseModel):
    """A capability says something about its work."""

    model_config = ConfigDict(extra="allow")


EVENT_DATA: dict[EventType, type[BaseModel]] = {
    EventType.RUN_QUEUED: RunQueuedData,
    EventType.RUN_START: RunStartData,
    EventType.RUN_RECOVERED: RunRecoveredData,
    EventType.PLAN_REQUESTED: PlanRequestedData,
    EventType.PLAN_REJECTED: PlanRejectedData,
    EventType.PLAN_GENERATED: PlanGeneratedData,
    EventType.PLAN_UPDATED: PlanUpdatedData,
    EventType.POLICY_TRIGGERED: PolicyTriggeredData,
    EventType.NODE_START: NodeStartData,
    EventType.NODE_DONE: NodeDoneData,
    EventType.NODE_FAILED: NodeFailedData,
    EventType.NODE_RETRY: NodeRetryData,
    EventType.NODE_BLOCKED: NodeBlockedData,
    EventType.NODE_SKIPPED: NodeSkippedData,
    EventType.VALIDATION_ERROR: ValidationErrorData,
    EventType.BREAKER_TRIPPED: BreakerTrippedData,
    EventType.BREAKER_HALF_OPEN: BreakerHalfOpenData,
    EventType.BREAKER_CLOSED: BreakerClosedData,
    EventType.RUN_PAUSED: RunPausedData,
    EventType.RUN_RESUMED: RunResumedData,
    EventType.RUN_DONE: RunDoneData,
    EventType.RUN_FAILED: RunFailedData,
    EventType.RUN_CANCELLED: RunCancelledData,
    EventType.MODEL_SELECTED: ModelSelectedData,
    EventType.LLM_REQUEST: LlmRequestData,
    EventType.LLM_RESPONSE: LlmResponseData,
    EventType.TOOL_CALLED: ToolCalledData,
    EventType.CACHE_HIT: CacheHitData,
    EventType.CACHE_MISS: CacheMissData,
    EventType.BUDGET_EXHAUSTED: BudgetExhaustedData,
    EventType.LOG: LogData,
}


class EventShape(BaseModel):
    """What all events have in common."""

    model_config = ConfigDict(extra="forbid")

    seq: int = Field(ge=1)
    run_id: str
    ts: str = Field(description="RFC 3339, UTC, ms")
    level: Level
    node_id: str | None = None
    attempt: int | None = None
    plan_version: int | None = None
    trace_id: str


def event_models() -> dict[EventType, type[BaseModel]]:
    """One model a type: the common fields, its `type` as a constant, and its data."""
    found: dict[EventType, type[BaseModel]] = {}
    for event_type, data in EVENT_DATA.items():
        name = "".join(part.capitalize() for part in event_type.split("_"))
        found[event_type] = create_model(
            name,
            __base__=EventShape,
            __doc__=(data.__doc__ or "").splitlines()[0],
            type=(Literal[event_type.value], ...),  # type: ignore[arg-type]  # made at run time
            data=(data, ...),
        )
    return found
