"""What we know of one MCP server: the revision it speaks and its tools, found out when needed.

A server is asked by `server/discover` first; one that does not understand is of an older revision
and gets an `initialize` handshake. A tool is called only while a fresh listing says of it what the
registration's pin says. Fresh is a listing for the server's own `ttlMs`, a minute at most, and
until the server says that its tools have changed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from app.adapters.capabilities.egress_transport import SendProgress
from app.adapters.capabilities.mcp_params import mirrored
from app.adapters.capabilities.mcp_protocol import (
    CAPABILITY_MISSING,
    CLIENT_INFO,
    HEADER_MISMATCH,
    LEGACY,
    MODERN,
    VERSION_UNSUPPORTED,
    Garbled,
    Request,
    RpcRefused,
    SessionLost,
    Tool,
    meta_of,
    tools_in,
)
from app.ports import CallFailed

FRESH_S_MAX = 60.0
PAGES_MAX = 100
TOOLS_MAX = 1_000
CURSOR_CHARS_MAX = 4_000


class Channel(Protocol):
    """Carries messages to one server and back: `mcp_http.py` and `mcp_stdio.py`.

    Both ways to send raise `CallFailed` for what became of the transport. `on_tools_changed` is
    called when the server says that they did.
    """

    on_tools_changed: Callable[[], None]

    async def request(self, request: Request) -> dict[str, Any]:
        """The result; raises `RpcRefused` and `Garbled`, too. Cancelling it stops the request."""
        ...

    async def notify(self, method: str, version: str) -> None:
        """A notification without parameters."""
        ...

    async def aclose(self) -> None:
        """Let go of the server."""
        ...


@dataclass(frozen=True, slots=True)
class ToolCall:
    """What to call: the tool and its pin, with what it gets.

    `fresh`: over a connection of its own. `progress` tells whether the call itself went out.
    """

    name: str
    pin: str
    arguments: dict[str, Any]
    meta: Mapping[str, str]
    fresh: bool
    progress: SendProgress


@dataclass(frozen=True, slots=True, eq=False)
class Agreement:
    """What was agreed upon with the server. `announces_changes`: to those who subscribe."""

    version: str
    announces_changes: bool = False


@dataclass(frozen=True, slots=True)
class _Look:
    """A tool as it was listed, when that was asked for, and until when it is fresh (monotonic)."""

    tool: Tool
    asked_at: float
    until: float


class McpSession:
    """One server over one channel. `is_legacy`: known to need the handshake, so nothing is tried.

    It opens itself at first use, and again when the server forgot it. Only a call of a tool has an
    effect there.
    """

    def __init__(self, channel: Channel, *, is_legacy: bool = False) -> None:
        self._channel = channel
        self._is_legacy = is_legacy
        self._lock = asyncio.Lock()
        self._agreement: Agreement | None = None
        self._looks: dict[str, _Look] = {}
        self._changes = 0
        channel.on_tools_changed = self._forget_tools

    async def aclose(self) -> None:
        """Let go of the server."""
        await self._channel.aclose()

    async def open(self) -> Agreement:
        """Agree on a revision. Raises what `Channel.request` raises, `CallFailed`
        `mcp_version_unsupported` when there is none in common."""
        async with self._lock:
            return await self._open()

    async def call(self, call: ToolCall) -> tuple[Tool, dict[str, Any]]:
        """Call a tool that is what its pin says; the tool as listed, and the result.

        Raises `CallFailed` `mcp_tool_changed` before anything is called, and what the channel
        raises.
        """
        try:
            return await self._call(call)
        except SessionLost:
            # The server did not look at the request, so sending it once more does no harm.
            call.progress.sent = False
            return await self._call(call)

    async def tools(self) -> list[Tool]:
        """All tools, as listed now, at most 1,000."""
        found: list[Tool] = []
        async with self._lock:
            agreement = await self._open()
            async with aclosing(self._listed(agreement)) as listed:
                async for tool, _ in listed:
                    found.append(tool)
                    if len(found) == TOOLS_MAX:
                        break
        return found

    async def _call(self, call: ToolCall) -> tuple[Tool, dict[str, Any]]:
        agreement, tool = await self._find(call.name, fresh=call.fresh)
        if tool is None or tool.pin != call.pin:
            what = "is not offered any more" if tool is None else "is not what was registered"
            text = f"the tool {what}: look at it, and register it with its new pin"
            raise CallFailed("mcp_tool_changed", text, retryable=False)
        request = _request(
            "tools/call",
            {"name": call.name, "arguments": call.arguments},
            agreement.version,
            call.meta,
            name=call.name,
            mirrored=mirrored(tool.mirrors, call.arguments),
            fresh=call.fresh,
            progress=call.progress,
        )
        with self._doubting(agreement):
            return tool, await self._channel.request(request)

    async def _find(self, name: str, *, fresh: bool) -> tuple[Agreement, Tool | None]:
        """The tool as the server lists it; None when it does not."""
        arrived_at = time.monotonic()
        if self._agreement is not None and (known := self._known(name, arrived_at)) is not None:
            return self._agreement, known
        async with self._lock:
            agreement = await self._open()
            if (known := self._known(name, arrived_at)) is not None:
                return agreement, known
            asked_at, changes = time.monotonic(), self._changes
            async with aclosing(self._listed(agreement, fresh=fresh)) as listed:
                async for tool, fresh_s in listed:
                    if tool.name == name:
                        if changes == self._changes:  # what was said meanwhile may be newer
                            self._looks[name] = _Look(tool, asked_at, asked_at + fresh_s)
                        return agreement, tool
            return agreement, None

    def _known(self, name: str, arrived_at: float) -> Tool | None:
        """The tool when it is fresh, or was looked at for somebody else while we waited."""
        look = self._looks.get(name)
        if look is None:
            return None
        is_fresh = time.monotonic() < look.until or look.asked_at >= arrived_at
        return look.tool if is_fresh else None

    async def _listed(
        self, agreement: Agreement, *, fresh: bool = False
    ) -> AsyncGenerator[tuple[Tool, float]]:
        """The tools page by page, each with the seconds for which its page is fresh."""
        cursor: dict[str, str] = {}
        for _ in range(PAGES_MAX):
            with self._doubting(agreement):
                page = await self._channel.request(
                    _request("tools/list", cursor, agreement.version, fresh=fresh)
                )
            fresh_s = _fresh_s(page)
            for tool in tools_in(page):
                yield tool, fresh_s
            following = page.get("nextCursor")
            if following is None:
                return
            if not isinstance(following, str) or len(following) > CURSOR_CHARS_MAX:
                raise Garbled("has an unusable cursor")
            cursor = {"cursor": following}
        raise Garbled(f"lists tools on more than {PAGES_MAX} pages")

    async def _open(self) -> Agreement:
        if self._agreement is None:
            self._agreement = await (self._handshake() if self._is_legacy else self._agree())
        return self._agreement

    async def _agree(self) -> Agreement:
        try:
            found = await self._channel.request(_request("server/discover", {}, MODERN))
        except RpcRefused as error:
            if error.code in (HEADER_MISMATCH, CAPABILITY_MISSING):
                raise
            if error.code == VERSION_UNSUPPORTED and not _names_one_of(error.data, LEGACY):
                raise _no_common_version() from error
            return await self._handshake()
        versions = found.get("supportedVersions")
        if not isinstance(versions, list):
            return await self._handshake()
        if MODERN not in versions:
            raise _no_common_version()
        return Agreement(MODERN, _announces_changes(found))

    async def _handshake(self) -> Agreement:
        params = {"protocolVersion": LEGACY[0], "capabilities": {}, "clientInfo": CLIENT_INFO}
        found = await self._channel.request(_request("initialize", params, None))
        version = found.get("protocolVersion")
        if version not in LEGACY:
            raise _no_common_version()
        await self._channel.notify("notifications/initialized", version)
        return Agreement(version)

    @contextmanager
    def _doubting(self, agreement: Agreement) -> Iterator[None]:
        """After a refusal what was listed may be wrong; without a JSON-RPC error, all may be."""
        try:
            yield
        except RpcRefused as error:
            self._forget_tools()
            if error.code is None and self._agreement is agreement:
                self._agreement = None
            raise

    def _forget_tools(self) -> None:
        self._changes += 1
        self._looks.clear()


def _request(
    method: str,
    params: Mapping[str, Any],
    version: str | None,
    meta: Mapping[str, str] | None = None,
    **more: Any,
) -> Request:
    found = meta_of(version, meta or {})
    return Request(method, {**params, **({"_meta": found} if found else {})}, version, **more)


def _fresh_s(page: Mapping[str, Any]) -> float:
    ttl_ms = page.get("ttlMs")
    if isinstance(ttl_ms, bool) or not isinstance(ttl_ms, int | float):
        return FRESH_S_MAX
    return min(max(ttl_ms / 1000, 0.0), FRESH_S_MAX)


def _names_one_of(data: Any, versions: tuple[str, ...]) -> bool:
    supported = data.get("supported") if isinstance(data, dict) else None
    return isinstance(supported, list) and any(version in supported for version in versions)


def _announces_changes(found: Mapping[str, Any]) -> bool:
    capabilities = found.get("capabilities")
    tools = capabilities.get("tools") if isinstance(capabilities, dict) else None
    return isinstance(tools, dict) and tools.get("listChanged") is True


def _no_common_version() -> CallFailed:
    text = "the server speaks no revision of MCP that we know"
    return CallFailed("mcp_version_unsupported", text, retryable=False)
