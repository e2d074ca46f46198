"""The invariants that can be judged run by run, from its journal, its frames and its tool calls.

Every rule is a generator over one `RunRecord` that yields a sentence for each violation. The names
in `RUN_RULES` are those of docs/RELIABILITY.md. Must never ask the service, nor share code with the
write path: only the fold of `app.domain` is used, to compare snapshots with the whole journal.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import orjson

from app.domain.event_json import decode_event
from app.domain.plan_json import plan_from_dict
from app.domain.snapshot import state_as_dict, state_from_dict
from app.domain.state import RunState, apply
from app.kit.ids import created_ms, parse_id
from tests.chaos.history import STATUS_OF_END, TERMINAL, RunRecord, digest

RESULTS = ("NODE_DONE", "NODE_FAILED")
OF_A_NODE = ("NODE_START", "NODE_DONE", "NODE_RETRY", "NODE_FAILED")
PROGRESS = ("NODE_DONE", "NODE_RETRY", "NODE_FAILED", "RUN_RESUMED")
OURS = "chaos."
POISON = "poison_run"


def numbered(run: RunRecord) -> Iterator[str]:
    """I1: seq is 1 … n, the head says n, and columns and bodies tell the same."""
    seqs = [row.seq for row in run.rows]
    if seqs != list(range(1, len(seqs) + 1)):
        yield f"seqs are not 1…{len(seqs)}: {_breaks(seqs)}"
    if run.head.seq != len(seqs):
        yield f"the head is at {run.head.seq}, the journal ends at {len(seqs)}"
    last_ts = ""
    for row in run.rows:
        body = orjson.loads(row.body)
        found = (body["seq"], body["run_id"], body["type"], body.get("node_id"))
        if found != (row.seq, run.run_id, row.type, row.node_id):
            yield f"row {row.seq} and its body tell different things"
        if body["ts"] < last_ts:
            yield f"time goes back at {row.seq}"
        last_ts = body["ts"]


def _breaks(seqs: list[int]) -> list[tuple[int, int]]:
    return [(a, b) for a, b in itertools.pairwise(seqs) if b != a + 1][:3]


def shown_is_kept(run: RunRecord) -> Iterator[str]:
    """I2: every frame that a client ever saw is in the journal, byte for byte."""
    kept = {row.seq: digest(row.body) for row in run.rows}
    for seq, mark in run.frames.items():
        if seq not in kept:
            yield f"event {seq} was shown and is not in the journal"
        elif kept[seq] != mark:
            yield f"event {seq} was shown with other bytes than those in the journal"


def resumed_in_order(run: RunRecord) -> Iterator[str]:
    """I3: a stream continues right behind its Last-Event-ID, without gaps and repetitions."""
    end = len(run.rows)
    for connection in run.connections:
        first = connection.after + 1
        expected = range(first, first + len(connection.seqs))
        if any(seq != want for seq, want in zip(connection.seqs, expected, strict=True)):
            yield f"a stream after {connection.after} gave {list(connection.seqs[:8])}…"
        if connection.gaps:
            yield f"a stream after {connection.after} told of a gap, but nothing was pruned"
        if connection.saw_terminal and (not connection.seqs or connection.seqs[-1] != end):
            yield f"a terminal event was shown at {connection.seqs[-1:]}, the journal ends at {end}"
        if connection.ended == "204" and connection.after != end:
            yield f"204 after {connection.after}, although the journal ends at {end}"


def one_result(run: RunRecord) -> Iterator[str]:
    """I4: one result an attempt, and nothing of a node after it is done."""
    done: set[str | None] = set()
    results: Counter[tuple[str | None, int | None]] = Counter()
    for row in run.rows:
        if row.type in OF_A_NODE and row.node_id in done:
            yield f"{row.type} of {row.node_id} at {row.seq}, after it was done"
        if row.type in ("NODE_DONE", "NODE_SKIPPED"):
            done.add(row.node_id)
        if row.type in RESULTS:
            results[row.node_id, row.attempt] += 1
    for (node_id, attempt), count in results.items():
        if count > 1:
            yield f"{count} results of attempt {attempt} of {node_id}"


def attempts_in_order(run: RunRecord) -> Iterator[str]:
    """I4: attempts of a node are started one after the other, each once, before its result."""
    started: dict[str | None, int] = {}
    is_begun = False
    for row in run.rows:
        if row.type == "NODE_START":
            is_begun = True
            if row.attempt != started.get(row.node_id, 0) + 1:
                yield f"attempt {row.attempt} of {row.node_id} after {started.get(row.node_id, 0)}"
            started[row.node_id] = row.attempt or 0
        elif row.type == "NODE_BLOCKED" and row.attempt and not is_begun:
            # A resumed run begins with what its predecessor left uncertain.
            started.setdefault(row.node_id, row.attempt)
        elif row.type in RESULTS and started.get(row.node_id, 0) != row.attempt:
            yield f"a result of attempt {row.attempt} of {row.node_id}, which was not under way"


def results_were_given(run: RunRecord) -> Iterator[str]:
    """I4: the result of a tool's node was the answer of that tool to that attempt."""
    nodes = run.nodes()
    answered = {(c.node_id, c.attempt) for c in run.calls if c.answer in ("ok", "slow")}
    called: set[tuple[str | None, int | None]] = set()
    for row in run.rows:
        if row.type == "NODE_START":
            called.add((row.node_id, row.attempt))
        elif row.type == "NODE_DONE" and "decided_by" not in row.data:
            attempt = (row.node_id, row.attempt)
            is_ours = nodes.get(row.node_id or "", {}).get("capability_id", "").startswith(OURS)
            if is_ours and attempt in called and attempt not in answered:
                yield f"{row.node_id} is done at {row.seq}, its tool never answered {row.attempt}"


