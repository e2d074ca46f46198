"""Judges what a crash left behind: by client log, tool ledger and database alone."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import asyncpg

from tests.sse import SseEvent
from tests.tools import LedgerEntry

TERMINAL = {"RUN_DONE", "RUN_FAILED", "RUN_CANCELLED"}


@dataclass
class ClientLog:
    """What the client was told: accepted runs, and every frame it ever saw, byte for byte."""

    accepted: set[str] = field(default_factory=set)
    keys: dict[str, str] = field(default_factory=dict)
    frames: dict[tuple[str, int], str] = field(default_factory=dict)

    def saw(self, run_id: str, event: SseEvent) -> None:
        """A frame arrived; the same seq must always carry the same bytes."""
        self.accepted.add(run_id)
        known = self.frames.setdefault((run_id, event.seq), event.data)
        assert known == event.data, f"event {event.seq} of {run_id} changed"


async def check(dsn: str, log: ClientLog, ledger: list[LedgerEntry]) -> dict[str, list[Any]]:
    """Raises AssertionError for a broken promise; returns the journal of every run."""
    connection = await asyncpg.connect(dsn)
    try:
        rows = await connection.fetch("select run_id, seq, body from events order by run_id, seq")
        heads = await connection.fetch("select run_id, seq, status, owner from run_heads")
    finally:
        await connection.close()
    journals: dict[str, list[dict[str, Any]]] = {}
    bodies: dict[tuple[str, int], str] = {}
    for run_id, seq, body in rows:
        journals.setdefault(str(run_id), []).append(json.loads(body))
        bodies[str(run_id), seq] = body
    assert log.accepted <= journals.keys(), "an accepted run was lost"
    assert {str(head["run_id"]) for head in heads} == journals.keys()
    for head in heads:
        _check_journal(str(head["run_id"]), journals[str(head["run_id"])], head)
    for (run_id, seq), data in log.frames.items():
        assert bodies.get((run_id, seq)) == data, f"a frame was shown and not kept: {run_id} {seq}"
    _check_ledger(journals, ledger)
    return journals


def _check_journal(run_id: str, events: list[dict[str, Any]], head: asyncpg.Record) -> None:
    """Numbered without gaps, one end, one result an attempt, nothing after a node is done."""
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1)), run_id
    assert head["seq"] == len(events), run_id
    ends = [event["seq"] for event in events if event["type"] in TERMINAL]
    assert ends == [len(events)], f"{run_id} ends at {ends} of {len(events)}: {head['status']}"
    assert head["owner"] is None, run_id
    times = [event["ts"] for event in events]
    assert times == sorted(times), run_id
    done: set[str] = set()
    results: Counter[tuple[str, int]] = Counter()
    for event in events:
        node: str = event.get("node_id", "")
        if event["type"] in ("NODE_START", "NODE_DONE", "NODE_RETRY", "NODE_FAILED"):
            assert node not in done, f"{run_id}: {event['type']} of {node} after it was done"
        if event["type"] == "NODE_DONE":
            done.add(node)
        if event["type"] in ("NODE_DONE", "NODE_FAILED"):
            results[node, event["attempt"]] += 1
    assert all(count == 1 for count in results.values()), run_id


def _check_ledger(journals: dict[str, list[dict[str, Any]]], ledger: list[LedgerEntry]) -> None:
    """`at_most_once` is called once a round; repeated calls of others carry the same key."""
    rounds: Counter[str] = Counter()
    keys: dict[tuple[str, str, str], int] = {}
    for entry in ledger:
        assert entry.run_id in journals, "a run that nobody accepted called a tool"
        if "once" in entry.path:
            rounds[entry.key] += 1
        keys[entry.run_id, entry.node_id, entry.key] = entry.attempt
    assert all(count == 1 for count in rounds.values()), f"called twice: {rounds}"
