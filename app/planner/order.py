"""Puts the nodes of a draft into topological order and binds by name those that ask for it.

Order is Kahn's (A. B. Kahn, "Topological sorting of large networks", CACM 5(11), 1962): linear, no
recursion, and with a first-in first-out queue the nodes come out by depth. A node that is bound by
name and whose facet nobody has produced yet waits until somebody has; so every edge that a binding
adds leads from an earlier to a later node, and can never close a cycle.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from app.domain.capability import Capability
from app.domain.errors import Fault
from app.domain.plan import Bound
from app.kit.json_pointer import escape
from app.planner.draft import DraftNode
from app.planner.view import View, Want

CYCLE_NAMED_MAX = 20


@dataclass(slots=True, eq=False)
class Node:
    """A draft node on its way into the plan.

    `requires` are the direct dependencies in order; `extra` the sources of explicit bindings that
    are not among them. `reach` holds one bit for the place of every node that this one depends on;
    it is worked out only when a binding needs it. `notes` says which choice a binding by name made.
    """

    draft: DraftNode
    capability: Capability
    view: View
    output: View
    requires: dict[str, None]
    bound: Mapping[str, Bound]
    extra: list[str] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)
    unmet: int = 0
    place: int = -1
    level: int = 1
    reach: int = 0

    @property
    def is_bound_by_name(self) -> bool:
        return self.draft.bindings is None

    @property
    def wants_names(self) -> bool:
        return self.draft.bindings is None and bool(self.view.wanted)


def in_order(nodes: Mapping[str, Node], inputs: Mapping[str, Any]) -> list[Node]:
    """The nodes in topological order, with place, level and bindings filled in.

    Nodes in or behind a cycle, or that wait for a facet which never comes, are left out.
    """
    children = _children(nodes)
    queue = [node for node in nodes.values() if not node.unmet]
    needs_binder = any(node.extra or node.wants_names for node in nodes.values())
    order: list[Node] = []
    binder = _Binder(nodes, order, inputs) if needs_binder else None
    for node in queue:
        if binder is not None and not binder.settle(node):
            continue
        node.place = len(order)
        order.append(node)
        for required in node.requires:
            if nodes[required].level >= node.level:
                node.level = nodes[required].level + 1
        for child in children[node.draft.id]:
            child.unmet -= 1
            if not child.unmet:
                queue.append(child)
        if binder is not None:
            queue.extend(binder.woken_by(node))
    return order


def _children(nodes: Mapping[str, Node]) -> dict[str, list[Node]]:
    """Who depends on whom; counts on the way how many requirements each node has."""
    children: dict[str, list[Node]] = {node_id: [] for node_id in nodes}
    for node in nodes.values():
        node.unmet = len(node.requires) + len(node.extra)
        for source in node.requires:
            children[source].append(node)
        for source in node.extra:
            children[source].append(node)
    return children


def given_key(want: Want, inputs: Mapping[str, Any]) -> str | None:
    """The key of the run's inputs that gives this property: its facet's name, else its own key."""
    if want.name in inputs:
        return want.name
    return want.key if want.key in inputs else None


class _Binder:
    """Finds sources by name and adds the edges that bindings need.

    Which nodes a node depends on is one big integer with a bit per place: the highest bit of
    `producers & reach` is the nearest producer, and 2,000 nodes cost 250 bytes each.
    """

    def __init__(
        self, nodes: Mapping[str, Node], order: list[Node], inputs: Mapping[str, Any]
    ) -> None:
        self._nodes = nodes
        self._order = order
        self._inputs = inputs
        self._makers: dict[str, int] = {}
        self._waiting: dict[str, list[Node]] = {}

    def settle(self, node: Node) -> bool:
        """Bind the node and complete its `requires`; False when it has to wait for a facet."""
        node.reach = 0
        for required in node.requires:
            node.reach |= _closure(self._nodes[required])
        if node.draft.bindings is not None:
            self._depend(node, (self._nodes[source] for source in node.extra))
            return True
        return self._bind(node)

    def woken_by(self, node: Node) -> list[Node]:
        """Note what a placed node offers; the nodes that waited for any of it."""
        woken: list[Node] = []
        for name in node.output.offered:
            self._makers[name] = self._makers.get(name, 0) | 1 << node.place
            woken += self._waiting.pop(name, ())
        return woken

    def _bind(self, node: Node) -> bool:
        bound: dict[str, Bound] = {}
        strangers: list[Node] = []
        for want in node.view.wanted:
            makers = self._makers.get(want.name, 0)
            if near := makers & node.reach:
                bound[want.key] = self._from_nearest(node, want, near, "nearest")
            elif (key := given_key(want, self._inputs)) is not None:
                bound[want.key] = Bound("inputs", "/" + escape(key))
            elif want.required and makers:
                bound[want.key] = self._from_nearest(node, want, makers, "latest")
                strangers.append(self._order[makers.bit_length() - 1])
            elif want.required:
                self._waiting.setdefault(want.name, []).append(node)
                return False
        node.bound = bound
        self._depend(node, strangers)
        return True

    def _from_nearest(self, node: Node, want: Want, makers: int, superlative: str) -> Bound:
        maker = self._order[makers.bit_length() - 1]
        if (count := makers.bit_count()) > 1:
            node.notes[want.key] = f"the {superlative} of {count} nodes that produce it; "
        return Bound(maker.draft.id, maker.output.offered[want.name])

    def _depend(self, node: Node, sources: Iterable[Node]) -> None:
        """Add the edges that are not implied by others: latest first, since it may imply some."""
        for source in sorted(sources, key=lambda found: -found.place):
            if not node.reach >> source.place & 1:
                node.requires[source.draft.id] = None
                node.reach |= _closure(source)


def _closure(node: Node) -> int:
    return node.reach | 1 << node.place


def unplaced_faults(
    nodes: Mapping[str, Node], order: list[Node], inputs: Mapping[str, Any]
) -> list[Fault]:
    """Why nodes were left out of the order: CYCLE, or INPUT_UNBOUND of the ones that wait."""
    offered = {name for node in order for name in node.output.offered}
    faults: list[Fault] = []
    for node in nodes.values():
        if node.place < 0 and not node.unmet:
            faults += [
                _unbound(node, want)
                for want in node.view.wanted
                if want.required and want.name not in offered and given_key(want, inputs) is None
            ]
    written = {node_id: index for index, node_id in enumerate(nodes)}
    return faults + [_cycle_fault(nodes, cycle, written) for cycle in _cycles(nodes)]


def _unbound(node: Node, want: Want) -> Fault:
    """INPUT_UNBOUND of a node that is bound by name."""
    return Fault(
        "INPUT_UNBOUND",
        f"node {node.draft.id!r} needs {want.name!r}: no node that it may follow produces it,"
        " and the inputs do not give it",
        node.draft.pointer,
        facet=want.facet,
        node_id=node.draft.id,
        capability_id=node.draft.capability_id,
    )


def _cycles(nodes: Mapping[str, Node]) -> list[list[str]]:
    """Cycles among the unplaced nodes, at least one if there is any, each once.

    Every node that still has unmet requirements points to the first of them; following these
    pointers from each node visits every node once and finds the cycles of that graph.
    """
    seen: dict[str, str] = {}
    found: list[list[str]] = []
    for start, first in nodes.items():
        if first.place >= 0:
            continue
        path: list[str] = []
        current: str | None = start
        while current is not None and current not in seen:
            seen[current] = start
            path.append(current)
            current = next((s for s in _sources(nodes[current]) if nodes[s].place < 0), None)
        if current is not None and seen[current] == start:
            found.append(path[path.index(current) :])
    return found


def _sources(node: Node) -> tuple[str, ...]:
    return (*node.requires, *node.extra)


def _cycle_fault(nodes: Mapping[str, Node], cycle: list[str], written: Mapping[str, int]) -> Fault:
    # Start at the member that the caller wrote first, so that the message does not depend on luck.
    first = min(range(len(cycle)), key=lambda index: written[cycle[index]])
    members = cycle[first:] + cycle[:first]
    named = members[:CYCLE_NAMED_MAX]
    dots = ["…"] if len(members) > len(named) else []
    node = nodes[members[0]]
    return Fault(
        "CYCLE",
        "the nodes require each other: " + " → ".join([*named, *dots, members[0]]),
        _edge_pointer(node, members[1 % len(members)]),
        node_id=members[0],
    )


def _edge_pointer(node: Node, source: str) -> str:
    if source in node.draft.requires:
        return node.draft.at(f"/requires/{list(node.draft.requires).index(source)}")
    key = next(key for key, bound in node.bound.items() if bound.source == source)
    return node.draft.at(f"/inputs/{escape(key)}/from")
