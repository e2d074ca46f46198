"""Settings -> Services: the only module that names concrete adapters and joins the floors."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from app.adapters.breakers.local import LocalBreakers
from app.adapters.capabilities.builtin import BuiltinAdapter
from app.adapters.capabilities.egress import EgressPolicy
from app.adapters.capabilities.egress_transport import EgressTransport
from app.adapters.capabilities.http import HttpAdapter
from app.adapters.capabilities.llm import LlmAdapter
from app.adapters.capabilities.mcp import McpAdapter
from app.adapters.capabilities.mcp_import import registrations
from app.adapters.capabilities.mcp_process import commands_of
from app.adapters.capabilities.pack import standard_packs
from app.adapters.capabilities.secrets import SecretStore
from app.adapters.tracing import open_exporters
from app.domain.capability import CapabilityKind, Effect, Registration
from app.domain.errors import FlexrunError
from app.journal.feed import Feed
from app.journal.readings import open_readings
from app.journal.record import Journal
from app.journal.tracer import TraceLimits
from app.kit import failpoints
from app.kit.drain import Drain
from app.kit.metrics import Metrics, watched_loop
from app.llm.cache import AnswerCache
from app.llm.calls import ModelCalls, RetryPolicy
from app.llm.catalog import Catalog, load_catalog
from app.llm.gateway import Gateway
from app.llm.models_file import ModelsInvalid
from app.orchestrator.commands import Commands
from app.orchestrator.execute import ExecutionLimits, Executor
from app.orchestrator.lease import Lease
from app.orchestrator.loop import Drive, LoopLimits
from app.orchestrator.orders import Orders
from app.orchestrator.planning import ModelPlanner
from app.orchestrator.runner import Runner
from app.planner.plan_envelope import PlanLimits
from app.ports import Breakers, CapabilityAdapter, HotAnswers, Provider, Topic, WakeUps
from app.registry.registry import Registry
from app.settings import Role, Settings, variable
from app.store.database import Database, HotConnection, connect
from app.store.events import EventReader
from app.store.fitness import unfit
from app.store.notify import NotifyWakeUps
from app.store.partitions import make_partitions, make_partitions_hot
from app.store.queue_stats import QueueWatch
from app.store.registry import RegistryStore

log = logging.getLogger("flexrun.bootstrap")


class NotReady(FlexrunError):
    """The service can not start; the message says what to do."""

    code = "not_ready"


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
        wake_ups = _wake_ups(settings, connect_here, lambda topic: wake[topic](), lease)
        stack.push_async_callback(wake_ups.aclose)
        announce_work = partial(wake_ups.announce, Topic.WORK)
        breakers = _breakers(settings, lease)
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
        trace_limits = TraceLimits(settings.trace_sample, settings.trace_cpu_max)
        facets_of = registry.facets_of if settings.log_events else None
        journal = Journal(
            connect_here,
            await stack.enter_async_context(
                open_readings(feed, reader, metrics, exporters, trace_limits, facets_of)
            ),
            make_partitions_hot,
            after_commit=partial(wake_ups.announce, Topic.COMMITS),
            metrics=metrics,
        )
        await journal.start()
        stack.push_async_callback(journal.close)

        gateway = _gateway(settings, catalog, providers, breakers, database, stack)
        plan_limits = PlanLimits(settings.nodes_max, settings.edges_max, settings.depth_max)
        execution_limits = _execution_limits(settings)
        drive = Drive(
            journal=journal,
            executor=Executor(adapters, registry.image, execution_limits, breakers, gateway),
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
        CapabilityKind.LLM: LlmAdapter(),
    }
    registry = Registry(RegistryStore(database), adapters, sweep_s=settings.sweep_s)
    await registry.start()
    stack.push_async_callback(registry.close)
    for pack in packs:
        await registry.seed(pack.facets(), pack.registrations())
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


def open_catalog(settings: Settings) -> Catalog:
    """The catalog of the operator's file, with the variables of this process. Raises
    `ModelsInvalid`."""
    return load_catalog(settings.models_file, variable)


def open_providers(catalog: Catalog) -> dict[str, Provider]:
    """Those that can be called, by name; they connect on their first call, and have to be closed.

    Raises `ModelsInvalid` for an address or a key that HTTP can not carry.
    """
    able = [found for found in catalog.providers.values() if not found.unavailable]
    if not able:
        return {}
    from app.adapters.providers import Endpoint, make_provider  # noqa: PLC0415 - only with models

    try:
        endpoints = [
            Endpoint(p.name, p.kind, p.base_url, p.key, p.headers, p.project, p.api) for p in able
        ]
    except ValueError as error:  # it names the provider and the field, never a value
        raise ModelsInvalid(f"The file of models can not be used: {error}.") from None
    return {endpoint.name: make_provider(endpoint) for endpoint in endpoints}


def _gateway(
    settings: Settings,
    catalog: Catalog,
    providers: Mapping[str, Provider],
    breakers: Breakers,
    database: Database,
    stack: AsyncExitStack,
) -> Gateway | None:
    """The way to models; None when no provider is configured."""
    if not providers:
        return None
    retries = RetryPolicy(
        settings.max_retries + 1, settings.backoff_base_ms, settings.backoff_max_ms
    )
    calls = ModelCalls(catalog, providers, breakers, retries)
    cache = None
    if settings.llm_cache_days:
        cache = AnswerCache(database, _hot_answers(settings, stack))
        stack.push_async_callback(cache.aclose)
    return Gateway(catalog, calls, cache, timeout_s=settings.provider_timeout_s)


def _hot_answers(settings: Settings, stack: AsyncExitStack) -> HotAnswers | None:
    if settings.redis_url is None:
        return None
    from app.adapters.llm_cache.redis import RedisHotAnswers  # noqa: PLC0415 - only with a Redis

    with _redis_address():
        url = settings.redis_url.get_secret_value()
        hot = RedisHotAnswers(url, budget_s=settings.redis_budget_ms / 1000)
    stack.push_async_callback(hot.aclose)
    return hot


def _wake_ups(
    settings: Settings,
    connect_here: Callable[[], Awaitable[HotConnection]],
    on_wake: Callable[[Topic], None],
    lease: Lease,
) -> WakeUps:
    """By Redis where there is one, else by the database itself."""

    def has_company() -> bool:
        return lease.has_company

    if settings.redis_url is None:
        return NotifyWakeUps(connect_here, on_wake=on_wake, has_company=has_company)
    from app.adapters.wake.redis import RedisWakeUps  # noqa: PLC0415 - only with a Redis

    with _redis_address():
        url = settings.redis_url.get_secret_value()
        return RedisWakeUps(url, on_wake=on_wake, has_company=has_company)


def _breakers(settings: Settings, lease: Lease) -> Breakers:
    """Shared by Redis where there is one, else this process's own."""

    def worker_id() -> str:
        return lease.worker_id

    threshold, cooldown_s = settings.cb_threshold, settings.cb_cooldown_s
    if settings.redis_url is None:
        return LocalBreakers(threshold=threshold, cooldown_s=cooldown_s, worker_id_of=worker_id)
    from app.adapters.breakers.redis import RedisBreakers  # noqa: PLC0415 - only with a Redis

    with _redis_address():
        return RedisBreakers(
            settings.redis_url.get_secret_value(),
            threshold=threshold,
            cooldown_s=cooldown_s,
            worker_id_of=worker_id,
            budget_s=settings.redis_budget_ms / 1000,
        )


@contextmanager
def _redis_address() -> Iterator[None]:
    try:
        yield
    except ValueError:  # its text holds the address, and that holds a password
        raise NotReady(
            "REDIS_URL is no address of a Redis. It looks like redis://user:password@host:6379/0."
        ) from None


def _secrets(path: Path | None) -> SecretStore:
    """The operator's secrets: `{"name": {"value": "…", "hosts": ["…"]}}`. Raises `NotReady`."""
    if path is None:
        return SecretStore()
    try:
        found = orjson.loads(path.read_bytes())
        return SecretStore({n: (given["value"], given["hosts"]) for n, given in found.items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotReady(f"FLEXRUN_SECRETS_FILE can not be used ({type(error).__name__}).") from None
