"""A tool as a process of its own, with an outside ledger: `python -m tests.chaos.tool_server`.

It speaks HTTP by hand, so that it can misbehave. How it behaves stands in the inputs of the call
(`behave`, made from the seed of the suite), and holds for the first attempt of a round; later ones
are answered. `/make/FACET` takes a recipe, which says how it behaves by that name, and passes it on
under it; `/surely/FACET` does so without fail. `POST /outage {"down": true}` makes every call fail
until it is told otherwise.

Arguments: the port, the ledger's path. A call with `behave: kill` sends SIGKILL to the process at
the other end of its connection: an envelope that kills whoever drives it.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import orjson
import psutil

from tests.chaos.ledger import Ledger

HANG_S = 30.0


class ToolServer:
    """Everything that calls it is in the ledger first."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._numbers = itertools.count(time.monotonic_ns())
        self._down = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length:")[1].split(b"\r")[0])
                body = orjson.loads(await reader.readexactly(length))
                if head.startswith(b"POST /outage"):
                    self._down = body["down"]
                    _respond(writer, 200, {"down": self._down})
                else:
                    await self._call(head.split(b" ")[1].decode(), body, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _call(self, path: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        number = next(self._numbers)
        _, way, *facet = path.split("/")
        inputs, content = body["inputs"], {"echo": body["inputs"].get("n", 0)}
        ordered = inputs.get("behave", "ok")
        if facet:
            [inputs] = inputs.values()
            content = {facet[0]: inputs}
            ordered = inputs.get(facet[0], "ok") if way == "make" else "ok"
        behave = ordered if body["attempt"] == 1 or ordered in ("kill", "refuse") else "ok"
        if self._down and behave != "kill":
            behave = "500"
        begin = {"call": number, "run": body["run_id"], "node": body["node_id"]}
        begin |= {"attempt": body["attempt"], "key": body["idempotency_key"]}
        await self._ledger.write({**begin, "at": time.monotonic()})
        await asyncio.sleep(inputs.get("work_s", 0))
        if behave == "hang":
            await asyncio.sleep(HANG_S)
        await self._ledger.write({"call": number, "answer": behave, "at": time.monotonic()})
        await _answer(behave, content, writer)


async def _answer(behave: str, content: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    match behave:
        case "ok":
            _respond(writer, 200, content)
        case "refuse":
            _respond(writer, 400, {"detail": "never"})
        case "500":
            _respond(writer, 500, {"detail": "not today"})
        case "429":
            _respond(writer, 429, {"detail": "too many"}, "Retry-After: 0\r\n")
        case "reset":
            writer.transport.abort()
        case "garbage":
            writer.write(b"HTTP/1.1 200 X\r\nContent-Length: 7\r\n\r\n{\xff'oops")
        case "slow":
            body = orjson.dumps(content)
            writer.write(b"HTTP/1.1 200 X\r\nContent-Type: application/json\r\n")
            writer.write(b"Content-Length: %d\r\n\r\n" % len(body))
            for byte in body:
                writer.write(bytes([byte]))
                await asyncio.sleep(0.02)
        case "kill":
            _kill_caller(writer)


def _kill_caller(writer: asyncio.StreamWriter) -> None:
    """SIGKILL the Flexrun process whose socket this is; nobody else may be hit."""
    caller = writer.get_extra_info("peername")[1]
    here = os.getpid()
    for connection in psutil.net_connections("tcp"):
        if (
            connection.laddr
            and connection.laddr[1] == caller
            and connection.pid not in (None, here)
        ):
            command = psutil.Process(connection.pid).cmdline()
            if "app.cli.main" in command:
                os.kill(connection.pid, signal.SIGKILL)


def _respond(writer: asyncio.StreamWriter, status: int, content: Any, headers: str = "") -> None:
    body = orjson.dumps(content)
    writer.write(
        f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n{headers}"
        f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )


async def main(port: int, ledger: Path) -> None:
    tool = ToolServer(Ledger(ledger))
    server = await asyncio.start_server(tool.serve, "127.0.0.1", port, limit=1 << 22)
    async with server:
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), Path(sys.argv[2])))
