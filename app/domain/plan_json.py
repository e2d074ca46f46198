"""Plans as JSON, as the journal stores them and the API serves them; the way back is exact.

{run_id, version, created_at, author, nodes: [...],
 metadata: {rationale, proof: [{node_id, key, source, pointer, fit, why}],
            output: [{key, source, pointer}], open_goals?: [id]}}

node: {id, kind, label, text, capability_id, capability_version, requires, bindings,
       facets: {input, output}, effect, timeout_s, max_attempts, concurrency, rationale}
binding: {"value": …} or {"from": "<node id>|inputs", "pointer": "/…"}
"""

from __future__ import annotations

from typing import Any

from app.domain.capability import Effect, NodeKind
from app.domain.plan import (
    Author,
    Bound,
    Fit,
    OutputSource,
    Plan,
    PlanNode,
    ProofStep,
    children_of,
)


def plan_as_dict(plan: Plan) -> dict[str, Any]:
    """The plan as JSON. Written out field by field: every run does this once."""
    found: dict[str, Any] = {
        "run_id": plan.run_id,
        "version": plan.version,
        "created_at": plan.created_at,
        "author": plan.author.value,
        "nodes": [node_as_dict(node) for node in plan.nodes.values()],
        "metadata": {
            "rationale": plan.rationale,
            "proof": [
                {
                    "node_id": step.node_id,
                    "key": step.key,
                    "source": step.source,
                    "pointer": step.pointer,
                    "fit": step.fit.value,
                    "why": step.why,
                }
                for step in plan.proof
            ],
            "output": [
                {"key": part.key, "source": part.source, "pointer": part.pointer}
                for part in plan.output
            ],
        },
    }
    if plan.open_goals:
        found["metadata"]["open_goals"] = list(plan.open_goals)
    return found


def node_as_dict(node: PlanNode) -> dict[str, Any]:
    """One node as JSON."""
    return {
        "id": node.id,
        "kind": node.kind.value,
        "label": node.label,
        "text": node.text,
        "capability_id": node.capability_id,
        "capability_version": node.capability_version,
        "requires": list(node.requires),
        "bindings": {key: bound.as_dict() for key, bound in node.bindings.items()},
        "facets": {"input": list(node.input_facets), "output": list(node.output_facets)},
        "effect": node.effect.value,
        "timeout_s": node.timeout_s,
        "max_attempts": node.max_attempts,
        "concurrency": node.concurrency,
        "rationale": node.rationale,
    }


def plan_from_dict(found: dict[str, Any]) -> Plan:
    """The plan that `plan_as_dict` wrote, equal to the original.

    Only for what Flexrun itself has stored: a shape it never wrote raises `KeyError`, `ValueError`.
    """
    nodes = {node["id"]: _node(node) for node in found["nodes"]}
    metadata = found["metadata"]
    return Plan(
        run_id=found["run_id"],
        version=found["version"],
        created_at=found["created_at"],
        author=Author(found["author"]),
        nodes=nodes,
        output=tuple(
            OutputSource(part["key"], part["source"], part["pointer"])
            for part in metadata["output"]
        ),
        proof=tuple(
            ProofStep(
                step["node_id"],
                step["key"],
                step["source"],
                step["pointer"],
                Fit(step["fit"]),
                step["why"],
            )
            for step in metadata["proof"]
        ),
        rationale=metadata["rationale"],
        children=children_of(nodes),
        open_goals=tuple(metadata.get("open_goals", ())),
    )


def _node(found: dict[str, Any]) -> PlanNode:
    return PlanNode(
        id=found["id"],
        kind=NodeKind(found["kind"]),
        label=found["label"],
        text=found["text"],
        capability_id=found["capability_id"],
        capability_version=found["capability_version"],
        requires=tuple(found["requires"]),
        bindings={
            key: Bound(None, "", bound["value"])
            if "value" in bound
            else Bound(bound["from"], bound["pointer"])
            for key, bound in found["bindings"].items()
        },
        input_facets=tuple(found["facets"]["input"]),
        output_facets=tuple(found["facets"]["output"]),
        effect=Effect(found["effect"]),
        timeout_s=found["timeout_s"],
        max_attempts=found["max_attempts"],
        concurrency=found["concurrency"],
        rationale=found["rationale"],
    )
