"""`GET /metrics` of a real service: exact values after known runs, and what it leaves out."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path

import asyncpg
import httpx
import orjson
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from app.journal import feed
from app.store import queue_stats
from app.store.database import Database
from app.store.migrate import migrate
from app.store.queue_stats import LANE_COUNT_MAX, read_queue
from app.version import VERSION
from docs.generate import DOCS
from tests.conftest import make_settings, with_database
from tests.envelopes import diamond, echo_node, graph
from tests.servers import start_postgres
from tests.service import RunningService, past_its_fence, running_service
from tests.shared_service import register, until
from tests.tools import (
    answer,
    answer_at_gate,
    fail_once,
    hang_up,
    http_capability,
    running_tool,
)

PATIENCE_S = 20.0
SHARED = {"runs_unfinished", "queue_depth", "queue_oldest_age_seconds", "workers"}


@pytest.fixture(autouse=True)
def _slow_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reading of the queue that takes its time counts as well."""
    monkeypatch.setattr(queue_stats, "READ_TIMEOUT_S", 30.0)


@pytest.fixture
def no_poll(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a poll finds before the committer has told of it would count as told by others."""
    monkeypatch.setattr(feed, "POLL_S", 3_600.0)


class Page:
    """One answer of `/metrics`, parsed."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.families: list[Metric] = list(text_string_to_metric_families(text))
        self._samples = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in self.families
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float:
        return self._samples[f"flexrun_{name}", tuple(sorted(labels.items()))]

    def by(self, name: str, label: str) -> dict[str, float]:
        """The values of a family with one label."""
        return {
            dict(labels)[label]: value
            for (found, labels), value in self._samples.items()
            if found == f"flexrun_{name}"
        }

    @property
    def names(self) -> set[str]:
        return {name.removeprefix("flexrun_") for name, _ in self._samples}


async def scrape(service: RunningService) -> Page:
    response = await service.client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return Page(response.text)


async def scrape_until(service: RunningService, holds: Callable[[Page], bool]) -> Page:
    """Scrape again and again until the page says so."""
    async with asyncio.timeout(PATIENCE_S):
        while not holds(page := await scrape(service)):  # noqa: ASYNC110 - untold
            await asyncio.sleep(0.01)
    return page


@pytest.mark.usefixtures("no_poll")
async def test_known_runs_give_exact_numbers(service: RunningService) -> None:
    for _ in range(3):
        assert (await service.finished(diamond()))["status"] == "done"
    assert len(await service.stream(diamond())) == 12
    page = await scrape_until(service, lambda page: page.value("runs_driven") == 0)

    assert page.value("build_info", version=VERSION) == 1
    assert page.by("runs_finished_total", "status") == {"done": 4, "failed": 0, "cancelled": 0}
    assert page.by("node_outcomes_total", "outcome") == {
        "done": 16,
        "failed": 0,
        "retry": 0,
        "blocked": 0,
        "skipped": 0,
    }
    assert page.by("node_duration_seconds_count", "capability_id") == {"util.echo": 16}
    assert page.value("journal_commits_total") == 16
    assert page.value("journal_flush_runs_count") == page.value("journal_flush_runs_sum") == 16
    assert page.value("journal_flush_runs_bucket", le="1.0") == 16
    assert page.value("journal_flush_events_count") == 16
    assert page.value("journal_flush_events_sum") == 4 * 12
    assert page.value("stream_frames_total") == 12
    assert page.value("wake_latency_seconds_count") == 0
    assert page.value("database_up") == 1
    assert page.by("runs_unfinished", "status") == {"queued": 0, "running": 0}
    assert page.by("workers", "role") == {"serve": 1, "api": 0, "worker": 0}
    for name in ("takeovers", "lease_losses", "journal_stale_writes"):
        assert page.value(f"{name}_total") == 0


async def test_outcomes_and_signals_are_counted_by_what_they_were(service: RunningService) -> None:
    async with running_tool(once=fail_once, ok=answer, hang=hang_up) as tool:
        await register(
            service,
            http_capability(tool, "once", "idempotent"),
            http_capability(tool, "ok", "pure"),
            http_capability(tool, "hang", "at_most_once"),
        )
        nodes = [echo_node(name, capability=f"test.{name}") for name in ("once", "ok")]
        assert (await service.finished(graph(*nodes)))["status"] == "done"
        run = await service.submit(graph(echo_node("hang", capability="test.hang")))
        await until(service, run["run_id"], "NODE_BLOCKED")
        page = await scrape(service)
        assert page.by("node_outcomes_total", "outcome") == {
            "done": 2,
            "failed": 0,
            "retry": 1,
            "blocked": 1,
            "skipped": 0,
        }
        decision = {"nodes": {"hang": {"decision": "fail"}}}
        url = f"/v1/runs/{run['run_id']}/resume"
        assert (await service.client.post(url, json=decision)).status_code == 202
        await until(service, run["run_id"], "RUN_FAILED")
    page = await scrape(service)

    assert page.by("signals_applied_total", "kind") == {"cancel": 0, "pause": 0, "resume": 1}
    assert page.by("runs_finished_total", "status") == {"done": 1, "failed": 1, "cancelled": 0}
    assert page.by("node_outcomes_total", "outcome")["failed"] == 1
    assert page.by("node_duration_seconds_count", "capability_id") == {
        "test.once": 2,
        "test.ok": 1,
        "test.hang": 1,
    }


async def test_open_streams_are_counted_while_they_are_open(service: RunningService) -> None:
    async with running_tool(gate=answer_at_gate) as tool:
        await register(service, http_capability(tool, "gate", "pure"))
        run = await service.submit(graph(echo_node("A", capability="test.gate")))
        following = [asyncio.create_task(service.events(run["run_id"])) for _ in range(3)]
        page = await scrape_until(service, lambda page: page.value("streams") == 3)
        assert page.value("runs_driven") == 1
        assert page.by("runs_unfinished", "status") == {"queued": 0, "running": 1}
        tool.gate.set()
        streams = await asyncio.gather(*following)
    page = await scrape_until(service, lambda page: page.value("streams") == 0)

    assert page.value("stream_frames_total") == sum(len(events) for events in streams)


async def test_the_queue_is_counted_by_lane(dsn: str) -> None:
    async with running_service(make_settings(runs_max=0), dsn) as service:
        for lane, count in {"interactive": 3, "standard": 2, "batch": 1}.items():
            for _ in range(count):
                await service.submit(diamond(constraints={"lane": lane}))
        page = await scrape(service)
        ages = page.by("queue_oldest_age_seconds", "lane")

        assert page.by("queue_depth", "lane") == {"interactive": 3, "standard": 2, "batch": 1}
        assert page.by("runs_unfinished", "status") == {"queued": 6, "running": 0}
        assert set(ages) == {"interactive", "standard", "batch"}
        assert all(0 < age < PATIENCE_S for age in ages.values())


async def test_an_append_under_an_old_epoch_is_a_stale_write(service: RunningService) -> None:
    async with running_tool(gate=answer_at_gate) as tool:
        await register(service, http_capability(tool, "gate", "idempotent"))
        run = await service.submit(graph(echo_node("A", capability="test.gate")))
        await asyncio.wait_for(tool.reached(1), PATIENCE_S)
        connection = await asyncpg.connect(service.services.database.dsn)
        # As another worker does: a new epoch, and then it gives the run back. It is not due at
        # once: whoever takes it here ends the old drive, maybe before that has written anything.
        await connection.execute(
            """update run_heads set epoch = epoch + 1, owner = null, wake_at = null
            where run_id = $1""",
            run["run_id"],
        )
        tool.gate.set()
        await scrape_until(service, lambda page: page.value("journal_stale_writes_total") == 1)
        await connection.execute(
            "update run_heads set wake_at = clock_timestamp() where run_id = $1", run["run_id"]
        )
        await connection.close()
        await until(service, run["run_id"], "RUN_DONE")
    page = await scrape(service)

    assert page.value("journal_stale_writes_total") == 1
    assert page.value("takeovers_total") == 1
    assert page.by("runs_finished_total", "status")["done"] == 1


async def test_a_lease_that_ran_out_is_counted(service: RunningService) -> None:
    await past_its_fence(service.services)
    page = await scrape(service)
    assert service.services.lease.held
    assert page.value("lease_losses_total") == 1
    assert (await service.finished(diamond()))["status"] == "done"


async def test_a_far_side_that_is_down_shows_as_an_open_breaker(dsn: str) -> None:
    async with (
        running_tool(hang=hang_up) as tool,
        running_service(make_settings(cb_threshold=1), dsn) as service,
    ):
        await register(service, http_capability(tool, "hang", "pure", max_attempts=1))
        before = await scrape(service)
        run = await service.finished(graph(echo_node("A", capability="test.hang")))
        page = await scrape(service)

    assert run["status"] == "failed"
    assert before.by("breakers", "status")["open"] == 0
    assert page.by("breakers", "status") == {"closed": 0, "open": 1, "half_open": 0}
    assert page.value("breaker_degraded") == 0
    assert page.by("breaker_transitions_total", "kind") == {
        "tripped": 1,
        "half_open": 0,
        "closed": 0,
    }


async def test_the_wake_latency_is_that_of_runs_that_others_drive(dsn: str) -> None:
    async with (
        running_tool(gate=answer_at_gate) as tool,
        running_service(make_settings(), dsn) as driver,
        running_service(make_settings(), dsn) as other,
    ):
        await register(driver, http_capability(tool, "gate", "idempotent"))
        run = await driver.submit(graph(echo_node("A", capability="test.gate")))
        following = asyncio.create_task(other.events(run["run_id"]))
        await asyncio.wait_for(tool.reached(1), PATIENCE_S)
        feed = other.services.feed
        async with asyncio.timeout(PATIENCE_S):
            while not any(c.is_live for c in feed._channels.values()):  # noqa: ASYNC110 - untold
                await asyncio.sleep(0.01)
        assert (await scrape(other)).value("wake_latency_seconds_count") == 0
        tool.gate.set()
        assert (await asyncio.wait_for(following, PATIENCE_S))[-1].event == "RUN_DONE"
        page = await scrape(other)

        assert page.value("wake_latency_seconds_count") >= 1
        assert 0 <= page.value("wake_latency_seconds_sum") < PATIENCE_S
        assert (await scrape(driver)).value("wake_latency_seconds_count") == 0
        assert page.by("workers", "role")["serve"] == 2


async def test_a_database_that_is_away_leaves_out_its_part_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_stats, "READ_EVERY_S", 0.0)
    monkeypatch.setattr(queue_stats, "REST_FACTOR", 0)
    with start_postgres(tmp_path) as server:
        await migrate(server.dsn)
        async with running_service(make_settings(submit_timeout_s=0.5), server.dsn) as service:
            await service.finished(diamond())
            there = await scrape(service)
            server.stop()
            away = await scrape(service)

    assert (there.value("database_up"), away.value("database_up")) == (1, 0)
    assert there.names - away.names == SHARED
    assert away.value("runs_finished_total", status="done") == 1


