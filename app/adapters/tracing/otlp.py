"""Traces by OTLP over HTTP with protobuf, through the exporter of the OpenTelemetry SDK.

The SDK reads the other standard variables by itself: OTEL_EXPORTER_OTLP_HEADERS, _TIMEOUT,
_COMPRESSION, _CERTIFICATE …, OTEL_RESOURCE_ATTRIBUTES. It repeats what a sink refuses for now, up
to its time limit (10 s).
"""

from __future__ import annotations

from collections.abc import Sequence

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace.export import SpanExportResult

from app.adapters.tracing.sdk_spans import readable, resource_of
from app.ports import RunTrace

SPANS_AT_ONCE = 1_024


class OtlpExporter:
    """POSTs spans to `endpoint`, the full URL."""

    def __init__(self, endpoint: str, service_name: str) -> None:
        self._exporter = OTLPSpanExporter(endpoint=endpoint)
        self._resource = resource_of(service_name)

    def export(self, runs: Sequence[RunTrace]) -> bool:
        spans = readable(runs, self._resource, lambda span: span.attributes)
        return all(
            self._exporter.export(spans[at : at + SPANS_AT_ONCE]) is SpanExportResult.SUCCESS
            for at in range(0, len(spans), SPANS_AT_ONCE)
        )

    def close(self) -> None:
        self._exporter.shutdown()  # type: ignore[no-untyped-call]  # the SDK's
