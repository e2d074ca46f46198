"""One service for all tests of a file, and an audit of everything that it wrote.

Starting a service takes longer than most tests, so a file starts one. What the tests leave in its
journal is judged at the end: no gaps, one last word a run, every event in its declared shape, and
no run that is still under way.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import httpx
import orjson

from app.domain.event_shapes import event_models
from app.domain.events import TERMINAL_EVENTS, EventType
from tests.conftest import fresh_database, make_settings
from tests.service import RunningService, running_service
from tests.sse import SseEvent, SseParser

PATIENCE_S = 30.0
AT_REST = {"done", "failed", "cancelled", "awaiting_human"}


@asynccontextmanager
async def shared_service(postgres_dsn: str, **changes: object) -> AsyncIterator[RunningService]:
    """A service on a database of its own; its journal is audited when it has stopped."""
    async with fresh_database(postgres_dsn) as dsn:
        async with running_service(make_settings(**changes), dsn) as service:
            yield service
        await audit(dsn)


async def rows(service: RunningService, sql: str, *arguments: Any) -> list[asyncpg.Record]:
    """Read the service's database past the service."""
    connection = await asyncpg.connect(service.services.database.dsn)
    try:
        found: list[asyncpg.Record] = await connection.fetch(sql, *arguments)
        return found
    finally:
        await connection.close()


async def audit(dsn: str) -> int:
    """Check every run in a database that nobody writes to any more; how many there are."""
    connection = await asyncpg.connect(dsn)
    try:
        heads = await connection.fetch(
            """select run_id, seq, status from run_heads join runs using (run_id)
            where pruned_at is null"""
        )
        stored = await connection.fetch(
            "select run_id, seq, type, body from events order by run_id, seq"
        )
    finally:
        await connection.close()
    models = event_models()
    bodies: dict[Any, list[tuple[int, str]]] = {}
    for run_id, seq, event_type, body in stored:
        event = orjson.loads(body)
        models[EventType(event_type)].model_validate(event)
        assert (event["seq"], event["type"], event["run_id"]) == (seq, event_type, str(run_id))
        bodies.setdefault(run_id, []).append((seq, event_type))
    for run_id, head_seq, status in heads:
        events = bodies[run_id]
        assert [seq for seq, _ in events] == list(range(1, head_seq + 1)), run_id
        terminal = [seq for seq, event_type in events if event_type in TERMINAL_EVENTS]
        is_over = status in ("done", "failed", "cancelled")
        assert terminal == ([head_seq] if is_over else []), run_id
        assert status in AT_REST, f"run {run_id} is left {status}"
    return len(heads)


async def until(service: RunningService, run_id: str, event_type: str, after: int = 0) -> SseEvent:
    """Follow a run from behind `after` up to the first event of a type; fails rather than hangs."""
    headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
    parser = SseParser()
    url = f"/v1/runs/{run_id}/events"
    missing = f"no {event_type}"
    try:
        async with (
            asyncio.timeout(PATIENCE_S),
            service.client.stream("GET", url, headers=headers) as response,
        ):
            assert response.status_code == 200, await response.aread()
            async for chunk in response.aiter_bytes():
                parser.feed(chunk)
                for event in parser.events:
                    if event.event == event_type:
                        return event
    except TimeoutError:
        missing += f" within {PATIENCE_S:.0f} s"
    raise AssertionError(f"{missing} in {[event.event for event in parser.events]}")


async def register(service: RunningService, *bodies: dict[str, Any]) -> None:
    """Register capabilities, or replace them."""
    for body in bodies:
        response = await service.client.post("/v1/capabilities", json=body)
        assert response.status_code in (200, 201), response.text


def problem(response: httpx.Response, status: int, code: str) -> list[dict[str, Any]]:
    """Check that a response is this problem, and give its faults."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert (body["status"], body["code"]) == (status, code), body
    assert body["type"] == f"urn:flexrun:problem:{code}"
    assert body["title"]
    assert body["detail"]
    faults: list[dict[str, Any]] = body["errors"]
    return faults


def codes(faults: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Code and pointer of each fault."""
    return [(fault["code"], fault["pointer"]) for fault in faults]