async def test_the_queue_is_asked_for_once_in_a_while_however_many_ask(dsn: str) -> None:
    async with running_service(make_settings(runs_max=0), dsn) as service:
        assert (await scrape(service)).by("queue_depth", "lane")["standard"] == 0
        await service.submit(diamond())
        pages = await asyncio.gather(*(scrape(service) for _ in range(20)))
        assert [page.by("queue_depth", "lane")["standard"] for page in pages] == [0] * 20


async def test_no_secret_is_told(dsn: str, tmp_path: Path) -> None:
    secrets = tmp_path / "secrets.json"
    secrets.write_bytes(orjson.dumps({"key": {"value": "marker-s", "hosts": ["127.0.0.1"]}}))
    async with (
        running_tool(hang=hang_up) as tool,
        running_service(make_settings(secrets_file=secrets), dsn) as service,
    ):
        body = http_capability(tool, "hang", "pure", max_attempts=1)
        body["config"]["secret_headers"] = {"Authorization": "key"}
        await register(service, body)
        envelope = graph(
            echo_node("marker-n", capability="test.hang"),
            objective="marker-o",
            inputs={"marker-i": "marker-v"},
            metadata={"label": "marker-l"},
        )
        assert (await service.finished(envelope))["status"] == "failed"
        page = await scrape(service)
    password = httpx.URL(dsn).password

    assert password
    assert password not in page.text
    assert "marker" not in page.text
    assert "test.hang" in page.text


