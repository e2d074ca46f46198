"""A caller's goal graph as a draft: taken as it is, nothing added or left out."""

from __future__ import annotations

from collections.abc import Mapping

from app.domain.envelope import Binding, FromBinding, GoalGraph
from app.domain.plan import Author, Bound
from app.planner.draft import Draft, DraftNode


def draft_goal_graph(graph: GoalGraph) -> Draft:
    """The draft of a goal graph. Whether it holds is for `verify` to say."""
    nodes = [
        DraftNode(
            node.id,
            node.capability,
            node.capability_version,
            node.requires,
            None if node.inputs is None else _bindings(node.inputs),
            node.text,
            node.timeout_s,
            node.max_attempts,
            "",
            f"/goal_graph/nodes/{index}",
        )
        for index, node in enumerate(graph.nodes)
    ]
    return Draft(Author.CALLER, nodes)


def _bindings(inputs: Mapping[str, Binding]) -> dict[str, Bound]:
    return {
        key: Bound(given.source, given.pointer)
        if isinstance(given, FromBinding)
        else Bound(None, "", given.value)
        for key, given in inputs.items()
    }
