"""The manifest of a run: what was done, what is left, what failed, and every attempt.

For `flexrun show --manifest`. A pure reading of the run resource and its events, so that any run
in any state has one. It must never ask the service for anything.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import datetime
from itertools import takewhile
from typing import Any

from app.cli.picture import ENDED

LIST_OF_STATUS = {
    "done": "completed_nodes",
    "pending": "pending_nodes",
    "running": "running_nodes",
    "blocked": "blocked_nodes",
    "failed": "failed_nodes",
    "skipped": "skipped_nodes",
}
KEPT = "resume"
"""Why a node is skipped whose result was taken over from the run that this one resumes."""

_OUTCOMES = {"NODE_DONE": "done", "NODE_FAILED": "failed", "NODE_RETRY": "failed"}


def manifest(run: dict[str, Any], events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The manifest of a run resource; `events` are its events in order, from the first one on.

    Every node is in exactly one of the lists. What the events say behind the resource is left out:
    the run may have gone on between the two requests.
    """
    history = _History()
    for event in takewhile(lambda event: event["seq"] <= run["last_seq"], events):
        history.see(event)
    started_at, finished_at = history.started_at, run["finished_at"]
    return {
        "run_id": run["run_id"],
        "status": run["status"],
        "objective": run["objective"],
        "plan_version": run["plan_version"],
        "resumed_from": run.get("resumed_from"),
        "created_at": run["created_at"],
        "started_at": started_at,
        "finished_at": finished_at,
        "duration_s": _ms_between(started_at, finished_at, 1000),
        "last_seq": run["last_seq"],
        **_lists(run["nodes"]),
        "nodes": {node["node_id"]: _node(node, history) for node in run["nodes"]},
        "failures": list(_failures(run)),
        "files": [],
    }


def _lists(nodes: Iterable[dict[str, Any]]) -> dict[str, list[str]]:
    """The nodes by where they stand. One that was taken over is completed: its result is there."""
    found: dict[str, list[str]] = {name: [] for name in LIST_OF_STATUS.values()}
    for node in nodes:
        is_kept = node["status"] == "skipped" and node.get("reason") == KEPT
        found[LIST_OF_STATUS["done" if is_kept else node["status"]]].append(node["node_id"])
    return found


def _node(node: dict[str, Any], history: _History) -> dict[str, Any]:
    node_id = node["node_id"]
    found = {name: node[name] for name in ("status", "capability_id")}
    found |= {name: node[name] for name in ("reason", "error") if name in node}
    if node_id in history.decided_by:
        found["decided_by"] = history.decided_by[node_id]
    found["attempts"] = [attempt.as_dict() for attempt in history.attempts.get(node_id, ())]
    return found


def _failures(run: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """The error of every failed node, then that of the run, which is about no node."""
    errors = [(n["node_id"], n.get("error")) for n in run["nodes"] if n["status"] == "failed"]
    for node_id, error in [*errors, (None, run["error"])]:
        if error is not None:
            yield {"node_id": node_id, "code": error["code"], "message": error["message"]}


# --- attempts -------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Attempt:
    """One attempt. `calls` counts how often it was made: after a take-over it is made again. A call
    that was handed over while its run was paused is made again without a word in the journal.

    `outcome`: done, failed, unknown (it may or may not have taken effect), blocked (an open breaker
    did not let it through), or abandoned (the run ended first); None while it is under way.
    """

    attempt: int
    round: int
    started_at: str
    calls: int = 1
    finished_at: str | None = None
    outcome: str | None = None
    duration_ms: float | None = None
    error: dict[str, Any] | None = None

    def end(self, event: dict[str, Any]) -> None:
        """The first event that tells how it went counts; an operator's decision comes later."""
        if self.outcome is not None:
            return
        self.outcome = _outcome(event)
        self.finished_at = event["ts"]
        if self.outcome == "blocked":
            self.calls -= 1
        took_ms = event["data"].get("duration_ms")
        self.duration_ms = _ms_between(self.started_at, event["ts"]) if took_ms is None else took_ms
        if self.outcome != "abandoned":
            self.error = event["data"].get("error")

    def as_dict(self) -> dict[str, Any]:
        found = asdict(self)
        if self.error is None:
            del found["error"]
        return found


@dataclass(slots=True)
class _History:
    """What the events say that the run resource does not."""

    started_at: str | None = None
    attempts: dict[str, list[_Attempt]] = field(default_factory=dict)
    decided_by: dict[str, Any] = field(default_factory=dict)

    def see(self, event: dict[str, Any]) -> None:
        event_type, data = event["type"], event["data"]
        if event_type == "RUN_START":
            self.started_at = event["ts"]
        elif event_type == "RUN_RECOVERED":
            for node_id in self.attempts.keys() & data["called_again"]:
                self._newest(node_id).calls += 1
        elif event_type == "NODE_START":
            attempt = _Attempt(event["attempt"], data.get("round", 1), event["ts"])
            self.attempts.setdefault(event["node_id"], []).append(attempt)
        elif event_type in _OUTCOMES or event_type == "NODE_BLOCKED":
            if event["node_id"] in self.attempts:
                self._newest(event["node_id"]).end(event)
            if data.get("decided_by") is not None:
                self.decided_by[event["node_id"]] = data["decided_by"]
        elif event_type in ENDED:
            for node_id in self.attempts:
                self._newest(node_id).end(event)

    def _newest(self, node_id: str) -> _Attempt:
        return self.attempts[node_id][-1]


def _outcome(event: dict[str, Any]) -> str:
    if event["type"] in ENDED:
        return "abandoned"
    if event["type"] == "NODE_BLOCKED":
        return "unknown" if event["data"]["reason"] == "unknown_outcome" else "blocked"
    return _OUTCOMES[event["type"]]


def _ms_between(earlier: str | None, later: str | None, divisor: int = 1) -> float | None:
    if earlier is None or later is None:
        return None
    span = datetime.fromisoformat(later) - datetime.fromisoformat(earlier)
    return round(span.total_seconds() * 1000) / divisor
