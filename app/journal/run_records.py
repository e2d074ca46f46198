"""The records of a run, made of its events: pure, the same in every process that reads the journal.

Who asks models is a component: the planner, or a node. `docs/RECORDS.md` tells what the records
mean; their shapes are in `domain/record_shapes.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from app.domain.events import TERMINAL_EVENTS, Event, EventType
from app.domain.record_shapes import (
    FallbackRecord,
    GenerationRecord,
    LatencyRecord,
    RecordKind,
)
from app.kit.rfc3339 import rfc3339

PLANNER = "planner"
UNFINISHED = "unfinished"
_NOT_NOW = ("overflow", "output_overflow", "breaker_open")
"""Why a model is passed over that fits calls of this kind; anything else is told if none is so."""

Status = Literal["success", "fallback", "error"]
_BY_TROUBLE: tuple[Status, ...] = ("success", "fallback", "error")

Record = GenerationRecord | FallbackRecord | LatencyRecord


def records_of(
    run_id: str, trace_id: str, events: Iterable[Event], told_seq: int, *, has_models: bool
) -> list[tuple[RecordKind, Record]]:
    """What happened behind `told_seq` as records; `events` are those of `READ` from the first on.

    `has_models`: whether models are configured.
    """
    reading = _Reading(run_id, trace_id, told_seq, has_models)
    for event in events:
        if isinstance(event.type, EventType) and (read := _READ.get(event.type)) is not None:
            read(reading, event)
    return reading.found


@dataclass(slots=True)
class _Component:
    """How far one who asks models has come. `missed`: who gave no answer, and what came instead."""

    attempt: int | None
    status: Status = "error"
    reason: str | None = UNFINISHED
    missed: tuple[str, str] | None = None
    way: str | None = None  # why another than the first model is asked
    is_asked: bool = True  # since the planner last said that a plan is wanted

    def selected(self, data: dict[str, Any]) -> None:
        self.is_asked = True
        chosen, passed_over = data["chosen"], [found["why"] for found in data["rejected"]]
        if chosen is None:
            why = "breaker_open" if "breaker_open" in passed_over else data["reason"]
            self._fails(why if self.missed is None else self.missed[1])
        elif self.missed is not None and self.missed[0] != chosen:
            self.way = self.missed[1]
        elif data["reason"] == "fallback":
            why_not = [why for why in passed_over if why in _NOT_NOW] or passed_over
            self.way = why_not[0] if why_not else data["reason"]

    def ended(self, model: str, outcome: str) -> None:
        """A call of this model ended, or its answer was known."""
        if outcome == "ok":
            self.missed = None
            self.status, self.reason = ("fallback", self.way) if self.way else ("success", None)
        else:
            self.missed = (model, outcome)
            self._fails(outcome)

    def refused(self, why: str) -> None:
        """What the model answered is of no use, or none may be asked."""
        if self.status != "error" or self.reason == UNFINISHED:
            self._fails(why)

    def begins_anew(self) -> None:
        """The same is wanted once more; what is known so far stands until somebody is asked."""
        self.is_asked, self.missed, self.way = False, None, None

    def replaced(self) -> None:
        """What was asked for came without a model."""
        self.status = "fallback"

    def _fails(self, why: str) -> None:
        self.status, self.reason = "error", why


@dataclass(slots=True)
class _Reading:
    """A fold over the events of one run."""

    run_id: str
    trace_id: str
    told_seq: int
    has_models: bool
    found: list[tuple[RecordKind, Record]] = field(default_factory=list)
    _components: dict[str, _Component] = field(default_factory=dict)
    _plans_before: list[_Component] = field(default_factory=list)
    _is_replaced: bool = False
    _calls: dict[tuple[str | None, int], Event] = field(default_factory=dict)
    _llm_ms: float | None = None
    _intent: str | None = None
    _author: str | None = None
    _queued_at: int = 0
    _started_at: int | None = None
    _planning_ms: float = 0.0
    _paused_at: int | None = None
    _paused_ms: int = 0

    def _tell(self, kind: RecordKind, record: Record, event: Event) -> None:
        if event.seq > self.told_seq:
            self.found.append((kind, record))

    def _of_run(self, event: Event) -> dict[str, str]:
        return {
            "timestamp": rfc3339(event.ts),
            "command_id": self.run_id,
            "trace_id": self.trace_id,
        }

    # --- the run ----------------------------------------------------------------------------------

    def queued(self, event: Event) -> None:
        self._queued_at = event.ts
        self._intent = event.data.get("label")

    def started(self, event: Event) -> None:
        self._started_at = event.ts

    def paused(self, event: Event) -> None:
        self._paused_at = event.ts

    def resumed(self, event: Event) -> None:
        if self._paused_at is not None:
            self._paused_ms += event.ts - self._paused_at
            self._paused_at = None

    def ended(self, event: Event) -> None:
        """The last event: what is still open ends with it."""
        for key in list(self._calls):
            self._cut_off(key, event)
        self.resumed(event)
        self._tell(RecordKind.FALLBACK, self._fallback(event), event)
        self._tell(RecordKind.LATENCY, self._latency(event), event)

    def _fallback(self, event: Event) -> FallbackRecord:
        named = [(f"node:{name}", c) for name, c in self._components.items() if name != PLANNER]
        plans = [*self._plans_before]
        if PLANNER in self._components:
            plans.append(self._components[PLANNER])
        if plans:
            named.insert(0, (PLANNER, _worst(plans)))
        worst = _worst([c for _, c in named]) if named else None
        unasked = "skipped" if self.has_models else "deterministic_only"
        return FallbackRecord.model_validate(
            {
                **self._of_run(event),
                "intent": self._intent,
                "decision_action": self._author,
                "status": str(event.type).removeprefix("RUN_").lower(),
                "llm_outcome": unasked if worst is None else worst.status,
                "fallback_reason": None if worst is None else worst.reason,
                "deterministic_used": worst is None or self._is_replaced,
                "llm_latency_ms": self._llm_ms,
                "components": {name: component.status for name, component in named},
            }
        )

    def _latency(self, event: Event) -> LatencyRecord:
        """Each step has what the ones before it left: times of events are whole ms, others not."""
        total = max(event.ts - self._queued_at, 0)
        left = float(total)
        started_at = event.ts if self._started_at is None else self._started_at
        steps: dict[str, float] = {}
        for name, took in (
            ("queue_ms", started_at - self._queued_at),
            ("paused_ms", self._paused_ms),
            ("planning_ms", self._planning_ms),
        ):
            steps[name] = round(min(max(took, 0), left), 3)
            left = max(round(left - steps[name], 3), 0)
        return LatencyRecord.model_validate(
            {
                **self._of_run(event),
                "total_ms": total,
                "steps": {**steps, "execution_ms": left},
                "llm_enabled": self.has_models,
            }
        )

    # --- who asks ---------------------------------------------------------------------------------

    def plan_wanted(self, _event: Event) -> None:
        if (planner := self._components.get(PLANNER)) is not None:
            planner.begins_anew()

    def plan_refused(self, event: Event) -> None:
        if (planner := self._components.get(PLANNER)) is not None:
            found = event.data["diagnostics"]
            planner.refused(found[0]["code"] if found else "rejected")

    def planned(self, event: Event) -> None:
        """A plan is there, by the model or without it; the next one is asked for anew."""
        self._author = event.data["author"]
        self._planning_ms += event.data.get("planning_ms") or 0.0
        planner = self._components.pop(PLANNER, None)
        if planner is not None:
            if not planner.is_asked:
                planner.replaced()
                self._is_replaced = True
            self._plans_before.append(planner)

    def selected(self, event: Event) -> None:
        name = PLANNER if event.node_id is None else event.node_id
        component = self._components.get(name)
        if component is None or component.attempt != event.attempt:
            component = self._components[name] = _Component(event.attempt)
        component.selected(event.data)

    def known(self, event: Event) -> None:
        if (component := self._component_of(event)) is not None:
            component.ended(event.data["model"], "ok")

    def over_budget(self, event: Event) -> None:
        if (component := self._component_of(event)) is not None:
            component.refused("budget_exhausted")

    def node_ended(self, event: Event) -> None:
        for key in [key for key in self._calls if key[0] == event.node_id]:
            self._cut_off(key, event)

    def _component_of(self, event: Event) -> _Component | None:
        return self._components.get(PLANNER if event.node_id is None else event.node_id)

    # --- calls ------------------------------------------------------------------------------------

    def called(self, event: Event) -> None:
        key = (event.node_id, event.data["call"])
        # After a take-over the same call number may come again: the first one was cut off.
        self._cut_off(key, event)
        self._calls[key] = event

    def answered(self, event: Event) -> None:
        data = event.data
        self._calls.pop((event.node_id, data["call"]), None)
        self._llm_ms = (self._llm_ms or 0.0) + data["duration_ms"]
        if (component := self._component_of(event)) is not None:
            component.ended(data["model"], data["outcome"])
        self._generation(event, event, data)

    def _cut_off(self, key: tuple[str | None, int], by: Event) -> None:
        request = self._calls.pop(key, None)
        if request is None:
            return
        took = float(max(by.ts - request.ts, 0))
        self._llm_ms = (self._llm_ms or 0.0) + took
        if (component := self._component_of(request)) is not None:
            component.ended(request.data["model"], UNFINISHED)
        unknown = {"tokens_in": None, "tokens_out": None, "cost_usd": None, "is_estimated": False}
        ended = {**request.data, **unknown, "outcome": UNFINISHED, "duration_ms": took}
        self._generation(request, by, ended)

    def _generation(self, asked: Event, ended: Event, data: dict[str, Any]) -> None:
        record = GenerationRecord(
            **self._of_run(ended),
            node_id=asked.node_id,
            attempt=asked.attempt,
            call=data["call"],
            provider=data["provider"],
            model_id=data["model"],
            role=data["role"],
            outcome=data["outcome"],
            refusal=data["outcome"] == "refused",
            latency_ms=data["duration_ms"],
            tokens_in=data["tokens_in"],
            tokens_out=data["tokens_out"],
            cost_usd=data["cost_usd"],
            is_estimated=data["is_estimated"],
        )
        self._tell(RecordKind.GENERATION, record, ended)


def _worst(components: list[_Component]) -> _Component:
    """The first of those in the most trouble."""
    return max(components, key=lambda component: _BY_TROUBLE.index(component.status))


_READ: dict[EventType, Callable[[_Reading, Event], None]] = {
    EventType.RUN_QUEUED: _Reading.queued,
    EventType.RUN_START: _Reading.started,
    EventType.RUN_PAUSED: _Reading.paused,
    EventType.RUN_RESUMED: _Reading.resumed,
    EventType.PLAN_REQUESTED: _Reading.plan_wanted,
    EventType.PLAN_REJECTED: _Reading.plan_refused,
    EventType.PLAN_GENERATED: _Reading.planned,
    EventType.MODEL_SELECTED: _Reading.selected,
    EventType.CACHE_HIT: _Reading.known,
    EventType.BUDGET_EXHAUSTED: _Reading.over_budget,
    EventType.LLM_REQUEST: _Reading.called,
    EventType.LLM_RESPONSE: _Reading.answered,
    EventType.NODE_DONE: _Reading.node_ended,
    EventType.NODE_FAILED: _Reading.node_ended,
    EventType.NODE_RETRY: _Reading.node_ended,
    EventType.NODE_BLOCKED: _Reading.node_ended,
    **dict.fromkeys((EventType(found) for found in TERMINAL_EVENTS), _Reading.ended),
}
READ = frozenset(_READ)
"""The types of the events that matter here; the others need not even be decoded."""
