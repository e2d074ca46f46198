"""The capabilities that a model is shown when it plans: those that could have a part in it.

Found from the facets alone: forward from what is at hand, what can be called at all; backward from
what is asked for, what could contribute. Whoever is far from both is left out when there are too
many, because a prompt is dear and a model that sees a thousand tools chooses badly.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from app.domain.capability import Capability
from app.domain.envelope import Selection
from app.planner.hypergraph import Edge, Hypergraph, hypergraph_of
from app.registry.image import RegistryImage

SHORTLIST_MAX = 60


def shortlist(
    image: RegistryImage,
    at_hand: Collection[str],
    goals: Iterable[str],
    selection: Selection,
    *,
    size_max: int = SHORTLIST_MAX,
) -> list[Capability]:
    """At most `size_max` capabilities, by id: required and preferred ones, then the nearest.

    Without goals (an output in words) everything that can be called counts as near.
    """
    graph = hypergraph_of(image)
    callable_ = _callable(graph, at_hand)
    named = [*selection.require, *selection.prefer]
    wanted = [graph.edges[name] for name in named if name in graph.edges]
    near = _contributors(graph, at_hand, goals) or list(graph.edges.values())
    chosen: dict[str, Capability] = {}
    for edge in (*wanted, *(edge for edge in near if edge.rank in callable_)):
        name = edge.capability.capability_id
        if len(chosen) < size_max and name not in selection.forbid:
            chosen[name] = edge.capability
    return [chosen[name] for name in sorted(chosen)]


def _callable(graph: Hypergraph, at_hand: Collection[str]) -> set[int]:
    """Ranks of all capabilities whose needs are at hand or made by others that can be called."""
    known = set(at_hand)
    found: set[int] = set()
    is_growing = True
    while is_growing:
        is_growing = False
        for edge in graph.edges.values():
            if edge.rank not in found and known.issuperset(edge.needs):
                found.add(edge.rank)
                known.update(edge.gives)
                is_growing = True
    return found


def _contributors(graph: Hypergraph, at_hand: Collection[str], goals: Iterable[str]) -> list[Edge]:
    """Who makes a goal, who makes what those need, and so on, nearest first."""
    wanted = list(dict.fromkeys(goals))
    seen = {*wanted, *at_hand}
    found: dict[int, Edge] = {}
    for facet in wanted:  # grows while it is walked
        for edge in graph.makers.get(facet, ()):
            if edge.rank not in found:
                found[edge.rank] = edge
                fresh = [need for need in edge.needs if need not in seen]
                seen.update(fresh)
                wanted += fresh
    return list(found.values())
