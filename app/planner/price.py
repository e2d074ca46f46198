"""What a call counts when the assembler looks for the cheapest plan.

Prices say what is taken of several ways, never what is allowed. The objective of the envelope
(`policies.planner.optimisation`) gives each capability its price:

    none              tier first, then dollars (`hypergraph.price_of`)
    quality           what a model can make, a model makes: kind `llm` is all but free, and whoever
                      makes one of its facets without a model is taken only where it has to be
    token_efficiency  kind `llm` only where nothing else will do; declared tokens count besides
    speed             the shortest chain of declared time limits, then tier: a limit is all that is
                      known of how long a call takes
    diversity         equals take turns: which of several capabilities of one price is taken differs
                      from run to run, so that not all runs lean on the same one

`selection` is the caller's own word and wins over the objective. While no model is up, what asks
one is avoided, whoever prefers it: such a run would only wait, or fail.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from zlib import crc32

from app.domain.capability import CapabilityKind
from app.domain.envelope import Objective, PlannerPolicies
from app.planner.hypergraph import Edge, Hypergraph, Price, search

PREFERRED_PRICE = 1
OUTDONE_PRICE = 500_000
"""More than a handful of calls of any tier, less than what the caller avoids by name."""
AVOIDED_PRICE = 1_000_000
DOWN_PRICE = 2_000_000
TOKENS_MAX = 99_999
SECONDS_MAX = 600
"""Longer time limits count as this: they are there to end what hangs."""
TURNS = 100
"""Whose turn it is counts less than a tenth of the cheapest call: it decides between equals."""

_OwnPrice = Callable[[Edge], int]


def pricing(
    policies: PlannerPolicies,
    graph: Hypergraph,
    at_hand: Collection[str],
    *,
    models_up: bool,
    run_id: str,
) -> Price:
    """The price of every capability, None for those that the caller forbids.

    `models_up`: a call of a model has a chance now. `run_id` is what `diversity` varies with.
    """
    selection, objective = policies.selection, policies.optimisation.objective
    is_open = not (selection.forbid or selection.prefer or selection.avoid)
    if is_open and objective is None and models_up:
        return _plain
    forbidden, preferred = frozenset(selection.forbid), frozenset(selection.prefer)
    avoided = frozenset(selection.avoid)
    if objective is Objective.QUALITY and models_up:
        by_objective = _quality(graph, at_hand, forbidden, avoided)
    else:
        by_objective = _without_models(objective, run_id)

    def price(edge: Edge) -> int | None:
        name = edge.capability.capability_id
        if name in forbidden:
            return None
        if not models_up and asks_model(edge):
            return edge.price + DOWN_PRICE
        if name in avoided:
            return by_objective(edge) + AVOIDED_PRICE
        return PREFERRED_PRICE if name in preferred else by_objective(edge)

    return price


def asks_model(edge: Edge) -> bool:
    """Whether a model runs the capability."""
    return edge.capability.registration.kind is CapabilityKind.LLM


def _plain(edge: Edge) -> int:
    return edge.price


def _without_models(objective: Objective | None, run_id: str) -> _OwnPrice:
    """The prices of all objectives but `quality`, which without models is as none."""
    if objective is Objective.TOKEN_EFFICIENCY:
        return _token_efficiency
    if objective is Objective.SPEED:
        return _speed
    return _diversity(run_id) if objective is Objective.DIVERSITY else _plain


def _quality(
    graph: Hypergraph,
    at_hand: Collection[str],
    forbidden: Collection[str],
    avoided: Collection[str],
) -> _OwnPrice:
    """Prices that make a model outdo everybody whose facets it could make as well."""

    def allowed(edge: Edge) -> int | None:
        return None if edge.capability.capability_id in forbidden else edge.price

    asking = [
        edge
        for edge in graph.edges.values()
        if asks_model(edge) and edge.capability.capability_id not in avoided
    ]
    # One that can not be called outdoes nobody: its rivals would only be dearer than other ways.
    callable_ = search(graph, at_hand, (), asking, allowed).calls
    by_models = {facet for edge in asking if edge.rank in callable_ for facet in edge.gives}

    def price(edge: Edge) -> int:
        if asks_model(edge):
            return edge.price // 1_000
        return edge.price + (0 if by_models.isdisjoint(edge.gives) else OUTDONE_PRICE)

    return price


def _token_efficiency(edge: Edge) -> int:
    tokens = min(edge.capability.registration.cost.tokens or 0, TOKENS_MAX)
    return edge.price + tokens + (OUTDONE_PRICE if asks_model(edge) else 0)


def _speed(edge: Edge) -> int:
    seconds = min(math.ceil(edge.capability.registration.timeout_s), SECONDS_MAX)
    return 1_000 * seconds + edge.price // 1_000


def _diversity(run_id: str) -> _OwnPrice:
    def price(edge: Edge) -> int:
        return edge.price + crc32(f"{run_id} {edge.capability.capability_id}".encode()) % TURNS

    return price
