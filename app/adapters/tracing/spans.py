"""The spans of a run, made of its events: pure, the same in every process that reads the journal.

    invoke_workflow {label}          the run, child of the caller's span
        plan
        execute_tool {capability}    an attempt of a node; a retry is another one
            chat {model}             a call of a model, CLIENT
            execute_tool {capability}    a call that the node made itself
            verify                   a value that broke its contract
        verify                       the run's output did

A span is named by what is in it of names, codes, counts and cost. Inputs, outputs, prompts, the
objective and the text of errors are not read here, so they can not get out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from app.adapters.tracing import conventions as name
from app.domain.events import TERMINAL_EVENTS, Event, EventType
from app.kit.ids import span_id

UNFINISHED = "unfinished"
"""`error.type` of what was under way when its run ended: nobody knows how it would have gone."""
CANCELLED = "cancelled"

Attributes = dict[str, str | int | float | bool]


@dataclass(slots=True)
class Span:
    """One span that ended. Ids are 16 hex digits, times ms since 1970; `error` is a code or ""."""

    name: str
    operation: str
    span_id: str
    parent_id: str | None
    start_ms: int
    attributes: Attributes = field(default_factory=dict)
    end_ms: int = 0
    error: str = ""


def spans_of(
    run_id: str, traceparent: str, events: Sequence[Event], told_seq: int = 0
) -> list[Span]:
    """The spans that ended after `told_seq`; the run's own one when it has ended.

    `traceparent` is the W3C context that the run was accepted with; a run that began its trace is
    named in it itself. `events` are all up to now, by seq.
    """
    return _Reading(run_id, traceparent, events, told_seq).spans


class _Reading:
    """A fold over the events of one run."""

    def __init__(
        self, run_id: str, traceparent: str, events: Sequence[Event], told_seq: int
    ) -> None:
        self.spans: list[Span] = []
        self._told_seq = told_seq
        self._run_id = run_id
        self._nodes: dict[str, Span] = {}
        self._chats: dict[tuple[str, int], Span] = {}
        self._root = self._root_of(traceparent, events[0].ts if events else 0)
        for event in events:
            if isinstance(event.type, EventType) and (read := _READ.get(event.type)) is not None:
                read(self, event)

    def _root_of(self, traceparent: str, start_ms: int) -> Span:
        own, caller = span_id(self._run_id), traceparent.split("-")[2]
        attributes: Attributes = {name.RUN_ID: self._run_id}
        return self._span(
            name.INVOKE_WORKFLOW, "", own, None if caller == own else caller, start_ms, attributes
        )

    @staticmethod
    def _span(
        operation: str,
        about: str,
        own: str,
        parent: str | None,
        start_ms: int,
        attributes: Attributes,
    ) -> Span:
        title = f"{operation} {about}" if about else operation
        return Span(
            title, operation, own, parent, start_ms, {name.OPERATION_NAME: operation, **attributes}
        )

    def _end(self, span: Span, event: Event, error: str = "") -> None:
        span.end_ms = max(event.ts, span.start_ms)
        if error:
            span.error = span.attributes[name.ERROR_TYPE] = error
        if event.seq > self._told_seq:
            self.spans.append(span)

    # --- the run ----------------------------------------------------------------------------------

    def queued(self, event: Event) -> None:
        self._root.attributes[name.LANE] = event.data["lane"]
        if label := event.data.get("label"):
            self._root.name = f"{name.INVOKE_WORKFLOW} {label}"
            self._root.attributes[name.WORKFLOW_NAME] = label

    def recovered(self, event: Event) -> None:
        before = self._root.attributes.get(name.TAKEOVERS, 0)
        self._root.attributes[name.TAKEOVERS] = int(before) + 1

    def ended(self, event: Event) -> None:
        """The last event: what is still open ends with it."""
        error = event.data["error"]["code"] if event.type is EventType.RUN_FAILED else ""
        status = str(event.type).removeprefix("RUN_").lower()
        for span in (*self._chats.values(), *self._nodes.values()):
            self._end(span, event, CANCELLED if status == CANCELLED else UNFINISHED)
        self._root.attributes[name.RUN_STATUS] = status
        self._end(self._root, event, error)

    # --- the plan ---------------------------------------------------------------------------------

    def planned(self, event: Event) -> None:
        data = event.data
        span = self._plan_span(event, data.get("planning_ms") or 0)
        span.attributes[name.PLAN_VERSION] = data["version"]
        span.attributes[name.PLAN_AUTHOR] = data["author"]
        span.attributes[name.PLAN_NODES] = data["node_count"]
        self._end(span, event)

    def plan_rejected(self, event: Event) -> None:
        found = event.data["diagnostics"]
        self._end(self._plan_span(event, 0), event, found[0]["code"] if found else "rejected")

    def _plan_span(self, event: Event, took_ms: float) -> Span:
        start_ms = max(event.ts - round(took_ms), self._root.start_ms)
        own = span_id(self._run_id, event.seq)
        return self._span(name.PLAN, "", own, self._root.span_id, start_ms, {})

    # --- nodes ------------------------------------------------------------------------------------

    def node_started(self, event: Event) -> None:
        node_id = event.node_id or ""
        attributes: Attributes = {
            name.TOOL_NAME: event.data["capability_id"],
            name.NODE_ID: node_id,
            name.ATTEMPT: event.attempt or 1,
        }
        own = span_id(self._run_id, node_id, event.attempt)
        self._nodes[node_id] = self._span(
            name.EXECUTE_TOOL,
            event.data["capability_id"],
            own,
            self._root.span_id,
            event.ts,
            attributes,
        )

    def node_ended(self, event: Event) -> None:
        """An attempt ended. A node that an operator decided, or that was kept, had none open."""
        span = self._nodes.pop(event.node_id or "", None)
        if span is None:
            return
        error = ""
        if event.type is not EventType.NODE_DONE:
            error = (event.data.get("error") or {}).get("code") or event.data.get("reason") or ""
        for key in [key for key in self._chats if key[0] == event.node_id]:
            self._end(self._chats.pop(key), event, UNFINISHED)
        self._end(span, event, error)

    def broke_contract(self, event: Event) -> None:
        """A span without length: the check is done when the event is written."""
        errors = event.data["errors"]
        parent = self._nodes.get(event.node_id or "", self._root)
        attributes: Attributes = {name.SCOPE: event.data["scope"], name.FAULTS: len(errors)}
        own = span_id(self._run_id, event.seq)
        span = self._span(name.VERIFY, "", own, parent.span_id, event.ts, attributes)
        self._end(span, event, errors[0]["code"] if errors else "invalid")

    def tool_called(self, event: Event) -> None:
        """The event comes at the end, and says how long the call took."""
        data, node_id = event.data, event.node_id or ""
        parent = self._nodes.get(node_id, self._root)
        outcome = data["outcome"]
        attributes: Attributes = {
            name.TOOL_NAME: data["capability_id"],
            name.NODE_ID: node_id,
            name.OUTCOME: outcome,
        }
        start_ms = max(event.ts - round(data["duration_ms"]), parent.start_ms)
        own, about = span_id(self._run_id, event.seq), data["capability_id"]
        span = self._span(name.EXECUTE_TOOL, about, own, parent.span_id, start_ms, attributes)
        self._end(span, event, "" if outcome == "ok" else outcome)

    # --- models -----------------------------------------------------------------------------------

    def model_called(self, event: Event) -> None:
        data, node_id = event.data, event.node_id or ""
        parent = self._nodes.get(node_id, self._root)
        attributes: Attributes = {
            name.PROVIDER_NAME: data["provider"],
            name.REQUEST_MODEL: data["model"],
            name.NODE_ID: node_id,
        }
        own = span_id(self._run_id, event.seq)
        span = self._span(name.CHAT, data["model"], own, parent.span_id, event.ts, attributes)
        # After a take-over the same call number may come again: the first one was cut off.
        if (cut_off := self._chats.pop((node_id, data["call"]), None)) is not None:
            self._end(cut_off, event, UNFINISHED)
        self._chats[node_id, data["call"]] = span

    def model_answered(self, event: Event) -> None:
        data = event.data
        span = self._chats.pop((event.node_id or "", data["call"]), None)
        if span is None:
            return
        span.attributes |= {
            name.INPUT_TOKENS: data["tokens_in"],
            name.OUTPUT_TOKENS: data["tokens_out"],
            name.COST_USD: float(data["cost_usd"]),
            name.IS_ESTIMATED: data["is_estimated"],
            name.OUTCOME: data["outcome"],
        }
        self._end(span, event, "" if data["outcome"] == "ok" else data["outcome"])


_READ: dict[EventType, Callable[[_Reading, Event], None]] = {
    EventType.RUN_QUEUED: _Reading.queued,
    EventType.RUN_RECOVERED: _Reading.recovered,
    EventType.PLAN_GENERATED: _Reading.planned,
    EventType.PLAN_REJECTED: _Reading.plan_rejected,
    EventType.NODE_START: _Reading.node_started,
    EventType.NODE_DONE: _Reading.node_ended,
    EventType.NODE_FAILED: _Reading.node_ended,
    EventType.NODE_RETRY: _Reading.node_ended,
    EventType.NODE_BLOCKED: _Reading.node_ended,
    EventType.VALIDATION_ERROR: _Reading.broke_contract,
    EventType.LLM_REQUEST: _Reading.model_called,
    EventType.LLM_RESPONSE: _Reading.model_answered,
    EventType.TOOL_CALLED: _Reading.tool_called,
    **dict.fromkeys((EventType(found) for found in TERMINAL_EVENTS), _Reading.ended),
}
