"""What a run looks like right now, for showing it: folded from its events, or read from the API."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

ENDED = {"RUN_DONE": "done", "RUN_FAILED": "failed", "RUN_CANCELLED": "cancelled"}
TERMINAL_STATUSES = frozenset(ENDED.values())
WAITING_STATUSES = frozenset({"awaiting_human", "paused"})


@dataclass(slots=True)
class NodeLook:
    """One node as it is shown. `since` is on the monotonic clock, while it runs."""

    node_id: str
    capability_id: str
    requires: tuple[str, ...] = ()
    status: str = "pending"
    attempt: int = 0
    duration_ms: float | None = None
    reason: str | None = None
    error: dict[str, Any] | None = None
    since: float | None = None

    @property
    def elapsed_ms(self) -> float | None:
        """How long it took, or has been running."""
        if self.status == "running" and self.since is not None:
            return (time.monotonic() - self.since) * 1000
        return self.duration_ms


@dataclass(slots=True)
class Picture:
    """A run and its nodes. Only looks: what it does not know it leaves as it was."""

    run_id: str
    status: str = "queued"
    plan_version: int | None = None
    nodes: dict[str, NodeLook] = field(default_factory=dict)
    error: dict[str, Any] | None = None

    @property
    def is_ended(self) -> bool:
        return self.status in TERMINAL_STATUSES

    @property
    def lacks_nodes(self) -> bool:
        """The plan was too big for its event: it is to be fetched."""
        return self.plan_version is not None and not self.nodes

    def take_plan(self, nodes: Iterable[dict[str, Any]]) -> None:
        """Know the nodes of the plan in force; those that it keeps stay as they are."""
        looks = (
            self.nodes.get(node["id"])
            or NodeLook(node["id"], node["capability_id"], tuple(node["requires"]))
            for node in nodes
        )
        # All at once: the screen may be drawn at any moment, from another thread.
        self.nodes = {look.node_id: look for look in looks}

    def apply(self, event: dict[str, Any]) -> None:
        """See one event."""
        event_type, data = event["type"], event["data"]
        if event_type in ENDED:
            self.status, self.error = ENDED[event_type], data.get("error")
        elif event_type in ("RUN_START", "RUN_RESUMED", "RUN_RECOVERED"):
            self.status = "running"
        elif event_type == "RUN_PAUSED":
            self.status = data["status"]
        elif event_type == "PLAN_GENERATED":
            if self.plan_version is not None:
                # What failed or was blocked under the plan before may be ordered anew.
                self.nodes = {
                    i: n for i, n in self.nodes.items() if n.status in ("done", "skipped")
                }
            self.plan_version = data["version"]
            self.take_plan(data.get("nodes") or ())
        elif (node := self.nodes.get(event.get("node_id", ""))) is not None:
            see = _NODE_EVENTS.get(event_type)
            if see is not None:
                see(node, event)


def _started(node: NodeLook, event: dict[str, Any]) -> None:
    node.status, node.attempt, node.since = "running", event.get("attempt", 1), time.monotonic()
    node.reason = node.error = None


def _done(node: NodeLook, event: dict[str, Any]) -> None:
    node.status, node.duration_ms = "done", event["data"].get("duration_ms")
    node.reason = node.error = None


def _failed(node: NodeLook, event: dict[str, Any]) -> None:
    node.status, node.error = "failed", event["data"]["error"]
    node.duration_ms, node.reason = event["data"].get("duration_ms"), None


def _retried(node: NodeLook, event: dict[str, Any]) -> None:
    node.status, node.error, node.reason = "pending", event["data"].get("error"), None


def _blocked(node: NodeLook, event: dict[str, Any]) -> None:
    node.status, node.reason = "blocked", event["data"]["reason"]
    node.error = event["data"].get("error")


def _skipped(node: NodeLook, event: dict[str, Any]) -> None:
    node.status, node.reason = "skipped", event["data"].get("reason")


_NODE_EVENTS: dict[str, Callable[[NodeLook, dict[str, Any]], None]] = {
    "NODE_START": _started,
    "NODE_DONE": _done,
    "NODE_FAILED": _failed,
    "NODE_RETRY": _retried,
    "NODE_BLOCKED": _blocked,
    "NODE_SKIPPED": _skipped,
}


def picture_of(run: dict[str, Any], plan: dict[str, Any] | None) -> Picture:
    """The picture of a run resource; the plan adds what requires what."""
    requires = {node["id"]: tuple(node["requires"]) for node in (plan or {}).get("nodes", ())}
    looks = (
        NodeLook(
            node["node_id"],
            node["capability_id"],
            requires.get(node["node_id"], ()),
            node["status"],
            node["attempt"],
            node["duration_ms"],
            node.get("reason"),
            node.get("error"),
        )
        for node in run["nodes"]
    )
    nodes = {look.node_id: look for look in looks}
    return Picture(run["run_id"], run["status"], run["plan_version"], nodes, run["error"])


class Line(NamedTuple):
    """A node in a drawn graph: what stands before it, and before what belongs below it."""

    guide: str
    below: str
    node_id: str


def laid_out(requires: dict[str, tuple[str, ...]], depth_max: int) -> list[Line]:
    """The nodes of a graph as a tree: each below the deepest one that it requires.

    Deeper graphs than `depth_max` would leave no room: those are listed in order, without guides.
    """
    order, depth = _in_order(requires)
    if not order or max(depth.values()) > depth_max:
        return [Line("", "", node_id) for node_id in order]
    children: dict[str | None, list[str]] = {}
    for node_id in order:
        parents = [name for name in requires[node_id] if name in requires]
        below = max(reversed(parents), key=depth.__getitem__, default=None)
        children.setdefault(below, []).append(node_id)
    lines: list[Line] = []
    stack = [Line("", "", node_id) for node_id in reversed(children.get(None, []))]
    while stack:
        line = stack.pop()
        lines.append(line)
        found = children.get(line.node_id, [])
        for child in reversed(found):
            ends = ("└─ ", "   ") if child == found[-1] else ("├─ ", "│  ")
            stack.append(Line(line.below + ends[0], line.below + ends[1], child))
    return lines


def _in_order(requires: dict[str, tuple[str, ...]]) -> tuple[list[str], dict[str, int]]:
    """The nodes so that none comes before what it requires, and how deep each lies."""
    unmet = {name: sum(r in requires for r in given) for name, given in requires.items()}
    after: dict[str, list[str]] = {}
    for name, given in requires.items():
        for required in given:
            after.setdefault(required, []).append(name)
    order = [name for name, count in unmet.items() if count == 0]
    depth = dict.fromkeys(order, 0)
    for name in order:
        for child in after.get(name, ()):
            depth[child] = max(depth.get(child, 0), depth[name] + 1)
            unmet[child] -= 1
            if unmet[child] == 0:
                order.append(child)
    return order, depth
