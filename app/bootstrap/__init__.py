"""Settings -> Services: the only module that names concrete adapters and joins the floors."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from app.adapters.capabilities.builtin import BuiltinAdapter
from app.adapters.capabilities.egress import EgressPolicy
from app.adapters.capabilities.egress_transport import EgressTransport
from app.adapters.capabilities.http import HttpAdapter
from app.adapters.capabilities.mcp import McpAdapter
from app.adapters.capabilities.mcp_import import registrations
from app.adapters.capabilities.mcp_process import commands_of
from app.adapters.capabilities.pack import standard_packs
from app.adapters.capabilities.pack_brief_llm import BRIEF_LLM, BriefLlmAdapter
from app.adapters.capabilities.secrets import SecretStore
from app.adapters.tracing import open_exporters
from app.bootstrap.errors import NotReady
from app.bootstrap.models import open_catalog, open_gateway, open_providers
from app.bootstrap.redis import open_breakers, open_delta_relay, open_wake_ups
from app.domain.capability import CapabilityKind, Effect, Registration
from app.domain.record_shapes import RecordKind
from app.journal.deltas import Deltas
from app.journal.feed import Feed
from app.journal.readings import open_readings
from app.journal.record import Journal
from app.journal.record_log import RecordsWanted
from app.journal.tracer import TraceLimits
from app.kit import failpoints
from app.kit.drain import Drain
from app.kit.metrics import Metrics, watched_loop
from app.llm.catalog import Catalog
from app.orchestrator.commands import Commands
from app.orchestrator.execute import Executor
from app.orchestrator.invoke import ExecutionLimits
from app.orchestrator.lease import Lease
from app.orchestrator.loop import Drive, LoopLimits
from app.orchestrator.orders import Orders
from app.orchestrator.planning import ModelPlanner
from app.orchestrator.runner import Runner
from app.planner.plan_envelope import PlanLimits
from app.ports import Breakers, CapabilityAdapter, Provider, Topic
from app.registry.registry import Registry
from app.settings import Role, Settings
from app.store.database import Database, connect
from app.store.events import EventReader
from app.store.fitness import unfit
from app.store.partitions import make_partitions, make_partitions_hot
from app.store.queue_stats import QueueWatch
from app.store.registry import RegistryStore

__all__ = [
    "NotReady",
    "Services",
    "offered_by_mcp",
    "open_catalog",
    "open_providers",
    "open_services",
]

log = logging.getLogger("flexrun.bootstrap")


@dataclass(slots=True)
class Services:
    """What the doors (api, cli, worker) use. One per process."""

    settings: Settings
    database: Database
    reader: EventReader
    feed: Feed
    journal: Journal
    registry: Registry
    catalog: Catalog
    providers: Mapping[str, Provider]
    lease: Lease
    breakers: Breakers
    runner: Runner
    commands: Commands
    orders: Orders
    announce_work: Callable[[], None]
    worker_wake: asyncio.Event
    secrets: SecretStore
    drain: Drain
    metrics: Metrics
    queue_watch: QueueWatch


@asynccontextmanager
async def open_services(
    settings: Settings, dsn: str, role: Role = "serve", *, sole_user: bool = False
) -> AsyncIterator[Services]:
    """Open everything, in the order in which it depends on each other, and close it in reverse.

    A process of the role `api` drives no runs. `sole_user`: we started the database server, and
    nobody else uses it. Whoever held runs before is dead, and no lease of theirs is waited for.
    Raises `NotReady` when the database is behind or not durable, `Unavailable` when it is away,
    `ModelsInvalid` when the file of models has faults.
    """
    if settings.failpoint:
        failpoints.arm(settings.failpoint)
    async with AsyncExitStack() as stack:
        catalog = open_catalog(settings)
        providers = open_providers(catalog)
        for provider in providers.values():
            stack.push_async_callback(provider.aclose)
        database = await _open_database(settings, dsn, stack)
        connect_here = partial(connect, dsn)
        metrics = Metrics()
        await stack.enter_async_context(watched_loop(metrics.loop_lag))
        reader = EventReader(database)
        feed = Feed(reader, metrics)
        feed.start()
        stack.push_async_callback(feed.close)
        worker_wake = asyncio.Event()
        lease = Lease(connect_here, role, sole_user=sole_user)
        lease.on_lost = worker_wake.set

        wake = {Topic.COMMITS: feed.nudge, Topic.WORK: worker_wake.set}
        wake_ups = open_wake_ups(settings, connect_here, lambda topic: wake[topic](), lease)
        stack.push_async_callback(wake_ups.aclose)
        relay = open_delta_relay(settings, feed, lease, stack)
        announce_work = partial(wake_ups.announce, Topic.WORK)
        breakers = open_breakers(settings, lease)
        stack.push_async_callback(breakers.aclose)
        secrets = _secrets(settings.secrets_file)
        registry, adapters = await _open_registry(settings, database, secrets, stack)
        exporters = open_exporters(
            settings.otel_service_name,
            (settings.otel_exporter_otlp_endpoint, settings.otel_exporter_otlp_traces_endpoint),
            (
                settings.langfuse_base_url,
                settings.langfuse_public_key,
                settings.langfuse_secret_key,
            ),
        )
        trace_limits = TraceLimits(settings.trace_sample, settings.trace_cpu_share)
        facets_of = registry.facets_of if settings.log_events else None
        journal = Journal(
            connect_here,
            await stack.enter_async_context(
                open_readings(
                    *(feed, reader, metrics, exporters, trace_limits, facets_of),
                    _records(settings, has_models=bool(providers)),
                )
            ),
            make_partitions_hot,
            after_commit=partial(wake_ups.announce, Topic.COMMITS),
            metrics=metrics,
        )
        await journal.start()
        stack.push_async_callback(journal.close)

        gateway = open_gateway(settings, catalog, providers, breakers, database, stack)
        plan_limits = PlanLimits(settings.nodes_max, settings.edges_max, settings.depth_max)
        execution_limits = _execution_limits(settings)
        drive = Drive(
            journal=journal,
            executor=Executor(
                adapters,
                registry.image,
                execution_limits,
                breakers,
                Deltas(feed, relay),
                gateway,
            ),
            image=registry.image,
            lease=lease,
            limits=LoopLimits(settings.events_max, settings.latency_record),
            plan_limits=plan_limits,
            planner=None if gateway is None else ModelPlanner(gateway, plan_limits),
            metrics=metrics,
            announce_work=announce_work,
            nudge_worker=worker_wake.set,
        )
        runner = Runner(drive, runs_max=0 if role == "api" else settings.runs_max)
        wake_ups.start()
        commands = Commands(
            journal,
            runner,
            reader,
            database,
            plan_limits,
            announce_work,
            settings.submit_timeout_s,
            models_up=lambda: gateway is not None and gateway.is_up,
            has_models=gateway is not None,
        )

        def nudge_workers() -> None:
            worker_wake.set()
            announce_work()

        drain = Drain()
        drain.on_begin(feed.wake_all)
        yield Services(
            settings=settings,
            database=database,
            reader=reader,
            feed=feed,
            journal=journal,
            registry=registry,
            catalog=catalog,
            providers=providers,
            lease=lease,
            breakers=breakers,
            runner=runner,
            commands=commands,
            orders=Orders(commands, nudge_workers),
            announce_work=announce_work,
            worker_wake=worker_wake,
            secrets=secrets,
            drain=drain,
            metrics=metrics,
            queue_watch=QueueWatch(database),
        )


async def _open_database(settings: Settings, dsn: str, stack: AsyncExitStack) -> Database:
    """The database, with the partitions of the days to come."""
    database = await Database.open(dsn)
    stack.push_async_callback(database.close)
    if (why := await unfit(database, allow_unsafe=settings.allow_unsafe_postgres)) is not None:
        raise NotReady(why)
    await make_partitions(database, datetime.now(UTC).date())
    return database


def _execution_limits(settings: Settings) -> ExecutionLimits:
    return ExecutionLimits(
        settings.value_bytes_max, settings.backoff_base_ms, settings.backoff_max_ms
    )


def _records(settings: Settings, *, has_models: bool) -> RecordsWanted:
    flags = {
        RecordKind.GENERATION: settings.log_generations,
        RecordKind.FALLBACK: settings.log_fallbacks,
        RecordKind.LATENCY: settings.log_latencies,
    }
    return RecordsWanted(frozenset(kind for kind, is_on in flags.items() if is_on), has_models)


async def _open_registry(
    settings: Settings, database: Database, secrets: SecretStore, stack: AsyncExitStack
) -> tuple[Registry, dict[CapabilityKind, CapabilityAdapter]]:
    """What can be called, and who calls it. The packs' own capabilities are there from now on."""
    transport = EgressTransport(EgressPolicy(settings.egress_allow))
    packs = standard_packs(transport)
    http = HttpAdapter(transport, secrets, response_bytes_max=settings.value_bytes_max)
    stack.push_async_callback(http.aclose)
    mcp = _mcp(settings, transport, secrets)
    stack.push_async_callback(mcp.aclose)
    adapters: dict[CapabilityKind, CapabilityAdapter] = {
        CapabilityKind.BUILTIN: BuiltinAdapter(packs),
        CapabilityKind.HTTP: http,
        CapabilityKind.MCP: mcp,
        CapabilityKind.LLM: BriefLlmAdapter(),
    }
    registry = Registry(RegistryStore(database), adapters, sweep_s=settings.sweep_s)
    await registry.start()
    stack.push_async_callback(registry.close)
    for pack in packs:
        await registry.seed(pack.facets(), pack.registrations())
    await registry.seed((), BRIEF_LLM)
    return registry, adapters


