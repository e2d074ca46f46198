"""Runs that are under way when their plan is made anew, and what every next version has to keep."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from app.domain.envelope import Envelope
from app.domain.events import Event, EventType
from app.domain.plan import Plan
from app.kit.json_pointer import resolve
from app.planner.plan_envelope import output_contract_of, plan_envelope
from app.planner.replan import Progress, progress_of
from app.registry.image import RegistryImage
from tests.plans import story_of

POLICY = {
    "id": "again",
    "trigger": {"kind": "on_node_failed"},
    "action": {"kind": "replan", "rationale": "The ground was too wet."},
}
BY_POLICY = {"runtime": [POLICY]}


def first_plan(made: Envelope, image: RegistryImage) -> Plan:
    return plan_envelope(made, image, run_id="r", created_at="now")


def next_plan(made: Envelope, image: RegistryImage, progress: Progress, **more: Any) -> Plan:
    """The next version as it is made without a model."""
    return plan_envelope(*(made, image), run_id="r", created_at="later", progress=progress, **more)


def output_of(node_id: str, plan: Plan, image: RegistryImage) -> dict[str, Any]:
    """What a node makes: a value for everything that its capability declares."""
    node = plan.nodes[node_id]
    used = image.get(node.capability_id, node.capability_version)
    return {} if used is None else {key: f"{key} by {node_id}" for key in used.output.properties}


def progress_at(
    plan: Plan,
    made: Envelope,
    image: RegistryImage,
    *,
    done: Iterable[str] = (),
    failed: Iterable[str] = (),
    unknown: Iterable[str] = (),
    policy_id: str | None = None,
) -> Progress:
    """How far a run is when these nodes have ended so; `policy_id`: which policy asks."""
    story = story_of(plan)
    story.done(*done)
    for node_id in failed:
        story.fail(node_id)
    for node_id in unknown:
        story.start(node_id)
        story.block(node_id)
    if policy_id is not None:
        story.add(Event(EventType.POLICY_TRIGGERED, {"policy_id": policy_id}))
    outputs = {node_id: output_of(node_id, plan, image) for node_id in done}
    found = progress_of(story.state, outputs, made)
    assert found is not None
    return found


def check_next(plan: Plan, progress: Progress, made: Envelope, image: RegistryImage) -> None:
    """The promises of a next version, found out by running it: what is kept is as it was and comes
    first, every node has what it needs, and a plan without open goals gives the output."""
    assert plan.version == progress.plan.version + 1
    ids = list(plan.nodes)
    kept_count = len(progress.kept)
    assert {node_id: plan.nodes[node_id] for node_id in ids[:kept_count]} == progress.kept
    assert plan.proof[: len(progress.kept_proof)] == progress.kept_proof
    assert len({(step.node_id, step.key) for step in plan.proof}) == len(plan.proof)
    outputs: dict[str, Any] = {"inputs": made.inputs}
    before: dict[str, set[str]] = {}
    for node in plan.nodes.values():
        before[node.id] = {"inputs", *node.requires}.union(*(before[i] for i in node.requires))
        taken: dict[str, Any] = {}
        for key, bound in node.bindings.items():
            assert bound.source is None or bound.source in before[node.id]
            held = bound.value if bound.source is None else outputs[bound.source]
            taken[key] = resolve(held, bound.pointer)
        used = image.get(node.capability_id, node.capability_version)
        assert used is not None
        assert used.input.is_valid(taken)
        outputs[node.id] = progress.outputs.get(node.id) or output_of(node.id, plan, image)
    if plan.open_goals:
        assert not plan.output
        return
    assert plan.output
    parts = {part.key: resolve(outputs[part.source], part.pointer) for part in plan.output}
    assert output_contract_of(made, image).is_valid(parts.get(None, parts))
