"""What verification refuses, and what it promises about the rest."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain.envelope import Envelope
from app.domain.errors import Fault, PlanRejected
from app.domain.plan import Fit, OutputSource, Plan, ProofStep
from app.kit.json_pointer import resolve
from app.planner import view as view_module
from app.planner.plan_envelope import PlanLimits, output_contract_of, plan_envelope
from app.registry.image import RegistryImage
from tests.registry_samples import capability, echo, envelope, facet, image_of, node

READ = capability("read", ["document"], ["outline"])
WRITE = capability("write", ["outline"], ["brief"])
STALE = capability("stale", active=False)
IMAGE = image_of(echo(), READ, WRITE, STALE)
TEXT = {"document": "text"}


def plan_of(made: Envelope, image: RegistryImage = IMAGE, limits: PlanLimits | None = None) -> Plan:
    return plan_envelope(made, image, run_id="r", created_at="now", limits=limits or PlanLimits())


def faults_of(
    made: Envelope, image: RegistryImage = IMAGE, limits: PlanLimits | None = None
) -> tuple[Fault, ...]:
    with pytest.raises(PlanRejected) as refused:
        plan_of(made, image, limits)
    return refused.value.faults


def codes_of(faults: tuple[Fault, ...]) -> list[tuple[str, str]]:
    return [(fault.code, fault.pointer) for fault in faults]


def output_steps(plan: Plan) -> dict[str, ProofStep]:
    return {step.key: step for step in plan.proof if step.node_id is None}


class TestGraph:
    def test_duplicates_reserved_and_unknown_names_are_found_together(self) -> None:
        faults = faults_of(
            envelope(
                node("A"),
                node("A"),
                node("inputs"),
                node("B", "A", "X", inputs={"a/b": {"from": "Y"}}),
            )
        )
        assert codes_of(faults) == [
            ("DUPLICATE_NODE", "/goal_graph/nodes/1/id"),
            ("RESERVED_NODE_ID", "/goal_graph/nodes/2/id"),
            ("UNKNOWN_NODE", "/goal_graph/nodes/3/requires/1"),
            ("UNKNOWN_NODE", "/goal_graph/nodes/3/inputs/a~1b/from"),
        ]

    def test_capabilities(self) -> None:
        faults = faults_of(
            envelope(
                node("A", capability="nope"),
                node("B", "A", capability="stale"),
                node("C", capability="util.echo", capability_version="9"),
                node("D", capability="stale", capability_version="1"),
            )
        )
        assert codes_of(faults) == [
            ("CAPABILITY_NOT_REGISTERED", "/goal_graph/nodes/0/capability"),
            ("CAPABILITY_INACTIVE", "/goal_graph/nodes/1/capability"),
            ("CAPABILITY_NOT_REGISTERED", "/goal_graph/nodes/2/capability_version"),
            ("CAPABILITY_INACTIVE", "/goal_graph/nodes/3/capability_version"),
        ]
        assert (faults[0].node_id, faults[0].capability_id) == ("A", "nope")

    def test_a_cycle_is_named_from_the_node_written_first(self) -> None:
        (fault,) = faults_of(
            envelope(node("E"), node("B", "E", "A"), node("C", "B"), node("A", "C"), node("D", "A"))
        )
        assert codes_of((fault,)) == [("CYCLE", "/goal_graph/nodes/1/requires/1")]
        assert fault.message.endswith("B → A → C → B")

    def test_a_node_that_requires_itself(self) -> None:
        (fault,) = faults_of(envelope(node("A", "A")))
        assert codes_of((fault,)) == [("CYCLE", "/goal_graph/nodes/0/requires/0")]

    def test_a_cycle_through_a_binding(self) -> None:
        (fault,) = faults_of(
            envelope(node("A", inputs={"k": {"value": 1}, "x": {"from": "B"}}), node("B", "A"))
        )
        assert codes_of((fault,)) == [("CYCLE", "/goal_graph/nodes/0/inputs/x/from")]

    def test_two_cycles_and_a_long_one(self) -> None:
        assert len(faults_of(envelope(node("A", "B"), node("B", "A"), node("C", "C")))) == 2
        ring = [node(f"n{i}", f"n{(i + 1) % 50}") for i in range(50)]
        (fault,) = faults_of(envelope(*ring))
        assert "n19 → … → n0" in fault.message

    def test_policies_on_selection(self) -> None:
        policies = {"planner": {"selection": {"forbid": ["util.echo"], "require": ["read"]}}}
        faults = faults_of(envelope(node("A"), policies=policies))
        assert codes_of(faults) == [
            ("SELECTION_CONFLICT", "/goal_graph/nodes/0/capability"),
            ("SELECTION_CONFLICT", "/policies/planner/selection/require/0"),
        ]
        kept = {"planner": {"selection": {"forbid": ["read"], "require": ["util.echo"]}}}
        assert plan_of(envelope(node("A"), policies=kept)).nodes


class TestLimits:
    def test_nodes(self) -> None:
        made = envelope(*(node(f"n{i}") for i in range(4)))
        assert codes_of(faults_of(made, limits=PlanLimits(nodes_max=3))) == [
            ("LIMIT_EXCEEDED", "/goal_graph/nodes")
        ]
        assert plan_of(made, limits=PlanLimits(nodes_max=4)).nodes

    def test_declared_and_derived_edges(self) -> None:
        declared = envelope(node("A"), node("B", "A"), node("C", "A", "B"))
        assert codes_of(faults_of(declared, limits=PlanLimits(edges_max=2))) == [
            ("LIMIT_EXCEEDED", "/goal_graph/nodes")
        ]
        derived = envelope(node("A"), node("B", inputs={"x": {"from": "A"}}))
        assert faults_of(derived, limits=PlanLimits(edges_max=0))[0].code == "LIMIT_EXCEEDED"
        assert plan_of(derived, limits=PlanLimits(edges_max=1)).nodes

    def test_depth(self) -> None:
        chain = envelope(node("A"), node("B", "A"), node("C", "B"))
        assert codes_of(faults_of(chain, limits=PlanLimits(depth_max=2))) == [
            ("LIMIT_EXCEEDED", "/goal_graph/nodes")
        ]
        assert plan_of(chain, limits=PlanLimits(depth_max=3)).nodes

    @pytest.mark.parametrize("bound", [{"max_depth": 2}, {"max_nodes": 2}])
    def test_the_envelope_may_ask_for_less(self, bound: dict[str, int]) -> None:
        policies = {"planner": {"topology": bound}}
        chain = (node("A"), node("B", "A"), node("C", "B"))
        assert faults_of(envelope(*chain, policies=policies))[0].code == "LIMIT_EXCEEDED"
        assert plan_of(envelope(*chain[:2], policies=policies)).nodes

    def test_a_chain_of_two_thousand_is_legal(self) -> None:
        chain = [node("n0"), *(node(f"n{i}", f"n{i - 1}") for i in range(1, 2_000))]
        assert len(plan_of(envelope(*reversed(chain))).nodes) == 2_000


class TestOutput:
    def test_facets_come_from_the_last_node_that_makes_them(self) -> None:
        graph = (
            node("A", capability="read"),
            node("B", "A", capability="write"),
            node("B2", "A", capability="write"),
            node("E", "B", "B2"),
        )
        plan = plan_of(envelope(*graph, inputs=TEXT, output=["brief", "document"]))
        assert plan.output == (
            OutputSource("brief", "B2", "/brief"),
            OutputSource("document", "inputs", "/document"),
        )
        brief, document = output_steps(plan)["brief"], output_steps(plan)["document"]
        assert brief.fit is Fit.SAME_FACET
        assert brief.why.startswith("the last of 2")
        assert document.fit is Fit.SAME_FACET

    def test_a_facet_that_nothing_gives(self) -> None:
        faults = faults_of(envelope(node("A"), output=["outline", "brief"]))
        assert codes_of(faults) == [
            ("OUTPUT_FACET_UNCOVERED", "/output_contract/facets/0"),
            ("OUTPUT_FACET_UNCOVERED", "/output_contract/facets/1"),
        ]
        assert faults[1].facet == "brief"

    def test_a_given_facet_that_breaks_its_schema(self) -> None:
        faults = faults_of(envelope(node("A"), inputs={"brief": 1}, output=["brief"]))
        assert codes_of(faults) == [("OUTPUT_MISMATCH", "/inputs/brief")]

    def test_an_optional_facet_that_nothing_gives_is_left_out(self) -> None:
        image = image_of(echo(), READ, facets=[facet("hint", required_by_default=False)])
        graph = node("A", capability="read")
        plan = plan_of(envelope(graph, inputs=TEXT, output=["outline", "hint"]), image)
        assert [part.key for part in plan.output] == ["outline"]

    def test_facets_that_share_a_key(self) -> None:
        facets = [facet("one", property_key="k"), facet("two", property_key="k")]
        catalog = {found.name: found for found in facets}
        both = capability("both", gives=["one", "two"], catalog=catalog)
        image = image_of(both, echo(), facets=facets)
        plan = plan_of(envelope(node("A", capability="both"), output=["one", "two"]), image)
        assert plan.output == (OutputSource("k", "A", "/k"),)
        faults = faults_of(envelope(node("A"), output=["one", "two"]), image)
        assert codes_of(faults) == [("OUTPUT_FACET_UNCOVERED", "/output_contract")]

    def test_schema_properties_by_facet_key_and_sink(self) -> None:
        plain = {"schema": {"type": "object", "properties": {"x": {"type": "integer"}}}}
        image = image_of(READ, capability("plain", gives=plain))
        schema = {
            "type": "object",
            "properties": {"outline": {"type": "string"}, "x": {}, "document": {}, "none": {}},
            "required": ["outline"],
        }
        plan = plan_of(
            envelope(
                node("A", capability="read"),
                node("P", capability="plain"),
                node("S", "P", "A", capability="plain"),
                inputs=TEXT,
                output={"schema": schema},
            ),
            image,
        )
        assert plan.output == (
            OutputSource("outline", "A", "/outline"),
            OutputSource("x", "S", "/x"),
            OutputSource("document", "inputs", "/document"),
        )
        assert output_steps(plan)["outline"].fit is Fit.SUBSUMED
        assert output_steps(plan)["document"].fit is Fit.SUBSUMED

    def test_schema_properties_uncovered_and_mismatched(self) -> None:
        schema = {
            "type": "object",
            "properties": {"outline": {"type": "integer"}, "y/z": {}},
            "required": ["y/z", "outline"],
        }
        faults = faults_of(
            envelope(
                node("A", capability="read"),
                inputs=TEXT,
                output={"schema": schema},
            )
        )
        assert codes_of(faults) == [
            ("OUTPUT_MISMATCH", "/output_contract/schema/properties/outline"),
            ("OUTPUT_FACET_UNCOVERED", "/output_contract/schema/properties/y~1z"),
        ]

    def test_a_silent_sink_is_checked_at_run(self) -> None:
        made: dict[str, Any] = {
            "output": {"schema": {"type": "object", "required": ["x"], "properties": {"y": {}}}}
        }
        plan = plan_of(envelope(node("A"), **made))
        assert plan.output == (OutputSource("y", "A", "/y"), OutputSource("x", "A", "/x"))
        assert output_steps(plan)["x"].fit is Fit.CHECKED_AT_RUN
        assert codes_of(faults_of(envelope(node("A"), constraints={"proof": "strict"}, **made)))[
            0
        ] == ("PROOF_TOO_WEAK", "/output_contract")
        assert faults_of(envelope(node("A"), node("B"), **made))[0].code == "OUTPUT_FACET_UNCOVERED"
        closed = {"schema": {"type": "object", "additionalProperties": False}}
        image = image_of(capability("closed", gives=closed))
        assert codes_of(faults_of(envelope(node("A", capability="closed"), **made), image)) == [
            ("OUTPUT_FACET_UNCOVERED", "/output_contract")
        ]

    def test_a_rule_across_the_parts_is_checked_at_run(self) -> None:
        schema = {"type": "object", "properties": {"outline": {}}, "minProperties": 1}
        made: dict[str, Any] = {"inputs": TEXT, "output": {"schema": schema}}
        graph = node("A", capability="read")
        assert output_steps(plan_of(envelope(graph, **made)))[""].fit is Fit.CHECKED_AT_RUN
        faults = faults_of(envelope(graph, constraints={"proof": "strict"}, **made))
        assert codes_of(faults) == [("PROOF_TOO_WEAK", "/output_contract")]

    def test_whole_outputs(self) -> None:
        one = plan_of(envelope(node("A"), node("B", "A")))
        assert one.output == (OutputSource(None, "B", ""),)
        assert output_steps(one)[""].fit is Fit.SUBSUMED
        two = plan_of(envelope(node("A"), node("B")))
        assert two.output == (OutputSource("A", "A", ""), OutputSource("B", "B", ""))
        assert {step.fit for step in two.proof} == {Fit.SUBSUMED}
        counted = {"schema": {"type": "object", "minProperties": 2}}
        weak = plan_of(envelope(node("A"), node("B"), output=counted))
        assert {step.fit for step in weak.proof} == {Fit.CHECKED_AT_RUN}
        faults = faults_of(envelope(node("A"), output={"schema": {"type": "array"}}))
        assert codes_of(faults) == [("OUTPUT_MISMATCH", "/output_contract")]

    def test_a_contract_that_does_not_compile(self) -> None:
        image = image_of(echo(), facets=[facet("given", direction="input")])
        faults = faults_of(envelope(node("A"), output=["nope", "given"]), image)
        assert codes_of(faults) == [
            ("UNKNOWN_FACET", "/output_contract/facets/0"),
            ("FACET_CONTRACT_DIRECTION_MISMATCH", "/output_contract/facets/1"),
        ]
        (fault,) = faults_of(envelope(node("A"), output={"schema": {"type": "nonsense"}}))
        assert fault.pointer.startswith("/output_contract/schema")


def test_a_long_list_of_faults_is_cut() -> None:
    with pytest.raises(PlanRejected, match=r"\(and 149 more\)") as refused:
        plan_of(envelope(*(node(f"n{i}", capability="nope") for i in range(150))))
    assert len(refused.value.faults) == 100


def test_strict_names_the_binding_that_is_too_weak() -> None:
    binding = {"outline": {"from": "A", "pointer": "/x"}}
    graph = (node("A"), node("B", capability="write", inputs=binding))
    faults = faults_of(envelope(*graph, constraints={"proof": "strict"}))
    assert codes_of(faults) == [("PROOF_TOO_WEAK", "/goal_graph/nodes/1/inputs/outline")]
    assert plan_of(envelope(*graph)).nodes


def test_memories_are_bounded_and_only_memories(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view_module, "_views", {})
    monkeypatch.setattr(view_module, "VIEWS_KEPT_MAX", 2)
    monkeypatch.setattr(view_module, "FITS_KEPT_MAX", 1)
    made = envelope(
        node("A", capability="read"),
        node("B", "A", capability="write"),
        node("E", "B", inputs={"x": {"from": "A"}, "y": {"from": "B"}}),
        inputs=TEXT,
    )
    assert plan_of(made) == plan_of(made)


def test_the_output_contract_is_the_one_of_the_image() -> None:
    made = envelope(output=["brief"])
    assert output_contract_of(made, IMAGE) is output_contract_of(made, IMAGE)


# A simulator: every node gives a value for each facet it declares.
NAMES = ["p", "q", "s", "t"]
CAPS = [
    capability(f"c{takes}{gives}", list(takes), list(gives))
    for takes in ["", "p", "q", "pq", "s"]
    for gives in ["p", "q", "s", "qs", "t"]
]
SIMULATED = image_of(*CAPS, echo())


@st.composite
def graphs(draw: st.DrawFn) -> Envelope:
    nodes = []
    for index in range(draw(st.integers(1, 8))):
        found = draw(st.sampled_from(CAPS))
        requires = draw(st.sets(st.integers(0, 7), max_size=2)) - {index}
        made = node(f"n{index}", *(f"n{i}" for i in sorted(requires)))
        made["capability"] = found.capability_id
        if draw(st.booleans()) and draw(st.booleans()):
            sources = st.sampled_from(["inputs", *(f"n{i}" for i in range(index))])
            made["inputs"] = {
                key: {"from": draw(sources), "pointer": f"/{key}"} for key in found.input.facets
            }
        nodes.append(made)
    inputs = {name: name for name in draw(st.sets(st.sampled_from(NAMES)))}
    wanted = draw(st.sampled_from([None, ["t"], ["p", "q"]]))
    return envelope(*nodes, inputs=inputs, output=wanted, constraints={"proof": "strict"})


@settings(max_examples=300)
@given(graphs())
def test_a_strictly_verified_plan_always_has_what_it_needs(made: Envelope) -> None:
    try:
        plan = plan_of(made, SIMULATED)
    except PlanRejected:
        return
    outputs: dict[str, Any] = {"inputs": made.inputs}
    for found in plan.nodes.values():
        assert all(required in outputs for required in found.requires)
        reachable = {"inputs"}
        stack = list(found.requires)
        while stack:
            reachable.add(current := stack.pop())
            stack += plan.nodes[current].requires
        given_values = {}
        for key, bound in found.bindings.items():
            assert bound.source in reachable
            given_values[key] = resolve(outputs[bound.source], bound.pointer)
        used = SIMULATED.get(found.capability_id, found.capability_version)
        assert used is not None
        assert used.input.is_valid(given_values)
        outputs[found.id] = dict.fromkeys(used.output.facets, found.id)
    parts = {part.key: resolve(outputs[part.source], part.pointer) for part in plan.output}
    if made.output_contract.mode == "facets":
        assert output_contract_of(made, SIMULATED).is_valid(parts)
    assert plan == plan_of(made, SIMULATED)
