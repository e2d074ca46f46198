"""From rows to a run that can be driven or shown: the newest snapshot, then the tail.

Deleting every snapshot changes nothing but the time this takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import orjson

from app.domain.envelope import Envelope
from app.domain.event_json import decode_event
from app.domain.plan import Plan
from app.domain.plan_json import plan_from_dict
from app.domain.snapshot import state_from_dict
from app.domain.state import RunState, apply
from app.kit.ids import created_ms
from app.store.events import EventReader

PAGE_ROWS = 5_000


@dataclass(slots=True)
class StoredRun:
    """A run as the journal has it. `epoch`, `seq`, `takes` are the head's.

    `body` is the envelope as it was sent; `envelope` is None and `body` empty once it is pruned.
    `resumed_from` is `(run_id, seq)` of the finished run whose results it keeps.
    """

    run_id: UUID
    tenant_id: str
    lane: str
    takes: int
    wake_at: datetime | None
    resumed_from: tuple[UUID, int] | None
    epoch: int
    seq: int
    owner: str | None
    status: str
    envelope: Envelope | None
    body: str
    traceparent: str
    objective: str
    label: str | None
    correlation_id: str | None
    trace_id: str
    state: RunState
    snapshot_seq: int
    pruned: bool


async def load_run(reader: EventReader, tenant_id: str, run_id: UUID) -> StoredRun | None:
    """The run with its state folded up to the head; None when this tenant has no such run."""
    row = await reader.run(tenant_id, run_id)
    if row is None:
        return None
    versions, bodies = row["versions"] or (), row["plans"] or ()
    plans = {
        version: plan_from_dict(orjson.loads(body))
        for version, body in zip(versions, bodies, strict=True)
    }
    state, snapshot_seq = _newest_state(run_id, plans, row["snapshot_seq"], row["snapshot"])
    if row["pruned_at"] is None:
        await _fold_tail(reader, run_id, state, row["seq"])
    envelope = row["envelope"]
    return StoredRun(
        run_id=run_id,
        tenant_id=tenant_id,
        lane=row["lane"],
        takes=row["takes"],
        wake_at=row["wake_at"],
        resumed_from=None
        if row["resumed_from"] is None
        else (row["resumed_from"], row["resumed_from_seq"]),
        epoch=row["epoch"],
        seq=row["seq"],
        owner=row["owner"],
        status=row["status"],
        envelope=None if envelope is None else Envelope.model_validate_json(envelope),
        body=envelope or "",
        traceparent=row["traceparent"],
        objective=row["objective"],
        label=row["label"],
        correlation_id=row["correlation_id"],
        trace_id=row["traceparent"].split("-")[1],
        state=state,
        snapshot_seq=snapshot_seq,
        pruned=row["pruned_at"] is not None,
    )


def _newest_state(
    run_id: UUID, plans: dict[int, Plan], seq: int | None, snapshot: str | None
) -> tuple[RunState, int]:
    if seq is not None and snapshot is not None:
        state = state_from_dict(str(run_id), plans, orjson.loads(snapshot))
        if state is not None:
            return state, seq
    return RunState(str(run_id), plans, queued_at=created_ms(run_id)), 0


async def _fold_tail(reader: EventReader, run_id: UUID, state: RunState, head: int) -> None:
    """Up to where the head was. What came since may be of a plan version that came since, too."""
    while state.seq < head:
        rows = await reader.page(run_id, state.seq, min(head - state.seq, PAGE_ROWS))
        if not rows:
            return
        for row in rows:
            apply(state, decode_event(row.body))


async def load_outputs(reader: EventReader, run_id: UUID, state: RunState) -> dict[str, Any]:
    """The outputs of all nodes that have one, by the events that hold them."""
    seqs = {
        node.done_seq: node_id for node_id, node in state.nodes.items() if node.done_seq is not None
    }
    bodies = await reader.events_at(run_id, list(seqs)) if seqs else {}
    return {
        seqs[seq]: await event_value(reader, run_id, orjson.loads(body)["data"])
        for seq, body in bodies.items()
    }


async def event_value(
    reader: EventReader, run_id: UUID, data: dict[str, Any], name: str = "output"
) -> Any:
    """A value that an event carries, or that it refers to."""
    if (reference := data.get(f"{name}_ref")) is not None:
        blob = await reader.blob(run_id, reference["sha256"])
        return None if blob is None else orjson.loads(blob)
    return data.get(name)


async def last_event(reader: EventReader, run_id: UUID, seq: int) -> dict[str, Any] | None:
    """The event at the head: of a finished run it holds the output or the error."""
    found = await reader.events_at(run_id, [seq])
    if seq not in found:
        return None
    event: dict[str, Any] = orjson.loads(found[seq])
    return event
