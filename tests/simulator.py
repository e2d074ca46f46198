"""One run in virtual time: the pure core driven as the loop drives it, with everything against it.

A `Scenario` is a plan, the limits of the run and a seed; the seed alone decides how calls end, in
which order outcomes arrive, what other runs take of the slots, what operators say, and where the
process dies, so a failing seed is a bug report. A crash keeps any prefix of an append, which is
harsher than the journal: there an append is atomic. What is durable is kept as bytes.

`Watch` knows the rules and learns only from events: it checks each one before and after it is
applied. `Outside` is the far side's own list of calls; no crash reaches it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn
from uuid import UUID

import orjson

from app.domain.capability import Effect
from app.domain.decide import Decision, Failure, RunLimits, decide, judge_failure, recover
from app.domain.errors import Fault
from app.domain.events import TERMINAL_EVENTS, BlockReason, Event, EventType, error_data
from app.domain.plan import Plan, PlanNode
from app.domain.ready import ready_set
from app.domain.run import NODE_TRANSITIONS, RUN_TRANSITIONS, NodeStatus, RunStatus
from app.domain.snapshot import state_as_dict, state_from_dict
from app.domain.state import CapabilityKey, RunState, apply
from app.journal.frames import decode_event, encode_body
from app.orchestrator.signals import Signal, SignalKind, apply_resume
from tests.plans import RUN_ID, START_MS, exact, fold, key_of, plan_node, plan_of

TURNS_MAX = 2_000
CONCURRENCY: dict[str, int | None] = {"free": None, "rare": 1, "scarce": 2}
FAILURES = {
    failure.code: failure
    for failure in (
        Failure("refused", "Connection refused.", retryable=True),
        Failure("forbidden", "No.", retryable=False),
        Failure("timeout", "Too late.", retryable=True, unknown_outcome=True),
        Failure("strange", "What?", retryable=False, unknown_outcome=True),
        Failure(
            "invalid_output",
            "The output breaks the contract.",
            retryable=False,
            faults=(Fault("TYPE", "no text", "/a"),),
            scope="capability_output",
        ),
    )
}


@dataclass(frozen=True)
class Scenario:
    """A run and its troubles: `trouble` is the chance of a call, the others are those of a turn."""

    plan: Plan
    seed: int
    max_parallel: int = 16
    deadline_ms: int | None = None
    failures: tuple[str, ...] = tuple(FAILURES)
    trouble: float = 0.3
    crash: float = 0.05
    foreign: float = 0.3
    cancel: float = 0.0


def random_scenario(seed: int) -> Scenario:
    """The scenario of a seed, of up to twelve nodes."""
    rng = random.Random(seed)
    nodes: list[PlanNode] = []
    density = rng.random()
    for index in range(rng.randint(1, 12)):
        earlier = [node.id for node in nodes if rng.random() < density][:4]
        capability = rng.choice(list(CONCURRENCY))
        nodes.append(
            plan_node(
                f"n{index}",
                *earlier,
                effect=rng.choice(list(Effect)),
                max_attempts=rng.randint(1, 3),
                capability_id=capability,
                concurrency=CONCURRENCY[capability],
            )
        )
    return Scenario(
        plan=plan_of(*nodes),
        seed=seed,
        max_parallel=rng.randint(1, 5),
        deadline_ms=rng.choice([None, None, None, 50, 400, 2_000]),
        failures=rng.choice([tuple(FAILURES), ("refused", "timeout"), ("timeout",)]),
        trouble=rng.choice([0.0, 0.05, 0.2, 0.5, 0.9]),
        crash=rng.choice([0.0, 0.05, 0.3]),
        foreign=rng.choice([0.0, 0.5]),
        cancel=rng.choice([0.0, 0.0, 0.05]),
    )


@dataclass
class Call:
    """One call under way. `failure` None: it will return an output."""

    node: PlanNode
    attempt: int
    round: int
    ends_at: int
    failure: Failure | None


@dataclass
class Outside:
    """Every call that ever reached the far side, and those that had or may have had an effect."""

    calls: Counter[tuple[str, int]] = field(default_factory=Counter)
    effects: Counter[tuple[str, int]] = field(default_factory=Counter)

    def called(self, call: Call) -> None:
        self.calls[call.node.id, call.attempt] += 1
        if call.failure is None or call.failure.unknown_outcome:
            self.effects[call.node.id, call.round] += 1

    def check(self, plan: Plan, crashes: int) -> None:
        for (node_id, attempt), count in self.calls.items():
            once = plan.nodes[node_id].effect is Effect.AT_MOST_ONCE
            allowed = 1 if once else 1 + crashes
            assert count <= allowed, f"{node_id} attempt {attempt} was called {count} times"
        for (node_id, number), count in self.effects.items():
            if plan.nodes[node_id].effect is Effect.AT_MOST_ONCE:
                assert count == 1, f"{node_id} may have happened {count} times in round {number}"


class Watch:
    """The rules of a journal, kept in the plainest way: sets of ids, recounted at every event."""

    def __init__(self, scenario: Scenario, seen: Counter[str]) -> None:
        self.scenario = scenario
        self.plan = scenario.plan
        self.seen = seen
        self.seq = 0
        self.ended = False
        self.status: dict[str, NodeStatus] = {}
        self.attempt: Counter[str] = Counter()
        self.round: dict[str, int] = {}
        self.starts: Counter[tuple[str, int]] = Counter()
        self.given_up: Counter[str] = Counter()
        self.queued_at = 0
        self.paused_at: int | None = None
        self.paused_ms = 0

    @property
    def deadline(self) -> int | None:
        limit = self.scenario.deadline_ms
        return None if limit is None else self.queued_at + limit + self.paused_ms

    def apply(self, state: RunState, event: Event) -> None:
        """Fold the event into the state, between the checks before and after."""
        assert not self.ended, f"{event.type} after the end"
        assert event.seq == self.seq + 1
        self.seq = event.seq
        self.seen[event.type] += 1
        run_before = state.status
        nodes_before = {node_id: node.status for node_id, node in state.nodes.items()}
        if event.type is EventType.NODE_START:
            self._may_start(event)
        apply(state, event)
        self._learn(event, state)
        if state.status is not run_before:
            assert state.status in RUN_TRANSITIONS[run_before], (run_before, state.status)
        for node_id, before in nodes_before.items():
            after = state.nodes[node_id].status
            if after is not before:
                assert node_id == event.node_id, f"{event.type} changed {node_id}"
                assert after in NODE_TRANSITIONS[before], (node_id, before, after)
                self.seen[f"{before} to {after}"] += 1
        self._recount(state)

    def _may_start(self, event: Event) -> None:
        node = self.plan.nodes[event.node_id or ""]
        assert all(self.status[required] is NodeStatus.DONE for required in node.requires)
        assert self.status[node.id] is NodeStatus.PENDING
        running = [i for i, status in self.status.items() if status is NodeStatus.RUNNING]
        assert len(running) < self.scenario.max_parallel
        if node.concurrency is not None:
            same = [i for i in running if key_of(self.plan.nodes[i]) == key_of(node)]
            assert len(same) < node.concurrency
        assert event.attempt == self.attempt[node.id] + 1
        self.attempt[node.id] += 1
        number = self.round[node.id]
        assert event.data.get("round", 1) == number
        self.starts[node.id, number] += 1
        assert self.starts[node.id, number] <= node.max_attempts
        assert self.deadline is None or event.ts < self.deadline

    def _learn(self, event: Event, state: RunState) -> None:
        match event.type:
            case EventType.RUN_QUEUED:
                self.queued_at = event.ts
            case EventType.PLAN_GENERATED:
                self.status = dict.fromkeys(self.plan.nodes, NodeStatus.PENDING)
                self.round = dict.fromkeys(self.plan.nodes, 1)
            case EventType.RUN_PAUSED:
                self.paused_at = event.ts
            case EventType.RUN_RESUMED:
                assert self.paused_at is not None
                self.paused_ms += event.ts - self.paused_at
                self.paused_at = None
        self.ended = event.type in TERMINAL_EVENTS
        assert state.status.is_terminal is self.ended
        if event.node_id is not None:
            self._learn_node(event, event.node_id)

    def _learn_node(self, event: Event, node_id: str) -> None:
        match event.type:
            case EventType.NODE_START:
                self.status[node_id] = NodeStatus.RUNNING
            case EventType.NODE_DONE:
                self.status[node_id] = NodeStatus.DONE
            case EventType.NODE_FAILED:
                self.status[node_id] = NodeStatus.FAILED
            case EventType.NODE_RETRY:
                self.status[node_id] = NodeStatus.PENDING
                self.round[node_id] = event.data.get("round", self.round[node_id])
            case EventType.NODE_BLOCKED:
                self.status[node_id] = NodeStatus.BLOCKED
                if event.data["reason"] == BlockReason.DEPENDENCY_FAILED:
                    self.given_up[node_id] += 1
                    assert self.given_up[node_id] == 1, f"{node_id} was blocked twice"
                    assert self._lost(node_id), f"{node_id} depends on no failed node"

    def _lost(self, node_id: str) -> bool:
        """Whether the node is right below one that failed or was given up."""
        return any(
            self.status[required] is NodeStatus.FAILED or self.given_up[required]
            for required in self.plan.nodes[node_id].requires
        )

    def _recount(self, state: RunState) -> None:
        """What `apply` counts along is what a look at the whole plan says."""
        nodes = state.nodes
        assert {node_id: node.status for node_id, node in nodes.items()} == self.status
        assert all(nodes[node_id].round == number for node_id, number in self.round.items())
        pending = {i for i, status in self.status.items() if status is NodeStatus.PENDING}
        unmet = {
            node_id: sum(
                self.status[required] is not NodeStatus.DONE
                for required in self.plan.nodes[node_id].requires
            )
            for node_id in self.status
        }
        assert {node_id: node.unmet for node_id, node in nodes.items()} == unmet
        waiting = {i: at for i, node in nodes.items() if (at := node.retry_at) is not None}
        assert state.waiting == waiting
        assert waiting.keys() <= pending
        ready = ready_set(state)
        assert len(ready) == len(set(ready))
        assert set(ready) == {i for i in pending if unmet[i] == 0 and i not in waiting}
        assert set(state.to_block) == {i for i in pending if self._lost(i)}
        for queue, status in (
            (state.running, NodeStatus.RUNNING),
            (state.failed, NodeStatus.FAILED),
            (state.blocked, NodeStatus.BLOCKED),
        ):
            assert set(queue) == {i for i, found in self.status.items() if found is status}
        assert state.done_count == list(self.status.values()).count(NodeStatus.DONE)
        for key, limited in state.ready_limited.items():
            assert limited, f"an empty queue of {key} is left"
            assert all(key_of(self.plan.nodes[node_id]) == key for node_id in limited)
        assert state.paused_ms == self.paused_ms
        assert state.paused_at == self.paused_at

    def check_end(self, state: RunState) -> None:
        """What a run that is finished, or waits for a human, must have come to."""
        below_failed, below_unknown = set[str](), set[str]()
        for node in self.plan.nodes.values():
            for found, reason in (
                (below_failed, NodeStatus.FAILED),
                (below_unknown, NodeStatus.BLOCKED),
            ):
                if any(
                    required in found
                    or (self.status.get(required) is reason and not self.given_up[required])
                    for required in node.requires
                ):
                    found.add(node.id)
        if state.status is RunStatus.DONE:
            assert set(self.status.values()) <= {NodeStatus.DONE}
        elif state.status is RunStatus.AWAITING_HUMAN:
            assert state.unknown_outcomes()
            assert not state.failed
        self._check_nodes(state, below_failed, below_unknown)

    def _check_nodes(
        self, state: RunState, below_failed: set[str], below_unknown: set[str]
    ) -> None:
        """Everything that could go on went on; what is lost was said to be lost, once."""
        for node_id, status in self.status.items():
            if node_id in below_failed:
                assert status is NodeStatus.BLOCKED
                assert self.given_up[node_id] == 1
            elif node_id in below_unknown:
                assert status is NodeStatus.PENDING
            elif status is NodeStatus.BLOCKED:
                assert state.nodes[node_id].reason == BlockReason.UNKNOWN_OUTCOME
            else:
                assert status in (NodeStatus.DONE, NodeStatus.FAILED)


class _Crash(Exception):
    """The process dies here."""


class Simulation:
    """A run from acceptance to its end, or to a human who does not come."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.plan = scenario.plan
        self.plans = {scenario.plan.version: scenario.plan}
        self.rng = random.Random(scenario.seed)
        self.seen: Counter[str] = Counter()
        self.outside = Outside()
        self.now = START_MS
        self.crashes = 0
        self.orders_left = 4
        self.durable: list[bytes] = []
        self.last_ts = 0
        self._begin()

    def _begin(self) -> None:
        """A new process: it knows nothing but the plan rows."""
        self.state = RunState(RUN_ID, self.plans)
        self.watch = Watch(self.scenario, self.seen)
        self.snapshots: list[bytes] = []
        self.calls: list[Call] = []
        self.arrived: list[Call] = []
        self.recall: list[str] = []
        self.opening: list[Event] = []
        self.signals: list[Signal] = []
        self.foreign: Counter[CapabilityKey] = Counter()

    # The loop

    def run(self) -> Simulation:
        """Drive the run to where it can not go on by itself, then check the whole of it."""
        self.opening = self._take_up()
        for _ in range(TURNS_MAX):
            try:
                if self.state.status is RunStatus.AWAITING_HUMAN and not self._operator_comes():
                    break
                wake_at = self._turn()
                if self.state.status.is_terminal:
                    break
                if self.state.status is RunStatus.RUNNING:
                    self._wait(wake_at)
            except _Crash:
                self._restart()
        else:
            self._stuck(f"no end after {TURNS_MAX} turns")
        self._check_all()
        return self

    def _turn(self) -> int | None:
        """One pass of the loop: take, apply, decide, record, perform. Says when to wake."""
        step: list[Event] = []
        self._note(step, self.opening)
        self.opening = []
        arrived, self.arrived = self.arrived, []
        for call in arrived:
            self._note(step, self._outcome(call))
        signals, self.signals = self.signals, []
        for signal in signals:
            self._note(step, self._consume(signal))
        to_call, wake_at = self._decide(step)
        self._record(step)
        for node_id in to_call:
            self._perform(node_id)
        self._crash_maybe("after the calls")
        return wake_at

    def _decide(self, step: list[Event]) -> tuple[list[str], int | None]:
        if self.state.status is not RunStatus.RUNNING:
            return [], None
        if self.state.plan is None:
            self._note(step, [self._plan_generated()])
        if self.rng.random() < self.scenario.cancel:
            self._note(step, [Event(EventType.RUN_CANCELLED, {"by": "an operator"})])
            return [], None
        to_call, self.recall = self.recall, []
        free = self._free_slots()
        limits = RunLimits(self.scenario.max_parallel, self.scenario.deadline_ms, free)
        decision = decide(self.state, self.now, limits)
        self._check_decision(decision, free)
        self._note(step, decision.events)
        to_call += [
            event.node_id or "" for event in decision.events if event.type is EventType.NODE_START
        ]
        if decision.complete:
            self._note(step, self._complete())
        return to_call, decision.wake_at

    def _note(self, step: list[Event], events: list[Event]) -> None:
        for event in events:
            self.last_ts = max(self.now, self.last_ts)
            event.seq, event.ts = self.state.seq + 1, self.last_ts
            self._apply(event)
        step += events

    def _apply(self, event: Event) -> None:
        """Fold one event, and take a snapshot behind it that must be the state itself."""
        self.watch.apply(self.state, event)
        self.snapshots.append(orjson.dumps(state_as_dict(self.state)))
        restored = state_from_dict(RUN_ID, self.plans, orjson.loads(self.snapshots[-1]))
        assert restored is not None
        assert exact(restored) == exact(self.state)

    def _record(self, step: list[Event]) -> None:
        """Make the step durable; a crash keeps some prefix of it."""
        bodies = [encode_body(event, RUN_ID, "") for event in step]
        if self.rng.random() < self.scenario.crash:
            self.durable += bodies[: self.rng.randint(0, len(bodies))]
            self.seen["crash in the append"] += 1
            raise _Crash
        self.durable += bodies
        self._crash_maybe("before the calls")

    def _crash_maybe(self, where: str) -> None:
        if not self.state.status.is_terminal and self.rng.random() < self.scenario.crash:
            self.seen[f"crash {where}"] += 1
            raise _Crash

    def _wait(self, wake_at: int | None) -> None:
        """Let time pass until outcomes arrive, a timer rings or another run gives slots back."""
        assert wake_at is None or wake_at > self.now, "the loop would spin"
        if not self.calls and wake_at is None:
            self._wait_for_slots()
            return
        times = sorted(call.ends_at for call in self.calls)
        if times:
            until = times[self.rng.randrange(len(times))]
            self.now = max(self.now, until if wake_at is None else min(until, wake_at))
        elif wake_at is not None:
            self.now = wake_at + self.rng.choice([0, 0, 7])
        self.arrived = [call for call in self.calls if call.ends_at <= self.now]
        self.calls = [call for call in self.calls if call.ends_at > self.now]
        self.rng.shuffle(self.arrived)
        if self.rng.random() < 0.05:
            self.signals.append(self._signal({}, self.state.seq))

    def _wait_for_slots(self) -> None:
        """Nothing of our own is under way: only slots that others hold may explain that."""
        limits = RunLimits(self.scenario.max_parallel, self.scenario.deadline_ms, self._limited())
        started = [e for e in decide(self.state, self.now, limits).events if e.node_id]
        if not any(self.foreign.values()) or not started:
            self._stuck("nothing runs, nothing rings, and free slots would not help")
        self.seen["waited for a slot"] += 1
        self.foreign.clear()

    def _stuck(self, why: str) -> NoReturn:
        raise AssertionError(f"seed {self.scenario.seed} is stuck: {why}: {self.state}")

    # Calls

    def _perform(self, node_id: str) -> None:
        node, state = self.plan.nodes[node_id], self.state.nodes[node_id]
        assert state.status is NodeStatus.RUNNING
        assert node_id not in [call.node.id for call in self.calls]
        ends_at = self.now + self.rng.choice([0, 1, 10, 100])
        call = Call(node, state.attempt, state.round, ends_at, self._failure())
        self.outside.called(call)
        self.calls.append(call)

    def _failure(self) -> Failure | None:
        """How a call will fail, or None."""
        if self.rng.random() >= self.scenario.trouble:
            return None
        failure = FAILURES[self.rng.choice(self.scenario.failures)]
        return replace(failure, delay_ms=self.rng.choice([0, 5, 300]))

    def _outcome(self, call: Call) -> list[Event]:
        node = self.state.nodes[call.node.id]
        assert (node.attempt, node.round) == (call.attempt, call.round)
        if call.failure is not None:
            return judge_failure(call.node, node, call.failure)
        data = {"output": {"from": call.node.id}, "duration_ms": 1.5}
        done = Event(EventType.NODE_DONE, data, node_id=call.node.id, attempt=call.attempt)
        return [Event(EventType.LOG, {"text": "soon"}, node_id=call.node.id), done]

    def _complete(self) -> list[Event]:
        if self.rng.random() < 0.9:
            return [Event(EventType.RUN_DONE, {"output": {}})]
        error = error_data("invalid_output", "The output breaks the run's contract.")
        return [
            Event(EventType.VALIDATION_ERROR, {"scope": "final_output", "errors": []}),
            Event(EventType.RUN_FAILED, {"error": error, "failed_nodes": []}),
        ]

    # Slots

    def _limited(self) -> dict[CapabilityKey, int]:
        return {
            key_of(node): node.concurrency
            for node in self.plan.nodes.values()
            if node.concurrency is not None
        }

    def _free_slots(self) -> dict[CapabilityKey, int]:
        """Free slots after our own calls and those of other runs, which may even be too many."""
        limits = self._limited()
        for key, limit in limits.items():
            if self.rng.random() < self.scenario.foreign:
                self.foreign[key] = self.rng.randint(0, limit + 1)
        own = Counter(key_of(self.plan.nodes[node_id]) for node_id in self.state.running)
        return {key: limit - own[key] - self.foreign[key] for key, limit in limits.items()}

    def _check_decision(self, decision: Decision, free: dict[CapabilityKey, int]) -> None:
        """The limits hold, and within them nothing that could start is left lying."""
        deadline = self.watch.deadline
        if deadline is not None and self.now >= deadline:
            [event] = decision.events
            assert event.data["error"]["code"] == "deadline_exceeded"
            self.seen["deadline"] += 1
            return
        started = [e.node_id or "" for e in decision.events if e.type is EventType.NODE_START]
        by_key = Counter(key_of(self.plan.nodes[node_id]) for node_id in started)
        for key, slots in free.items():
            assert by_key[key] <= max(slots, 0), f"{by_key[key]} calls of {key} with {slots} slots"
        if len(self.state.running) + len(started) < self.scenario.max_parallel:
            for node_id in self._could_start():
                key = key_of(self.plan.nodes[node_id])
                full = key in free and by_key[key] >= free[key]
                assert node_id in started or full, f"{node_id} could have started"
        if not decision.complete and self.state.status is RunStatus.RUNNING:
            self._check_alarm(decision)

    def _could_start(self) -> list[str]:
        due = [i for i, retry_at in self.state.waiting.items() if retry_at <= self.now]
        return [*ready_set(self.state), *due]

    def _check_alarm(self, decision: Decision) -> None:
        """The alarm is set to the first thing that only the clock brings."""
        if any(event.type in _RESTING for event in decision.events):
            return
        alarms = [at for at in self.state.waiting.values() if at > self.now]
        if (deadline := self.watch.deadline) is not None:
            alarms.append(deadline)
        assert decision.wake_at == min(alarms, default=None)

    # Operators

    def _operator_comes(self) -> bool:
        """Leave a signal for the run that waits, unless the operator went home."""
        if self.rng.random() < 0.1:
            self.seen["nobody came"] += 1
            return False
        self.now += self.rng.choice([0, 30, 5_000])
        paused_seq = self.state.seq
        nodes: dict[str, dict[str, Any]] = {}
        for node_id in self.state.unknown_outcomes():
            decision = self.rng.choice(["done", "retry", "fail", "nothing"])
            if self.orders_left <= 0 and decision in ("retry", "nothing"):
                decision = "done"
            if decision != "nothing":
                nodes[node_id] = {"decision": decision, "output": {"said": "so"}}
        self.orders_left -= 1
        fault = self.rng.random()
        if fault < 0.05:
            paused_seq -= 1
        elif fault < 0.1:
            nodes[self.rng.choice(list(self.plan.nodes))] = {"decision": "retry"}
        self.signals.append(self._signal(nodes, paused_seq))
        return True

    def _signal(self, nodes: dict[str, dict[str, Any]], paused_seq: int) -> Signal:
        body = {"nodes": nodes, "paused_seq": paused_seq, "operator": "ada"}
        return Signal(UUID(int=self.rng.getrandbits(128)), SignalKind.RESUME, body)

    def _consume(self, signal: Signal) -> list[Event]:
        before = self.state.status
        events, outputs, outcome = apply_resume(self.state, signal)
        self.seen[outcome.split(":")[0]] += 1
        assert (outcome == "applied") is bool(events)
        if before is not RunStatus.AWAITING_HUMAN or signal.body["paused_seq"] != self.state.seq:
            assert events == []
        done = {e.node_id for e in events if e.type is EventType.NODE_DONE}
        assert set(outputs) == done
        return events

    # Crashes

    def _restart(self) -> None:
        """The process is gone; another one, with a clock of its own, folds what is durable."""
        self.crashes += 1
        self.now += self.rng.choice([-40, 0, 10, 1_000])
        lost = self.state.running
        self._begin()
        for body in self.durable:
            self._apply(decode_event(body))
        self.last_ts = self.state.last_ts
        self.seen["recovered with calls under way"] += bool(lost)
        self.opening = self._take_up()

    def _take_up(self) -> list[Event]:
        if not self.durable:
            return [Event(EventType.RUN_QUEUED, {}), *self._started()]
        if self.state.status is RunStatus.QUEUED:
            return self._started()
        if self.state.status is not RunStatus.RUNNING:
            return []
        events, self.recall = recover(self.state)
        self._check_recovery(events)
        return [Event(EventType.RUN_RECOVERED, {"called_again": self.recall}), *events]

    def _check_recovery(self, events: list[Event]) -> None:
        """Every intent without a result is called again, or given to a human: never both."""
        once = [i for i in self.state.running if self.plan.nodes[i].effect is Effect.AT_MOST_ONCE]
        assert [event.node_id for event in events] == once
        for event in events:
            assert event.type is EventType.NODE_BLOCKED
            assert event.data["reason"] == BlockReason.UNKNOWN_OUTCOME
        assert self.recall == [i for i in self.state.running if i not in once]

    def _started(self) -> list[Event]:
        started = [Event(EventType.RUN_START, {})]
        return [*started, self._plan_generated()] if self.rng.random() < 0.8 else started

    def _plan_generated(self) -> Event:
        data = {"version": self.plan.version, "planning_ms": 0.25}
        return Event(EventType.PLAN_GENERATED, data, plan_version=self.plan.version)

    # The end

    def _check_all(self) -> None:
        events = [decode_event(body) for body in self.durable]
        self.seen[f"ended {self.state.status}"] += 1
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        terminal = [event for event in events if event.type in TERMINAL_EVENTS]
        assert terminal == ([events[-1]] if self.state.status.is_terminal else [])
        cut_short = self.state.status is RunStatus.CANCELLED or (
            bool(terminal) and terminal[0].data.get("error", {}).get("code") == "deadline_exceeded"
        )
        if not cut_short:
            self.watch.check_end(self.state)
        self.outside.check(self.plan, self.crashes)
        assert exact(fold(self.plans, events)) == exact(self.state)

    def check_snapshots(self, every: Callable[[int], bool] = lambda k: True) -> None:
        """fold(snapshot at k + tail) == fold(all), for every k that is asked for."""
        for k, body in enumerate(self.snapshots, 1):
            if every(k):
                state = state_from_dict(RUN_ID, self.plans, orjson.loads(body))
                assert state is not None
                assert state.seq == k
                for tail in self.durable[k:]:
                    apply(state, decode_event(tail))
                assert exact(state) == exact(self.state)


_RESTING = TERMINAL_EVENTS | {EventType.RUN_PAUSED}
