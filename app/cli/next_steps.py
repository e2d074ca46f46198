"""What a person can do about a run as it stands, and about an order that it refused."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

from app.cli.client import DEFAULT_URL, without_userinfo
from app.cli.picture import TERMINAL_STATUSES, WAITING_STATUSES


def next_steps(run: dict[str, Any], url: str) -> Iterator[str]:
    """Lines for the bottom of a report: commands to copy. None for a run that needs nothing."""
    lines = list(_lines(run, run["run_id"], url_option(url)))
    if lines:
        yield ""
        yield from lines


def _lines(run: dict[str, Any], run_id: str, at: str) -> Iterator[str]:
    match run["status"]:
        case "queued" | "running":
            yield f"Watch it: flexrun tail {run_id} -f{at}"
        case "paused" | "awaiting_human":
            if running := [n["node_id"] for n in run["nodes"] if n["status"] == "running"]:
                yield f"Still under way, and recorded when it ends: {', '.join(running)}"
            needed = list(decisions(run, at))
            yield from needed or (f"Go on with it: flexrun resume {run_id}{at}",)
            yield f"End it: flexrun cancel {run_id}{at}"
        case "failed":
            yield f"What happened: flexrun show {run_id} --events{at}"
            yield f"Go on where it failed, as a new run: flexrun resume {run_id}{at}"
        case "cancelled":
            yield f"Go on where it stopped, as a new run: flexrun resume {run_id}{at}"


def url_option(url: str) -> str:
    """What a suggested command needs to reach the same service."""
    shown = without_userinfo(url)
    return "" if shown == DEFAULT_URL else f" --url {shlex.quote(shown)}"


_MEANINGS = {
    "unknown_outcome": {
        "retry": "it did not; call it again",
        "done": "it did; give its output by --output NODE=@file.json",
        "fail": "give it up",
    },
    "awaiting_answer": {
        "retry": "plan again, now that what was missing is there",
        "done": "this is the output of the run",
        "fail": "give it up",
    },
}


def decisions(run: dict[str, Any], at: str) -> Iterator[str]:
    """The decisions that a run awaits, as commands; none if it awaits none."""
    waiting = {
        node["node_id"]: node["reason"] for node in run["nodes"] if node.get("reason") in _MEANINGS
    }
    if not waiting:
        return
    unknown = [node_id for node_id, reason in waiting.items() if reason == "unknown_outcome"]
    if unknown:
        called = ", ".join(unknown)
        yield f"Nobody knows whether the call of {called} took effect. Look, then decide:"
    else:
        yield "No plan was found (flexrun tail tells why): give the output of the run, or decide:"
    meanings = _MEANINGS["unknown_outcome" if unknown else "awaiting_answer"]
    for decision, meaning in meanings.items():
        nodes = " ".join(f"--node {shlex.quote(node_id)}={decision}" for node_id in waiting)
        outputs = "".join(f" --output {shlex.quote(node_id)}=@output.json" for node_id in waiting)
        more = outputs if decision == "done" else ""
        yield f"  flexrun resume {run['run_id']} {nodes}{more}{at}    # {meaning}"


# --- refusals -------------------------------------------------------------------------------------

_REFUSED_IN = {
    "cancel": (TERMINAL_STATUSES, "there is nothing left to cancel"),
    "pause": (TERMINAL_STATUSES | WAITING_STATUSES, "there is nothing to pause"),
    "resume": (frozenset({"queued", "running", "done"}), "there is nothing to resume"),
}


def refusal(kind: str, run: dict[str, Any], url: str) -> tuple[str, str | None]:
    """Why a run in this state does not take a signal, in words, and what can be done instead."""
    status, run_id, at = run["status"], run["run_id"], url_option(url)
    refusing, why = _REFUSED_IN[kind]
    state = "awaits a human" if status == "awaiting_human" else f"is {status}"
    # It may have moved on since it refused.
    said = f"Run {run_id} {state}: {why}." if status in refusing else f"Run {run_id} {state} now."
    lines = list(_lines(run, run_id, at))
    if status == "done":
        lines = [f"Its result: flexrun show {run_id}{at}"]
    return said, "\n".join(lines) or None
