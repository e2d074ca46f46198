"""A new run that goes on where a finished one stopped. The finished one never changes.

What the old run has done is copied into the journal of the new one as NODE_SKIPPED, with the output
or a reference to a copy of it, so that retention of the old run can not break the new one. Where
the old run can not know whether an `at_most_once` effect happened, the new one does not know it
either: such a node is blocked until an operator decides. All others start anew.

The plan is the old one: what was done was done under it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import orjson

from app.domain.decide import unknown_outcome
from app.domain.errors import Conflict
from app.domain.events import Event, EventType, SkipReason, error_data
from app.domain.signals import uncertain_nodes
from app.kit.rfc3339 import rfc3339
from app.orchestrator.plans import adopt_plan, plan_generated
from app.orchestrator.resume import StoredRun, event_value
from app.orchestrator.run import DrivenRun
from app.store.events import EventReader


@dataclass(slots=True)
class Successor:
    """What is taken over from a finished run: results by node, as data of events and as values."""

    old: StoredRun
    operator: dict[str, Any] | None
    note: str | None
    kept: dict[str, dict[str, Any]]
    outputs: dict[str, Any]

    @property
    def blobs(self) -> list[str]:
        """The sha256 of the big values among the results."""
        refs = [data["output_ref"] for data in self.kept.values() if "output_ref" in data]
        return [ref["sha256"] for ref in refs]

    def begin(self, run: DrivenRun) -> None:
        """Put the plan and the results into the first append of the new run."""
        opening = run.opening
        assert opening is not None
        assert opening.new_run is not None
        opening.new_run.resumed_from = (self.old.run_id, self.old.seq)
        opening.events[0].data.update(
            resumed_from={"run_id": str(self.old.run_id), "seq": self.old.seq},
            operator=self.operator,
            note=self.note,
        )
        plan = self.old.state.plan
        if plan is None:
            return  # it was never planned: the new run is planned anew
        created_at = rfc3339(run.state.queued_at)
        plan = replace(plan, run_id=run.handle.text_id, version=1, created_at=created_at)
        adopt_plan(run, plan, opening)
        run.outputs.update(self.outputs)
        opening.events.append(plan_generated(plan, None))
        opening.events += [
            Event(EventType.NODE_SKIPPED, {"reason": SkipReason.RESUME, **data}, node_id=node_id)
            for node_id, data in self.kept.items()
        ]
        error = error_data("unknown_outcome", "The earlier run does not know how the call ended.")
        opening.events += [
            unknown_outcome(node_id, 1, error) for node_id in uncertain_nodes(self.old.state)
        ]


async def successor_of(
    reader: EventReader, old: StoredRun, operator: dict[str, Any] | None, note: str | None
) -> Successor:
    """Read what a finished run leaves. Raises `Conflict` (`missing_snapshot`) once it is pruned."""
    if old.pruned or old.envelope is None:
        raise Conflict(
            "The journal of this run was dropped by retention; its results are gone. "
            "Submit the envelope again.",
            code="missing_snapshot",
        )
    nodes = old.state.nodes
    seqs = {node.done_seq: node_id for node_id, node in nodes.items() if node.done_seq is not None}
    bodies = await reader.events_at(old.run_id, list(seqs)) if seqs else {}
    kept = {seqs[seq]: _result(orjson.loads(bodies[seq])["data"]) for seq in sorted(bodies)}
    outputs = {
        node_id: await event_value(reader, old.run_id, data) for node_id, data in kept.items()
    }
    return Successor(old, operator, note, kept, outputs)


def _result(data: dict[str, Any]) -> dict[str, Any]:
    """The output of an event, or the reference to it, and nothing else of its data."""
    return {name: data[name] for name in ("output", "output_ref") if name in data}
