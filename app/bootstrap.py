"""Settings -> Services: the only module that names concrete adapters and joins the floors."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import orjson

from app.adapters.capabilities.builtin import BuiltinAdapter
from app.adapters.capabilities.egress import EgressPolicy
from app.adapters.capabilities.egress_transport import EgressTransport
from app.adapters.capabilities.http import HttpAdapter
from app.adapters.capabilities.pack import standard_packs
from app.adapters.capabilities.secrets import SecretStore
from app.domain.capability import CapabilityKind
from app.domain.errors import FlexrunError
from app.journal.feed import Feed
from app.journal.record import Journal
from app.kit import failpoints
from app.kit.drain import Drain
from app.orchestrator.commands import Commands
from app.orchestrator.execute import ExecutionLimits, Executor
from app.orchestrator.lease import Lease
from app.orchestrator.loop import Drive, LoopLimits
from app.orchestrator.runner import Runner
from app.planner.plan_envelope import PlanLimits
from app.ports import CapabilityAdapter
from app.registry.registry import Registry
from app.settings import Settings
from app.store.database import Database, HotConnection, connect, server_facts
from app.store.events import EventReader
from app.store.migrate import current_revision, head_revision
from app.store.notify import WakeUps
from app.store.partitions import make_partitions, make_partitions_hot
from app.store.registry import RegistryStore

log = logging.getLogger("flexrun.bootstrap")

DURABILITY = ("fsync", "full_page_writes", "synchronous_commit")


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
    lease: Lease
    runner: Runner
    commands: Commands
    drain: Drain


@asynccontextmanager
async def open_services(
    settings: Settings, dsn: str, *, sole_user: bool = False
) -> AsyncIterator[Services]:
    """Open everything, in the order in which it depends on each other, and close it in reverse.

    `sole_user`: we started the database server, and nobody else uses it. Whoever held runs before
    is dead, and no lease of theirs is waited for.
    Raises `NotReady` when the database is behind or not durable, `Unavailable` when it is away.
    """
    if settings.failpoint:
        failpoints.arm(settings.failpoint)
    async with AsyncExitStack() as stack:
        database = await Database.open(dsn)
        stack.push_async_callback(database.close)
        await _check_database(database, settings)
        await make_partitions(database, datetime.now(UTC).date())

        async def connect_here() -> HotConnection:
            return await connect(dsn)

        reader = EventReader(database)
        feed = Feed(reader)
        feed.start()
        stack.push_async_callback(feed.close)
        lease = Lease(connect_here, sole_user=sole_user)
        wake_ups = WakeUps(connect_here, on_wake=feed.nudge, has_company=lambda: lease.has_company)
        wake_ups.start()
        stack.push_async_callback(wake_ups.close)
        journal = Journal(connect_here, feed, make_partitions_hot, after_commit=wake_ups.announce)
        await journal.start()
        stack.push_async_callback(journal.close)

        transport = EgressTransport(EgressPolicy(settings.egress_allow))
        packs = standard_packs(transport)
        http = HttpAdapter(
            transport,
            _secrets(settings.secrets_file),
            response_bytes_max=settings.value_bytes_max,
        )
        stack.push_async_callback(http.aclose)
        adapters: dict[CapabilityKind, CapabilityAdapter] = {
            CapabilityKind.BUILTIN: BuiltinAdapter(packs),
            CapabilityKind.HTTP: http,
        }
        registry = Registry(RegistryStore(database), adapters, sweep_s=settings.sweep_s)
        await registry.start()
        stack.push_async_callback(registry.close)
        for pack in packs:
            await registry.seed(pack.facets(), pack.registrations())

        executor = Executor(
            adapters,
            registry.image,
            ExecutionLimits(
                settings.value_bytes_max, settings.backoff_base_ms, settings.backoff_max_ms
            ),
        )
        plan_limits = PlanLimits(settings.nodes_max, settings.edges_max, settings.depth_max)
        drive = Drive(
            journal=journal,
            executor=executor,
            image=registry.image,
            lease=lease,
            limits=LoopLimits(settings.events_max, settings.latency_record),
            plan_limits=plan_limits,
        )
        runner = Runner(drive, runs_max=settings.runs_max)
        drain = Drain()
        drain.on_begin(feed.wake_all)
        yield Services(
            settings=settings,
            database=database,
            reader=reader,
            feed=feed,
            journal=journal,
            registry=registry,
            lease=lease,
            runner=runner,
            commands=Commands(
                journal, runner, reader, database, plan_limits, settings.submit_timeout_s
            ),
            drain=drain,
        )


def _secrets(path: Path | None) -> SecretStore:
    """The operator's secrets: `{"name": {"value": "…", "hosts": ["…"]}}`. Raises `NotReady`."""
    if path is None:
        return SecretStore()
    try:
        found = orjson.loads(path.read_bytes())
        return SecretStore({n: (given["value"], given["hosts"]) for n, given in found.items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotReady(f"FLEXRUN_SECRETS_FILE can not be used ({type(error).__name__}).") from None


async def _check_database(database: Database, settings: Settings) -> None:
    """Refuse a database that is behind, or that may forget what it acknowledged."""
    revision, head = await current_revision(database), head_revision()
    if revision != head:
        raise NotReady(
            f"The database is at revision {revision or 'empty'}, this version needs {head}. "
            "Run `flexrun migrate` first."
        )
    async with database.read() as connection:
        facts = await server_facts(connection)
    unsafe = [name for name in DURABILITY if facts[name] == "off"]
    if unsafe and not settings.allow_unsafe_postgres:
        raise NotReady(
            f"Postgres runs with {', '.join(unsafe)} off, so that a crash could lose accepted "
            "runs. Turn it on; FLEXRUN_ALLOW_UNSAFE_POSTGRES=true accepts it for tests."
        )
