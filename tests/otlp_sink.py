"""A receiver of OTLP/HTTP that reads the real protobuf, or misbehaves, as a collector may."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.far_side import Exchange, FarSide, answer, far_side

ACCEPTED = answer(200, b"", "application/x-protobuf")


@dataclass(frozen=True)
class ReceivedSpan:
    """A span as it came over the line; ids in hex, times in ms, `parent` "" for none."""

    trace_id: str
    span_id: str
    parent: str
    name: str
    kind: int
    start_ms: int
    end_ms: int
    error: str
    attributes: dict[str, Any] = field(hash=False)
    resource: dict[str, Any] = field(hash=False)

    def json(self, key: str) -> Any:
        """An attribute that holds JSON."""
        return orjson.loads(self.attributes[key])


@dataclass
class OtlpSink:
    """The running receiver; `side.behave` decides the next answers."""

    side: FarSide

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.side.port}"

    @property
    def exchanges(self) -> list[Exchange]:
        return self.side.exchanges

    def bodies(self) -> list[bytes]:
        """What was received, unpacked."""
        return [
            gzip.decompress(found.body)
            if found.headers.get("content-encoding") == "gzip"
            else found.body
            for found in self.exchanges
        ]

    def spans(self) -> list[ReceivedSpan]:
        """Every span that was received, in order."""
        return [span for body in self.bodies() for span in _read(body)]

    def traces(self) -> dict[str, list[ReceivedSpan]]:
        """The spans by their trace."""
        found: dict[str, list[ReceivedSpan]] = {}
        for span in self.spans():
            found.setdefault(span.trace_id, []).append(span)
        return found


@asynccontextmanager
async def otlp_sink() -> AsyncIterator[OtlpSink]:
    """A receiver for the time of the block, which accepts everything until told otherwise."""
    async with far_side() as side:
        side.behave = ACCEPTED
        yield OtlpSink(side)


async def hang(writer: asyncio.StreamWriter, exchange: Exchange) -> None:
    """Take the request and never answer it."""
    await asyncio.Event().wait()


def _read(body: bytes) -> list[ReceivedSpan]:
    request = ExportTraceServiceRequest.FromString(body)
    return [
        ReceivedSpan(
            trace_id=span.trace_id.hex(),
            span_id=span.span_id.hex(),
            parent=span.parent_span_id.hex(),
            name=span.name,
            kind=span.kind,
            start_ms=span.start_time_unix_nano // 1_000_000,
            end_ms=span.end_time_unix_nano // 1_000_000,
            error=span.status.message if span.status.code == 2 else "",
            attributes=_values(span.attributes),
            resource=_values(resource.resource.attributes),
        )
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


def _values(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}
