"""The judge: reads only client logs, the tools' ledger and the database, and names what is broken.

Fed run by run, so that half a million events need not be in memory at once; `finish` judges what
concerns more than one run. `rules.py` holds the rules of a single run. A rule that can not read a
run at all is a violation as well: a checker that crashes has found something.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.chaos.history import STATUS_OF_END, WAITING, ClientLog, RunRecord, Surroundings
from tests.chaos.rules import POISON, PROGRESS, RUN_RULES

BREAKER_EVENTS = {
    "BREAKER_TRIPPED": "tripped",
    "BREAKER_HALF_OPEN": "half_open",
    "BREAKER_CLOSED": "closed",
}
SHOWN_MAX = 40
CANCEL_S = 3.0
"""More than a worker takes to hear of a signal, whatever happens to it."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken promise."""

    rule: str
    run_id: str
    what: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.run_id or '-'}: {self.what}"


@dataclass
class Checker:
    """`judge` every run, then `finish` once; `violations` and `counts` are the result."""

    log: ClientLog
    around: Surroundings
    violations: list[Violation] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    _seen: set[str] = field(default_factory=set)
    _told: Counter[tuple[str, bool, int, str]] = field(default_factory=Counter)

    def judge(self, run: RunRecord) -> None:
        """All rules that concern this run alone, and its share of the others."""
        self._seen.add(run.run_id)
        rules = {
            **RUN_RULES,
            "I14 cancel reaches": self._cancels,
            "I19 poison": self._poison,
            "I26 progress": self._progress,
            "I15 no early steal": self._steals,
            "counted": self._count,
        }
        for name, rule in rules.items():
            try:
                self._add(name, run.run_id, rule(run))
            except Exception as error:
                self._add(name, run.run_id, iter([f"can not be judged: {error!r}"]))

    def finish(self) -> list[Violation]:
        """What needs to know all runs. Returns all violations."""
        self._add("I6 accepted exists", "", self._accepted())
        self._add("I7 one run a key", "", self._keys())
        self._add("I1 never changes", "", self._changes())
        self._add("I14 signals kept", "", self._signals())
        self._add("I16 answers", "", self._answers())
        self._add("I22 announced once", "", self._announcements())
        return self.violations

    def _add(self, rule: str, run_id: str, found: Iterator[str]) -> None:
        self.violations += [Violation(rule, run_id, what) for what in found]

    def _count(self, run: RunRecord) -> Iterator[str]:
        yield from ()
        counts = self.counts
        counts["runs"] += 1
        counts["events"] += len(run.rows)
        counts[f"runs {run.head.status}"] += 1
        counts["tool calls"] += len(run.calls)
        counts["snapshots"] += len(run.snapshots)
        counts["signals"] += len(run.signals)
        counts["frames"] += sum(len(connection.seqs) for connection in run.connections)
        counts["reconnects"] += max(0, len(run.connections) - 1)
        for row in run.rows:
            if row.type == "RUN_RECOVERED":
                counts["take-overs" if row.data["from_worker"] else "hand-overs"] += 1
            elif row.type == "PLAN_UPDATED":
                counts["replans"] += 1
            elif row.type in BREAKER_EVENTS:
                data = row.data
                key = (data["scope"], data["degraded"], data["generation"])
                self._told[(*key, BREAKER_EVENTS[row.type])] += 1

    # --- of one run, in the light of what was done to the processes -------------------------------

    def _cancels(self, run: RunRecord) -> Iterator[str]:
        """I14: nothing is started long after a cancel was accepted.

        A call whose parent only answered then was decided on then. How late a call itself reaches
        its tool says nothing: its worker may have been frozen with the call in its hands.
        """
        if not (accepted := self._cancelled_at.get(run.run_id)):
            return
        nodes = run.nodes()
        late = {
            call.node_id
            for call in run.calls
            if call.end is not None and call.end > accepted + CANCEL_S
        }
        early = {
            call.node_id
            for call in run.calls
            if call.end is not None and call.end <= accepted + CANCEL_S
        }
        for call in run.calls:
            if call.begin <= accepted + CANCEL_S:
                continue
            if (late - early) & set(nodes.get(call.node_id, {"requires": []})["requires"]):
                yield f"{call.node_id} was called although a cancel had been accepted long before"

    @functools.cached_property
    def _cancelled_at(self) -> dict[str, float]:
        return {sent.run_id: sent.at for sent in self.log.signals if sent.kind == "cancel"}

    def _poison(self, run: RunRecord) -> Iterator[str]:
        """I19: what kills its worker is given up after 3 takes, and nothing else is."""
        last = run.rows[-1] if run.rows else None
        code = last.data["error"]["code"] if last and last.type == "RUN_FAILED" else None
        if run.run_id in self.around.expected_poison:
            if code != POISON:
                yield f"a run that kills its workers ended with {last and last.type} {code}"
            elif (deaths := _most_calls_of_an_attempt(run)) > 3:
                yield f"it was called again after it had killed a worker: {deaths} times in all"
        elif code == POISON and self._was_hit(run):
            self.counts["given up after 3 losses in a row"] += 1
        elif code == POISON:
            yield "a run that kills nobody was taken for poison"

    def _was_hit(self, run: RunRecord) -> bool:
        """Whether the suite hit one of the workers that the run lost since its last progress.

        Three losses in a row look like poison to everybody, and the first of them may have been by
        a neighbour that is poison. Each was followed by a claim, which moves the epoch on; who was
        about to give the run up may have been hit as well.
        """
        lost = run.rows[-1].data["error"]["lost_workers"]
        epoch = at_progress = 1
        for row in run.rows:
            if row.type == "RUN_RECOVERED":
                epoch = row.data["epoch"]
            elif row.type in PROGRESS:
                at_progress = epoch
        in_a_row = len(lost) >= 3 and run.head.epoch - at_progress >= 3
        return in_a_row and not self.around.struck.isdisjoint(map(_pid, lost))

    def _progress(self, run: RunRecord) -> Iterator[str]:
        """I26: in the end every run is over, or waits for a human who was never asked to answer."""
        status = run.head.status
        if status in STATUS_OF_END.values():
            return
        if status not in WAITING or run.run_id not in self.around.may_wait:
            last = run.rows[-1].type if run.rows else "nothing"
            yield f"still {status}, owner {run.head.owner}, last event {last}"

    def _steals(self, run: RunRecord) -> Iterator[str]:
        """I15, I16: only runs of workers that were killed, frozen or cut off are taken over."""
        if self.around.disturbed is None:
            return
        for row in run.rows:
            worker = row.data["from_worker"] if row.type == "RUN_RECOVERED" else None
            if worker and _pid(worker) not in self.around.disturbed:
                yield f"taken over at {row.seq} from {worker}, which nobody had touched"

    # --- over all runs ----------------------------------------------------------------------------

    def _accepted(self) -> Iterator[str]:
        for run_id in sorted(self.log.accepted - self._seen):
            yield f"{run_id} was accepted and does not exist"

    def _keys(self) -> Iterator[str]:
        """I7, I8: however often a POST was repeated, its key made one run, and always that."""
        around = self.around
        for post in self.log.posts.values():
            told = set(post.run_ids)
            made = around.runs_of_label.get(post.key, [])
            if len(told) > 1 or len(made) > 1:
                yield f"key {post.key} made {sorted(told | set(made))}"
            elif told and told != set(made):
                yield f"key {post.key} was answered with {told}, the database has {made}"
            if told and around.key_of_run.get(post.key) not in told:
                yield f"key {post.key} is stored for {around.key_of_run.get(post.key)}, not {told}"

    def _changes(self) -> Iterator[str]:
        for run_id, seq in self.log.changed:
            yield f"event {seq} of {run_id} was shown twice with different bytes"

    def _signals(self) -> Iterator[str]:
        """I14: a signal that was answered 202 is stored, and a repeated key is the same signal."""
        by_key: dict[tuple[str, str, str], set[str]] = {}
        for sent in self.log.signals:
            by_key.setdefault((sent.run_id, sent.kind, sent.key), set()).add(sent.signal_id)
        for key, ids in by_key.items():
            if len(ids) > 1:
                yield f"{key} was answered with several signals: {sorted(ids)}"
        stored = self.around.signal_ids
        for sent in self.log.signals:
            if sent.signal_id not in stored:
                yield f"{sent.kind} {sent.signal_id} of {sent.run_id} was accepted and is not kept"

    def _answers(self) -> Iterator[str]:
        for bad in self.log.bad_answers:
            yield f"{bad.method} {bad.path} answered {bad.status}: {bad.what}"

    def _announcements(self) -> Iterator[str]:
        """I22: an opening is told once over all journals, and every told one has its row."""
        rows: Counter[tuple[str, bool, int, str]] = Counter()
        in_journal: Counter[tuple[str, bool, int, str]] = Counter()
        for row in self.around.announced:
            key = (row.scope, row.worker_id != "", row.generation, row.kind)
            rows[key] += 1
            in_journal[key] += row.run_id is not None
        for key, count in rows.items():
            if count > 1 and not key[1]:  # breakers of single processes may share a number
                yield f"{key} has {count} rows"
            if self._told[key] != in_journal[key]:
                yield f"{key} is told {self._told[key]} times, its rows say {in_journal[key]}"
        for key in self._told.keys() - rows.keys():
            yield f"{key} is in a journal and has no row"
        self.counts["breaker openings"] = sum(key[3] == "tripped" for key in rows)


def _most_calls_of_an_attempt(run: RunRecord) -> int:
    """What the tools saw: how often the same attempt of a node was called at most."""
    return max(Counter((c.node_id, c.attempt) for c in run.calls).values(), default=0)


def _pid(worker_id: str | None) -> int:
    """`host:pid:random`; 0 for nobody."""
    return int(worker_id.split(":")[-2]) if worker_id else 0


def shown(violations: list[Violation]) -> str:
    """The violations as lines, the first of each rule first."""
    by_rule: dict[str, list[Violation]] = {}
    for violation in violations:
        by_rule.setdefault(violation.rule, []).append(violation)
    lines = [f"{rule}: {len(found)}" for rule, found in by_rule.items()]
    for depth in range(SHOWN_MAX):
        lines += [str(found[depth]) for found in by_rule.values() if depth < len(found)]
    return "\n".join(lines[: SHOWN_MAX + len(by_rule)])