# --- the queue's statements -----------------------------------------------------------------------


async def plans(dsn: str, statements: list[str]) -> list[str]:
    connection = await asyncpg.connect(dsn)
    try:
        for setting in queue_stats._BY_INDEX:
            await connection.execute(setting.replace("set local", "set"))
        return [
            "\n".join(row[0] for row in await connection.fetch(f"explain {statement}"))
            for statement in statements
        ]
    finally:
        await connection.close()


async def test_finished_runs_are_never_read(dsn: str, database: Database) -> None:
    connection = await asyncpg.connect(dsn)
    await connection.execute(
        """insert into run_heads (run_id, tenant_id, epoch, seq, status, lane)
        select gen_random_uuid(), 't' || n % 7, 1, 3,
            case when n % 3 = 0 then 'queued' else 'done' end, 'batch'
        from generate_series(1, 3000) n"""
    )
    await connection.execute("analyze run_heads")
    await connection.close()
    queued = str(queue_stats._QUEUED).replace(":lanes", "'{batch}'").replace(":most", "100000")
    found = await plans(dsn, [queued, str(queue_stats._UNDER_WAY)])

    assert (await read_queue(database)).depth == {"interactive": 0, "standard": 0, "batch": 1000}
    assert all("Seq Scan" not in plan for plan in found), found
    used = set(re.findall(r"using (run_heads_\w+)", "\n".join(found)))
    assert used == {"run_heads_queued", "run_heads_owned", "run_heads_due"}