def retried_on_purpose(run: RunRecord) -> Iterator[str]:
    """I13: a new round, which acts again, is begun by a human only."""
    asked: dict[str, str] = {}
    for row in run.rows:
        if row.type == "RUN_RESUMED":
            asked = row.data.get("nodes") or {}
        elif row.type == "NODE_RETRY" and row.data.get("round") is not None:
            decision = asked.pop(row.node_id or "", None)
            if decision != "retry":
                yield f"{row.node_id} begins a new round at {row.seq}, and nobody asked for it"


def epochs_grow(run: RunRecord) -> Iterator[str]:
    """I5: the fence only ever moves forward, in the journal and as an observer saw it."""
    last = 0
    for row in run.rows:
        if row.type == "RUN_RECOVERED":
            epoch = row.data["epoch"]
            if epoch <= last:
                yield f"take-over at {row.seq} under epoch {epoch}, after {last}"
            last = epoch
    if last > run.head.epoch:
        yield f"the head is at epoch {run.head.epoch}, a take-over had {last}"
    seen = [*run.sightings, (run.head.epoch, run.head.seq)]
    for before, after in itertools.pairwise(seen):
        if after[0] < before[0] or after[1] < before[1]:
            yield f"the head went back from (epoch, seq) {before} to {after}"


def one_end(run: RunRecord) -> Iterator[str]:
    """I9: one terminal event, it is the last, and the head says the same."""
    ends = [row for row in run.rows if row.type in TERMINAL]
    if len(ends) > 1:
        yield f"{len(ends)} terminal events: {[row.type for row in ends]}"
    if ends and ends[0].seq != run.rows[-1].seq:
        yield f"{ends[0].type} at {ends[0].seq} of {len(run.rows)}"
    status = STATUS_OF_END[ends[-1].type] if ends else None
    if status != run.head.status and (ends or run.head.status in STATUS_OF_END.values()):
        yield f"the journal ends with {ends[-1:] and ends[-1].type}, the head is {run.head.status}"
    if ends and run.head.owner is not None:
        yield f"finished, and still owned by {run.head.owner}"


