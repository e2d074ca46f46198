"""Judges what a crash left behind, with the checker of the fault suite (`tests/chaos`)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import asyncpg

from tests.chaos import archive, history
from tests.chaos.checker import Checker, shown
from tests.sse import SseEvent
from tests.tools import LedgerEntry


@dataclass
class ClientLog:
    """What the client was told: accepted runs, and every frame it ever saw, byte for byte.

    `poison`: runs that kill whoever drives them.
    """

    accepted: set[str] = field(default_factory=set)
    poison: set[str] = field(default_factory=set)
    keys: dict[str, str] = field(default_factory=dict)
    frames: dict[tuple[str, int], str] = field(default_factory=dict)

    def saw(self, run_id: str, event: SseEvent) -> None:
        """A frame arrived; the same seq must always carry the same bytes."""
        self.accepted.add(run_id)
        known = self.frames.setdefault((run_id, event.seq), event.data)
        assert known == event.data, f"event {event.seq} of {run_id} changed"


async def check(dsn: str, log: ClientLog, ledger: list[LedgerEntry]) -> dict[str, list[Any]]:
    """Raises AssertionError for a broken promise; returns the journal of every run."""
    seen = history.ClientLog()
    for (run_id, seq), data in log.frames.items():
        seen.frames[run_id][seq] = history.digest(data.encode())
    calls: dict[str, list[history.ToolCall]] = {}
    for entry in ledger:
        call = history.ToolCall(entry.run_id, entry.node_id, entry.attempt, entry.key, entry.at)
        calls.setdefault(entry.run_id, []).append(call)
    journals: dict[str, list[dict[str, Any]]] = {}
    connection = await asyncpg.connect(dsn)
    try:
        around = await archive.surroundings(connection)
        around.expected_poison |= log.poison
        checker = Checker(seen, around)
        async for run in archive.runs(connection, seen, calls):
            checker.judge(run)
            journals[run.run_id] = [json.loads(row.body) for row in run.rows]
    finally:
        await connection.close()
    violations = checker.finish()
    assert not violations, shown(violations)
    assert log.accepted <= journals.keys(), "an accepted run was lost"
    assert calls.keys() <= journals.keys(), "a run that nobody accepted called a tool"
    stored = {key: around.key_of_run.get(key) for key in log.keys}
    assert stored == log.keys, "a key made another run than the client was told"
    return journals
