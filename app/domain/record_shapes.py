"""What the records in the log hold: one model for each kind of line, and nothing of it is content.

`docs/RECORDS.md` is made of these models. Records are readings of the journal, so that losing one
loses nothing. Ids, names, codes, numbers and times are in them; prompts, answers, inputs, outputs,
the objective and the texts of errors never are. Event lines spell their fields as the telemetry
they are compared with does, all others are snake_case.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class RecordKind(StrEnum):
    """The `message` of a line."""

    GENERATION = "generation"
    FALLBACK = "fallback_metrics"
    LATENCY = "pipeline_latency"


LlmOutcome = Literal["deterministic_only", "skipped", "success", "fallback", "error"]
"""What became of asking models; see `FallbackRecord`."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EventLine(_Record):
    """An event is durable: one line for each event, a moment later. `message` is its type.

    All fields are in every line, null where they do not apply.
    """

    eventTs: str = Field(description="when it happened: RFC 3339, UTC, ms")
    seq: int = Field(ge=1, description="1, 2, 3 … within the run")
    eventType: str = Field(description="as in EVENTS.md")
    runId: str
    planVersion: int | None = Field(description="the plan version in force")
    nodeId: str | None
    capabilityId: str | None = Field(description="of the node, once it has started")
    facetProvenance: dict[str, list[str]] | None = Field(
        description="the facets that the capability reads and makes: `input`, `output`"
    )
    attempt: int | None
    status: str | None = Field(
        description="what the run or the node is from now on; of a call of a model or "
        "a tool its outcome"
    )
    durationMs: float | None = Field(ge=0, description="of a node, a call, or planning")
    errorCode: str | None


class _OfRun(_Record):
    timestamp: str = Field(description="when it happened: RFC 3339, UTC, ms")
    command_id: str = Field(description="the id of the run: a command is a run")
    trace_id: str = Field(description="32 hex digits, as in the spans of the run")


class GenerationRecord(_OfRun):
    """A call of a model ended, well or not: exactly one for each call of every provider.

    A try, a repair and an escalation are calls of their own. An answer from the cache is none. The
    record is written when the run ends or pauses next.
    """

    node_id: str | None = Field(description="null for a call of the planner")
    attempt: int | None = Field(description="of the node")
    call: int = Field(ge=1, description="1, 2, 3 … of this attempt, or of this planning")
    provider: str
    model_id: str
    role: str = Field(description="what the model was chosen for")
    outcome: str = Field(
        description="`ok`, or why there is no usable answer, as in LLM_RESPONSE; `unfinished` for "
        "a call that was cut off: by the end of its attempt, or with its process"
    )
    refusal: bool = Field(description="the model would not answer")
    latency_ms: float = Field(ge=0)
    tokens_in: int | None = Field(ge=0, description="null when it was cut off: nobody knows")
    tokens_out: int | None = Field(ge=0, description="as tokens_in")
    cost_usd: str | None = Field(description="decimal, by the prices of the catalog; null as above")
    is_estimated: bool = Field(description="the provider did not count: tokens are projected")


class FallbackRecord(_OfRun):
    """A run ended: who gave what models were asked for. Exactly one for each run.

    `success`: for everything that was asked, the model that was chosen first, or its answer in the
    cache. `fallback`: for something another path did, the next model, a reliable one, or the
    assembler in place of a plan by a model. `error`: for something nobody did. `skipped`: models
    are configured, and the run asked none. `deterministic_only`: none is configured. Of several
    the worst counts.
    """

    intent: str | None = Field(description="`metadata.label` of the envelope: a name, not a text")
    decision_action: str | None = Field(
        description="who made the last plan: `caller`, `assembler`, `llm` …; null without a plan"
    )
    status: Literal["done", "failed", "cancelled"] = Field(description="how the run ended")
    llm_outcome: LlmOutcome
    fallback_reason: str | None = Field(
        description="of `fallback` and `error`, for the first component that is so: an outcome of "
        "LLM_RESPONSE, a code of PLAN_REJECTED, why a model was passed over (`overflow`, "
        "`breaker_open` …), `budget_exhausted`, `no_compatible_model`"
    )
    deterministic_used: bool = Field(
        description="no model was asked, or a plan was made without the model that was asked for it"
    )
    llm_latency_ms: float | None = Field(
        ge=0, description="of all calls together, also of those side by side; null without a call"
    )
    components: dict[str, Literal["success", "fallback", "error"]] = Field(
        description="who asked models: `planner`, and `node:` with the id of each node"
    )


class LatencyRecord(_OfRun):
    """A run ended: where its time went. Exactly one for each run.

    The same as `timings` in the run resource, which has the nodes besides.
    """

    total_ms: float = Field(ge=0, description="from acceptance to the last event")
    steps: dict[Literal["queue_ms", "planning_ms", "execution_ms", "paused_ms"], float] = Field(
        description="`queue_ms`, `planning_ms`, `execution_ms`, `paused_ms`: together the total; "
        "without FLEXRUN_LATENCY_RECORD planning is part of execution"
    )
    llm_enabled: bool = Field(description="models are configured where the run ended")


RECORDS: dict[RecordKind, type[_OfRun]] = {
    RecordKind.GENERATION: GenerationRecord,
    RecordKind.FALLBACK: FallbackRecord,
    RecordKind.LATENCY: LatencyRecord,
}
