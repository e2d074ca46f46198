"""The judge is judged: a good history passes, and every rule has a history that it refuses."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import orjson
import pytest

from app.domain.capability import Effect
from app.domain.event_json import decode_event, encode_event
from app.domain.events import Event, EventType
from app.domain.plan import Plan
from app.domain.plan_json import plan_as_dict
from app.domain.snapshot import state_as_dict
from app.domain.state import RunState, apply
from tests.chaos.checker import Checker
from tests.chaos.history import (
    BadAnswer,
    BreakerRow,
    ClientLog,
    Connection,
    EventRow,
    Head,
    Post,
    RunRecord,
    SentSignal,
    SignalRow,
    Surroundings,
    ToolCall,
    digest,
)
from tests.chaos.rules import RUN_RULES
from tests.plans import RUN_ID, START_MS, plan_node, plan_of

PLAN = plan_of(plan_node("A"), plan_node("B", "A", effect=Effect.AT_MOST_ONCE))
ERROR = {"code": "x", "message": "x"}
OUTPUT = {"output": {}, "duration_ms": 1.0}
SIGNAL = "0190b1c2-0000-7000-8000-0000000000aa"

Written = tuple[EventType, str | None, int | None, dict[str, Any]]

GOOD: list[Written] = [
    (EventType.RUN_QUEUED, None, None, {"objective": "x", "lane": "standard"}),
    (EventType.RUN_START, None, None, {}),
    (EventType.PLAN_GENERATED, None, None, {"version": 1, "author": "caller", "node_count": 2}),
    (EventType.NODE_START, "A", 1, {"capability_id": "util.echo"}),
    (
        *(EventType.RUN_RECOVERED, None, None),
        {"epoch": 2, "from_worker": "host:77:abc", "called_again": ["A"]},
    ),
    (EventType.NODE_DONE, "A", 1, OUTPUT),
    (EventType.NODE_START, "B", 1, {"capability_id": "util.echo"}),
    (EventType.NODE_BLOCKED, "B", 1, {"reason": "unknown_outcome", "error": ERROR}),
    (
        *(EventType.RUN_PAUSED, None, None),
        {"status": "awaiting_human", "reason": "unknown_outcome", "nodes": ["B"]},
    ),
    (
        *(EventType.RUN_RESUMED, None, None),
        {"signal_id": SIGNAL, "operator": None, "note": None, "nodes": {"B": "retry"}},
    ),
    (EventType.NODE_RETRY, "B", 1, {"delay_ms": 0, "round": 2, "error": ERROR}),
    (EventType.NODE_START, "B", 2, {"capability_id": "util.echo", "round": 2}),
    (EventType.NODE_DONE, "B", 2, OUTPUT),
    (EventType.RUN_DONE, None, None, {"output": {}}),
]
SNAPSHOT_AT = 9


def rows_of(written: list[Written]) -> list[EventRow]:
    """The events as rows of the journal."""
    rows = []
    for seq, (kind, node_id, attempt, data) in enumerate(written, 1):
        event = Event(kind, data, node_id=node_id, attempt=attempt, seq=seq, ts=START_MS + seq)
        body = encode_event(event, RUN_ID, "0" * 32)
        rows.append(EventRow(seq, kind.value, node_id, attempt, body))
    return rows


def snapshot_of(rows: list[EventRow], seq: int) -> bytes:
    state = RunState(RUN_ID, {1: PLAN}, queued_at=START_MS)
    for row in rows[:seq]:
        apply(state, decode_event(row.body))
    return orjson.dumps(state_as_dict(state))


def call(node_id: str, attempt: int, round_: int, begin: float, answer: str = "ok") -> ToolCall:
    key = f"{RUN_ID}:{node_id}:{round_}"
    return ToolCall(RUN_ID, node_id, attempt, key, begin, begin + 1, answer)


def good(written: list[Written] | None = None, **changes: Any) -> RunRecord:
    """A run with a take-over, a question to a human and two streams, in which all is well."""
    rows = rows_of(written or GOOD)
    seqs = [row.seq for row in rows]
    run = RunRecord(
        run_id=RUN_ID,
        head=Head(3, len(rows), "done"),
        rows=rows,
        plans={1: plan_as_dict(PLAN)},
        snapshots=[(SNAPSHOT_AT, snapshot_of(rows, SNAPSHOT_AT))] if written is None else [],
        signals=[SignalRow(SIGNAL, "resume", "k", "applied")],
        calls=[call("A", 1, 1, 1.0), call("A", 1, 1, 3.0), call("B", 1, 1, 5.0, "reset")],
        frames={row.seq: digest(row.body) for row in rows},
        connections=[
            Connection(RUN_ID, 0, array("l", seqs[:5])),
            Connection(RUN_ID, 5, array("l", seqs[5:]), "end", saw_terminal=True),
            Connection(RUN_ID, len(rows), ended="204"),
        ],
        sightings=[(1, 1), (1, 4), (2, 4), (2, 8)],
    )
    for name, value in changes.items():
        setattr(run, name, value)
    return run


def edited(*edits: tuple[int, Written | None]) -> list[Written]:
    """The good journal with some events (by seq) replaced, or left out."""
    found = dict(enumerate(GOOD, 1))
    for seq, written in edits:
        if written is None:
            del found[seq]
        else:
            found[seq] = written
    return list(found.values())


def inserted(after: int, *written: Written) -> list[Written]:
    return [*GOOD[:after], *written, *GOOD[after:]]


def without(seq: int) -> RunRecord:
    run = good()
    run.rows = [row for row in run.rows if row.seq != seq]
    return run


def other_body(seq: int) -> RunRecord:
    run = good()
    run.frames[seq] = digest(b"something else")
    return run


def stream(after: int, *seqs: int, **more: Any) -> RunRecord:
    return good(connections=[Connection(RUN_ID, after, array("l", seqs), **more)])


def spoilt_snapshot() -> RunRecord:
    return good(snapshots=[(SNAPSHOT_AT, snapshot_of(rows_of(GOOD), SNAPSHOT_AT - 2))])


def done(node_id: str, attempt: int, **data: Any) -> Written:
    return (EventType.NODE_DONE, node_id, attempt, {**OUTPUT, **data})


def start(node_id: str, attempt: int) -> Written:
    return (EventType.NODE_START, node_id, attempt, {"capability_id": "util.echo"})


def with_tool(node_id: str) -> dict[str, Any]:
    plan = plan_as_dict(PLAN)
    nodes = [
        {**node, "capability_id": "chaos.pure_0"} if node["id"] == node_id else node
        for node in plan["nodes"]
    ]
    return {**plan, "nodes": nodes}


def replanned(plan: Plan, *between: Written) -> RunRecord:
    """A run that gets this plan when A is done, with events after that was asked for."""
    triggered = {"policy_id": "p", "trigger": "on_node_complete", "node_id": "A"}
    written = inserted(
        6,
        (EventType.POLICY_TRIGGERED, None, None, triggered),
        *between,
        (EventType.PLAN_GENERATED, None, None, {"version": 2, "author": "replan", "node_count": 2}),
        (EventType.PLAN_UPDATED, None, None, {"version": 2}),
    )
    return good(written, plans={1: plan_as_dict(PLAN), 2: plan_as_dict(plan)})


RESUMED = GOOD[9]
CANCELLED: Written = (EventType.RUN_CANCELLED, None, None, {"by": None})

BAD_RUNS: dict[str, list[Callable[[], RunRecord]]] = {
    "I1 numbered": [
        lambda: without(4),
        lambda: good(head=Head(3, 99, "done")),
        lambda: good(rows=[*rows_of(GOOD), rows_of(GOOD)[-1]]),
        lambda: good(rows=[replace(row, node_id="Z") for row in rows_of(GOOD)]),
    ],
    "I2 shown is kept": [
        lambda: other_body(3),
        lambda: good(frames={99: digest(b"shown before it was durable")}),
    ],
    "I3 resumed in order": [
        lambda: stream(5, 5, 6, 7),
        lambda: stream(5, 7, 8),
        lambda: stream(0, 1, 2, 2),
        lambda: stream(0, 1, 2, saw_terminal=True),
        lambda: stream(0, 1, 2, gaps=1),
        lambda: stream(3, ended="204"),
    ],
    "I4 one result": [
        lambda: good(inserted(6, done("A", 1))),
        lambda: good(inserted(6, start("A", 2))),
    ],
    "I4 attempts in order": [
        lambda: good(edited((12, start("B", 3)))),
        lambda: good(inserted(4, start("A", 1))),
        lambda: good(edited((7, None))),
    ],
    "I4 results were given": [
        lambda: good(plans={1: with_tool("A")}, calls=[]),
        lambda: good(plans={1: with_tool("A")}, calls=[call("A", 1, 1, 1.0, "reset")]),
    ],
    "I5 epochs grow": [
        lambda: good(sightings=[(2, 4), (1, 5)]),
        lambda: good(sightings=[(1, 6), (2, 4)]),
        lambda: good(head=Head(1, len(GOOD), "done")),
        lambda: good(inserted(5, GOOD[4])),
    ],
    "I9 one end": [
        lambda: good([*GOOD, GOOD[-1]]),
        lambda: good([*GOOD, CANCELLED]),
        lambda: good(inserted(6, GOOD[-1])),
        lambda: good(head=Head(3, len(GOOD), "cancelled")),
        lambda: good(head=Head(3, len(GOOD), "done", owner="host:1:a")),
        lambda: good(GOOD[:-1], head=Head(3, len(GOOD) - 1, "done")),
    ],
    "I10 folds": [spoilt_snapshot, lambda: good(head=Head(3, len(GOOD), "failed"))],
    "I11 plans only grow": [
        lambda: good(plans={}),
        lambda: good(plans={2: plan_as_dict(PLAN)}),
        lambda: good(inserted(3, GOOD[2])),
        lambda: good(inserted(6, (EventType.PLAN_UPDATED, None, None, {"version": 2}))),
        lambda: good(edited((7, start("Z", 1)))),
    ],
    "I11 replans keep": [
        lambda: replanned(plan_of(plan_node("A", effect=Effect.AT_MOST_ONCE), PLAN.nodes["B"])),
        lambda: replanned(plan_of(plan_node("B", effect=Effect.AT_MOST_ONCE))),
        lambda: replanned(PLAN, start("B", 1)),
    ],
    "I12 parents first": [
        lambda: good(edited((6, start("B", 1)), (7, done("A", 1)))),
        lambda: good(calls=[call("A", 1, 1, 3.0), call("B", 1, 1, 2.0)]),
    ],
    "I13 called as recorded": [
        lambda: good(calls=[call("A", 2, 1, 1.0)]),
        lambda: good(calls=[call("B", 2, 1, 1.0)]),
        lambda: good(calls=[replace(call("A", 1, 1, 1.0), key="another")]),
    ],
    "I13 at most once": [
        lambda: good(calls=[call("B", 1, 1, 5.0), call("B", 1, 1, 7.0)]),
        lambda: good(calls=[call("B", 1, 1, 5.0), call("B", 2, 1, 7.0)]),
    ],
    "I13 retried on purpose": [
        lambda: good(edited((10, (*RESUMED[:3], {"signal_id": SIGNAL, "nodes": {"B": "done"}})))),
        lambda: good(inserted(12, GOOD[10])),
    ],
    "I14 signals once": [
        lambda: good(edited((10, (*RESUMED[:3], {})))),
        lambda: good([*GOOD[:11], GOOD[8], RESUMED, *GOOD[11:]]),
        lambda: good(signals=[SignalRow(SIGNAL, "resume", "k", "discarded: late")]),
        lambda: good(signals=[]),
        lambda: good(signals=[SignalRow(SIGNAL, "resume", "k", "applied")] * 2),
        lambda: good(
            signals=[
                SignalRow(SIGNAL, "resume", None, "applied"),
                SignalRow("another", "cancel", None, None),
            ]
        ),
        lambda: good(inserted(9, start("B", 2))),
        lambda: good(inserted(6, (*RESUMED[:3], {"signal_id": "another"}))),
    ],
}


def around(**changes: Any) -> Surroundings:
    found = Surroundings(
        key_of_run={"k1": RUN_ID},
        runs_of_label={"k1": [RUN_ID]},
        disturbed={77},
        signal_ids={SIGNAL},
    )
    for name, value in changes.items():
        setattr(found, name, value)
    return found


def log(**changes: Any) -> ClientLog:
    found = ClientLog(
        posts={"k1": Post("k1", "chain", [RUN_ID, RUN_ID], [202])},
        signals=[SentSignal(RUN_ID, "resume", "k", SIGNAL)],
    )
    for name, value in changes.items():
        setattr(found, name, value)
    return found


def rules_broken(
    run: RunRecord | None = None, client: ClientLog | None = None, world: Surroundings | None = None
) -> set[str]:
    checker = Checker(client or log(), world or around())
    checker.judge(run or good())
    return {violation.rule for violation in checker.finish()}


def test_a_good_history_passes() -> None:
    assert rules_broken() == set()


def test_a_replan_that_keeps_what_is_done_passes() -> None:
    found = {name: list(rule(replanned(PLAN))) for name, rule in RUN_RULES.items()}
    assert found["I11 replans keep"] == found["I11 plans only grow"] == []


def test_every_rule_of_a_run_has_bad_histories() -> None:
    assert BAD_RUNS.keys() == RUN_RULES.keys()


@pytest.mark.parametrize(
    ("rule", "number"), [(rule, n) for rule, bad in BAD_RUNS.items() for n in range(len(bad))]
)
def test_a_bad_run_is_refused(rule: str, number: int) -> None:
    assert list(RUN_RULES[rule](BAD_RUNS[rule][number]()))


@pytest.mark.parametrize("rule", RUN_RULES)
def test_a_good_run_breaks_no_rule(rule: str) -> None:
    assert list(RUN_RULES[rule](good())) == []


def test_a_run_that_can_not_be_read_is_a_violation() -> None:
    broken = good(rows=[EventRow(1, "RUN_QUEUED", None, None, b"no JSON")])
    assert "I1 numbered" in rules_broken(broken)


FAILED: Written = (
    *(EventType.RUN_FAILED, None, None),
    {
        "error": {
            "code": "poison_run",
            "message": "x",
            "lost_workers": ["host:75:a", "host:76:b", "host:77:c"],
        },
        "failed_nodes": [],
    },
)


def unfinished(status: str) -> RunRecord:
    return good(GOOD[:9], head=Head(3, 9, status), connections=[], signals=[], calls=[])


def cancelled_at(at: float) -> ClientLog:
    return log(signals=[SentSignal(RUN_ID, "cancel", "k", SIGNAL, at)])


TRIPPED: Written = (
    *(EventType.BREAKER_TRIPPED, None, None),
    {"scope": "t::h", "generation": 7, "cooldown_s": 1.0, "degraded": False},
)
ANNOUNCED = BreakerRow("t::h", "", 7, "tripped", RUN_ID)

BAD_WORLDS: dict[str, list[Callable[[], set[str]]]] = {
    "I6 accepted exists": [
        lambda: rules_broken(client=log(posts={"k1": Post("k1", "chain", ["lost"])}))
    ],
    "I7 one run a key": [
        lambda: rules_broken(world=around(runs_of_label={"k1": [RUN_ID, "another"]})),
        lambda: rules_broken(client=log(posts={"k1": Post("k1", "chain", [RUN_ID, "another"])})),
        lambda: rules_broken(world=around(key_of_run={"k1": "another"})),
        lambda: rules_broken(world=around(key_of_run={})),
        lambda: rules_broken(world=around(runs_of_label={})),
    ],
    "I1 never changes": [lambda: rules_broken(client=log(changed=[(RUN_ID, 4)]))],
    "I14 signals kept": [
        lambda: rules_broken(world=around(signal_ids=set())),
        lambda: rules_broken(
            client=log(
                signals=[
                    SentSignal(RUN_ID, "resume", "k", SIGNAL),
                    SentSignal(RUN_ID, "resume", "k", "another"),
                ]
            ),
            world=around(signal_ids={SIGNAL, "another"}),
        ),
    ],
    "I14 cancel reaches": [
        lambda: rules_broken(
            good(calls=[call("A", 1, 1, 20.0), call("B", 1, 1, 22.0)]), client=cancelled_at(10.0)
        )
    ],
    "I16 answers": [
        lambda: rules_broken(client=log(bad_answers=[BadAnswer("POST", "/v1/runs", 500, "")]))
    ],
    "I15 no early steal": [lambda: rules_broken(world=around(disturbed={1}))],
    "I19 poison": [
        lambda: rules_broken(world=around(expected_poison={RUN_ID})),
        lambda: rules_broken(good([*GOOD[:-1], FAILED], head=Head(3, len(GOOD), "failed"))),
        lambda: rules_broken(good([*GOOD[:5], FAILED], head=Head(4, 6, "failed"))),
        lambda: rules_broken(
            good([*GOOD[:5], FAILED], head=Head(3, 6, "failed")), world=around(struck={77})
        ),
        lambda: rules_broken(
            good([*GOOD[:5], FAILED], calls=[call("A", 1, 1, 1.0)] * 4),
            world=around(expected_poison={RUN_ID}),
        ),
    ],
    "I22 announced once": [
        lambda: rules_broken(
            good(inserted(6, TRIPPED, TRIPPED)), world=around(announced=[ANNOUNCED])
        ),
        lambda: rules_broken(good(inserted(6, TRIPPED))),
        lambda: rules_broken(world=around(announced=[ANNOUNCED])),
        lambda: rules_broken(
            good(inserted(6, TRIPPED)), world=around(announced=[ANNOUNCED, ANNOUNCED])
        ),
    ],
    "I26 progress": [
        lambda: rules_broken(unfinished("running")),
        lambda: rules_broken(unfinished("queued"), world=around(may_wait={RUN_ID})),
        lambda: rules_broken(unfinished("awaiting_human")),
    ],
}


@pytest.mark.parametrize(
    ("rule", "number"), [(rule, n) for rule, bad in BAD_WORLDS.items() for n in range(len(bad))]
)
def test_a_bad_world_is_refused(rule: str, number: int) -> None:
    assert rule in BAD_WORLDS[rule][number]()


def test_a_cancel_that_came_at_the_end_passes() -> None:
    run = good(calls=[call("A", 1, 1, 20.0), call("B", 1, 1, 22.0)])
    assert "I14 cancel reaches" not in rules_broken(run, cancelled_at(20.5))


def test_what_waits_on_purpose_and_what_is_announced_properly_passes() -> None:
    waiting = around(may_wait={RUN_ID})
    assert "I26 progress" not in rules_broken(unfinished("awaiting_human"), world=waiting)
    announced = good(inserted(6, TRIPPED))
    assert "I22 announced once" not in rules_broken(announced, world=around(announced=[ANNOUNCED]))
    unlucky = good([*GOOD[:5], FAILED], head=Head(4, 6, "failed"))
    assert "I19 poison" not in rules_broken(unlucky, world=around(struck={77}))
    poisoned = good([*GOOD[:-1], FAILED], head=Head(3, len(GOOD), "failed"))
    assert "I19 poison" not in rules_broken(poisoned, world=around(expected_poison={RUN_ID}))
