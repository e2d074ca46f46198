"""Linear mode: a goal graph that names no capabilities is planned one node at a time.

The caller says what is to be done and in which order, and a model chooses who does it: one goal
among those whose requirements are done, with the results so far before its eyes. Each choice makes
a plan version; the last one covers the run's output, and is proved as a whole.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter
from typing import Any

from app.domain.envelope import FromBinding, GoalGraph, GoalNode
from app.domain.errors import Fault
from app.domain.plan import Author
from app.kit.json_pointer import escape
from app.planner.draft import RESERVED_NODE_IDS, Draft, PlanLimits, reject_if
from app.planner.goal_graph import draft_goal_node
from app.planner.order import CYCLE_NAMED_MAX
from app.planner.prompt import INPUTS, bindings_of
from app.planner.replan import Progress
from app.registry.image import RegistryImage

REFUSED = "the goal graph was refused"
_LIMITS = PlanLimits()


def is_open(graph: GoalGraph) -> bool:
    """Whether a goal of the graph names no capability."""
    return any(node.capability is None for node in graph.nodes)


def check_goals(graph: GoalGraph, image: RegistryImage, limits: PlanLimits = _LIMITS) -> None:
    """What can be said of a goal graph before anything is chosen.

    Raises `PlanRejected` with LIMIT_EXCEEDED, DUPLICATE_NODE, RESERVED_NODE_ID, UNKNOWN_NODE,
    CYCLE, or CAPABILITY_NOT_REGISTERED for a named capability that nobody registered.
    """
    faults: list[Fault] = []
    if (count := len(graph.nodes)) > limits.nodes_max:
        why = f"the goal graph has {count} nodes; {limits.nodes_max} is the limit"
        reject_if(REFUSED, [Fault("LIMIT_EXCEEDED", why, "/goal_graph/nodes")])
    known = {node.id for node in graph.nodes}
    taken: set[str] = set()
    for index, node in enumerate(graph.nodes):
        at = f"/goal_graph/nodes/{index}"
        if node.id in taken:
            why = f"the node id {node.id!r} is taken"
            faults.append(Fault("DUPLICATE_NODE", why, f"{at}/id", node_id=node.id))
        taken.add(node.id)
        if node.id in RESERVED_NODE_IDS:
            why = f"the node id {node.id!r} names the run's inputs in bindings"
            faults.append(Fault("RESERVED_NODE_ID", why, f"{at}/id", node_id=node.id))
        if node.capability is not None and not image.is_known(node.capability):
            why = f"no capability {node.capability!r} is registered"
            where = f"{at}/capability"
            faults.append(Fault("CAPABILITY_NOT_REGISTERED", why, where, node_id=node.id))
        for place, required in enumerate(node.requires):
            if required not in known:
                why = f"node {node.id!r} requires {required!r}, which is not in the graph"
                where = f"{at}/requires/{place}"
                faults.append(Fault("UNKNOWN_NODE", why, where, node_id=node.id))
        for key, source in _sources(node).items():
            if source not in known:
                why = f"node {node.id!r} takes {key!r} from {source!r}, which is not in the graph"
                where = f"{at}/inputs/{escape(key)}/from"
                faults.append(Fault("UNKNOWN_NODE", why, where, node_id=node.id))
    reject_if(REFUSED, faults)
    reject_if(REFUSED, _cycle_faults(graph))


def _sources(goal: GoalNode) -> dict[str, str]:
    """The goals from which a goal takes its inputs, by key."""
    given = (goal.inputs or {}).items()
    found = {key: bound.source for key, bound in given if isinstance(bound, FromBinding)}
    return {key: source for key, source in found.items() if source != INPUTS}


def _needs(goal: GoalNode) -> list[str]:
    """The goals that come before a goal: by its word, or because it takes something from them."""
    return [*goal.requires, *_sources(goal).values()]


def _cycle_faults(graph: GoalGraph) -> list[Fault]:
    """Goals that can never become ready, because they wait for each other; one such ring."""
    try:
        TopologicalSorter({goal.id: _needs(goal) for goal in graph.nodes}).prepare()
    except CycleError as found:
        # From requirement to who requires it, the first once more at the end; here the other way.
        ring: list[str] = found.args[1][:0:-1]
    else:
        return []
    places = {goal.id: place for place, goal in enumerate(graph.nodes)}
    first = min(range(len(ring)), key=lambda index: places[ring[index]])
    named = [*ring[first:], *ring[:first]][:CYCLE_NAMED_MAX]
    dots = ["…"] if len(ring) > len(named) else []
    why = "the nodes require each other: " + " → ".join([*named, *dots, named[0]])
    return [Fault("CYCLE", why, f"/goal_graph/nodes/{places[named[0]]}", node_id=named[0])]


def ready_goals(
    graph: GoalGraph, planned: Collection[str], done: Collection[str]
) -> list[GoalNode]:
    """The goals that no node does yet and that wait for none but those that have their result."""
    return [
        goal
        for goal in graph.nodes
        if goal.id not in planned and all(needed in done for needed in _needs(goal))
    ]


def is_stepwise(graph: GoalGraph | None, progress: Progress | None) -> bool:
    """Whether the next plan version is one more node of an open goal graph."""
    if graph is None or not is_open(graph):
        return False
    return progress is None or any(goal.id not in progress.kept for goal in graph.nodes)


def ready_now(graph: GoalGraph, progress: Progress | None) -> list[GoalNode]:
    """The goals that may be planned next. Raises `PlanRejected` (GOAL_NOT_READY) without any."""
    if progress is None:
        return ready_goals(graph, (), ())
    ready = ready_goals(graph, progress.kept, progress.done)
    if not ready:
        why = "every goal that is left waits for one whose outcome is not known"
        reject_if(REFUSED, [Fault("GOAL_NOT_READY", why, "/goal_graph/nodes")])
    return ready


def draft_named(graph: GoalGraph, progress: Progress | None) -> Draft | None:
    """The ready goals that name their capability: nobody has to choose. None when there is none."""
    named = [goal for goal in ready_now(graph, progress) if goal.capability is not None]
    if not named:
        return None
    nodes = [draft_goal_node(goal, graph.nodes.index(goal)) for goal in named]
    return Draft(Author.CALLER, nodes, "", _still_open(graph, progress, [n.id for n in named]))


def draft_chosen(graph: GoalGraph, progress: Progress | None, answer: Mapping[str, Any]) -> Draft:
    """The goal that a model chose, done by the capability that it chose."""
    goal = next(found for found in ready_now(graph, progress) if found.id == answer["node"])
    chosen = goal.model_copy(update={"capability": answer["capability"]})
    node = draft_goal_node(chosen, graph.nodes.index(goal))
    if goal.inputs is None:
        node = replace(node, bindings=bindings_of(answer.get("inputs"), {}))
    node = replace(node, rationale=answer.get("rationale", ""), pointer="")
    return Draft(Author.LLM, [node], "", _still_open(graph, progress, [goal.id]))


def _still_open(
    graph: GoalGraph, progress: Progress | None, drafted: Collection[str]
) -> tuple[str, ...]:
    kept: Collection[str] = () if progress is None else progress.kept
    return tuple(goal.id for goal in graph.nodes if goal.id not in kept and goal.id not in drafted)
