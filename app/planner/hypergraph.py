"""The registry as a directed hypergraph, and the cheapest derivation in it.

Facets are vertices; a capability is a hyperedge from all facets that it requires to all that it
surely produces. The cheapest derivation of a facet is found by D. E. Knuth, "A generalization of
Dijkstra's algorithm", Information Processing Letters 6(1), 1977, with the superior function

    cost(call) = price of the capability + the sum of the costs of its required facets

The sum counts a facet that is used twice twice, as is usual: the true cheapest set of calls is
NP-hard (it contains set cover). `assemble` merges what is shared afterwards. Where prices are
times, the longest of the required facets counts instead of their sum, which is superior as well.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from app.domain.capability import Capability
from app.planner.view import Want, wants_of
from app.registry.image import RegistryImage


@dataclass(frozen=True, slots=True)
class Edge:
    """A capability as a hyperedge.

    `needs` are the facets of its required inputs, each once; `gives` those it surely produces.
    `rank` is its place among all capabilities by id, the last of the tie-breaks.
    """

    rank: int
    capability: Capability
    needs: tuple[str, ...]
    gives: tuple[str, ...]
    price: int


@dataclass(frozen=True, slots=True)
class Hypergraph:
    """All plannable capabilities by id, and the producers of every facet."""

    edges: Mapping[str, Edge]
    makers: Mapping[str, tuple[Edge, ...]]


@dataclass(frozen=True, slots=True)
class Call:
    """A capability whose needs are all derived. `depth` counts the calls in a row up to it."""

    edge: Edge
    cost: int
    depth: int


@dataclass(slots=True)
class Derivation:
    """What a search found.

    `maker` is the call that first derived a facet; `calls` are all calls by rank, each after those
    that it needs. `relevant` are the capabilities that could contribute.
    """

    maker: dict[str, Call] = field(default_factory=dict)
    calls: dict[int, Call] = field(default_factory=dict)
    relevant: list[Edge] = field(default_factory=list)


@dataclass(slots=True)
class _Pending:
    """A relevant capability: how many needs are not derived yet, what the others cost so far."""

    edge: Edge
    price: int
    unmet: int = 0
    spent: int = 0
    depth: int = 0


Price = Callable[[Edge], int | None]
_graphs: WeakKeyDictionary[RegistryImage, Hypergraph] = WeakKeyDictionary()


def hypergraph_of(image: RegistryImage) -> Hypergraph:
    """The hypergraph of an image, built at its first use."""
    found = _graphs.get(image)
    if found is None:
        found = _graphs[image] = _build(image)
    return found


def _build(image: RegistryImage) -> Hypergraph:
    edges: dict[str, Edge] = {}
    makers: dict[str, list[Edge]] = {}
    for rank, capability in enumerate(image.active()):
        wants = wants_of(capability.input)
        needs = dict.fromkeys(facet_of(want, image) for want in wants if want.required)
        # Only what a call surely produces can carry a derivation, and only facets have a meaning
        # that two capabilities share: equal keys of two plain schemas may be a coincidence.
        made = capability.output.properties.values()
        gives = tuple(found.facet for found in made if found.facet is not None and found.required)
        edge = Edge(rank, capability, tuple(needs), gives, price_of(capability))
        edges[capability.capability_id] = edge
        for facet in gives:
            makers.setdefault(facet, []).append(edge)
    return Hypergraph(edges, {facet: tuple(found) for facet, found in makers.items()})


def facet_of(want: Want, image: RegistryImage) -> str:
    """What a property takes: its own facet, else the only one known by its key, else the key."""
    if want.facet is not None:
        return want.facet
    named = image.facets_named(want.key)
    return named[0].name if len(named) == 1 else want.key


def price_of(capability: Capability) -> int:
    """What a call costs, in thousandths of the cheapest call: tier first, then dollars.

    Every call costs something, so that of two ways through one tier the shorter wins. Observed
    latency and reliability belong here once the registry keeps them.
    """
    cost = capability.registration.cost
    cents = int((cost.usd_per_call or 0) * 100)
    return 1_000 + 10_000 * cost.tier + min(cents, 9_999)


def search(
    graph: Hypergraph,
    at_hand: Collection[str],
    goals: Iterable[str],
    must: Iterable[Edge],
    price: Price,
    *,
    shallow: bool = False,
    side_by_side: bool = False,
) -> Derivation:
    """The cheapest derivation of the goals and of the calls in `must` from the facets at hand.

    `price` gives a capability's price, None to leave it out. `shallow` minimises depth instead
    (`1 + max` is superior as well) and lets cost break ties. `side_by_side`: of all that a call
    needs, only the dearest counts. A goal that is at hand is derived all the same. Touches only
    capabilities that can contribute and stops when all goals are reached; a goal that can not be
    derived is missing from `maker`, a call of `must` from `calls`.
    """
    open_goals = set(goals)
    must = list(must)
    open_calls = {edge.rank for edge in must}
    pending, takers = _relevant(graph, at_hand, open_goals, must, price)
    join = max if side_by_side else operator.add
    found = Derivation(relevant=[known.edge for known in pending.values()])
    heap: list[tuple[int, int, int]] = []

    def push(ready: _Pending) -> None:
        cost, deep = ready.spent + ready.price, ready.depth + 1
        first, second = (deep, cost) if shallow else (cost, deep)
        heapq.heappush(heap, (first, second, ready.edge.rank))

    for known in pending.values():
        if not known.unmet:
            push(known)
    while heap and (open_goals or open_calls):
        first, second, rank = heapq.heappop(heap)
        cost, deep = (second, first) if shallow else (first, second)
        edge = pending[rank].edge
        call = found.calls[rank] = Call(edge, cost, deep)
        open_calls.discard(rank)
        for facet in edge.gives:
            if facet in found.maker:
                continue
            found.maker[facet] = call
            open_goals.discard(facet)
            for taker in takers.get(facet, ()):
                taker.spent = join(taker.spent, cost)
                taker.unmet -= 1
                if deep > taker.depth:
                    taker.depth = deep
                if not taker.unmet:
                    push(taker)
    return found


def _relevant(
    graph: Hypergraph,
    at_hand: Collection[str],
    goals: Iterable[str],
    must: Iterable[Edge],
    price: Price,
) -> tuple[dict[int, _Pending], dict[str, list[_Pending]]]:
    """Go back from the goals to every capability that can contribute; who waits for which facet."""
    pending: dict[int, _Pending] = {}
    takers: dict[str, list[_Pending]] = {}
    wanted = [*goals]
    seen = set(wanted).union(at_hand)
    fresh: Iterable[Edge] = must
    while True:
        for edge in fresh:
            if edge.rank in pending or (own := price(edge)) is None:
                continue
            waits = pending[edge.rank] = _Pending(edge, own)
            for need in edge.needs:
                if need in at_hand:
                    continue
                waits.unmet += 1
                takers.setdefault(need, []).append(waits)
                if need not in seen:
                    seen.add(need)
                    wanted.append(need)
        if not wanted:
            return pending, takers
        fresh = graph.makers.get(wanted.pop(), ())