def folds(run: RunRecord) -> Iterator[str]:
    """I10: the head is the fold of the journal, and so is every snapshot with its tail."""
    run_id = parse_id(run.run_id)
    assert run_id is not None, run.run_id
    plans = {version: plan_from_dict(body) for version, body in run.plans.items()}
    state = RunState(run.run_id, plans, queued_at=created_ms(run_id))
    resumed: list[tuple[int, RunState]] = []
    snapshots = dict(run.snapshots)
    for row in run.rows:
        event = decode_event(row.body)
        apply(state, event)
        for _, other in resumed:
            apply(other, event)
        if row.seq in snapshots:
            stored = state_from_dict(run.run_id, plans, orjson.loads(snapshots[row.seq]))
            if stored is not None:
                resumed.append((row.seq, stored))
                if _plain(stored) != _plain(state):
                    yield f"the snapshot at {row.seq} is not the fold up to there"
    for seq, other in resumed:
        if _plain(other) != _plain(state):
            yield f"snapshot {seq} and its tail do not give the fold of the whole journal"
    if state.status != run.head.status:
        yield f"the fold is {state.status}, the head is {run.head.status}"


def _plain(state: RunState) -> Any:
    return orjson.loads(orjson.dumps(state_as_dict(state)))


def plans_only_grow(run: RunRecord) -> Iterator[str]:
    """I11: plan versions are 1 … n, each announced once and each further one put in force once;
    results bind to one in force."""
    if sorted(run.plans) != list(range(1, len(run.plans) + 1)):
        yield f"plan versions {sorted(run.plans)}"
    announced, updated = (
        [row.data["version"] for row in run.rows if row.type == name]
        for name in ("PLAN_GENERATED", "PLAN_UPDATED")
    )
    if updated != [version for version in announced if version > 1]:
        yield f"plan versions {announced} are announced, {updated} put in force"
    if announced != sorted(set(announced)) or not set(announced) <= set(run.plans):
        yield f"plan versions {announced} are announced, {sorted(run.plans)} are stored"
    nodes = run.nodes()
    for row in run.rows:
        if row.type in OF_A_NODE and row.node_id not in nodes:
            yield f"{row.type} of {row.node_id} at {row.seq}, which no plan has"


def replans_keep(run: RunRecord) -> Iterator[str]:
    """I11: a new version has what is done as it was, and nothing starts while it is being made."""
    done: set[str] = set()
    is_asked_for = False
    for row in run.rows:
        if row.type in ("NODE_DONE", "NODE_SKIPPED"):
            done.add(row.node_id or "")
        elif row.type == "POLICY_TRIGGERED":
            is_asked_for = True
        elif row.type == "PLAN_REJECTED" and row.data["final"]:
            is_asked_for = False
        elif row.type == "PLAN_UPDATED":
            is_asked_for = False
            version = row.data["version"]
            before, after = (
                {node["id"]: node for node in run.plans[number]["nodes"]}
                for number in (version - 1, version)
            )
            changed = sorted(i for i in done & before.keys() if after.get(i) != before[i])
            if changed:
                yield f"version {version} at {row.seq} changes {changed}, which are done"
        elif row.type == "NODE_START" and is_asked_for:
            yield f"{row.node_id} starts at {row.seq} under a plan that was to be made anew"


def parents_first(run: RunRecord) -> Iterator[str]:
    """I12: a node starts when its parents' results are durable; tools saw the same order."""
    nodes = run.nodes()
    done: set[str | None] = set()
    by_hand: set[str | None] = set()
    for row in run.rows:
        if row.type in ("NODE_DONE", "NODE_SKIPPED"):
            done.add(row.node_id)
            if row.type == "NODE_SKIPPED" or "decided_by" in row.data:
                by_hand.add(row.node_id)
        elif row.type == "NODE_START" and row.node_id in nodes:
            missing = set(nodes[row.node_id]["requires"]) - done
            if missing:
                yield f"{row.node_id} starts at {row.seq} before {sorted(missing)} are done"
    yield from _seen_by_tools(run, nodes, by_hand)


def _seen_by_tools(
    run: RunRecord, nodes: dict[str, dict[str, Any]], by_hand: set[str | None]
) -> Iterator[str]:
    """The second source: a tool was called after the tools of its parents had answered."""
    answered: dict[str, float] = {}
    for call in run.calls:
        if call.answer in ("ok", "slow") and call.end is not None:
            answered[call.node_id] = min(answered.get(call.node_id, call.end), call.end)
    for call in run.calls:
        for parent in nodes.get(call.node_id, {"requires": []})["requires"]:
            if parent in answered and parent not in by_hand and call.begin < answered[parent]:
                yield f"the tool saw {call.node_id} before {parent} had answered"


