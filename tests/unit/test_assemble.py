"""The assembler: cheapest derivations, their sharing, and clear words when there is none."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain.capability import Capability, NodeKind
from app.domain.envelope import Envelope
from app.domain.errors import Fault, PlanRejected
from app.domain.plan import Author, Bound, Fit, OutputSource, Plan
from app.planner import hypergraph
from app.planner.plan_envelope import PlanLimits, plan_envelope
from app.registry.image import RegistryImage
from tests.registry_samples import capability, envelope, facet, image_of

OUTLINE = capability("document.outline", ["document"], ["outline"])
COMPOSE = capability("brief.compose", ["outline"], ["draft_brief"])
CHECK = capability("brief.check", ["draft_brief", "document"], ["brief"], kind=NodeKind.VALIDATION)
FETCH = capability("document.fetch", ["url"], ["document"])
PACK = [OUTLINE, COMPOSE, CHECK, FETCH]


def plan_of(made: Envelope, image: RegistryImage, limits: PlanLimits | None = None) -> Plan:
    return plan_envelope(made, image, run_id="r", created_at="now", limits=limits or PlanLimits())


def faults_of(made: Envelope, image: RegistryImage) -> tuple[Fault, ...]:
    with pytest.raises(PlanRejected) as refused:
        plan_of(made, image)
    return refused.value.faults


def brief(policies: Mapping[str, Any] | None = None, **inputs: Any) -> Envelope:
    planner = {"planner": policies or {}}
    return envelope(inputs=inputs, output=["brief"], policies=planner)


def selection(**lists: Sequence[str]) -> dict[str, Any]:
    return {"selection": lists}


class TestPack:
    def test_a_document_becomes_a_checked_brief(self) -> None:
        plan = plan_of(brief(document="text"), image_of(*PACK))
        assert plan.author is Author.ASSEMBLER
        assert list(plan.nodes) == ["outline", "compose", "check"]
        check = plan.nodes["check"]
        assert check.kind is NodeKind.VALIDATION
        assert check.requires == ("compose",)
        assert check.bindings == {
            "draft_brief": Bound("compose", "/draft_brief"),
            "document": Bound("inputs", "/document"),
        }
        assert check.text == "The brief."
        assert check.rationale == "makes brief from draft_brief, document"
        assert plan.output == (OutputSource("brief", "check", "/brief"),)
        assert {step.fit for step in plan.proof} == {Fit.SAME_FACET}
        assert plan.rationale == "cheapest way to brief in the registry: 3 calls, cost 3"

    def test_a_url_gives_another_plan(self) -> None:
        plan = plan_of(brief(url="https://example.org"), image_of(*PACK))
        assert list(plan.nodes) == ["fetch", "outline", "compose", "check"]
        assert plan.nodes["check"].requires == ("compose", "fetch")

    def test_without_a_capability_another_way_or_a_clear_rejection(self) -> None:
        direct = capability("brief.direct", ["document"], ["draft_brief"], tier=1)
        rest = [OUTLINE, CHECK, FETCH]
        plan = plan_of(brief(document="text"), image_of(*rest, direct))
        assert list(plan.nodes) == ["direct", "check"]
        (fault,) = faults_of(brief(document="text"), image_of(*rest))
        assert (fault.code, fault.facet) == ("CAPABILITY_MISSING", "brief")
        assert fault.pointer == "/output_contract/facets/0"
        assert fault.message == (
            "the facet 'brief' can not be produced: brief.check lacks 'draft_brief'; the inputs"
            " could give: draft_brief"
        )

    def test_nothing_produces_it_at_all(self) -> None:
        (fault,) = faults_of(brief(document="text"), image_of(OUTLINE, facets=["brief"]))
        assert fault.message.endswith("no active capability produces it")

    def test_many_that_could_are_not_all_named(self) -> None:
        makers = [capability(f"m{i}", [f"x{i}"], ["brief"]) for i in range(7)]
        (fault,) = faults_of(brief(policies=selection(forbid=["m0"])), image_of(*makers))
        assert "m0 is forbidden; m1 lacks 'x1'; " in fault.message
        assert "m4 lacks 'x4'; …" in fault.message
        assert "m5" not in fault.message

    def test_only_forbidden_ones_could(self) -> None:
        one = capability("one", (), ["brief"])
        (fault,) = faults_of(brief(policies=selection(forbid=["one"])), image_of(one))
        assert fault.message.endswith("can not be produced: one is forbidden")

    def test_an_input_that_breaks_its_facet_is_not_at_hand(self) -> None:
        faults = faults_of(brief(document=7), image_of(*PACK))
        assert [(fault.code, fault.pointer) for fault in faults] == [
            ("CAPABILITY_MISSING", "/output_contract/facets/0"),
            ("INPUT_MISMATCH", "/inputs/document"),
        ]


class TestWhatIsAskedFor:
    def test_a_given_facet_is_passed_through(self) -> None:
        made = envelope(inputs={"document": "text"}, output=["outline", "document"])
        plan = plan_of(made, image_of(*PACK))
        assert list(plan.nodes) == ["outline"]
        assert plan.output[1] == OutputSource("document", "inputs", "/document")

    def test_unless_all_is_given_then_it_is_made_anew(self) -> None:
        polish = capability("text.polish", ["text"], ["text"])
        made = envelope(inputs={"text": "a", "note": "b"}, output=["text", "note"])
        plan = plan_of(made, image_of(polish, facets=["note"]))
        assert plan.nodes["polish"].bindings == {"text": Bound("inputs", "/text")}
        assert [part.source for part in plan.output] == ["polish", "inputs"]
        faults = faults_of(made, image_of(facets=["text", "note"]))
        assert [fault.code for fault in faults] == ["CAPABILITY_MISSING"] * 2

    def test_a_schema_names_facets(self) -> None:
        image = image_of(*PACK, facets=[facet("outline", property_key="points")])
        schema = {"type": "object", "properties": {"outline": {}, "extra": {}}}
        made = envelope(inputs={"document": "text"}, output={"schema": schema})
        plan = plan_of(made, image_of(*PACK))
        assert list(plan.nodes) == ["outline"]
        by_key = {"schema": {"type": "object", "required": ["points"]}}
        assert plan_of(
            envelope(inputs={"document": "text"}, output=by_key),
            image_of(
                capability(
                    "document.outline",
                    ["document"],
                    ["outline"],
                    catalog={"outline": facet("outline", property_key="points")},
                ),
                facets=image.facets.values(),
            ),
        ).output == (OutputSource("points", "outline", "/points"),)

    def test_a_schema_that_needs_what_is_no_facet(self) -> None:
        schema = {
            "type": "object",
            "properties": {"outline": {}, "x": {}},
            "required": ["outline", "x", "y"],
        }
        made = envelope(inputs={"document": "text"}, output={"schema": schema})
        faults = faults_of(made, image_of(*PACK))
        assert [(fault.code, fault.pointer) for fault in faults] == [
            ("OUTPUT_FACET_UNCOVERED", "/output_contract/schema/properties/x"),
            ("OUTPUT_FACET_UNCOVERED", "/output_contract/schema"),
        ]
        given_too = envelope(inputs={"document": "text", "x": 1, "y": 2}, output={"schema": schema})
        assert [part.source for part in plan_of(given_too, image_of(*PACK)).output] == [
            "outline",
            "inputs",
            "inputs",
        ]

    @pytest.mark.parametrize("output", [None, {"schema": {"type": "object"}}])
    def test_nothing_that_can_be_assembled(self, output: Any) -> None:
        (fault,) = faults_of(envelope(output=output), image_of(*PACK))
        assert (fault.code, fault.pointer) == ("CAPABILITY_MISSING", "/output_contract")
        assert "goal_graph" in fault.message


class TestInputs:
    def test_by_key_and_the_name_wins(self) -> None:
        headline = facet("headline", property_key="title")
        take = capability("take", ["headline"], ["brief"], catalog={"headline": headline})
        image = image_of(take, facets=[headline])
        by_key = plan_of(brief(title="t"), image)
        assert by_key.nodes["take"].bindings == {"title": Bound("inputs", "/title")}
        given: list[dict[str, Any]] = [
            {"title": "t", "headline": "h"},
            {"headline": "h", "title": "t"},
        ]
        for inputs in given:
            both = plan_of(brief(**inputs), image)
            assert both.nodes["take"].bindings == {"title": Bound("inputs", "/headline")}

    def test_a_plain_schema_takes_facets_by_its_keys(self) -> None:
        plain = {"schema": {"type": "object", "required": ["outline", "mode"]}}
        image = image_of(OUTLINE, capability("plain", plain, ["brief"]))
        plan = plan_of(brief(document="text", mode="fast"), image)
        assert plan.nodes["plain"].bindings == {
            "outline": Bound("outline", "/outline"),
            "mode": Bound("inputs", "/mode"),
        }
        assert faults_of(brief(document="text"), image)[0].code == "CAPABILITY_MISSING"

    def test_optional_inputs_are_bound_when_something_gives_them(self) -> None:
        hint = facet("outline", required_by_default=False)
        write = capability("write", ["document", "outline"], ["brief"], catalog={"outline": hint})
        image = image_of(OUTLINE, write)
        alone = plan_of(brief(document="text"), image)
        assert list(alone.nodes["write"].bindings) == ["document"]
        both = envelope(inputs={"document": "text"}, output=["outline", "brief"])
        plan = plan_of(both, image)
        assert plan.nodes["write"].bindings["outline"] == Bound("outline", "/outline")
        assert plan.nodes["write"].requires == ("outline",)
        flat = envelope(
            inputs={"document": "text"},
            output=["outline", "brief"],
            policies={"planner": {"topology": {"max_depth": 1}}},
        )
        assert plan_of(flat, image).nodes["write"].requires == ()

    def test_an_output_that_may_be_missing_carries_no_derivation(self) -> None:
        perhaps = facet("outline", required_by_default=False)
        image = image_of(
            capability("a", ["document"], ["outline"], catalog={"outline": perhaps}), COMPOSE, CHECK
        )
        assert faults_of(brief(document="text"), image)[0].code == "CAPABILITY_MISSING"

    def test_nor_is_it_bound_where_it_is_optional(self) -> None:
        perhaps = facet("hint", required_by_default=False)
        catalog = {"hint": perhaps}
        image = image_of(
            capability("a", ["document"], ["outline", "hint"], catalog=catalog),
            capability("b", ["outline", "hint"], ["brief"], catalog=catalog),
            facets=[perhaps],
        )
        assert list(plan_of(brief(document="text"), image).nodes["b"].bindings) == ["outline"]


class TestChoice:
    CHEAP = capability("cheap", ["document"], ["brief"])
    DEAR = capability("dear", ["document"], ["brief"], tier=3)
    BOTH = image_of(CHEAP, DEAR)

    def chosen(self, image: RegistryImage | None = None, **lists: Sequence[str]) -> list[str]:
        plan = plan_of(brief(policies=selection(**lists), document="d"), image or self.BOTH)
        return sorted(node.capability_id for node in plan.nodes.values())

    def test_tier_then_dollars_then_length_then_id(self) -> None:
        assert self.chosen() == ["cheap"]
        paid = [
            capability(name, ["document"], ["brief"], cost={"usd_per_call": usd})
            for name, usd in (("a", "0.50"), ("b", "0.01"))
        ]
        assert self.chosen(image_of(*paid)) == ["b"]
        steps = [
            capability("a1", ["document"], ["outline"]),
            capability("a2", ["outline"], ["brief"]),
        ]
        assert self.chosen(image_of(*steps, self.CHEAP)) == ["cheap"]
        assert self.chosen(image_of(self.CHEAP, capability("also", ["document"], ["brief"]))) == [
            "also"
        ]

    def test_prefer_avoid_forbid(self) -> None:
        assert self.chosen(prefer=["dear"]) == ["dear"]
        assert self.chosen(avoid=["cheap"]) == ["dear"]
        assert self.chosen(avoid=["cheap", "dear"]) == ["cheap"]
        assert self.chosen(forbid=["cheap"]) == ["dear"]

    def test_a_required_capability_is_in_the_plan(self) -> None:
        assert self.chosen(require=["dear"]) == ["dear"]
        extra = capability("extra", ["document"], ["note"])
        image = image_of(self.CHEAP, extra)
        assert self.chosen(image, require=["extra"]) == ["cheap", "extra"]
        alone = envelope(
            inputs={"document": "d"}, policies={"planner": selection(require=["extra"])}
        )
        plan = plan_of(alone, image)
        assert plan.rationale.startswith("cheapest way to what the policies require")
        assert plan.output == (OutputSource(None, "extra", ""),)

    def test_requirements_that_can_not_be_kept(self) -> None:
        image = image_of(
            self.CHEAP,
            capability("stale", active=False),
            capability("stuck", ["document", "moon"], ["brief"]),
        )
        policies = selection(require=["stale", "nope", "cheap", "stuck"], forbid=["cheap"])
        faults = faults_of(brief(policies=policies, document="d"), image)
        assert [(fault.code, fault.pointer) for fault in faults] == [
            ("CAPABILITY_INACTIVE", "/policies/planner/selection/require/0"),
            ("CAPABILITY_NOT_REGISTERED", "/policies/planner/selection/require/1"),
            ("SELECTION_CONFLICT", "/policies/planner/selection/require/2"),
        ]
        (fault,) = faults_of(brief(policies=selection(require=["stuck"]), document="d"), image)
        assert (fault.code, fault.capability_id) == ("SELECTION_CONFLICT", "stuck")
        assert fault.message == "capability 'stuck' is required but lacks 'moon'"

    def test_what_is_shared_is_called_once_and_what_is_spare_is_dropped(self) -> None:
        image = image_of(
            OUTLINE,
            capability("left", ["outline"], ["l"]),
            capability("right", ["outline"], ["r"]),
            capability("join", ["l", "r"], ["brief"]),
            capability("all", ["outline"], ["x", "y"], tier=1),
            capability("just_x", ["outline"], ["x"]),
        )
        assert sorted(plan_of(brief(document="d"), image).nodes) == [
            "join",
            "left",
            "outline",
            "right",
        ]
        made = envelope(inputs={"document": "d"}, output=["x", "y"])
        assert sorted(plan_of(made, image).nodes) == ["all", "outline"]

    def test_a_call_that_looks_spare_but_feeds_the_other_is_kept(self) -> None:
        image = image_of(
            capability("a", ["document"], ["x"]),
            capability("b", ["x"], ["x", "y"]),
        )
        made = envelope(inputs={"document": "d"}, output=["x", "y"])
        assert sorted(plan_of(made, image).nodes) == ["a", "b"]

    def test_nor_is_one_dropped_that_a_required_capability_needs(self) -> None:
        image = image_of(
            capability("a", ["document"], ["x"]),
            capability("m", ["x"], ["z"]),
            capability("b", ["z"], ["x"]),
            self.CHEAP,
        )
        assert self.chosen(image, require=["m", "b"]) == ["a", "b", "cheap", "m"]

    def test_a_bound_on_depth_may_cost_more(self) -> None:
        steps = [
            capability("s1", ["document"], ["m"]),
            capability("s2", ["m"], ["brief"]),
            self.DEAR,
        ]
        image = image_of(*steps)
        assert len(plan_of(brief(document="d"), image).nodes) == 2
        flat = plan_of(brief({"topology": {"max_depth": 1}}, document="d"), image)
        assert list(flat.nodes) == ["dear"]
        too_deep = brief({"topology": {"max_depth": 1}}, document="d")
        assert faults_of(too_deep, image_of(*steps[:2]))[0].code == "LIMIT_EXCEEDED"


def test_node_ids_are_short_valid_and_unique() -> None:
    names = ["x.make", "y.make", "z.inputs", "tail.", "u.-dash", "a" * 120, "a" * 119 + "b"]
    image = image_of(*(capability(name, (), [f"f{i}"]) for i, name in enumerate(names)))
    asked = envelope(output=[f"f{i}" for i in range(len(names))])
    found = {node.capability_id: node_id for node_id, node in plan_of(asked, image).nodes.items()}
    assert found == {
        "x.make": "make",
        "y.make": "y.make",
        "z.inputs": "z.inputs",
        "tail.": "tail.",
        "u.-dash": "u.-dash",
        "a" * 120: "a" * 100,
        "a" * 119 + "b": "a" * 95 + "_2",
    }
    thrice = [capability("a" * 110 + c, (), [f"f{i}"]) for i, c in enumerate("xyz")]
    third = plan_of(envelope(output=["f0", "f1", "f2"]), image_of(*thrice))
    assert sorted(map(len, third.nodes)) == [97, 97, 100]
    reserved = image_of(capability("inputs", (), ["x"]))
    assert list(plan_of(envelope(output=["x"]), reserved).nodes) == ["inputs_2"]


# Against brute force, on registries small enough for it.
NAMES = "abcdef"
_facets = st.sets(st.sampled_from(NAMES), max_size=3)
_caps = st.lists(
    st.tuples(_facets, _facets.filter(bool), st.integers(0, 3)), min_size=1, max_size=7
)


def registry(shapes: Sequence[tuple[set[str], set[str], int]]) -> list[Capability]:
    return [
        capability(f"c{i}", sorted(takes), sorted(gives), tier=tier)
        for i, (takes, gives, tier) in enumerate(shapes)
    ]


def cheapest(caps: Sequence[Capability], at_hand: set[str]) -> dict[str, int]:
    """The cost of every derivable facet, by relaxing until nothing changes."""
    cost = dict.fromkeys(at_hand, 0)
    for _ in range(len(caps) + 1):
        for cap in caps:
            if all(need in cost for need in cap.input.facets):
                total = hypergraph.price_of(cap) + sum(cost[need] for need in cap.input.facets)
                for given_facet in cap.output.facets:
                    cost[given_facet] = min(total, cost.get(given_facet, total))
    return cost


@settings(max_examples=300)
@given(_caps, st.sets(st.sampled_from(NAMES), max_size=2), st.sampled_from(NAMES))
def test_costs_are_those_of_brute_force(
    shapes: list[tuple[set[str], set[str], int]], at_hand: set[str], goal: str
) -> None:
    caps = registry(shapes)
    image = image_of(*caps, facets=NAMES)
    graph = hypergraph.hypergraph_of(image)
    at_hand -= {goal}
    expected = cheapest(caps, at_hand)
    found = hypergraph.search(graph, at_hand, [goal], [], lambda edge: edge.price)
    assert (goal in found.maker) == (goal in expected)
    if goal in expected:
        assert found.maker[goal].cost == expected[goal]
    flat = hypergraph.search(graph, at_hand, [goal], [], lambda edge: edge.price, shallow=True)
    assert (goal in flat.maker) == (goal in expected)
    if goal in flat.maker:
        assert flat.maker[goal].depth <= found.maker[goal].depth


@settings(max_examples=200)
@given(
    _caps,
    st.sets(st.sampled_from(NAMES), max_size=2),
    st.sets(st.sampled_from(NAMES), min_size=1, max_size=3),
    st.integers(0, 99),
)
def test_plans_are_the_same_in_whatever_order_things_were_registered(
    shapes: list[tuple[set[str], set[str], int]], at_hand: set[str], goals: set[str], seed: int
) -> None:
    caps = registry(shapes)
    made = envelope(inputs=dict.fromkeys(at_hand, "text"), output=sorted(goals))
    feasible = set(cheapest(caps, at_hand))
    anew = goals if goals <= at_hand else goals - at_hand
    image = image_of(*caps, facets=NAMES)
    try:
        plan = plan_of(made, image)
    except PlanRejected:
        assert not anew <= feasible or goals <= at_hand
        return
    assert goals <= feasible
    total = sum(
        hypergraph.price_of(image.capabilities[node.capability_id, node.capability_version])
        for node in plan.nodes.values()
    )
    if not goals <= at_hand:
        assert total <= sum(cheapest(caps, at_hand)[goal] for goal in goals)
    random.Random(seed).shuffle(caps)
    assert plan_of(made, image_of(*caps, facets=reversed(NAMES))) == plan
