"""What verification promises of the next version of a plan, whoever drafted it."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain.capability import Effect
from app.domain.envelope import Envelope
from app.domain.errors import PlanRejected
from app.domain.plan import Author, Bound, OutputSource, Plan
from app.planner.draft import Draft, PlanLimits
from app.planner.plan_envelope import output_contract_of
from app.planner.prompt import draft_of
from app.planner.replan import Progress, made_by
from app.planner.verify import verify
from app.registry.image import RegistryImage
from tests.registry_samples import capability, echo, envelope, image_of, node
from tests.replans import BY_POLICY, check_next, first_plan, next_plan, progress_at

DRILL = capability("soil.drill", ["place"], ["soil"])
JUDGE = capability("soil.judge", ["soil"], ["verdict"])
REPORT = capability("farm.report", ["verdict", "place"], ["report"])
IMAGE = image_of(DRILL, JUDGE, REPORT)
ASKED = envelope(inputs={"place": "Dithmarschen"}, output=["report"], policies=BY_POLICY)


def verified(draft: Draft, progress: Progress, made: Envelope, image: RegistryImage) -> Plan:
    return verify(
        *(draft, made, image, output_contract_of(made, image)),
        run_id="r",
        created_at="later",
        limits=PlanLimits(),
        progress=progress,
    )


class TestNextVersion:
    """What it keeps, and what it may add."""

    def drafted(
        self,
        progress: Progress,
        *stages: dict[str, Any],
        made: Envelope = ASKED,
        image: RegistryImage = IMAGE,
    ) -> Plan:
        plan = verified(draft_of({"stages": stages}, progress.kept), progress, made, image)
        check_next(plan, progress, made, image)
        return plan

    def test_kept_nodes_stay_as_they_are_whatever_the_registry_says_now(self) -> None:
        progress = progress_at(first_plan(ASKED, IMAGE), ASKED, IMAGE, done=["drill"])
        newer = capability("soil.drill", ["place"], ["soil"], version="2", age_s=9, timeout_s=1)
        stale = capability("soil.drill", ["place"], ["soil"], active=False)
        for registry in (image_of(DRILL, newer, JUDGE, REPORT), image_of(stale, JUDGE, REPORT)):
            plan = next_plan(ASKED, registry, progress)
            check_next(plan, progress, ASKED, registry)
            assert plan.nodes["judge"].bindings == {"soil": Bound("drill", "/soil")}
        with pytest.raises(PlanRejected) as refused:
            next_plan(ASKED, image_of(JUDGE, REPORT, facets=["place"]), progress)
        codes = [(fault.code, fault.node_id) for fault in refused.value.faults]
        assert ("CAPABILITY_NOT_REGISTERED", "drill") in codes or codes[0][
            0
        ] == "CAPABILITY_MISSING"

    def test_what_may_have_happened_is_not_done_again_by_another_node(self) -> None:
        sell = capability("farm.sell", ["soil"], ["verdict"], effect=Effect.AT_MOST_ONCE)
        image = image_of(DRILL, sell, REPORT)
        progress = progress_at(
            first_plan(ASKED, image),
            ASKED,
            image,
            done=["drill"],
            unknown=["sell"],
            policy_id="again",
        )
        with pytest.raises(PlanRejected) as refused:
            self.drafted(
                progress, {"stage": "sell it again", "capability": "farm.sell"}, image=image
            )
        assert [(f.code, f.node_id) for f in refused.value.faults] == [
            ("OUTCOME_UNKNOWN", "sell_it_again")
        ]

    def test_a_capability_that_is_gone_can_not_be_built_on(self) -> None:
        made = envelope(
            node("A", capability="soil.drill"),
            node("B", "A", capability="soil.judge"),
            inputs={"place": "here", "soil": "wet"},
            output=["verdict"],
        )
        progress = progress_at(first_plan(made, IMAGE), made, IMAGE, done=["A"], policy_id="x")
        with pytest.raises(PlanRejected) as refused:
            next_plan(made, image_of(JUDGE), progress)
        [fault] = refused.value.faults
        assert (fault.code, fault.node_id) == ("CAPABILITY_NOT_REGISTERED", "A")

    def test_a_new_node_makes_the_output_where_an_old_one_did(self) -> None:
        judged = envelope(inputs={"place": "here", "soil": "wet"}, output=["verdict"])
        image = image_of(JUDGE, capability("soil.sort", ["soil"], ["soil"]))
        first = envelope(
            node("sort", capability="soil.sort"),
            node("judge", "sort", capability="soil.judge"),
            inputs=judged.inputs,
            output=["verdict"],
        )
        progress = progress_at(first_plan(first, image), first, image, done=["sort", "judge"])
        bound = {"soil": {"from": "inputs", "pointer": "/soil"}}
        stage = {"stage": "anew", "capability": "soil.judge", "inputs": bound}
        plan = self.drafted(progress, stage, made=judged, image=image)
        assert list(plan.nodes) == ["sort", "judge", "anew"], "although it is higher up"
        assert plan.output == (OutputSource("verdict", "anew", "/verdict"),)

    def test_a_freeform_output_is_that_of_the_last_node(self) -> None:
        made = envelope(node("A"), node("B", "A"))
        image = image_of(echo())
        progress = progress_at(first_plan(made, image), made, image, done=["A"], failed=["B"])
        stage = {"stage": "B", "capability": "util.echo", "requires": ["A"]}
        plan = self.drafted(progress, stage, made=made, image=image)
        assert plan.output == (OutputSource(None, "B", ""),)
        assert plan.author is Author.LLM, "the next goal is its drafter's"

    def test_the_id_of_a_kept_node_is_not_free(self) -> None:
        progress = progress_at(first_plan(ASKED, IMAGE), ASKED, IMAGE, done=["drill", "judge"])
        plan = self.drafted(progress, {"stage": "judge", "capability": "farm.report"})
        assert list(plan.nodes) == ["drill", "judge", "judge_2"]
        with pytest.raises(PlanRejected) as refused:
            verified(
                draft_of({"stages": [{"stage": "judge", "capability": "farm.report"}]}),
                *(progress, ASKED, IMAGE),
            )
        assert [fault.code for fault in refused.value.faults] == ["DUPLICATE_NODE"]

    def test_kept_nodes_count_against_the_limits(self) -> None:
        topology = {"planner": {"topology": {"max_nodes": 3}}, **BY_POLICY}
        made = envelope(inputs={"place": "here"}, output=["report"], policies=topology)
        progress = progress_at(first_plan(made, IMAGE), made, IMAGE, done=["drill", "judge"])
        assert len(next_plan(made, IMAGE, progress).nodes) == 3
        more = capability("farm.more", ["verdict"], ["more"])
        last = capability("farm.report", ["more"], ["report"])
        with pytest.raises(PlanRejected) as refused:
            next_plan(made, image_of(DRILL, JUDGE, more, last), progress)
        assert [fault.code for fault in refused.value.faults] == ["LIMIT_EXCEEDED"]


# --- whatever the registry, whatever has happened ------------------------------------------------

NAMES = ["a", "b", "c", "d", "e"]
TAKES = ["", "a", "b", "ab", "c", "cd"]
GIVES = ["a", "b", "c", "d", "e", "cd", "ae"]
CAPS = [
    capability(f"{takes or 'nil'}.{gives}.{effect}", list(takes), list(gives), effect=effect)
    for takes in TAKES
    for gives in GIVES
    for effect in (Effect.PURE, Effect.AT_MOST_ONCE)
]


IMAGES = [
    image_of(*random.Random(seed).sample(CAPS, 4 + seed % 16), facets=NAMES) for seed in range(40)
]


def wish(rng: random.Random, image: RegistryImage) -> Envelope:
    """Some facets given, some asked for, and now and then a capability that has to be used."""
    inputs = {name: name for name in rng.sample(NAMES, rng.randint(0, 3))}
    wanted = rng.sample(NAMES, rng.randint(1, 3))
    known = [found.capability_id for found in image.active()]
    selection = {"require": rng.sample(known, rng.choice([0, 0, 0, 1]))}
    policies = {**BY_POLICY, "planner": {"selection": selection}}
    strict = {"proof": "strict"}
    return envelope(inputs=inputs, output=wanted, policies=policies, constraints=strict)


def ended(rng: random.Random, plan: Plan, made: Envelope, image: RegistryImage) -> Progress:
    """Nodes end one way or another, each after those that it requires; some do not start."""
    ends: dict[str, list[str]] = {"done": [], "failed": [], "unknown": []}
    for found in plan.nodes.values():
        ways = ["done", "done", "failed", ""]
        if found.effect is Effect.AT_MOST_ONCE:
            ways.append("unknown")
        if set(found.requires).issubset(ends["done"]):
            ends.setdefault(rng.choice(ways), []).append(found.id)
    ends.pop("", None)
    return progress_at(plan, made, image, policy_id="again", **ends)


def under_way(rng: random.Random) -> tuple[RegistryImage, Envelope, Progress]:
    """A run somewhere in its first plan, over some registry."""
    while True:
        image = rng.choice(IMAGES)
        made = wish(rng, image)
        with contextlib.suppress(PlanRejected):
            return image, made, ended(rng, first_plan(made, image), made, image)


def stages(rng: random.Random, progress: Progress, image: RegistryImage) -> list[dict[str, Any]]:
    """What a model might say: right and wrong names, of kept nodes, of stages, of nobody."""
    known = list(image.active())
    names = [*progress.plan.nodes, "x", "x 2", "inputs"]
    found: list[dict[str, Any]] = []
    for _ in range(rng.randint(1, 3)):
        used = rng.choice(known)
        requires = rng.sample(names, rng.choice([0, 0, 1]))
        bound = {
            key: {"from": rng.choice(names), "pointer": f"/{key}"} for key in used.input.properties
        }
        found.append(
            {
                "stage": rng.choice(names),
                "capability": used.capability_id,
                "requires": requires,
                "inputs": rng.choice([{}, {}, bound]),
            }
        )
    return found


seeds = st.integers(0, 1_000_000)


@settings(max_examples=200)
@given(seeds)
def test_the_rest_of_any_plan_keeps_what_is_done_and_does_nothing_twice(
    seed: int,
) -> None:
    image, made, progress = under_way(random.Random(seed))
    try:
        after = next_plan(made, image, progress)
    except PlanRejected:
        assert progress.in_doubt, "what could be planned once can be planned again"
        return
    check_next(after, progress, made, image)
    there = made_by(image, progress)
    used = {found.capability_id for found in progress.kept.values()}
    required = made.policies.planner.selection.require
    for found in after.nodes.values():
        if found.id not in progress.kept:
            assert found.capability_id not in used
            assert found.capability_id in required or not there.issuperset(found.output_facets)
    assert after == next_plan(made, image, progress)


@settings(max_examples=200)
@given(seeds)
def test_whatever_a_model_drafts_for_the_rest_is_whole_or_refused(seed: int) -> None:
    rng = random.Random(seed)
    image, made, progress = under_way(rng)
    draft = draft_of({"stages": stages(rng, progress, image)}, progress.kept)
    assert progress.kept.keys().isdisjoint(found.id for found in draft.nodes)
    try:
        after = verified(draft, progress, made, image)
    except PlanRejected:
        return
    check_next(after, progress, made, image)
    assert after.author is Author.REPLAN
