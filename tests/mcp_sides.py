"""An adapter of the kind `mcp` with a server that it reaches, for tests of either transport."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from app.adapters.capabilities.egress import EgressPolicy
from app.adapters.capabilities.egress_transport import EgressTransport
from app.adapters.capabilities.mcp import McpAdapter
from app.adapters.capabilities.mcp_process import Command
from app.adapters.capabilities.mcp_protocol import pin_of
from app.adapters.capabilities.secrets import SecretStore
from app.domain.capability import Effect
from app.ports import Call, CallFailed
from tests import mcp_server
from tests.capability_samples import call_of, mcp_capability
from tests.far_side import Behaviour, Exchange, FarSide, far_side
from tests.mcp_server import TOOLS, McpServer, over_http

VALUE_MAX = 50_000
CANARY = "Bearer c4n4ry-s3cr3t-0123456789"
SCRIPT = mcp_server.__file__


@dataclass
class Side:
    """An adapter and a server that it reaches; `heard` gives the messages that came in there."""

    adapter: McpAdapter
    at: dict[str, Any]
    heard: Callable[[], Awaitable[list[dict[str, Any]]]]

    async def call(
        self,
        tool: str,
        inputs: dict[str, Any] | None = None,
        *,
        effect: Effect = Effect.IDEMPOTENT,
        deadline_ms: int = 20_000,
        pin: str = "",
    ) -> dict[str, Any]:
        return await self.adapter.invoke(
            tool_call(self.at, tool, inputs, effect=effect, deadline_ms=deadline_ms, pin=pin)
        )

    async def failure(
        self, tool: str, inputs: dict[str, Any] | None = None, **more: Any
    ) -> CallFailed:
        with pytest.raises(CallFailed) as caught:
            await self.call(tool, inputs, **more)
        return caught.value

    async def methods(self) -> list[str]:
        return [message.get("method", "") for message in await self.heard()]


def is_about_us(message: dict[str, Any]) -> bool:
    """Whether a message is there only because somebody asks what was heard."""
    method = message.get("method")
    return method == "tools/list" or (
        method == "tools/call" and "heard" in message["params"].values()
    )


def tool_call(
    at: dict[str, Any],
    tool: str,
    inputs: dict[str, Any] | None = None,
    *,
    effect: Effect = Effect.IDEMPOTENT,
    deadline_ms: int = 20_000,
    pin: str = "",
) -> Call:
    """A call of a tool of the test server, which is registered as it is."""
    config = {**at, "tool": tool, "description_sha256": pin or pin_of(TOOLS[tool])}
    return call_of(mcp_capability(config, effect), inputs or {}, deadline_ms)


def command(era: str = "modern") -> Command:
    """The test server as a child process."""
    return Command("local", (sys.executable, "-I", SCRIPT), {"MCP_ERA": era})


@asynccontextmanager
async def over_pipes(era: str) -> AsyncIterator[Side]:
    transport = EgressTransport(EgressPolicy())
    servers = {"local": command(era)}
    adapter = McpAdapter(transport, servers=servers, value_bytes_max=VALUE_MAX)

    async def heard() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (await running.call("heard"))["heard"]
        while is_about_us(found[-1]):
            found.pop()
        return found

    running = Side(adapter, {"server": "local"}, heard)
    yield running
    await adapter.aclose()
    await transport.aclose()


@asynccontextmanager
async def over_sockets(era: str, *, streamed: bool) -> AsyncIterator[Side]:
    async with far_side() as far, far_adapter(far, McpServer(era), streamed=streamed) as running:
        yield running


@asynccontextmanager
async def far_adapter(
    far: FarSide, server: McpServer | None = None, *, streamed: bool = False
) -> AsyncIterator[Side]:
    """An adapter that may reach the far side, with a secret for it; at first there is `server`."""
    server = server or McpServer()
    far.behave = over_http(server, streamed=streamed)
    secrets = SecretStore({"token": (CANARY, [f"127.0.0.1:{far.port}"])})
    transport = EgressTransport(EgressPolicy(["127.0.0.1"]))
    adapter = McpAdapter(transport, secrets, value_bytes_max=VALUE_MAX)

    async def heard() -> list[dict[str, Any]]:
        return server.heard

    yield Side(adapter, {"url": far.url}, heard)
    await adapter.aclose()
    await transport.aclose()


def but(server: McpServer, method: str, behave: Behaviour) -> Behaviour:
    """The server, that behaves otherwise at one method."""
    usual = over_http(server)

    async def either(writer: asyncio.StreamWriter, exchange: Exchange) -> None:
        is_it = exchange.body and exchange.json.get("method") == method
        await (behave if is_it else usual)(writer, exchange)

    return either


def rpc(message_id: object, **parts: object) -> bytes:
    """A JSON-RPC response as the body of an answer."""
    return json.dumps({"jsonrpc": "2.0", "id": message_id, **parts}).encode()
