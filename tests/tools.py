"""A tool outside of Flexrun: an HTTP server whose ledger says what was really called, and when.

It speaks HTTP by hand, so that it can misbehave in ways a library would not allow.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class LedgerEntry:
    """One call that reached the tool. `at` is monotonic seconds."""

    path: str
    run_id: str
    node_id: str
    attempt: int
    key: str
    at: float


Behaviour = Callable[["Tool", dict[str, Any], asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Tool:
    """`behaviours` maps a path to what the tool does with a call."""

    port: int = 0
    ledger: list[LedgerEntry] = field(default_factory=list)
    behaviours: dict[str, Behaviour] = field(default_factory=dict)
    called: asyncio.Event = field(default_factory=asyncio.Event)
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    async def reached(self, count: int) -> None:
        """Until so many calls have reached the tool, over all paths."""
        while len(self.ledger) < count:
            self.called.clear()
            await self.called.wait()

    def calls(self, run_id: str, node_id: str) -> list[LedgerEntry]:
        return [e for e in self.ledger if (e.run_id, e.node_id) == (run_id, node_id)]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                path = head.split(b" ", 2)[1].decode()
                length = int(head.lower().split(b"content-length:")[1].split(b"\r")[0])
                body = json.loads(await reader.readexactly(length))
                self.ledger.append(
                    LedgerEntry(
                        path,
                        body["run_id"],
                        body["node_id"],
                        body["attempt"],
                        body["idempotency_key"],
                        time.monotonic(),
                    )
                )
                self.called.set()
                await self.behaviours[path](self, body, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


def respond(writer: asyncio.StreamWriter, status: int, content: Any, headers: str = "") -> None:
    """A whole JSON answer."""
    body = json.dumps(content).encode()
    writer.write(
        f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n{headers}"
        f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )


async def answer(tool: Tool, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    """200 with what was asked."""
    respond(writer, 200, {"echo": body["inputs"]})


async def answer_at_gate(tool: Tool, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    """200, but not before the test opens the gate."""
    await tool.gate.wait()
    await answer(tool, body, writer)


async def fail_once(tool: Tool, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    """500 for the first attempt of a node, then 200."""
    if body["attempt"] == 1:
        respond(writer, 500, {"detail": "not yet"})
    else:
        await answer(tool, body, writer)


async def hang_up(tool: Tool, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    """Take the call and cut the line: nobody can know what happened. Later rounds are answered."""
    if body["idempotency_key"].endswith(":1"):
        writer.transport.abort()
    else:
        await answer(tool, body, writer)


@asynccontextmanager
async def running_tool(**behaviours: Behaviour) -> AsyncIterator[Tool]:
    """The tool on a free port; `answer=…` serves `/answer`, and so on."""
    tool = Tool(behaviours={f"/{name}": behaviour for name, behaviour in behaviours.items()})
    connections: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(tool._serve(reader, writer))
        connections.add(task)
        task.add_done_callback(connections.discard)

    server = await asyncio.start_server(accept, "127.0.0.1", 0, limit=1 << 22)
    tool.port = server.sockets[0].getsockname()[1]
    try:
        yield tool
    finally:
        server.close()
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)


def http_capability(tool: Tool, name: str, effect: str, **more: Any) -> dict[str, Any]:
    """The registration of one of the tool's paths."""
    return {
        "capability_id": f"test.{name}",
        "version": "1.0.0",
        "display_name": name,
        "summary": f"a test tool that will {name}",
        "kind": "http",
        "effect": effect,
        "input_contract": {"mode": "json_schema", "schema": {"type": "object"}},
        "output_contract": {"mode": "json_schema", "schema": {"type": "object"}},
        "timeout_s": 20,
        "config": {"url": tool.url(f"/{name}")},
        **more,
    }
