"""A caller's goal graph as a draft: taken as it is, nothing added or left out."""

from __future__ import annotations

from collections.abc import Mapping

from app.domain.envelope import Binding, FromBinding, GoalGraph, GoalNode
from app.domain.errors import Fault
from app.domain.plan import Author, Bound
from app.planner.draft import Draft, DraftNode, reject_if


def draft_goal_graph(graph: GoalGraph) -> Draft:
    """The draft of a goal graph. Whether it holds is for `verify` to say.

    Raises `PlanRejected` (CAPABILITY_MISSING) for goals that name no capability: here is nobody who
    could choose one.
    """
    faults = [
        Fault(
            "CAPABILITY_MISSING",
            f"node {node.id!r} names no capability, which only a model can choose: name one, or"
            " configure a model and submit the run",
            f"/goal_graph/nodes/{index}",
            node_id=node.id,
        )
        for index, node in enumerate(graph.nodes)
        if node.capability is None
    ]
    reject_if("the goal graph was refused", faults)
    nodes = [draft_goal_node(node, index) for index, node in enumerate(graph.nodes)]
    return Draft(Author.CALLER, nodes)


def draft_goal_node(node: GoalNode, index: int) -> DraftNode:
    """A goal that names its capability, at this place in the graph, as a draft."""
    return DraftNode(
        node.id,
        node.capability or "",
        node.capability_version,
        node.requires,
        None if node.inputs is None else _bindings(node.inputs),
        node.text,
        node.timeout_s,
        node.max_attempts,
        "",
        f"/goal_graph/nodes/{index}",
    )


def _bindings(inputs: Mapping[str, Binding]) -> dict[str, Bound]:
    return {
        key: Bound(given.source, given.pointer)
        if isinstance(given, FromBinding)
        else Bound(None, "", given.value)
        for key, given in inputs.items()
    }
