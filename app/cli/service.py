"""A process of the service on its listening sockets, until a signal.

Imports the whole app: `serve.py` does so in a thread, while the database starts.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from types import FrameType

from fastapi import FastAPI

from app.cli.config import DatabaseInUse, masked
from app.cli.errors import ExitCode
from app.main import Server, create_app, make_server
from app.settings import Role, Settings

log = logging.getLogger("flexrun.service")


class _StartWatch:
    """Keeps why the app did not start. uvicorn would only log it, as a traceback."""

    def __init__(self, app: FastAPI) -> None:
        self.error: Exception | None = None
        self._log = logging.getLogger("uvicorn.error")
        self._log.disabled = True
        self._inner = app.router.lifespan_context
        app.router.lifespan_context = self._lifespan

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        try:
            async with self._inner(app):
                yield
        except Exception as error:
            self.error = error
            raise

    def end(self) -> None:
        """The start is over: uvicorn may log again."""
        self._log.disabled = False


def run_service(
    settings: Settings,
    database: DatabaseInUse,
    role: Role,
    listeners: list[socket.socket],
    signals_taken: Callable[[], None],
) -> None:
    """Serve until a signal, and leave in order unless a second SIGINT comes.

    `signals_taken` is called once uvicorn heeds the signals. Raises why the app did not start.
    """
    app = create_app(settings, database.dsn, role, sole_user=database.sole_user)
    watch = _StartWatch(app)
    server = make_server(app, settings, role)

    def announce() -> None:
        watch.end()
        gc.enable()
        if not server.should_exit:
            signal.signal(signal.SIGINT, partial(_interrupted, server))
            _say(_ready_line(settings, role, listeners[0]))

    server.on_signals_taken, server.on_listening = signals_taken, announce

    async def serve_until_signal() -> None:
        try:
            await server.serve(sockets=listeners)
        except SystemExit:
            # So uvicorn says that the app did not start.
            if watch.error is None:
                raise

    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        runner.run(serve_until_signal())
    if watch.error is not None:
        raise watch.error


def _interrupted(server: Server, sig: int, frame: FrameType | None) -> None:
    """The first Ctrl-C drains, the next one does not wait: the journal is whole at any moment."""
    if server.should_exit:
        os._exit(ExitCode.INTERRUPTED)
    server.handle_exit(sig, frame)


def _say(line: str) -> None:
    """One line on stdout. Whoever reads it may be gone and a disk full: the service goes on."""
    try:
        print(line, flush=True)
    except OSError as error:
        log.warning("could not print %r (%s)", line, type(error).__name__)
        # What is still in the buffer would fail again, and turn the exit code into 120.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _ready_line(settings: Settings, role: Role, listener: socket.socket) -> str:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    if settings.database_url is None:
        where = f"data in {settings.data_dir}"
    else:
        where = f"database {masked(settings.database_url.get_secret_value())}"
    what = "Flexrun" if role == "serve" else f"Flexrun {role}"
    return f"{what} is ready at http://{host}:{listener.getsockname()[1]} ({where})"
