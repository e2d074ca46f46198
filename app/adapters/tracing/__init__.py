"""Exporters of traces, made of a run's events (`spans.py`), each in a process of its own."""

from __future__ import annotations

from pydantic import SecretStr

from app.adapters.tracing.process import ExporterProcess
from app.ports import TraceExporter

OTLP = "app.adapters.tracing.otlp:OtlpExporter"
LANGFUSE = "app.adapters.tracing.langfuse:LangfuseExporter"


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
        arguments = {"endpoint": traces_endpoint, "service_name": service_name}
        exporters.append(ExporterProcess(OTLP, arguments))
    base_url, public_key, secret_key = langfuse
    if public_key is not None and secret_key is not None:
        arguments = {
            "base_url": base_url,
            "public_key": public_key,
            "secret_key": secret_key.get_secret_value(),
            "service_name": service_name,
        }
        exporters.append(ExporterProcess(LANGFUSE, arguments))
    return exporters
