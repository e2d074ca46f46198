"""Fixtures: a real Postgres and a real Redis for the session, a fresh database for every test.

One migrated template database is cloned per test, so that every test has real commits and locks
and none sees another's rows.
"""

from __future__ import annotations

import functools
import itertools
import os
import ssl
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, cast

import asyncpg
import hypothesis
import pytest

from app.bootstrap import Services, open_services
from app.settings import Settings
from app.store import database as database_module
from app.store.database import Database
from app.store.migrate import migrate
from app.worker import Worker
from tests.servers import RunningRedis, data_folder, start_postgres, start_redis
from tests.service import RunningService, running_service

_numbers = itertools.count(1)

# Every httpx client reads the certificates of the web, 22 ms long, and nearly all here speak plain
# HTTP. Nobody changes the context that all of them share now.
ssl.create_default_context = cast("Any", functools.cache(ssl.create_default_context))

# Every machine stands still now and then: how long an example takes says nothing of the code.
hypothesis.settings.register_profile(
    "patient",
    hypothesis.settings.default,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("patient")
# Nor is one that is busy out of service: tests of who waits no longer set limits of their own.
database_module.POOL_S = 30.0


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of whoever runs the tests do not reach the services under test."""
    ours = ("FLEXRUN_", "OTEL_", "LANGFUSE_")
    for name in [name for name in os.environ if name.startswith(ours)]:
        monkeypatch.delenv(name)
    own_names = ("DATABASE_URL", "REDIS_URL", "MAX_RETRIES", "PROVIDER_TIMEOUT_S")
    for name in (*own_names, "CB_THRESHOLD", "CB_COOLDOWN_S"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def untraced() -> Iterator[None]:
    """No coverage: it makes loops over thousands of examples two or three times as slow."""
    here, elsewhere = sys.gettrace(), threading.gettrace()
    sys.settrace(None)
    threading.settrace(None)
    yield
    threading.settrace(elsewhere)
    sys.settrace(here)


# Load, races, faults, whole processes: of the lines of the app these say what others have said, and
# tracing makes them twice as slow.
UNTRACED = {
    "chaos",
    "crash",
    "e2e",
    "test_breakers_in_runs",
    "test_breakers_many_processes",
    "test_canaries",
    "test_commits",
    "test_concurrency",
    "test_contract",
    "test_limited_capabilities",
    "test_llm_cache",
    "test_metrics",
    "test_orders",
    "test_parking",
    "test_provider_failures",
    "test_redis_breakers",
    "test_slm",
    "test_stream",
    "test_successors",
    "test_tracer",
    "test_tracing",
    "test_worker",
}


@pytest.fixture(autouse=True)
def _some_are_untraced(request: pytest.FixtureRequest) -> None:
    """What a property covers beyond the examples of other tests differs from run to run, too."""
    is_property = getattr(request.function, "is_hypothesis_test", False)
    if is_property or not UNTRACED.isdisjoint((request.path.stem, request.path.parent.name)):
        request.getfixturevalue("untraced")


@pytest.fixture(scope="session")
def postgres_dsn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the session's Postgres; tests use `dsn`, a database of their own."""
    with (
        data_folder(tmp_path_factory.mktemp("postgres")) as folder,
        start_postgres(folder) as server,
    ):
        yield server.dsn


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRedis]:
    with start_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


_templates: dict[str, str] = {}


async def _template(postgres_dsn: str) -> str:
    """The name of the migrated template, made on first use."""
    if postgres_dsn not in _templates:
        admin = await asyncpg.connect(postgres_dsn)
        try:
            await admin.execute("create database flexrun_template")
        finally:
            await admin.close()
        await migrate(with_database(postgres_dsn, "flexrun_template"))
        _templates[postgres_dsn] = "flexrun_template"
    return _templates[postgres_dsn]


def with_database(dsn: str, name: str) -> str:
    """The same server, another database."""
    return f"{dsn.rpartition('/')[0]}/{name}"


@asynccontextmanager
async def fresh_database(postgres_dsn: str) -> AsyncIterator[str]:
    """A database at head, cloned from the template and dropped at the end of the block."""
    template = await _template(postgres_dsn)
    name = f"test_{next(_numbers)}"
    admin = await asyncpg.connect(postgres_dsn)
    try:
        await admin.execute(f"create database {name} template {template} strategy file_copy")
        yield with_database(postgres_dsn, name)
        await admin.execute(f"drop database {name} with (force)")
    finally:
        await admin.close()


@pytest.fixture
async def dsn(postgres_dsn: str) -> AsyncIterator[str]:
    """A fresh database of the test's own."""
    async with fresh_database(postgres_dsn) as dsn:
        yield dsn


@pytest.fixture
async def database(dsn: str) -> AsyncIterator[Database]:
    database = await Database.open(dsn)
    yield database
    await database.close()


@pytest.fixture
def settings() -> Settings:
    """Settings of a service under test."""
    return make_settings()


def make_settings(**changes: object) -> Settings:
    """Settings with a few values changed."""
    base: dict[str, object] = {
        "allow_unsafe_postgres": True,
        "drain_grace_s": 2.0,
        "submit_timeout_s": 30.0,
        "backoff_base_ms": 1,
        "backoff_max_ms": 20,
        "egress_allow": ("127.0.0.1",),
    }
    return Settings.model_validate({**base, **changes})


@pytest.fixture
async def services(dsn: str, settings: Settings) -> AsyncIterator[Services]:
    """The open services with a worker, without HTTP."""
    async with AsyncExitStack() as stack:
        services = await stack.enter_async_context(open_services(settings, dsn))
        worker = Worker(services)
        await worker.start()
        yield services
        await worker.drain(settings.drain_grace_s)


@pytest.fixture
async def service(dsn: str, settings: Settings) -> AsyncIterator[RunningService]:
    """The whole service on a free port, in this event loop."""
    async with running_service(settings, dsn) as service:
        yield service