async def test_counting_a_lane_stops_somewhere(
    dsn: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_stats, "LANE_COUNT_MAX", 10)
    connection = await asyncpg.connect(dsn)
    await connection.execute(
        """insert into run_heads (run_id, tenant_id, epoch, seq, status, lane)
        select gen_random_uuid(), 't', 1, 3, 'queued', 'batch' from generate_series(1, 25)"""
    )
    await connection.close()

    assert LANE_COUNT_MAX == 100_000
    assert (await read_queue(database)).depth["batch"] == 10


async def test_a_database_that_refuses_is_away_as_well(postgres_dsn: str, dsn: str) -> None:
    database = await Database.open(dsn)
    watch = queue_stats.QueueWatch(database)
    assert await watch.stats() is not None
    nobody = await Database.open(with_database(postgres_dsn, "postgres"))  # no tables there
    try:
        assert await queue_stats.QueueWatch(nobody).stats() is None
    finally:
        await nobody.close()
        await database.close()


# --- the documents --------------------------------------------------------------------------------


def documented() -> dict[str, tuple[str, frozenset[str], str]]:
    """Name → type, labels and meaning, as the page of the documents has them."""
    text = (DOCS / "METRICS.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `flexrun_(\w+)` \| (\w+) \| (.*?)\| (.+) \|$", text, re.MULTILINE)
    assert len({row[0] for row in rows}) == len(rows)
    return {
        name: (kind, frozenset(re.findall(r"`(\w+)`", labels)), meaning)
        for name, kind, labels, meaning in rows
    }


async def test_the_page_of_the_documents_is_what_is_answered(service: RunningService) -> None:
    await service.finished(diamond())
    page = await scrape(service)
    answered = {}
    for family in page.families:
        if family.name.startswith("flexrun_"):
            name = family.name.removeprefix("flexrun_") + "_total" * (family.type == "counter")
            labels = {label for sample in family.samples for label in sample.labels} - {"le"}
            answered[name] = (family.type, frozenset(labels), family.documentation)

    assert answered == documented()
