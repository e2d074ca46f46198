"""MCP over the standard streams of a child process: one JSON-RPC message a line.

A server is started at first use, serves all calls at once, and is started again when it dies, ever
later when it dies young. Source: MCP 2026-07-28 "stdio", and 2025-11-25 for the requests that
older servers may send to us.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson

from app.adapters.capabilities.http_outcome import connection_lost, unreachable
from app.adapters.capabilities.mcp_process import Child, Command
from app.adapters.capabilities.mcp_protocol import (
    MODERN,
    TOOLS_CHANGED,
    Garbled,
    Request,
    RpcRefused,
    meta_of,
    notification,
    result_of,
)
from app.adapters.capabilities.mcp_session import McpSession
from app.adapters.capabilities.secrets import redacted
from app.kit.json_gate import JsonRefused, parse_json
from app.ports import CallFailed

log = logging.getLogger("flexrun.mcp")

# One that lived this long did not die of its start.
GROWN_UP_S = 60.0
BACK_OFF_S_MAX = 60.0
# A line may be longer than an answer, so that one large answer does not end the server.
LINE_FACTOR = 2

_METHOD_NOT_FOUND = -32_601
_PROBE = "server/discover"
_OPENING = (_PROBE, "initialize")


@dataclass(frozen=True, slots=True)
class StdioLimits:
    """How patient we are with a server, in seconds.

    `start_s`: until it answers. `probe_s`: for what older servers may leave unanswered.
    `back_off_s`: after its second death in a row, then twice that, up to a minute. `exit_grace_s`:
    before each harsher way to end it.
    """

    start_s: float = 30.0
    probe_s: float = 10.0
    back_off_s: float = 1.0
    exit_grace_s: float = 2.0


class StdioServer:
    """One server of the operator, started when it is needed. `bytes_max` bounds each message."""

    def __init__(self, command: Command, bytes_max: int, limits: StdioLimits | None = None) -> None:
        self._command = command
        self._bytes_max = bytes_max
        self._limits = limits or StdioLimits()
        self._running: tuple[StdioChannel, McpSession] | None = None
        self._starting: asyncio.Task[McpSession] | None = None
        self._is_closed = False
        self._is_legacy = False
        self._deaths = 0
        self._not_before = 0.0

    async def session(self) -> McpSession:
        """The open session with the running server, which is started when it does not run.

        Callers share one start, and it goes on when they do not wait for it. Raises `CallFailed`
        `capability_unreachable` when it can not be started, or not yet again, and what opening a
        session raises.
        """
        if self._running is not None and not self._running[0].is_over:
            return self._running[1]
        if self._starting is None:
            self._check_may_start()
            self._starting = asyncio.create_task(self._start())
            self._starting.add_done_callback(self._start_ended)
        return await asyncio.shield(self._starting)

    async def aclose(self) -> None:
        """End the server for good; calls under way fail."""
        self._is_closed = True
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        if self._running is not None:
            await self._running[0].aclose()

    def _check_may_start(self) -> None:
        if self._is_closed:
            raise unreachable("the server was ended")
        wait_s = self._not_before - time.monotonic()
        if wait_s > 0:
            text = "the server died, and is not started again yet"
            raise unreachable(text, retry_after_s=wait_s)

    async def _start(self) -> McpSession:
        try:
            async with asyncio.timeout(self._limits.start_s):
                return await self._come_up()
        except BaseException as error:
            self._is_legacy = False
            if isinstance(error, TimeoutError | OSError):
                text = "the server can not be started, or does not answer"
                raise unreachable(text) from error
            raise

    def _start_ended(self, task: asyncio.Task[McpSession]) -> None:
        self._starting = None
        if not task.cancelled():
            task.exception()  # it is known to whoever waits, if anybody does

    async def _come_up(self) -> McpSession:
        try:
            return await self._launch(is_legacy=self._is_legacy)
        except CallFailed as failed:
            if self._is_legacy or failed.code != "capability_connection_lost":
                raise
        # Some older servers end when they are asked anything before the handshake.
        session = await self._launch(is_legacy=True)
        self._is_legacy = True
        return session

    async def _launch(self, *, is_legacy: bool) -> McpSession:
        try:
            child = await Child.start(
                self._command, LINE_FACTOR * self._bytes_max, self._limits.exit_grace_s
            )
        except OSError:
            self._note_death(0.0)
            raise
        channel = StdioChannel(child, self._bytes_max, self._limits.probe_s, self._note_death)
        try:
            session = McpSession(channel, is_legacy=is_legacy)
            agreement = await session.open()
        except BaseException:
            await channel.aclose()
            raise
        if agreement.announces_changes:
            channel.listen()
        self._running = (channel, session)
        return session

    def _note_death(self, lived_s: float) -> None:
        self._deaths = 1 if lived_s >= GROWN_UP_S else self._deaths + 1
        if self._deaths > 1:
            delay_s = self._limits.back_off_s * 2 ** min(self._deaths - 2, 10)
            self._not_before = time.monotonic() + min(delay_s, BACK_OFF_S_MAX)


class StdioChannel:
    """The messages to and from one running child. `on_over` gets the seconds that it lived."""

    def __init__(
        self, child: Child, bytes_max: int, probe_s: float, on_over: Callable[[float], None]
    ) -> None:
        self.on_tools_changed: Callable[[], None] = _ignore
        self.is_over = False
        self._child = child
        self._bytes_max = bytes_max
        self._probe_s = probe_s
        self._on_over = on_over
        self._started_at = time.monotonic()
        self._ids = itertools.count(1)
        self._pending: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._reader = asyncio.create_task(self._read())

    async def request(self, request: Request) -> dict[str, Any]:
        """See `Channel.request`. Cancelling it sends `notifications/cancelled`."""
        if self.is_over:
            raise unreachable("the server is gone")
        if not self._child.has_room():
            raise unreachable("the server does not read what it is sent")
        message_id = next(self._ids)
        answer = asyncio.get_running_loop().create_future()
        self._pending[message_id] = answer
        try:
            request.progress.sent = True
            self._send(request.message(message_id))
            async with asyncio.timeout(self._probe_s if request.method == _PROBE else None):
                return result_of(await answer)
        except TimeoutError:
            raise RpcRefused(None, "does not answer") from None
        except asyncio.CancelledError:
            if request.method not in _OPENING:
                self._send(notification("notifications/cancelled", {"requestId": message_id}))
            raise
        finally:
            del self._pending[message_id]

    async def notify(self, method: str, version: str) -> None:
        """See `Channel.notify`."""
        self._send(notification(method))

    def listen(self) -> None:
        """Ask a modern server to tell when its tools change; its answer is the end of that."""
        params = {"notifications": {"toolsListChanged": True}, "_meta": meta_of(MODERN, {})}
        self._send(Request("subscriptions/listen", params, MODERN).message(next(self._ids)))

    async def aclose(self) -> None:
        """End the child."""
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        await self._child.end()

    def _send(self, message: dict[str, Any]) -> None:
        self._child.write_line(orjson.dumps(message))

    async def _read(self) -> None:
        try:
            while line := await self._child.read_line():
                self._take(line)
        except ValueError:
            log.warning("MCP server %s wrote too long a line and is ended", self._child.name)
        finally:
            self.is_over = True
            self._on_over(time.monotonic() - self._started_at)
            for answer in self._pending.values():
                if not answer.done():
                    answer.set_exception(connection_lost())
        await self._child.end()

    def _take(self, line: bytes) -> None:
        try:
            message = redacted(parse_json(line), self._child.secrets)
        except JsonRefused as refused:
            self._spoil(line, f"is not strict JSON: {refused.detail}")
            return
        if not isinstance(message, dict):
            return
        if "method" in message:
            self._hear(message)
        elif len(line) > self._bytes_max:
            self._settle(message, Garbled(f"is larger than {self._bytes_max} bytes"))
        else:
            self._settle(message, None)

    def _spoil(self, line: bytes, why: str) -> None:
        """A line that must not be read may still tell whose answer it is; else it is chatter."""
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            log.debug("MCP server %s wrote a line that is no message", self._child.name)
            return
        if isinstance(message, dict):
            self._settle(message, Garbled(why))

    def _settle(self, message: dict[str, Any], error: Garbled | None) -> None:
        message_id = message.get("id")
        answer = self._pending.get(message_id) if isinstance(message_id, int) else None
        if answer is None or answer.done():
            return  # cancelled meanwhile, or never asked
        if error is None:
            answer.set_result(message)
        else:
            answer.set_exception(error)

    def _hear(self, message: dict[str, Any]) -> None:
        if message["method"] == TOOLS_CHANGED:
            self.on_tools_changed()
        if "id" not in message:
            return
        answer: dict[str, Any] = {"jsonrpc": "2.0", "id": message["id"]}
        if message["method"] == "ping":
            answer["result"] = {}
        else:
            text = "this client answers no questions"
            answer["error"] = {"code": _METHOD_NOT_FOUND, "message": text}
        if self._child.has_room():
            self._send(answer)


def _ignore() -> None:
    """Until a session wants to know."""
