"""Shapes of runs in OpenAPI. Responses are built as plain JSON; a test holds them against these."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.domain.run import NodeStatus, RunStatus


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorShape(BaseModel):
    """A stable code and a sentence for people."""

    code: str
    message: str


class NodeShape(_Shape):
    """A node of a run. `reason` says why it is blocked, `error` what its last attempt met."""

    node_id: str
    status: NodeStatus
    capability_id: str
    attempt: int
    duration_ms: float | None
    reason: str | None = None
    error: ErrorShape | None = None


class Timings(_Shape):
    """The latency record in ms; null where the run is not that far."""

    total_ms: float | None
    queue_ms: float | None
    planning_ms: float | None
    paused_ms: float
    nodes: dict[str, float]


class RunMetadata(_Shape):
    label: str | None
    correlation_id: str | None


class ResumedFrom(_Shape):
    """The finished run whose results a run keeps, and how far its journal went."""

    run_id: str
    seq: int


class RunResource(_Shape):
    """A run: where it stands, what it produced."""

    run_id: str
    status: RunStatus
    objective: str
    plan_version: int | None
    last_seq: int
    nodes: list[NodeShape]
    output: Any | None
    error: ErrorShape | None
    timings: Timings | None
    metadata: RunMetadata
    resumed_from: ResumedFrom | None
    created_at: str
    finished_at: str | None
    links: dict[str, str]


class RunSummary(_Shape):
    run_id: str
    status: RunStatus
    objective: str
    label: str | None
    correlation_id: str | None
    lane: str
    last_seq: int
    created_at: str
    links: dict[str, str]


class RunList(_Shape):
    """A page of runs. `next_cursor` goes into `?cursor=`; null on the last page."""

    runs: list[RunSummary]
    next_cursor: str | None


class NodeOutput(_Shape):
    run_id: str
    node_id: str
    output: Any


class EventPage(_Shape):
    """A page of events. `next_after` goes into `?after=`."""

    events: list[dict[str, Any]]
    next_after: int


class Operator(_Shape):
    """Who gave an order, for the audit trail."""

    id: str = Field(min_length=1, max_length=200)
    display_name: str | None = Field(default=None, max_length=200)
    email: str | None = Field(default=None, max_length=320)


class NodeAnswer(_Shape):
    """What became of a node whose outcome is unknown: `done` needs its `output`."""

    decision: Literal["done", "retry", "fail"]
    output: Any = None


class DeltaFrame(_Shape):
    """The `data:` of `event: delta`: a piece of what an attempt of a node says while it runs.

    Pieces with the same node, attempt and call are one text, numbered from 1; 1 begins it anew. A
    number that is missing was dropped. `call` is that of LLM_REQUEST, missing where the capability
    speaks itself.
    """

    run_id: str
    node_id: str
    attempt: int = Field(ge=1)
    call: int | None = Field(default=None, ge=1)
    piece: int = Field(ge=1)
    text: str


class OrderBody(_Shape):
    """Who orders it and why; with `expected_plan_version` only if the plan is still that one."""

    expected_plan_version: int | None = Field(default=None, ge=1)
    operator: Operator | None = None
    note: str | None = Field(default=None, max_length=4_000)


class ResumeBody(OrderBody):
    """Decisions for every node that waits, and who made them."""

    nodes: dict[str, NodeAnswer] = Field(default_factory=dict, max_length=2_000)


class OrderAccepted(_Shape):
    """A signal for the run; or the new run that goes on where a finished one stopped."""

    run_id: str
    signal_id: str | None
    resumed_from: ResumedFrom | None = None


class DebugView(_Shape):
    """Everything about a run that the journal and the head say."""

    run: RunResource
    lease: dict[str, Any]
    snapshot: dict[str, Any] | None
    completed_nodes: list[str]
    pending_nodes: list[str]
    attempts: dict[str, Any]
    plans: list[dict[str, Any]]
    signals: list[dict[str, Any]]
    envelope: dict[str, Any] | None
    trace_id: str
