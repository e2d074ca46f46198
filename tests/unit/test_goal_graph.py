"""A caller's goal graph: taken as is, bound explicitly or by facet name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from app.domain.envelope import Envelope
from app.domain.errors import Fault, PlanRejected
from app.domain.plan import Author, Bound, Fit, OutputSource, Plan, ProofStep
from app.planner.plan_envelope import plan_envelope
from app.registry.image import RegistryImage
from tests.registry_samples import capability, diamond, echo, envelope, facet, image_of, node

COUNT = facet("count", {"type": "integer"})
OLD_COUNT = facet("count", {"type": "integer"}, version="0.9.0")
READ = capability("read", ["document"], ["outline"])
WRITE = capability("write", ["outline"], ["brief"])
IMAGE = image_of(echo(), READ, WRITE)


def plan_of(made: Envelope, image: RegistryImage = IMAGE) -> Plan:
    return plan_envelope(made, image, run_id="r", created_at="now")


def faults_of(made: Envelope, image: RegistryImage = IMAGE) -> tuple[Fault, ...]:
    with pytest.raises(PlanRejected) as refused:
        plan_of(made, image)
    assert refused.value.code == "plan_rejected"
    return refused.value.faults


def steps_of(plan: Plan) -> dict[tuple[str | None, str], ProofStep]:
    return {(step.node_id, step.key): step for step in plan.proof}


def given_as(pointer: str, source: str = "inputs") -> dict[str, str]:
    return {"from": source, "pointer": pointer}


def bindings_of(plan: Plan, node_id: str) -> Mapping[str, Bound]:
    return plan.nodes[node_id].bindings


def test_the_diamond() -> None:
    plan = plan_of(diamond())
    assert plan.author is Author.CALLER
    assert (plan.run_id, plan.version, plan.created_at) == ("r", 1, "now")
    assert list(plan.nodes) == ["A", "B", "C", "D"]
    assert plan.nodes["D"].requires == ("B", "C")
    assert plan.children == {"A": ("B", "C"), "B": ("D",), "C": ("D",), "D": ()}
    assert bindings_of(plan, "A") == {"n": Bound(None, "", 1)}
    assert bindings_of(plan, "D") == {"b": Bound("B"), "c": Bound("C")}
    assert plan.output == (OutputSource(None, "D", ""),)
    assert [step.node_id for step in plan.proof] == [None]


def test_what_the_node_says_wins_over_the_registration() -> None:
    image = image_of(
        echo(),
        echo("slow", timeout_s=9, max_attempts=2, concurrency=4, effect="at_most_once"),
        echo("once", effect="at_most_once"),
    )
    plan = plan_of(
        envelope(
            node("A", capability="slow"),
            node("B", capability="slow", timeout_s=1, max_attempts=5, text="do it"),
            node("C", capability="once"),
        ),
        image,
    )
    a, b, c = plan.nodes.values()
    assert (a.timeout_s, a.max_attempts, a.concurrency, a.text) == (9, 2, 4, "")
    assert (b.timeout_s, b.max_attempts, b.text, b.label) == (1, 5, "do it", "slow")
    assert (c.timeout_s, c.max_attempts, c.effect) == (60, 1, "at_most_once")


def test_nodes_come_out_in_topological_order() -> None:
    plan = plan_of(envelope(node("D", "B", "C"), node("C", "A"), node("B", "A"), node("A")))
    assert list(plan.nodes) == ["A", "C", "B", "D"]


def test_a_requirement_named_twice_is_one_edge() -> None:
    assert plan_of(envelope(node("A"), node("B", "A", "A"))).nodes["B"].requires == ("A",)


def test_a_version_may_be_named_and_the_newest_is_taken_otherwise() -> None:
    image = image_of(echo(version="2", age_s=1), echo(version="1", age_s=2))
    plan = plan_of(envelope(node("A"), node("B", capability_version="2")), image)
    assert [found.capability_version for found in plan.nodes.values()] == ["1", "2"]


class TestExplicitBindings:
    def test_a_binding_adds_the_edge_that_is_not_there(self) -> None:
        plan = plan_of(
            envelope(node("B", inputs={"in": {"from": "A", "pointer": "/x"}}), node("A"))
        )
        assert list(plan.nodes) == ["A", "B"]
        assert plan.nodes["B"].requires == ("A",)

    def test_but_not_one_that_is_implied(self) -> None:
        plan = plan_of(
            envelope(
                node("A"),
                node("B", "A"),
                node("C", "B", inputs={"in": {"from": "A"}}),
                node("D", inputs={"a": {"from": "A"}, "c": {"from": "C"}, "b": {"from": "B"}}),
            )
        )
        assert plan.nodes["C"].requires == ("B",)
        assert plan.nodes["D"].requires == ("C",)

    def test_same_facet(self) -> None:
        plan = plan_of(
            envelope(
                node("A", capability="read", inputs={"document": given_as("/d")}),
                node("B", capability="write", inputs={"outline": given_as("/outline", "A")}),
                inputs={"d": "text"},
            )
        )
        given, made = steps_of(plan)["A", "document"], steps_of(plan)["B", "outline"]
        assert (given.fit, given.why) == (Fit.SUBSUMED, "the given value was checked")
        assert (made.fit, made.source, made.pointer) == (Fit.SAME_FACET, "A", "/outline")

    def test_another_version_of_a_facet_is_decided_on_the_schemas(self) -> None:
        image = image_of(
            capability("make", gives=["count"], catalog={"count": OLD_COUNT}),
            capability("take", takes=["count"], catalog={"count": COUNT}),
            facets=[COUNT],
        )
        plan = plan_of(
            envelope(
                node("A", capability="make"),
                node("B", capability="take", inputs={"count": {"from": "A", "pointer": "/count"}}),
            ),
            image,
        )
        assert steps_of(plan)["B", "count"].fit is Fit.SUBSUMED

    def test_an_output_that_says_nothing_is_checked_at_run(self) -> None:
        plan = plan_of(
            envelope(
                node("A"),
                node("B", capability="write", inputs={"outline": {"from": "A", "pointer": "/o"}}),
            )
        )
        assert steps_of(plan)["B", "outline"].fit is Fit.CHECKED_AT_RUN

    def test_a_part_that_may_be_missing_is_checked_at_run_unless_it_is_optional(self) -> None:
        perhaps = facet("count", {"type": "integer"}, required_by_default=False)
        image = image_of(
            capability("make", gives=["count"], catalog={"count": perhaps}),
            capability("take", takes=["count"], catalog={"count": COUNT}),
            capability("could", takes=["count"], catalog={"count": perhaps}),
            facets=[COUNT],
        )
        binding = {"count": {"from": "A", "pointer": "/count"}}
        plan = plan_of(
            envelope(
                node("A", capability="make"),
                node("B", capability="take", inputs=binding),
                node("C", capability="could", inputs=binding),
            ),
            image,
        )
        assert steps_of(plan)["B", "count"].fit is Fit.CHECKED_AT_RUN
        assert steps_of(plan)["C", "count"].fit is Fit.SAME_FACET

    def test_constants_are_checked(self) -> None:
        good = envelope(node("A", capability="read", inputs={"document": {"value": "text"}}))
        step = steps_of(plan_of(good))["A", "document"]
        assert (step.fit, step.source) == (Fit.SUBSUMED, None)
        bad = envelope(node("A", capability="read", inputs={"document": {"value": 1}}))
        (fault,) = faults_of(bad)
        assert (fault.code, fault.facet) == ("INPUT_MISMATCH", "document")
        assert fault.pointer == "/goal_graph/nodes/0/inputs/document/value"
        assert (fault.node_id, fault.capability_id) == ("A", "read")

    def test_the_pointer_leads_into_the_value(self) -> None:
        shape = {"type": "object", "properties": {"a/b": {"type": "integer"}}}
        image = image_of(capability("take", takes=["x"], catalog={"x": facet("x", shape)}))
        inputs = {"deep": {"er": {"a/b": "no"}}}
        binding = {"x": {"from": "inputs", "pointer": "/deep/er"}}
        (fault,) = faults_of(
            envelope(node("A", capability="take", inputs=binding), inputs=inputs), image
        )
        assert fault.pointer == "/inputs/deep/er/a~1b"

    @pytest.mark.parametrize("capability_id", ["read", "util.echo"])
    def test_inputs_that_are_not_there(self, capability_id: str) -> None:
        binding = {"document": {"from": "inputs", "pointer": "/nothing"}}
        (fault,) = faults_of(envelope(node("A", capability=capability_id, inputs=binding)))
        assert fault.code == "INPUT_UNBOUND"
        assert fault.pointer == "/goal_graph/nodes/0/inputs/document"

    def test_a_required_input_left_out(self) -> None:
        (fault,) = faults_of(envelope(node("A", capability="read", inputs={})))
        assert (fault.code, fault.pointer) == ("INPUT_UNBOUND", "/goal_graph/nodes/0/inputs")

    def test_a_provable_mismatch(self) -> None:
        image = image_of(
            capability("make", gives=["count"], catalog={"count": COUNT}), WRITE, facets=[COUNT]
        )
        binding = {"outline": {"from": "A", "pointer": "/count"}}
        (fault,) = faults_of(
            envelope(node("A", capability="make"), node("B", capability="write", inputs=binding)),
            image,
        )
        assert fault.code == "INPUT_MISMATCH"
        assert fault.pointer == "/goal_graph/nodes/1/inputs/outline"

    def test_a_part_that_the_producer_never_has(self) -> None:
        closed = {"schema": {"type": "object", "properties": {}, "additionalProperties": False}}
        image = image_of(echo(), capability("make", gives=closed))
        (fault,) = faults_of(
            envelope(
                node("A", capability="make"),
                node("B", inputs={"x": {"from": "A", "pointer": "/y"}}),
            ),
            image,
        )
        assert (fault.code, fault.pointer) == ("INPUT_MISMATCH", "/goal_graph/nodes/1/inputs/x")

    def test_a_malformed_pointer_names_nothing(self) -> None:
        (fault,) = faults_of(
            envelope(node("A"), node("B", inputs={"x": {"from": "A", "pointer": "/~2"}}))
        )
        assert (fault.code, fault.pointer) == ("INPUT_MISMATCH", "/goal_graph/nodes/1/inputs/x")

    def test_a_key_that_the_contract_refuses(self) -> None:
        closed: dict[str, Any] = {
            "type": "object",
            "properties": {"a": {"type": "string"}},
            "additionalProperties": False,
        }
        image = image_of(
            capability("closed", {"schema": closed}),
            capability("patterned", {"schema": {**closed, "patternProperties": {"^b": {}}}}),
        )
        bound = {"b": {"value": 1}}
        (fault,) = faults_of(envelope(node("A", capability="closed", inputs=bound)), image)
        assert (fault.code, fault.pointer) == ("INPUT_MISMATCH", "/goal_graph/nodes/0/inputs/b")
        plan = plan_of(envelope(node("A", capability="patterned", inputs=bound)), image)
        assert steps_of(plan)["A", ""].fit is Fit.SUBSUMED


class TestRulesAcrossInputs:
    """Top-level keywords that no property can be blamed for."""

    PAIR = capability(
        "pair", {"schema": {"type": "object", "minProperties": 2, "properties": {"a": {}}}}
    )
    NUMBERS = capability(
        "numbers", {"schema": {"type": "object", "additionalProperties": {"type": "integer"}}}
    )
    IMAGE = image_of(echo(), PAIR, NUMBERS)

    def test_known_values_are_checked_whole(self) -> None:
        both = {"a": {"value": 1}, "b": {"from": "inputs", "pointer": "/b"}}
        plan = plan_of(
            envelope(node("A", capability="pair", inputs=both), inputs={"b": 2}), self.IMAGE
        )
        assert steps_of(plan)["A", ""].fit is Fit.SUBSUMED
        one = {"a": {"value": 1}}
        (fault,) = faults_of(envelope(node("A", capability="pair", inputs=one)), self.IMAGE)
        assert (fault.code, fault.pointer) == ("INPUT_MISMATCH", "/goal_graph/nodes/0/inputs")

    def test_others_are_left_to_the_check_before_the_call(self) -> None:
        made = {"a": {"from": "A"}}
        graph = (node("A"), node("B", capability="pair", inputs=made))
        plan = plan_of(envelope(*graph), self.IMAGE)
        assert steps_of(plan)["B", ""].fit is Fit.CHECKED_AT_RUN
        (fault,) = faults_of(envelope(*graph, constraints={"proof": "strict"}), self.IMAGE)
        assert (fault.code, fault.pointer) == ("PROOF_TOO_WEAK", "/goal_graph/nodes/1/inputs")

    def test_limits_on_unknown_keys_count_only_when_there_are_any(self) -> None:
        def numbers(value: object) -> Envelope:
            return envelope(node("A", capability="numbers", inputs={"x": {"value": value}}))

        assert plan_of(numbers(1), self.IMAGE).nodes
        (fault,) = faults_of(numbers("no"), self.IMAGE)
        assert fault.code == "INPUT_MISMATCH"
        none = plan_of(envelope(node("A", capability="numbers", inputs={})), self.IMAGE)
        assert ("A", "") not in steps_of(none)

    @pytest.mark.parametrize(
        ("schema", "spans"),
        [
            ({"$ref": "#/$defs/x"}, False),
            ({"$ref": "#/$defs/x", "minProperties": 1}, True),
            ({"$ref": "#/$defs/y"}, True),
            ({"$ref": "#/$defs/x", "title": "said beside it"}, False),
        ],
    )
    def test_a_body_behind_a_reference(self, schema: dict[str, Any], spans: bool) -> None:
        body = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
        defs = {"x": body, "y": {"$ref": "#/$defs/x"}}
        image = image_of(echo(), capability("take", {"schema": {**schema, "$defs": defs}}))
        plan = plan_of(envelope(node("A", capability="take", inputs={"a": {"value": 1}})), image)
        assert steps_of(plan)["A", "a"].fit is Fit.SUBSUMED
        assert (("A", "") in steps_of(plan)) is spans

    def test_a_key_that_is_required_without_being_declared(self) -> None:
        image = image_of(
            echo(), capability("take", {"schema": {"type": "object", "required": ["x"]}})
        )
        (fault,) = faults_of(envelope(node("A", capability="take", inputs={})), image)
        assert fault.code == "INPUT_UNBOUND"
        plan = plan_of(envelope(node("A", capability="take"), inputs={"x": 1}), image)
        assert bindings_of(plan, "A") == {"x": Bound("inputs", "/x")}


class TestBindingByName:
    def test_from_requires_and_inputs(self) -> None:
        plan = plan_of(
            envelope(
                node("A", capability="read"),
                node("B", "A", capability="write"),
                inputs={"document": "text"},
            )
        )
        assert bindings_of(plan, "A") == {"document": Bound("inputs", "/document")}
        assert bindings_of(plan, "B") == {"outline": Bound("A", "/outline")}
        assert steps_of(plan)["A", "document"].fit is Fit.SAME_FACET
        assert steps_of(plan)["B", "outline"].fit is Fit.SAME_FACET

    def test_the_nearest_of_several_and_the_proof_says_so(self) -> None:
        image = image_of(
            echo(), READ, WRITE, capability("refine", ["outline"], ["outline"]), facets=["outline"]
        )
        plan = plan_of(
            envelope(
                node("A", capability="read"),
                node("R", "A", capability="refine"),
                node("X", "R"),
                node("B", "X", capability="write"),
                inputs={"document": "text"},
            ),
            image,
        )
        assert bindings_of(plan, "B") == {"outline": Bound("R", "/outline")}
        assert "the nearest of 2 nodes" in steps_of(plan)["B", "outline"].why
        assert plan.nodes["B"].requires == ("X",)

    def test_requires_before_inputs_before_other_nodes(self) -> None:
        nodes = (node("A", capability="read"), node("B", capability="write"))
        given = envelope(*nodes, inputs={"document": "text", "outline": "mine"})
        assert bindings_of(plan_of(given), "B") == {"outline": Bound("inputs", "/outline")}
        assert plan_of(given).nodes["B"].requires == ()
        alone = plan_of(envelope(*nodes, inputs={"document": "text"}))
        assert bindings_of(alone, "B") == {"outline": Bound("A", "/outline")}
        assert alone.nodes["B"].requires == ("A",)

    def test_a_node_waits_for_its_facet_whatever_the_order(self) -> None:
        plan = plan_of(
            envelope(
                node("B", capability="write"),
                node("E", "B"),
                node("A", capability="read"),
                inputs={"document": "text"},
            )
        )
        assert list(plan.nodes) == ["A", "B", "E"]

    def test_several_strangers_the_latest(self) -> None:
        plan = plan_of(
            envelope(
                node("A1", capability="read"),
                node("A2", capability="read"),
                node("B", "E", capability="write"),
                node("E"),
                inputs={"document": "text"},
            )
        )
        assert bindings_of(plan, "B") == {"outline": Bound("A2", "/outline")}
        assert plan.nodes["B"].requires == ("E", "A2")
        assert "the latest of 2 nodes" in steps_of(plan)["B", "outline"].why

    def test_by_the_key_of_a_facet_with_another_key(self) -> None:
        headline = facet("headline", property_key="title")
        image = image_of(
            capability("take", ["headline"], catalog={"headline": headline}), facets=[headline]
        )
        for key in ("headline", "title"):
            made = envelope(node("A", capability="take"), inputs={key: "text"})
            assert bindings_of(plan_of(made, image), "A") == {"title": Bound("inputs", f"/{key}")}
            assert steps_of(plan_of(made, image))["A", "title"].fit is Fit.SAME_FACET

    def test_optional_inputs_are_bound_when_there_is_something(self) -> None:
        hint = facet("hint", required_by_default=False)
        image = image_of(
            capability("write", ["outline", "hint"], ["brief"], catalog={"hint": hint}),
            capability("hinter", gives=["hint"]),
            facets=[hint, "outline"],
        )
        graph = (node("H", capability="hinter"), node("B", capability="write"))
        without = plan_of(envelope(*graph, inputs={"outline": "o"}), image)
        assert list(bindings_of(without, "B")) == ["outline"]
        given = plan_of(envelope(*graph, inputs={"outline": "o", "hint": "h"}), image)
        assert bindings_of(given, "B")["hint"] == Bound("inputs", "/hint")
        required = (graph[0], node("B", "H", capability="write"))
        made = plan_of(envelope(*required, inputs={"outline": "o"}), image)
        assert bindings_of(made, "B")["hint"] == Bound("H", "/hint")

    def test_a_contract_that_asks_for_nothing_gets_nothing(self) -> None:
        plan = plan_of(envelope(node("A"), node("B", "A"), inputs={"x": 1}))
        assert bindings_of(plan, "B") == {}

    def test_an_input_that_breaks_the_facet(self) -> None:
        (fault,) = faults_of(envelope(node("A", capability="read"), inputs={"document": 1}))
        assert (fault.code, fault.pointer) == ("INPUT_MISMATCH", "/inputs/document")

    def test_nothing_gives_it(self) -> None:
        made = envelope(node("A", capability="write"), node("B", "A"))
        (fault,) = faults_of(made)
        assert (fault.code, fault.pointer) == ("INPUT_UNBOUND", "/goal_graph/nodes/0")
        assert (fault.facet, fault.node_id) == ("outline", "A")

    def test_only_a_follower_gives_it(self) -> None:
        image = image_of(WRITE, capability("back", ["brief"], ["outline"]))
        (fault,) = faults_of(
            envelope(node("A", capability="write"), node("B", "A", capability="back")), image
        )
        assert (fault.code, fault.node_id) == ("INPUT_UNBOUND", "A")

    def test_two_that_wait_for_each_other(self) -> None:
        image = image_of(WRITE, capability("back", ["brief"], ["outline"]))
        faults = faults_of(
            envelope(node("A", capability="write"), node("B", capability="back")), image
        )
        assert [(found.code, found.node_id) for found in faults] == [
            ("INPUT_UNBOUND", "A"),
            ("INPUT_UNBOUND", "B"),
        ]
