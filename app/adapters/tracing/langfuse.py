"""Traces for Langfuse, through its SDK, which sends OTLP to `<base>/api/public/otel/v1/traces`.

What Langfuse shows of a span is in attributes of its own: https://langfuse.com/docs, "OpenTelemetry
attribute mapping". A call of a model is a generation, with tokens and cost.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from langfuse import Langfuse, LangfuseOtelSpanAttributes
from langfuse.types import MaskOtelSpansParams, MaskOtelSpansResult, OtelSpanPatch
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider

from app.adapters.tracing import conventions as name
from app.adapters.tracing.sdk_spans import readable, resource_of
from app.adapters.tracing.spans import Attributes, Span
from app.kit.redact import redact
from app.ports import RunTrace

SPANS_AT_ONCE = 1_024
"""Half of what the SDK's queue holds: it never has to drop any."""

_TYPES = {
    name.CHAT: "generation",
    name.EXECUTE_TOOL: "tool",
    name.INVOKE_WORKFLOW: "chain",
    name.VERIFY: "evaluator",
}
_CONTENT = (
    LangfuseOtelSpanAttributes.OBSERVATION_INPUT,
    LangfuseOtelSpanAttributes.OBSERVATION_OUTPUT,
)


class _Processors(TracerProvider):
    """Where the SDK puts its processor, so that it can be given spans that ended long ago."""

    def __init__(self, service_name: str) -> None:
        super().__init__(resource=resource_of(service_name), shutdown_on_exit=False)
        self.found: list[SpanProcessor] = []

    def add_span_processor(self, span_processor: SpanProcessor) -> None:
        super().add_span_processor(span_processor)
        self.found.append(span_processor)


class LangfuseExporter:
    """Writes to one project. The SDK does not tell whether it arrived; it logs what did not."""

    def __init__(self, base_url: str, public_key: str, secret_key: str, service_name: str) -> None:
        self._provider = _Processors(service_name)
        self._client = Langfuse(
            public_key=public_key,
            secret_key=secret_key,
            base_url=base_url.rstrip("/"),
            tracer_provider=self._provider,
            should_export_span=lambda _span: True,
            mask_otel_spans=_mask,
            flush_at=SPANS_AT_ONCE,
        )

    def export(self, runs: Sequence[RunTrace]) -> bool:
        spans = readable(runs, self._provider.resource, _attributes_of)
        for at in range(0, len(spans), SPANS_AT_ONCE):
            for span in spans[at : at + SPANS_AT_ONCE]:
                for processor in self._provider.found:
                    processor.on_end(span)
            self._client.flush()  # waits: the queue of the SDK is empty before the next ones
        return True

    def close(self) -> None:
        self._client.shutdown()


def _attributes_of(span: Span) -> Attributes:
    """The attributes of a span, and what Langfuse wants to know besides."""
    known = LangfuseOtelSpanAttributes
    found = dict(span.attributes)
    found[known.OBSERVATION_TYPE] = _TYPES.get(span.operation, "span")
    if span.error:
        found[known.OBSERVATION_LEVEL] = "ERROR"
        found[known.OBSERVATION_STATUS_MESSAGE] = span.error
    if span.operation == name.INVOKE_WORKFLOW:
        found[known.TRACE_NAME] = span.name
        found[known.AS_ROOT] = True
    if span.operation == name.CHAT:
        found[known.OBSERVATION_MODEL] = found[name.REQUEST_MODEL]
        if name.COST_USD in found:
            usage = {"input": found[name.INPUT_TOKENS], "output": found[name.OUTPUT_TOKENS]}
            found[known.OBSERVATION_USAGE_DETAILS] = orjson.dumps(usage).decode()
            cost = {"total": found[name.COST_USD]}
            found[known.OBSERVATION_COST_DETAILS] = orjson.dumps(cost).decode()
    return found


@functools.lru_cache(maxsize=1_000)
def _may_be_secret(key: str) -> bool:
    """Whether `redact` looks at what is under this key: keys are few, and looking is dear."""
    return bool(redact({key: "x"}) != {key: "x"})


def _mask(*, params: MaskOtelSpansParams) -> MaskOtelSpansResult:
    """The second net: should content or a secret ever get into a span, it stops here."""
    patches = {}
    for identifier, span in params.spans.items():
        before: Mapping[str, Any] = span.attributes
        suspects = {
            key: value
            for key, value in before.items()
            if _may_be_secret(key) or (isinstance(value, str) and "@" in value)
        }
        changed = {k: value for k, value in redact(suspects).items() if value != before[k]}
        content = tuple(key for key in _CONTENT if key in before)
        if changed or content:
            patches[identifier] = OtelSpanPatch(set_attributes=changed, delete_attributes=content)
    return MaskOtelSpansResult(span_patches=patches)
