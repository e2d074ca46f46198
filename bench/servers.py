"""Stand-ins that the service is compared with, as processes: `python -m bench.servers KIND`.

post    FastAPI with one route that validates a 2 KB body and does nothing else
stock   sse-starlette's EventSourceResponse as its documentation shows it: one queue a client,
        a dict an event
"""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import AsyncIterator
from typing import Any

import orjson
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel, Field
from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

Item = dict[str, Any]


class Step(BaseModel):
    """A node as a service would declare it."""

    id: str = Field(min_length=1, max_length=100)
    capability: str
    requires: list[str] = Field(default_factory=list)
    inputs: dict[str, Any] = Field(default_factory=dict)


class Job(BaseModel):
    """A body about as rich as an envelope."""

    objective: str = Field(min_length=1)
    labels: dict[str, str] = Field(default_factory=dict)
    nodes: list[Step] = Field(max_length=2_000)


def job_body(size: int) -> bytes:
    """A valid `Job` of this many bytes."""
    job: Item = {
        "objective": "",
        "labels": {f"label{i}": "value" for i in range(8)},
        "nodes": [
            {"id": name, "capability": "util.echo", "requires": [], "inputs": {"ok": True}}
            for name in "ABCD"
        ],
    }
    job["objective"] = "y" * (size - len(orjson.dumps(job)))
    return orjson.dumps(job)


def post_app() -> ASGIApp:
    """The least that FastAPI can do with a POST."""
    app = FastAPI()

    @app.post("/jobs", status_code=202)
    async def submit(job: Job) -> Item:
        return {"nodes": len(job.nodes)}

    return app


def stock_app() -> ASGIApp:
    """PUT /bursts stores frames, GET /stream attaches, POST /go sends them to all who did."""
    queues: list[asyncio.Queue[Item | None]] = []
    bursts: list[list[Item | None]] = []

    async def load(request: Request) -> Response:
        bursts[:] = orjson.loads(await request.body())
        return Response()

    async def stream(request: Request) -> Response:
        queue: asyncio.Queue[Item | None] = asyncio.Queue()
        queues.append(queue)

        async def events() -> AsyncIterator[Item]:
            while (item := await queue.get()) is not None:
                yield item

        return EventSourceResponse(events())

    async def go(request: Request) -> Response:
        end: list[Item | None] = [None]
        for burst in [*bursts, end]:
            for queue in queues:
                for item in burst:
                    queue.put_nowait(item)
            await asyncio.sleep(0)
        queues.clear()
        return Response()

    return Starlette(
        routes=[
            Route("/bursts", load, methods=["PUT"]),
            Route("/stream", stream),
            Route("/go", go, methods=["POST"]),
        ]
    )


def main(kind: str) -> None:
    """Serve until SIGTERM, with the loop and parser that the service uses."""
    app = {"post": post_app, "stock": stock_app}[kind]()
    config = uvicorn.Config(
        app, loop="uvloop", http="httptools", log_level="error", access_log=False, backlog=4096
    )
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(4096)
    print(f"ready at http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main(sys.argv[1])
