"""What changed between two plan versions, for `GET /v1/runs/{id}/plans/diff`."""

from __future__ import annotations

from typing import Any

from app.domain.plan import Plan
from app.domain.plan_json import node_as_dict, plan_as_dict


def diff_plans(before: Plan, after: Plan) -> dict[str, Any]:
    """Nodes are compared by id, field by field, in their JSON form:

    {from, to: versions, added: [node], removed: [node],
     changed: [{id, fields: {name: {before, after}}}], output: {before, after} if it changed}
    """
    changed: list[dict[str, Any]] = []
    for node_id, node in after.nodes.items():
        earlier = before.nodes.get(node_id)
        if earlier is not None and earlier != node:
            old, new = node_as_dict(earlier), node_as_dict(node)
            fields = {
                name: {"before": old[name], "after": new[name]}
                for name in new
                if old[name] != new[name]
            }
            changed.append({"id": node_id, "fields": fields})
    found: dict[str, Any] = {
        "from": before.version,
        "to": after.version,
        "added": [
            node_as_dict(node) for node in after.nodes.values() if node.id not in before.nodes
        ],
        "removed": [
            node_as_dict(node) for node in before.nodes.values() if node.id not in after.nodes
        ],
        "changed": changed,
    }
    if before.output != after.output:
        found["output"] = {
            "before": plan_as_dict(before)["metadata"]["output"],
            "after": plan_as_dict(after)["metadata"]["output"],
        }
    return found
