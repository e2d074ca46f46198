"""Spans as the OpenTelemetry SDK exports them. Loads the SDK, so only exporters import it.

A finished span with an id and times of its own is a `ReadableSpan`; going through a tracer would
cost five times as much, only to be given other ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from app.adapters.tracing import conventions as name
from app.adapters.tracing.spans import Attributes, Span, spans_of
from app.domain.event_json import decode_event
from app.domain.events import rested_before
from app.ports import RunTrace
from app.version import VERSION

SCOPE = InstrumentationScope("flexrun", VERSION)
SAMPLED = TraceFlags(TraceFlags.SAMPLED)
NS_PER_MS = 1_000_000
_OK = Status(StatusCode.UNSET)

AttributesOf = Callable[[Span], Attributes]


class _HashedOnce(Resource):
    """The encoder hashes the resource of every span, and the SDK makes JSON of it each time."""

    def __init__(self, made: Resource) -> None:
        super().__init__(made.attributes, made.schema_url)
        self._hash = super().__hash__()

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or super().__eq__(other)


def resource_of(service_name: str) -> Resource:
    """What the spans are from; OTEL_RESOURCE_ATTRIBUTES adds to it."""
    return _HashedOnce(Resource.create({"service.name": service_name, "service.version": VERSION}))


def readable(
    runs: Sequence[RunTrace], resource: Resource, attributes_of: AttributesOf
) -> list[ReadableSpan]:
    """All spans of these runs."""
    found: list[ReadableSpan] = []
    for run in runs:
        trace_id = int(run.traceparent.split("-")[1], 16)
        events = [decode_event(body) for body in run.bodies]
        for span in spans_of(run.run_id, run.traceparent, events, rested_before(events)):
            found.append(_readable(span, trace_id, resource, attributes_of(span)))
    return found


def _readable(
    span: Span, trace_id: int, resource: Resource, attributes: Attributes
) -> ReadableSpan:
    parent = None
    if span.parent_id is not None:
        is_remote = span.operation == name.INVOKE_WORKFLOW
        parent = SpanContext(trace_id, int(span.parent_id, 16), is_remote, SAMPLED)
    return ReadableSpan(
        span.name,
        SpanContext(trace_id, int(span.span_id, 16), is_remote=False, trace_flags=SAMPLED),
        parent,
        resource,
        attributes,
        kind=SpanKind.CLIENT if span.operation == name.CHAT else SpanKind.INTERNAL,
        status=Status(StatusCode.ERROR, span.error) if span.error else _OK,
        start_time=span.start_ms * NS_PER_MS,
        end_time=span.end_ms * NS_PER_MS,
        instrumentation_scope=SCOPE,
    )