def called_as_recorded(run: RunRecord) -> Iterator[str]:
    """I12, I13: no call without its durable NODE_START, and each under the key of its round."""
    rounds = {
        (row.node_id, row.attempt): row.data.get("round") or 1
        for row in run.rows
        if row.type == "NODE_START"
    }
    for call in run.calls:
        ordered = rounds.get((call.node_id, call.attempt))
        if ordered is None:
            yield f"a tool was called for attempt {call.attempt} of {call.node_id}, never started"
        elif call.key != f"{run.run_id}:{call.node_id}:{ordered}":
            yield f"attempt {call.attempt} of {call.node_id} was called under {call.key}"


def at_most_once(run: RunRecord) -> Iterator[str]:
    """I13: an `at_most_once` tool acts once a round, and is called once an attempt."""
    nodes = run.nodes()
    acted: Counter[str] = Counter()
    called: Counter[tuple[str, int]] = Counter()
    for call in run.calls:
        if nodes.get(call.node_id, {}).get("effect") == "at_most_once":
            acted[call.key] += call.acted
            called[call.node_id, call.attempt] += 1
    for key, count in acted.items():
        if count > 1:
            yield f"an at_most_once tool acted {count} times under {key}"
    for (node_id, attempt), count in called.items():
        if count > 1:
            yield f"attempt {attempt} of at_most_once {node_id} was called {count} times"


def signals_once(run: RunRecord) -> Iterator[str]:
    """I14: a signal acts once or is discarded; one key is one signal; a pause holds."""
    told = Counter(found for row in run.rows if (found := row.data.get("signal_id")) is not None)
    for signal in run.signals:
        count = told.pop(signal.signal_id, 0)
        if count > 1:
            yield f"{signal.kind} {signal.signal_id} was applied {count} times"
        if signal.outcome is None and run.head.status in STATUS_OF_END.values():
            yield f"{signal.kind} {signal.signal_id} has no outcome although the run is over"
        if signal.outcome == "applied" and not count:
            yield f"{signal.kind} {signal.signal_id} was applied, and no event tells of it"
        if count and signal.outcome != "applied":
            yield f"{signal.kind} {signal.signal_id} is in the journal, and {signal.outcome}"
    if told:
        yield f"the journal tells of signals that nobody sent: {sorted(told)}"
    keyed = Counter((s.kind, s.key) for s in run.signals if s.key is not None)
    for (kind, key), count in keyed.items():
        if count > 1:
            yield f"{count} signals {kind} under the key {key}"
    yield from _pauses(run)


def _pauses(run: RunRecord) -> Iterator[str]:
    """Nothing starts and nothing ends in DONE between RUN_PAUSED and RUN_RESUMED."""
    paused = False
    for row in run.rows:
        if row.type == "RUN_PAUSED":
            paused = True
        elif row.type == "RUN_RESUMED":
            if not paused:
                yield f"RUN_RESUMED at {row.seq} of a run that was not paused"
            paused = False
        elif paused and row.type in ("NODE_START", "RUN_DONE"):
            yield f"{row.type} at {row.seq} while the run was paused"


RunRule = Callable[[RunRecord], Iterator[str]]

RUN_RULES: dict[str, RunRule] = {
    "I1 numbered": numbered,
    "I2 shown is kept": shown_is_kept,
    "I3 resumed in order": resumed_in_order,
    "I4 one result": one_result,
    "I4 attempts in order": attempts_in_order,
    "I4 results were given": results_were_given,
    "I5 epochs grow": epochs_grow,
    "I9 one end": one_end,
    "I10 folds": folds,
    "I11 plans only grow": plans_only_grow,
    "I11 replans keep": replans_keep,
    "I12 parents first": parents_first,
    "I13 called as recorded": called_as_recorded,
    "I13 at most once": at_most_once,
    "I13 retried on purpose": retried_on_purpose,
    "I14 signals once": signals_once,
}
