"""The outside ledger: what really reached the tools, written with fsync before a tool answers.

A ledger is a file a tool process appends JSON lines to; `begin` is on disk before the tool acts and
`end` before it answers. Reading it needs neither the tools nor the service.
"""

from __future__ import annotations

import asyncio
import os
from collections import defaultdict
from pathlib import Path

import orjson

from tests.chaos.history import ToolCall


class Ledger:
    """Appends lines; calls that wait together share one fsync."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._waiting: list[tuple[bytes, asyncio.Future[None]]] = []
        self._writer: asyncio.Task[None] | None = None

    async def write(self, line: dict[str, object]) -> None:
        """Returns when the line is on disk."""
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((orjson.dumps(line) + b"\n", written))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write_all())
        await asyncio.shield(written)

    async def _write_all(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            await asyncio.to_thread(self._sync, b"".join([line for line, _ in batch]))
            for _, written in batch:
                if not written.done():
                    written.set_result(None)

    def _sync(self, lines: bytes) -> None:
        os.write(self._fd, lines)
        os.fdatasync(self._fd)


def read_ledgers(folder: Path) -> dict[str, list[ToolCall]]:
    """All calls of all tools, by run."""
    calls: defaultdict[str, list[ToolCall]] = defaultdict(list)
    for path in sorted(folder.glob("*.ledger")):
        begun: dict[int, dict[str, object]] = {}
        ended: dict[int, dict[str, object]] = {}
        # What is behind the last newline is not written to its end yet.
        for line in path.read_bytes().split(b"\n")[:-1]:
            found = orjson.loads(line)
            (begun if "key" in found else ended)[found["call"]] = found
        for number, begin in begun.items():
            end = ended.get(number, {})
            call = ToolCall(
                run_id=str(begin["run"]),
                node_id=str(begin["node"]),
                attempt=int(str(begin["attempt"])),
                key=str(begin["key"]),
                begin=float(str(begin["at"])),
                end=float(str(end["at"])) if end else None,
                answer=str(end.get("answer", "")),
            )
            calls[call.run_id].append(call)
    return dict(calls)
