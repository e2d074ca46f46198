"""Settings: the only reader of the environment.

Names that the ecosystem knows keep them (`DATABASE_URL`, `REDIS_URL`, `MAX_RETRIES` …); all others
begin with `FLEXRUN_`. `.env.example` lists every one; a test compares it with this model.
The command line also reads `FLEXRUN_URL`: where its commands look for the service.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AliasChoices, Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

Role = Literal["serve", "api", "worker"]
"""What a process does: both, only accept and stream runs, or only drive them."""


def _plain(name: str) -> AliasChoices:
    """A variable that keeps its own name, without our prefix."""
    return AliasChoices(name.upper(), name.lower())


class Settings(BaseSettings):
    """Everything an operator can set. Flags of the command line win over the environment."""

    model_config = SettingsConfigDict(
        env_prefix="FLEXRUN_",
        env_ignore_empty=True,  # compose files pass unset variables as empty ones
        extra="ignore",
        frozen=True,
    )

    # Where the service stands.
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65_535, description="Port to listen on; 0 takes a free one.")
    worker_port: int = Field(
        8001, ge=0, le=65_535, description="Port of `flexrun worker`: probes and metrics only."
    )
    allow_unauthenticated: bool = Field(
        False, description="Allow a non-loopback address although there is no authentication."
    )
    data_dir: Path = Field(
        Path(".flexrun"), description="Where the embedded Postgres keeps its data."
    )
    log_level: str = Field("INFO", description="DEBUG, INFO, WARNING or ERROR.")

    # Postgres.
    database_url: SecretStr | None = Field(
        None,
        validation_alias=_plain("database_url"),
        description="postgresql://… of the database; without it an embedded one is started.",
    )
    allow_unsafe_postgres: bool = Field(
        False,
        description="For tests only: accept fsync, full_page_writes or synchronous_commit off.",
    )

    # Redis: shared breakers and quick wake-ups; never authoritative.
    redis_url: SecretStr | None = Field(
        None,
        validation_alias=_plain("redis_url"),
        description="redis://… shared by all processes; without it each has breakers of its own.",
    )

    redis_budget_ms: int = Field(
        50, ge=1, description="How long a call waits for Redis before the process judges alone."
    )

    # How much a process does at once.
    runs_max: int = Field(1_000, ge=0, le=100_000, description="Runs driven at once.")
    submit_timeout_s: float = Field(
        5.0, gt=0, description="How long POST waits for the journal before it answers 503."
    )
    drain_grace_s: float = Field(
        10.0, ge=0, description="How long running calls may go on after SIGTERM, in seconds."
    )

    # Limits of one run; each has its own problem code.
    envelope_bytes_max: int = Field(1_048_576, ge=1_024, description="Size of a request body.")
    nodes_max: int = Field(2_000, ge=1, description="Nodes of a plan.")
    edges_max: int = Field(10_000, ge=1, description="Edges of a plan.")
    depth_max: int = Field(2_000, ge=1, description="Longest chain of a plan.")
    events_max: int = Field(50_000, ge=100, description="Events of a run.")
    value_bytes_max: int = Field(2_097_152, ge=1_024, description="Size of one output as JSON.")
    streams_max: int = Field(5_000, ge=1, description="Open event streams of a process.")

    # Attempts and calls.
    max_retries: int = Field(
        2,
        ge=0,
        le=19,
        validation_alias=_plain("max_retries"),
        description="Retries of a capability whose registration says nothing; at_most_once: 0.",
    )
    provider_timeout_s: float = Field(
        60.0,
        gt=0,
        validation_alias=_plain("provider_timeout_s"),
        description="Time limit of a capability whose registration says nothing, in seconds.",
    )
    backoff_base_ms: int = Field(200, ge=1, description="First back-off between attempts, in ms.")
    backoff_max_ms: int = Field(30_000, ge=1, description="Longest back-off, in ms.")

    # Breakers of the far sides, one for every tool and host.
    cb_threshold: int = Field(
        5,
        ge=1,
        le=10_000,
        validation_alias=_plain("cb_threshold"),
        description="Consecutive failures of a far side after which its breaker opens.",
    )
    cb_cooldown_s: float = Field(
        30.0,
        gt=0,
        le=86_400,
        validation_alias=_plain("cb_cooldown_s"),
        description="How long an open breaker refuses calls before it lets one try, in seconds.",
    )

    # The way out.
    egress_allow: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Comma-separated CIDRs or hosts that tools may reach although private."
    )
    secrets_file: Path | None = Field(
        None,
        description="JSON file of secrets for http and mcp capabilities: "
        '{"name": {"value": "…", "hosts": ["api.example.com"]}}.',
    )
    mcp_file: Path | None = Field(
        None,
        description="JSON file of MCP servers to start here: "
        '{"servers": {"files": {"command": ["npx", "…"], "env": {}}}}.',
    )

    # Models.
    models_file: Path | None = Field(
        None,
        description="YAML file of providers and models; without it models.yaml in the working "
        "directory, if there is one.",
    )
    models_enabled: bool = Field(
        True, description="No call of a model is made without it, whatever is configured."
    )
    llm_cache_days: int = Field(
        30,
        ge=0,
        le=3_650,
        description="Days that an answer of a model is kept after its last use; 0: no cache.",
    )

    # Traces. The OpenTelemetry SDK reads its other variables itself: OTEL_EXPORTER_OTLP_HEADERS …
    otel_exporter_otlp_endpoint: str | None = Field(
        None,
        validation_alias=_plain("otel_exporter_otlp_endpoint"),
        description="Base URL of an OTLP/HTTP receiver; spans of runs go to /v1/traces below it.",
    )
    otel_exporter_otlp_traces_endpoint: str | None = Field(
        None,
        validation_alias=_plain("otel_exporter_otlp_traces_endpoint"),
        description="The whole URL for spans, in place of the one above.",
    )
    otel_service_name: str = Field(
        "flexrun",
        validation_alias=_plain("otel_service_name"),
        description="Name of this service in traces.",
    )
    langfuse_public_key: str | None = Field(
        None,
        validation_alias=_plain("langfuse_public_key"),
        description="Public key of a project of Langfuse; runs are traced there.",
    )
    langfuse_secret_key: SecretStr | None = Field(
        None,
        validation_alias=_plain("langfuse_secret_key"),
        validate_default=True,
        description="Its secret key.",
    )
    langfuse_base_url: str = Field(
        "https://cloud.langfuse.com",
        validation_alias=AliasChoices("LANGFUSE_BASE_URL", "langfuse_base_url", "LANGFUSE_HOST"),
        description="Where that Langfuse is. LANGFUSE_HOST is read, too.",
    )
    trace_sample: float = Field(
        1.0, ge=0, le=1, description="Share of the traces that is exported, chosen by trace id."
    )
    trace_cpu_share: float = Field(
        0.02,
        gt=0,
        le=1,
        description="Share of one core that the process of an exporter may take beside a busy "
        "service; runs that end faster than that are not traced.",
    )

    # Instruments.
    log_events: bool = Field(False, description="Write a log line for every event of every run.")
    log_generations: bool = Field(
        False, description="Write a record to the log for every call of a model."
    )
    log_fallbacks: bool = Field(
        False, description="Write a record to the log for every run: who gave what models should."
    )
    log_latencies: bool = Field(
        False, description="Write a record to the log for every run: where its time went."
    )
    latency_record: bool = Field(True, description="Keep planning and queue times of each run.")
    sweep_s: float = Field(5.0, gt=0, description="How often stale capabilities are looked for.")
    failpoint: str | None = Field(
        None, description="For tests only: `name[:n]` of a point at which the process dies."
    )

    @field_validator("egress_allow", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("langfuse_secret_key")
    @classmethod
    def _comes_in_a_pair(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        if (value is None) != (info.data.get("langfuse_public_key") is None):
            raise ValueError("LANGFUSE_PUBLIC_KEY and LANGFUSE_SECRET_KEY belong together")
        return value


def variable(name: str) -> SecretStr | None:
    """The value of a variable that the file of models names, None when it is unset or empty."""
    value = os.environ.get(name)
    return SecretStr(value) if value else None