def _mcp(settings: Settings, transport: EgressTransport, secrets: SecretStore) -> McpAdapter:
    try:
        servers = commands_of(settings.mcp_file) if settings.mcp_file else {}
    except ValueError as error:
        raise NotReady(f"FLEXRUN_MCP_FILE can not be used: {error}.") from None
    return McpAdapter(transport, secrets, servers, value_bytes_max=settings.value_bytes_max)


async def offered_by_mcp(
    settings: Settings, config: dict[str, Any], *, effect: Effect, prefix: str, timeout_s: float
) -> list[Registration]:
    """A registration for each tool that an MCP server offers, by settings of this machine.

    `config` reaches the server as a registration's would. Raises `CallFailed`, and `NotReady` for
    files that can not be used.
    """
    transport = EgressTransport(EgressPolicy(settings.egress_allow))
    mcp = _mcp(settings, transport, _secrets(settings.secrets_file))
    async with AsyncExitStack() as stack:
        stack.push_async_callback(transport.aclose)
        stack.push_async_callback(mcp.aclose)
        tools = await mcp.tools(config, timeout_s)
    return registrations(tools, config, effect=effect, prefix=prefix)


def _secrets(path: Path | None) -> SecretStore:
    """The operator's secrets: `{"name": {"value": "…", "hosts": ["…"]}}`. Raises `NotReady`."""
    if path is None:
        return SecretStore()
    try:
        found = orjson.loads(path.read_bytes())
        return SecretStore({n: (given["value"], given["hosts"]) for n, given in found.items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotReady(f"FLEXRUN_SECRETS_FILE can not be used ({type(error).__name__}).") from None
