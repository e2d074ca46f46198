"""The ASGI app with its lifespan, and the server that runs it.

`serve` is API and worker in one process. `api` accepts and streams runs and drives none; `worker`
drives them, and its only routes are the probes and the metrics.
"""

from __future__ import annotations

import gc
import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.api import (
    breakers,
    capabilities,
    contracts,
    events,
    facets,
    health,
    metrics,
    models,
    orders,
    plans,
    runs,
    slm,
)
from app.api.errors import install_error_handlers
from app.api.hot import HotRoutes
from app.api.openapi import install_openapi
from app.api.stream import TRANSPORT
from app.bootstrap import open_services
from app.settings import Role, Settings
from app.version import VERSION
from app.worker import Worker

log = logging.getLogger("flexrun.main")

GC_THRESHOLD = 20_000
"""New objects between two looks for garbage. A run makes hundreds, and nearly all of them die by
reference count: looking at every 700 took a twentieth of the time."""

PROBES = (health, metrics)
ROUTERS = (
    *(runs, orders, events, plans, capabilities, facets, contracts, models, slm, breakers),
    *PROBES,
)


def create_app(
    settings: Settings, dsn: str, role: Role = "serve", *, sole_user: bool = False
) -> FastAPI:
    """The app over a database at head. Its lifespan opens the services and starts the worker."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_services(settings, dsn, role, sole_user=sole_user) as services:
            worker = Worker(services)
            await worker.start()
            app.state.services = services
            app.state.worker = worker
            # What start-up made lives as long as the process: spare every collection from it.
            gc.freeze()
            gc.set_threshold(GC_THRESHOLD)
            try:
                yield
            finally:
                services.drain.begin()
                await worker.drain(settings.drain_grace_s)

    app = FastAPI(
        title="Flexrun",
        version=VERSION,
        summary="Runs agent work as verified plans.",
        lifespan=lifespan,
        redirect_slashes=False,
    )
    install_error_handlers(app)
    for module in PROBES if role == "worker" else ROUTERS:
        app.include_router(module.router)
    install_openapi(app)
    return app


class Protocol(HttpToolsProtocol):
    """uvicorn's protocol, which also shows a stream its socket, so that it can cut a dead one."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {TRANSPORT: {"transport": self.transport}}


class Server(uvicorn.Server):
    """A server that says how far its start is, and begins to drain on SIGTERM, before it waits for
    open streams to end.

    `on_signals_taken` is called once it heeds the signals, `on_listening` once it takes requests.
    """

    def __init__(self, config: uvicorn.Config, on_exit: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_exit = on_exit
        self.on_signals_taken: Callable[[], None] = lambda: None
        self.on_listening: Callable[[], None] = lambda: None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.on_signals_taken()
        await super().startup(sockets)
        self.on_listening()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._on_exit()
        super().handle_exit(sig, frame)


def make_server(app: FastAPI, settings: Settings, role: Role = "serve") -> Server:
    """The server of an app, with the fast loop and parser."""

    def begin_drain() -> None:
        if (services := getattr(app.state, "services", None)) is not None:
            services.drain.begin()

    config = uvicorn.Config(
        app if role == "worker" else HotRoutes(app),
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http=Protocol,
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        timeout_graceful_shutdown=5,
        timeout_keep_alive=75,
        backlog=4096,
    )
    return Server(config, begin_drain)
