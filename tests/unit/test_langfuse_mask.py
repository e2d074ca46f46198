"""The second net before Langfuse: what must never be in a span is taken out of it there."""

from __future__ import annotations

from types import MappingProxyType

from langfuse import LangfuseOtelSpanAttributes
from langfuse.types import MaskOtelSpansParams, OtelSpanData, OtelSpanIdentifier

from app.adapters.tracing.langfuse import _mask


def span(**attributes: str | int) -> OtelSpanData:
    return OtelSpanData(
        trace_id="a" * 32,
        span_id="b" * 16,
        parent_span_id=None,
        name="chat small",
        instrumentation_scope_name="flexrun",
        instrumentation_scope_version="1",
        attributes=MappingProxyType(attributes),
        resource_attributes=MappingProxyType({}),
    )


def test_secrets_and_content_go_and_everything_else_stays() -> None:
    content = LangfuseOtelSpanAttributes.OBSERVATION_INPUT
    spans = {
        "plain": span(input_tokens=12, label="nightly"),
        "secret": span(api_key="sk-canary", input_tokens=12, max_token="canary"),
        "address": span(url="postgres://user:canary@db/x", mail="ops@example.com"),
        "content": span(**{content: "canary", "label": "nightly"}),
    }
    keys = {name: OtelSpanIdentifier(trace_id="a" * 32, span_id=name) for name in spans}
    found = _mask(params=MaskOtelSpansParams(spans={keys[n]: s for n, s in spans.items()}))
    assert found.span_patches is not None
    patches = {
        key.span_id: (dict(patch.set_attributes), tuple(patch.delete_attributes))
        for key, patch in found.span_patches.items()
        if patch is not None
    }
    assert patches == {
        "secret": ({"api_key": "[redacted]", "max_token": "[redacted]"}, ()),
        "address": ({"url": "postgres://[redacted]@db/x"}, ()),
        "content": ({}, (content,)),
    }
