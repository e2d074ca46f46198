"""The service under test: over real HTTP, in this event loop or as a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from app.bootstrap import Services
from app.main import Server, create_app, make_server
from app.settings import Role, Settings
from tests.sse import SseEvent, read_stream


class _QuietServer(Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """pytest keeps its signal handlers."""
        yield


@dataclass
class RunningService:
    """A service that answers: `client` speaks to it, `services` are its insides."""

    url: str
    client: httpx.AsyncClient
    services: Services
    server: Server

    async def submit(self, envelope: dict[str, Any], **headers: str) -> dict[str, Any]:
        """POST a run and return its resource."""
        response = await self.client.post("/v1/runs", json=envelope, headers=headers)
        assert response.status_code == 202, response.text
        found: dict[str, Any] = response.json()
        return found

    async def finished(self, envelope: dict[str, Any]) -> dict[str, Any]:
        """POST a run and wait for its end."""
        response = await self.client.post("/v1/runs", json=envelope, headers={"Prefer": "wait=30"})
        assert response.status_code == 200, response.text
        found: dict[str, Any] = response.json()
        return found

    async def stream(self, envelope: dict[str, Any], **headers: str) -> list[SseEvent]:
        """POST a run as a stream and read it to its end."""
        headers = {"Accept": "text/event-stream", **headers}
        async with self.client.stream(
            "POST", "/v1/runs", json=envelope, headers=headers
        ) as response:
            assert response.status_code == 200, await response.aread()
            return await read_stream(response)

    async def events(self, run_id: str, **headers: str) -> list[SseEvent]:
        """The whole stream of a run."""
        headers = {"Accept": "text/event-stream", **headers}
        async with self.client.stream(
            "GET", f"/v1/runs/{run_id}/events", headers=headers
        ) as response:
            if response.status_code == 204:
                return []
            assert response.status_code == 200, await response.aread()
            return await read_stream(response)


async def past_its_fence(services: Services) -> None:
    """Let a worker find that it is past its own lease.

    A renewal under way would set that right again, so until it takes part as somebody else.
    """
    lease = services.lease
    before = lease.worker_id
    async with asyncio.timeout(20):
        while lease.worker_id == before:
            lease._good_until = 0.0
            await asyncio.sleep(0.01)


@asynccontextmanager
async def running_service(
    settings: Settings, dsn: str, role: Role = "serve"
) -> AsyncIterator[RunningService]:
    """Start the service on a free port and stop it as SIGTERM would."""
    app = create_app(settings, dsn, role)
    server = make_server(app, settings.model_copy(update={"port": 0}))
    server.__class__ = _QuietServer
    task = asyncio.create_task(server.serve())
    while not server.started:
        if task.done():
            await task
            raise RuntimeError("the service did not start")
        await asyncio.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    try:
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            yield RunningService(url, client, app.state.services, server)
    finally:
        app.state.services.drain.begin()
        server.should_exit = True
        await task
