"""What a person can do about a run that waits or failed: commands to copy."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

from app.cli.client import DEFAULT_URL


def next_steps(run: dict[str, Any], url: str) -> Iterator[str]:
    """Lines for the bottom of a report; none for a run that needs nothing."""
    run_id = run["run_id"]
    at = url_option(url)
    if run["status"] == "awaiting_human":
        yield from _decisions(run, run_id, at)
    elif run["status"] == "failed":
        yield ""
        yield f"What happened: flexrun show {run_id} --events{at}"
    elif run["status"] in ("queued", "running"):
        yield ""
        yield f"Watch it: flexrun tail {run_id} -f{at}"


def url_option(url: str) -> str:
    """What a suggested command needs to reach the same service."""
    return "" if url == DEFAULT_URL else f" --url {shlex.quote(url)}"


def _decisions(run: dict[str, Any], run_id: str, at: str) -> Iterator[str]:
    waiting = [node["node_id"] for node in run["nodes"] if node.get("reason") == "unknown_outcome"]
    if not waiting:
        return
    yield ""
    yield f"Nobody knows whether the call of {', '.join(waiting)} took effect. Look, then decide:"
    for decision, meaning in (
        ("retry", "it did not; call it again"),
        ("done", "it did; give its output by --output NODE=@file.json"),
        ("fail", "give it up"),
    ):
        nodes = " ".join(f"--node {shlex.quote(node_id)}={decision}" for node_id in waiting)
        outputs = "".join(f" --output {shlex.quote(node_id)}=@output.json" for node_id in waiting)
        more = outputs if decision == "done" else ""
        yield f"  flexrun resume {run_id} {nodes}{more}{at}    # {meaning}"
