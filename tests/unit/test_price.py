"""What an envelope optimises for, and what that does to its plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from app.domain.capability import Capability, CapabilityKind
from app.domain.envelope import Envelope, Objective
from app.domain.errors import Fault, PlanRejected
from app.domain.plan import Plan
from app.planner.hypergraph import hypergraph_of, search
from app.planner.plan_envelope import plan_envelope, within_tokens
from app.registry.image import RegistryImage
from tests.registry_samples import capability, envelope, image_of, node


def model(
    capability_id: str, takes: Sequence[str], gives: Sequence[str], **more: Any
) -> Capability:
    """A capability that a model runs, of tier 5 unless said otherwise."""
    made = capability(capability_id, takes, gives, **{"tier": 5, **more})
    llm = made.registration.model_copy(update={"kind": CapabilityKind.LLM})
    return replace(made, registration=llm)


CODE = capability("code", ["document"], ["brief"])
MODEL = model("model", ["document"], ["brief"])


def wish(
    objective: str | None = None,
    *,
    max_tokens: int | None = None,
    output: Sequence[str] = ("brief",),
    **selection: Sequence[str],
) -> Envelope:
    optimisation = {"objective": objective, "max_tokens": max_tokens}
    planner = {"optimisation": optimisation, "selection": selection}
    return envelope(inputs={"document": "text"}, output=output, policies={"planner": planner})


def plan_of(
    made: Envelope, image: RegistryImage, *, models_up: bool = True, run_id: str = "r"
) -> Plan:
    return plan_envelope(made, image, run_id=run_id, created_at="now", models_up=models_up)


def chosen(
    made: Envelope, *capabilities: Capability, models_up: bool = True, run_id: str = "r"
) -> list[str]:
    plan = plan_of(made, image_of(*capabilities), models_up=models_up, run_id=run_id)
    return sorted(found.capability_id for found in plan.nodes.values())


class TestWithout:
    def test_an_objective_plans_are_as_they_were(self) -> None:
        image = image_of(CODE, MODEL)
        plain = envelope(inputs={"document": "text"}, output=["brief"])
        assert plan_of(wish(), image) == plan_of(plain, image)
        assert plan_of(plain, image).rationale == (
            "cheapest way to brief in the registry: 1 calls, cost 1"
        )

    def test_what_is_not_known_is_refused(self) -> None:
        with pytest.raises(ValidationError):
            wish("beauty")
        with pytest.raises(ValidationError):
            envelope(policies={"planner": {"optimisation": {"maxTokens": 5}}})


class TestModels:
    """Which of a model and code makes a facet that both can make."""

    @pytest.mark.parametrize(
        ("objective", "expected"),
        [(None, "code"), ("quality", "model"), ("token_efficiency", "code"), ("speed", "code")],
    )
    def test_by_objective(self, objective: str | None, expected: str) -> None:
        assert chosen(wish(objective), CODE, MODEL) == [expected]

    @pytest.mark.parametrize("objective", [None, *Objective])
    def test_none_while_no_model_is_up_but_where_nothing_else_will_do(
        self, objective: str | None
    ) -> None:
        dear = capability("dear", ["document"], ["brief"], tier=9, timeout_s=86_400)
        cheap = model("cheap", ["document"], ["brief"], tier=0)
        assert chosen(wish(objective), dear, cheap, models_up=False) == ["dear"]
        asked = wish(objective, prefer=["cheap"])
        assert chosen(asked, dear, cheap, models_up=False) == ["dear"]
        assert chosen(wish(objective), cheap, models_up=False) == ["cheap"]

    def test_the_plan_tells_why_there_is_no_model_in_it(self) -> None:
        image = image_of(CODE, MODEL)
        told = [plan_of(wish("quality"), image, models_up=up).rationale for up in (True, False)]
        assert told == [
            "best way to brief in the registry for quality: 1 calls",
            "best way to brief in the registry for quality: 1 calls, without a model because none"
            " is up",
        ]
        frugal = plan_of(wish("token_efficiency"), image, models_up=False)
        assert frugal.rationale == (
            "best way to brief in the registry for token_efficiency: 1 calls"
        )

    def test_quality_takes_the_longer_way_to_a_model(self) -> None:
        steps = [
            capability("prepare", ["document"], ["outline"], tier=9),
            model("write", ["outline"], ["brief"]),
        ]
        assert chosen(wish("quality"), CODE, *steps) == ["prepare", "write"]

    def test_quality_takes_the_cheaper_of_two_models(self) -> None:
        other = model("a.dear", ["document"], ["brief"], tier=9)
        assert chosen(wish("quality"), CODE, other, MODEL) == ["model"]

    def test_a_model_that_can_not_be_called_outdoes_nobody(self) -> None:
        stuck = model("stuck", ["moon"], ["brief"])
        behind = model("behind", ["outline"], ["brief"])
        outline = capability("outline", ["document"], ["outline"])
        rivals = [CODE, capability("other", ["document"], ["brief"], tier=1)]
        assert chosen(wish("quality"), *rivals, stuck) == ["code"]
        asked = wish("quality", forbid=["outline"])
        assert chosen(asked, *rivals, behind, outline) == ["code"]

    def test_a_model_that_can_not_be_called_makes_no_other_way_cheaper(self) -> None:
        stuck = model("stuck", ["moon"], ["outline"])
        short = [
            capability("outline", ["document"], ["outline"]),
            capability("compose", ["outline"], ["brief"]),
        ]
        dear = capability("dear", ["document"], ["brief"], tier=9)
        assert chosen(wish("quality"), *short, dear, stuck) == ["compose", "outline"]

    def test_the_callers_own_word_wins(self) -> None:
        assert chosen(wish("quality", avoid=["model"]), CODE, MODEL) == ["code"]
        assert chosen(wish("quality", forbid=["model"]), CODE, MODEL) == ["code"]
        assert chosen(wish("quality", prefer=["code"]), CODE, MODEL) == ["code"]
        assert chosen(wish("token_efficiency", avoid=["code"]), CODE, MODEL) == ["model"]
        assert chosen(wish("token_efficiency", prefer=["model"]), CODE, MODEL) == ["model"]
        assert chosen(wish("quality", require=["code"]), CODE, MODEL) == ["code"]


class TestTokens:
    def test_fewer_declared_tokens_win_where_there_is_only_a_model(self) -> None:
        many = model("a.many", ["document"], ["brief"], cost={"tier": 5, "tokens": 9_000})
        few = model("few", ["document"], ["brief"], cost={"tier": 5, "tokens": 2_000})
        assert chosen(wish(), many, few) == ["a.many"]
        assert chosen(wish("token_efficiency"), many, few) == ["few"]

    def test_a_plan_that_declares_more_than_max_tokens_is_refused(self) -> None:
        declared = {"tier": 0, "tokens": 3_000}
        steps = [
            capability("s1", ["document"], ["outline"], cost=declared),
            capability("s2", ["outline"], ["brief"], cost=declared),
        ]
        assert chosen(wish(max_tokens=6_000), *steps) == ["s1", "s2"]
        with pytest.raises(PlanRejected) as refused:
            chosen(wish(max_tokens=5_999), *steps)
        assert refused.value.faults == (
            Fault(
                "LIMIT_EXCEEDED",
                "the plan declares 6000 tokens; 5999 is the limit",
                "/policies/planner/optimisation/max_tokens",
            ),
        )

    def test_so_is_a_graph_of_the_caller(self) -> None:
        image = image_of(capability("ask", cost={"tokens": 3_000}))
        nodes = [node("A", capability="ask", inputs={}), node("B", capability="ask", inputs={})]
        for max_tokens, is_refused in ((6_000, False), (5_999, True)):
            policies = {"planner": {"optimisation": {"max_tokens": max_tokens}}}
            made = envelope(*nodes, policies=policies)
            if is_refused:
                with pytest.raises(PlanRejected):
                    plan_of(made, image)
            else:
                assert len(plan_of(made, image).nodes) == 2

    def test_what_declares_nothing_or_is_not_known_counts_nothing(self) -> None:
        plan = plan_of(wish(max_tokens=0), image_of(CODE))
        assert within_tokens(plan, wish(max_tokens=0), image_of(facets=["brief"])) is plan


class TestSpeed:
    def timed(self, name: str, takes: str, gives: str, timeout_s: float, **more: Any) -> Capability:
        return capability(name, [takes], [gives], timeout_s=timeout_s, **more)

    def test_the_shorter_time_limit_wins_then_the_tier(self) -> None:
        slow = self.timed("slow", "document", "brief", 30)
        quick = self.timed("quick", "document", "brief", 10, tier=9)
        assert chosen(wish(), slow, quick) == ["slow"]
        assert chosen(wish("speed"), slow, quick) == ["quick"]
        same = self.timed("alike", "document", "brief", 10)
        assert chosen(wish("speed"), slow, quick, same) == ["alike"]

    def test_what_runs_side_by_side_takes_as_long_as_the_longest(self) -> None:
        parts = [
            self.timed("left", "document", "x", 20),
            self.timed("right", "document", "y", 20),
            capability("join", ["x", "y"], ["brief"], timeout_s=5),
        ]
        whole = self.timed("whole", "document", "brief", 30)
        assert chosen(wish(), *parts, whole) == ["whole"]
        assert chosen(wish("speed"), *parts, whole) == ["join", "left", "right"]

    def test_very_long_limits_are_alike(self) -> None:
        hour = self.timed("an.hour", "document", "brief", 3_600, tier=1)
        day = self.timed("day", "document", "brief", 86_400)
        assert chosen(wish("speed"), hour, day) == ["day"]


class TestDiversity:
    EQUALS = tuple(capability(f"equal{i}", ["document"], ["brief"]) for i in range(3))

    def test_equals_take_turns_from_run_to_run(self) -> None:
        runs = [f"run-{i}" for i in range(40)]
        taken = [chosen(wish("diversity"), *self.EQUALS, run_id=run)[0] for run in runs]
        assert set(taken) == {"equal0", "equal1", "equal2"}
        again = [chosen(wish("diversity"), *self.EQUALS, run_id=run)[0] for run in runs]
        assert again == taken

    def test_nobody_dearer_gets_a_turn(self) -> None:
        dear = capability("dear", ["document"], ["brief"], tier=1)
        longer = [
            capability("s1", ["document"], ["outline"]),
            capability("s2", ["outline"], ["brief"]),
        ]
        for run in range(40):
            taken = chosen(wish("diversity"), CODE, dear, *longer, run_id=f"run-{run}")
            assert taken == ["code"]


# Layered registries: whoever makes a facet takes only facets before it, so that there is no circle
# in which two facets could each be made by a model only at the cost of the other.
NAMES = "abcdef"
_layers = st.lists(
    st.tuples(st.integers(1, 5), st.sets(st.integers(0, 4), max_size=2), st.booleans()),
    min_size=1,
    max_size=8,
)


def layered(shapes: Sequence[tuple[int, set[int], bool]]) -> list[Capability]:
    """Capabilities that make one facet each; the flag says whether a model does it."""
    found = []
    for number, (gives, takes, is_model) in enumerate(shapes):
        needs = sorted({NAMES[place] for place in takes if place < gives} | {"a"})
        make = model if is_model else capability
        found.append(make(f"c{number}", needs, [NAMES[gives]]))
    return found


def reachable(caps: Sequence[Capability]) -> set[str]:
    """The facets that can be made from `a` by these."""
    found = {"a"}
    for _ in caps:
        found |= {
            n for cap in caps if found.issuperset(cap.input.facets) for n in cap.output.facets
        }
    return found


def is_model(cap: Capability) -> bool:
    return cap.registration.kind is CapabilityKind.LLM


@settings(max_examples=150)
@given(_layers, st.sampled_from(NAMES[1:]), st.sampled_from([None, *Objective]), st.booleans())
def test_who_makes_a_facet(
    shapes: list[tuple[int, set[int], bool]],
    goal: str,
    objective: Objective | None,
    models_up: bool,
) -> None:
    caps = layered(shapes)
    image = image_of(*caps, facets=NAMES)
    planner = {"optimisation": {"objective": objective}}
    made = envelope(inputs={"a": "text"}, output=[goal], policies={"planner": planner})
    can = reachable(caps)
    if goal not in can:
        with pytest.raises(PlanRejected):
            plan_of(made, image, models_up=models_up)
        return
    plan = plan_of(made, image, models_up=models_up)
    used = [image.capabilities[n.capability_id, n.capability_version] for n in plan.nodes.values()]
    without = reachable([cap for cap in caps if not is_model(cap)])
    callable_ = [cap for cap in caps if can.issuperset(cap.input.facets)]
    by_models = {name for cap in callable_ if is_model(cap) for name in cap.output.facets}
    if objective is Objective.QUALITY and models_up:
        assert not [cap for cap in used if not is_model(cap) and cap.output.facets[0] in by_models]
    elif objective is Objective.TOKEN_EFFICIENCY or not models_up:
        assert goal not in without or not any(map(is_model, used))
    assert plan_of(made, image, models_up=models_up) == plan


@settings(max_examples=150)
@given(_layers, st.lists(st.integers(1, 99), min_size=8, max_size=8), st.sampled_from(NAMES[1:]))
def test_speed_finds_the_shortest_chain_of_time_limits(
    shapes: list[tuple[int, set[int], bool]], limits: list[int], goal: str
) -> None:
    caps = layered(shapes)
    image = image_of(*caps, facets=NAMES)
    price = {cap.capability_id: limit for cap, limit in zip(caps, limits, strict=False)}
    best: dict[str, int] = {"a": 0}
    for _ in caps:
        for cap in caps:
            if best.keys() >= set(cap.input.facets):
                ends = price[cap.capability_id] + max(best[need] for need in cap.input.facets)
                name = cap.output.facets[0]
                best[name] = min(ends, best.get(name, ends))
    found = search(
        hypergraph_of(image),
        {"a"},
        [goal],
        (),
        lambda edge: price[edge.capability.capability_id],
        side_by_side=True,
    )
    assert (goal in found.maker) == (goal in best)
    if goal in best:
        assert found.maker[goal].cost == best[goal]
