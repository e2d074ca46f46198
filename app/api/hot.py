"""The hot route ahead of FastAPI: `POST /v1/runs` without its middleware, routing and dependencies.

FastAPI documents the route and would answer it in the same way, with the same function; its
machinery around the call costs more than planning and journaling a small run together. Streams of
other routes are run here as well, after FastAPI has returned.
"""

from __future__ import annotations

import asyncio
import contextlib

from fastapi import FastAPI
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from app.api.errors import answer_error
from app.api.runs import submit_run
from app.api.stream import STREAMS
from app.domain.errors import Unavailable


class HotRoutes:
    """The ASGI app that the server runs: the hot route itself, all else through FastAPI."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["path"] == "/v1/runs" and scope["method"] == "POST":
            await self._submit(scope, receive, send)
        else:
            streams = scope[STREAMS] = []
            try:
                await self._app(scope, receive, send)
            except asyncio.CancelledError:
                await _refuse_late(scope, receive, send)
                raise
            for stream in streams:
                await stream(scope, receive, send)

    async def _submit(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self._app
        request = Request(scope, receive)
        try:
            response = await submit_run(request)
        except asyncio.CancelledError:
            await _refuse_late(scope, receive, send)
            raise
        except Exception as error:
            response = await answer_error(request, error)
        await response(scope, receive, send)


async def _refuse_late(scope: Scope, receive: Receive, send: Send) -> None:
    """The server stops and has waited long enough: 503, where nothing was answered yet."""
    stopping = Unavailable("This process is shutting down.", code="draining")
    response = await answer_error(Request(scope, receive), stopping)
    with contextlib.suppress(RuntimeError):  # the answer had begun
        await response(scope, receive, send)
