"""The default planner: the cheapest plan that the registry holds, without a model.

The facets at hand are those inputs that name a facet and keep its schema; the facets asked for come
from the output contract. `hypergraph.search` finds the cheapest derivation, what it shares is
merged, calls that turn out to be unneeded are dropped, and the rest becomes a draft for `verify`.

Decided here, where the design is silent:
    - A facet that is both given and asked for is passed through, unless all that is asked for is
      given: then it is to be made anew (a translation of a text into a text, say).
    - `selection.require` puts a capability into the plan even if nothing needs its output;
      `prefer` makes it all but free; `avoid` uses it only if nothing else will do. What else makes
      one way cheaper than another is in `price.py`.
    - A json_schema output is assembled from its required properties that name facets, or from all
      of them if none is required.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from app.domain.contract import Contract, instructions_of
from app.domain.envelope import NODE_ID_PATTERN, Envelope, Objective, Selection
from app.domain.errors import Fault
from app.domain.plan import Author, Bound
from app.kit.json_pointer import escape
from app.planner.draft import RESERVED_NODE_IDS, Draft, DraftNode, PlanLimits, reject_if
from app.planner.hypergraph import (
    Call,
    Derivation,
    Edge,
    Hypergraph,
    Price,
    facet_of,
    hypergraph_of,
    search,
)
from app.planner.price import pricing
from app.planner.view import wants_of
from app.registry.image import RegistryImage

REFUSED = "no plan can be assembled"
NODE_ID = re.compile(NODE_ID_PATTERN)
NODE_ID_MAX = 100
NAMED_MAX = 5


@dataclass(slots=True)
class _Task:
    """What one assembly works on. `at_hand` gives the key of the inputs that holds a facet."""

    image: RegistryImage
    graph: Hypergraph
    at_hand: dict[str, str]
    goals: list[str]
    must: list[Edge]
    price: Price
    objective: Objective | None
    models_up: bool

    def search(self, *, shallow: bool = False, among: Collection[int] | None = None) -> Derivation:
        """The cheapest derivation; `among` allows only the capabilities of these ranks."""
        price = self.price
        if among is not None:

            def price(edge: Edge) -> int | None:
                return self.price(edge) if edge.rank in among else None

        return search(
            self.graph,
            self.at_hand,
            self.goals,
            self.must,
            price,
            shallow=shallow,
            side_by_side=self.objective is Objective.SPEED,
        )

    def is_reached_by(self, found: Derivation) -> bool:
        """Whether a search reached every goal and every required capability."""
        return found.maker.keys() >= set(self.goals) and found.calls.keys() >= {
            edge.rank for edge in self.must
        }


def assemble(
    envelope: Envelope,
    image: RegistryImage,
    output: Contract,
    limits: PlanLimits,
    *,
    models_up: bool = True,
    run_id: str = "",
) -> Draft:
    """The draft of the cheapest plan. Deterministic, whatever order things were registered in.

    `models_up`: a call of a model has a chance now. `run_id` is what plans for diversity vary with.

    Raises `PlanRejected` with CAPABILITY_MISSING (which facet can not be produced, and what its
    producers lack), INPUT_MISMATCH (an input names a facet and breaks its schema, and nothing else
    helps), OUTPUT_FACET_UNCOVERED, SELECTION_CONFLICT, CAPABILITY_NOT_REGISTERED or
    CAPABILITY_INACTIVE of a required capability.
    """
    faults: list[Fault] = []
    at_hand, misfits = _at_hand(envelope.inputs, image)
    graph = hypergraph_of(image)
    policies = envelope.policies.planner
    selection = policies.selection
    must = _required_edges(selection, image, graph, faults)
    goals = _goals(output, envelope.inputs, image, faults)
    if not faults and not goals and not must:
        faults.append(_nothing_asked(output))
    reject_if(REFUSED, faults)
    price = pricing(policies, graph, at_hand, models_up=models_up, run_id=run_id)
    objective = policies.optimisation.objective
    task = _Task(image, graph, at_hand, goals, must, price, objective, models_up)
    passed = [goal for goal in goals if goal in at_hand]
    if len(passed) < len(goals) or must:
        task.goals = [goal for goal in goals if goal not in at_hand]
    found = task.search()
    missing = [goal for goal in task.goals if goal not in found.maker]
    if len(missing) < len(task.goals):
        missing = [goal for goal in missing if goal not in at_hand]
    faults += [_missing(goal, task, found, output) for goal in missing]
    stuck = [edge for edge in must if edge.rank not in found.calls]
    faults += [_unreached(edge, task, found, selection) for edge in stuck]
    reject_if(REFUSED, faults and faults + misfits)
    task.goals = [goal for goal in task.goals if goal in found.maker]
    return _within(task, found, limits)


def inputs_at_hand(envelope: Envelope, image: RegistryImage) -> frozenset[str]:
    """The facets that the inputs give."""
    return frozenset(_at_hand(envelope.inputs, image)[0])


def goals_of(envelope: Envelope, image: RegistryImage, output: Contract) -> list[str]:
    """The facets that are asked for, as far as the output names any."""
    return _goals(output, envelope.inputs, image, [])


def _at_hand(inputs: Mapping[str, Any], image: RegistryImage) -> tuple[dict[str, str], list[Fault]]:
    """The facets that the inputs give, each with its key; and what is wrong with the others."""
    at_hand: dict[str, str] = {}
    misfits: list[Fault] = []
    for key, value in inputs.items():
        named = image.facets_named(key)
        if not named:
            at_hand.setdefault(key, key)
        for facet in named:
            broken = image.facet_contract(facet).property_violations(facet.key, value)
            if not broken:
                # The facet's own name speaks louder than a key that several facets may share.
                at_hand[facet.name] = key if key == facet.name else at_hand.get(facet.name, key)
            for fault in broken:
                at = "/inputs/" + escape(key) + fault.pointer[len(escape(facet.key)) + 1 :]
                why = f"the input {key!r} is not a {facet.name!r}: {fault.message}"
                misfits.append(Fault("INPUT_MISMATCH", why, at, facet=facet.name))
    return at_hand, misfits


def _required_edges(
    selection: Selection, image: RegistryImage, graph: Hypergraph, faults: list[Fault]
) -> list[Edge]:
    edges: list[Edge] = []
    for index, name in enumerate(selection.require):
        edge = graph.edges.get(name)
        if edge is not None and name not in selection.forbid:
            edges.append(edge)
            continue
        if edge is not None:
            code, why = "SELECTION_CONFLICT", "is both required and forbidden"
        elif image.is_known(name):
            code, why = "CAPABILITY_INACTIVE", "is required but inactive"
        else:
            code, why = "CAPABILITY_NOT_REGISTERED", "is required but not registered"
        pointer = f"/policies/planner/selection/require/{index}"
        faults.append(Fault(code, f"capability {name!r} {why}", pointer, capability_id=name))
    return edges


def _goals(
    output: Contract, inputs: Mapping[str, Any], image: RegistryImage, faults: list[Fault]
) -> list[str]:
    """The facets asked for, in the order of the output contract."""
    if output.mode == "facets":
        return list(output.facets)
    wants = wants_of(output)
    required = [want for want in wants if want.required]
    goals: list[str] = []
    for want in required or wants:
        facet = facet_of(want, image)
        if facet in image.facets:
            goals.append(facet)
        elif want.required and want.key not in inputs:
            faults.append(
                Fault(
                    "OUTPUT_FACET_UNCOVERED",
                    f"the output needs {want.key!r}, which names no facet: nothing can be"
                    " assembled for it",
                    _asked_at(output, want.key),
                )
            )
    return list(dict.fromkeys(goals))


def _nothing_asked(output: Contract) -> Fault:
    what = "a freeform output" if output.mode == "freeform" else "this output schema"
    return Fault(
        "CAPABILITY_MISSING",
        f"{what} names no facet that a plan could be assembled for: ask for facets, name facets as"
        " properties of a schema, or give a goal_graph",
        "/output_contract",
    )


def _asked_at(output: Contract, name: str) -> str:
    """Where the output contract asks for a facet or a property."""
    if output.mode == "facets":
        return f"/output_contract/facets/{output.facets.index(name)}"
    if name in output.properties:
        return "/output_contract/schema/properties/" + escape(name)
    return "/output_contract/schema"


def _missing(goal: str, task: _Task, found: Derivation, output: Contract) -> Fault:
    makers = task.graph.makers.get(goal, ())
    if makers:
        dots = "; …" if len(makers) > NAMED_MAX else ""
        why = "; ".join(_lack(edge, task, found) for edge in makers[:NAMED_MAX]) + dots
    else:
        why = "no active capability produces it"
    roots = _roots(task, found)
    hint = f"; the inputs could give: {', '.join(roots)}" if makers and roots else ""
    return Fault(
        "CAPABILITY_MISSING",
        f"the facet {goal!r} can not be produced: {why}{hint}",
        _asked_at(output, goal),
        facet=goal,
    )


def _lack(edge: Edge, task: _Task, found: Derivation) -> str:
    name = edge.capability.capability_id
    if task.price(edge) is None:
        return f"{name} is forbidden"
    return f"{name} lacks {_lacking(edge, task, found)}"


def _lacking(edge: Edge, task: _Task, found: Derivation) -> str:
    lacking = [need for need in edge.needs if need not in task.at_hand and need not in found.maker]
    return ", ".join(repr(need) for need in lacking)


def _roots(task: _Task, found: Derivation) -> list[str]:
    """Facets that are needed on the way and that no usable capability produces."""
    made = {facet for edge in found.relevant for facet in edge.gives}
    needed = {need for edge in found.relevant for need in edge.needs}
    return sorted(needed - made - task.at_hand.keys())[:NAMED_MAX]


def _unreached(edge: Edge, task: _Task, found: Derivation, selection: Selection) -> Fault:
    name = edge.capability.capability_id
    return Fault(
        "SELECTION_CONFLICT",
        f"capability {name!r} is required but lacks {_lacking(edge, task, found)}",
        f"/policies/planner/selection/require/{selection.require.index(name)}",
        capability_id=name,
    )


def _within(task: _Task, found: Derivation, limits: PlanLimits) -> Draft:
    """The cheapest draft that is not too deep: without optional inputs if these make it so, and
    the shallowest if the cheapest is too deep as it is."""
    nodes: list[DraftNode] = []
    calls: list[Call] = []
    for shallow, optional in itertools.product((False, True), (True, False)):
        if optional:  # the first try with this derivation
            found = task.search(shallow=True) if shallow else found
            calls = _pruned(task, found, shallow=shallow)
        nodes, depth = _drafted(task, calls, optional=optional)
        if depth <= limits.depth_max:
            break
    return Draft(Author.ASSEMBLER, nodes, _rationale(task, calls))


def _pruned(task: _Task, found: Derivation, *, shallow: bool) -> list[Call]:
    """The calls that the goals need, less those that the others make unnecessary.

    Each goal is derived on its own, so a call may be in for the sake of a facet that another call,
    needed for another goal, produces as well.
    """
    calls = _needed(task, found)
    tried: set[int] = set()
    while (spare := _spare(task, calls, tried)) is not None:
        tried.add(spare.rank)
        among = {call.edge.rank for call in calls} - {spare.rank}
        without = task.search(shallow=shallow, among=among)
        if task.is_reached_by(without):
            calls = _needed(task, without)
    return calls


def _needed(task: _Task, found: Derivation) -> list[Call]:
    """The calls that goals and required capabilities need, each after those that it needs."""
    needed: set[int] = set()
    open_calls = [found.maker[goal] for goal in task.goals]
    open_calls += [found.calls[edge.rank] for edge in task.must]
    while open_calls:
        edge = open_calls.pop().edge
        if edge.rank not in needed:
            needed.add(edge.rank)
            open_calls += [found.maker[need] for need in edge.needs if need not in task.at_hand]
    return [call for rank, call in found.calls.items() if rank in needed]


def _spare(task: _Task, calls: list[Call], tried: set[int]) -> Edge | None:
    """The dearest call not tried yet for all of whose useful facets there is another producer."""
    used = {need for call in calls for need in call.edge.needs}.difference(task.at_hand)
    used.update(task.goals)
    makers = Counter(facet for call in calls for facet in call.edge.gives)
    keep = tried.union(edge.rank for edge in task.must)
    spare = [
        call.edge
        for call in calls
        if call.edge.rank not in keep
        and all(makers[facet] > 1 for facet in call.edge.gives if facet in used)
    ]
    return max(spare, key=lambda edge: (task.price(edge) or 0, edge.rank), default=None)


def _drafted(task: _Task, calls: list[Call], *, optional: bool) -> tuple[list[DraftNode], int]:
    """The nodes of the calls, each bound to the first node that makes what it takes; the depth."""
    nodes: list[DraftNode] = []
    made: dict[str, Bound] = {}
    level: dict[str, int] = {}
    for call in calls:
        capability = call.edge.capability
        bindings: dict[str, Bound] = {}
        for want in wants_of(capability.input):
            facet = facet_of(want, task.image)
            if facet in task.at_hand:
                bindings[want.key] = Bound("inputs", "/" + escape(task.at_hand[facet]))
            elif facet in made and (want.required or optional):
                bindings[want.key] = made[facet]
        sources = [bound.source for bound in bindings.values() if bound.source in level]
        requires = list(dict.fromkeys(sources))
        node_id = _node_id(capability.capability_id, level)
        level[node_id] = 1 + max((level[source] for source in requires), default=0)
        nodes.append(
            DraftNode(
                node_id,
                capability.capability_id,
                capability.version,
                requires,
                bindings,
                instructions_of(
                    task.image.facets[name]
                    for name in capability.output.facets
                    if name in task.image.facets
                ),
                rationale=_reason(call),
            )
        )
        for found in capability.output.properties.values():
            if found.facet in call.edge.gives:
                made.setdefault(found.facet, Bound(node_id, "/" + escape(found.key)))
    return nodes, max(level.values())


def _node_id(capability_id: str, taken: Collection[str]) -> str:
    """The last part of the capability's id, or more of it when that is taken or no node id."""
    whole = capability_id[:NODE_ID_MAX]
    for candidate in (capability_id.rpartition(".")[2], whole):
        if _is_free(candidate, taken):
            return candidate
    count = 2
    while f"{whole[: NODE_ID_MAX - 5]}_{count}" in taken:
        count += 1
    return f"{whole[: NODE_ID_MAX - 5]}_{count}"


def _is_free(node_id: str, taken: Collection[str]) -> bool:
    if node_id in taken or node_id in RESERVED_NODE_IDS:
        return False
    return NODE_ID.match(node_id) is not None


def _reason(call: Call) -> str:
    gives = ", ".join(call.edge.gives) or "nothing that others need"
    needs = ", ".join(call.edge.needs) or "nothing"
    return f"makes {gives} from {needs}"


def _rationale(task: _Task, calls: list[Call]) -> str:
    goals = ", ".join(task.goals) or "what the policies require"
    if task.objective is None:
        cost = sum(task.price(call.edge) or 0 for call in calls)
        return f"cheapest way to {goals} in the registry: {len(calls)} calls, cost {cost / 1_000:g}"
    is_down = task.objective is Objective.QUALITY and not task.models_up
    note = ", without a model because none is up" if is_down else ""
    return f"best way to {goals} in the registry for {task.objective}: {len(calls)} calls{note}"
