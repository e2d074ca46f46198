"""Exporters of traces, made of a run's events (`spans.py`); their SDKs are loaded on demand."""

from __future__ import annotations

from pydantic import SecretStr

from app.ports import TraceExporter


def open_exporters(
    service_name: str,
    otlp: tuple[str | None, str | None],
    langfuse: tuple[str, str | None, SecretStr | None],
) -> list[TraceExporter]:
    """One for each sink that is configured.

    `otlp`: the base URL of a receiver, and the whole URL for spans, which wins. `langfuse`: the
    address of a Langfuse, and the public and the secret key of a project there.
    """
    exporters: list[TraceExporter] = []
    endpoint, traces_endpoint = otlp
    if endpoint is not None and traces_endpoint is None:
        traces_endpoint = f"{endpoint.rstrip('/')}/v1/traces"  # as the OTLP specification says
    if traces_endpoint is not None:
        from app.adapters.tracing.otlp import OtlpExporter  # noqa: PLC0415 - only where configured

        exporters.append(OtlpExporter(traces_endpoint, service_name))
    base_url, public_key, secret_key = langfuse
    if public_key is not None and secret_key is not None:
        from app.adapters.tracing.langfuse import (  # noqa: PLC0415 - 40 MB, only where configured
            LangfuseExporter,
        )

        exporters.append(
            LangfuseExporter(base_url, public_key, secret_key.get_secret_value(), service_name)
        )
    return exporters
