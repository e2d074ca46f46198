"""One run in virtual time: the pure core driven as the loop drives it, with everything against it.

A `Scenario` is a plan, the limits of the run and a seed; the seed alone decides how calls end, in
which order outcomes arrive, what breakers refuse, what other runs take of the slots, what operators
say, and where the process dies, so a failing seed is a bug report. A crash keeps any prefix of an
append, which is harsher than the journal: there an append is atomic. What is durable is kept as
bytes, and a signal stays open until the append that consumes it is durable as a whole.

The rules that every event is held against are in `journal_rules.py`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NoReturn
from uuid import UUID

import orjson

from app.domain.capability import Effect
from app.domain.decide import (
    Decision,
    Failure,
    RunLimits,
    decide,
    judge_failure,
    recover,
    unknown_outcome,
)
from app.domain.event_json import decode_event, encode_event
from app.domain.events import (
    TERMINAL_EVENTS,
    BlockReason,
    Event,
    EventType,
    SkipReason,
    error_data,
)
from app.domain.plan import Plan
from app.domain.plan_json import plan_as_dict, plan_from_dict
from app.domain.ready import ready_set
from app.domain.run import NodeStatus, RunStatus
from app.domain.signals import Signal, SignalKind, apply_signal, uncertain_nodes
from app.domain.snapshot import state_as_dict, state_from_dict
from app.domain.state import CapabilityKey, RunState, apply
from app.domain.triggers import triggered
from tests.journal_rules import FINISHED, Call, Inheritance, Outside, Watch, is_kept
from tests.plans import RUN_ID, START_MS, exact, fold, key_of
from tests.scenarios import FAILURES, Scenario, next_plan, random_scenario

__all__ = ["Scenario", "Simulation", "random_scenario"]

TURNS_MAX = 2_000
WAITS_FOR_HUMAN = (RunStatus.AWAITING_HUMAN, RunStatus.PAUSED)


@dataclass(frozen=True)
class Planning:
    """A model makes the next plan. `kept` are the nodes that stay, as far as it was told."""

    ends_at: int
    kept: frozenset[str]


class _Crash(Exception):
    """The process dies here."""


class Simulation:
    """A run from acceptance to its end, or to a human who does not come."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.rng = random.Random(scenario.seed)
        self.seen: Counter[str] = Counter()
        self.outside = Outside()
        self.now = START_MS
        self.crashes = 0
        self.orders_left = 4
        self.durable: list[bytes] = []
        self.plan_rows = {1: _row_of(scenario.plan)}
        self.snapshots: list[bytes] = []
        self.last_ts = 0
        self.signals: list[Signal] = []
        self.lives = 0
        self._begin()
        if scenario.inherits is not None:
            self._accept(scenario.inherits)

    def _begin(self) -> None:
        """A new process: it knows nothing but the plan rows."""
        self.lives += 1
        self.plans = {v: plan_from_dict(orjson.loads(row)) for v, row in self.plan_rows.items()}
        self.state = RunState(RUN_ID, self.plans)
        scenario = self.scenario
        bounds = (scenario.max_parallel, scenario.deadline_ms)
        self.watch = Watch(self.plans, scenario.policies, *bounds, self.seen)
        del self.snapshots[len(self.durable) :]
        self.calls: list[Call] = []
        self.arrived: list[Call | Planning] = []
        self.planning: Planning | None = None
        self.recall: list[str] = []
        self.opening: list[Event] = []
        self.foreign: Counter[CapabilityKey] = Counter()

    @property
    def plan(self) -> Plan:
        """The plan in force, or that of the caller."""
        return self.state.plan or self.plans[1]

    # The loop

    def run(self) -> Simulation:
        """Drive the run to where it can not go on by itself, then check the whole of it."""
        self.opening = self._take_up(was_lost=False)
        for _ in range(TURNS_MAX):
            try:
                self._operators_interfere()
                if self._is_parked and not self._signalled():
                    break
                wake_at = self._turn()
                if self.state.status.is_terminal:
                    break
                if not self._is_parked:
                    self._wait(wake_at)
            except _Crash:
                self._restart()
        else:
            self._stuck(f"no end after {TURNS_MAX} turns")
        self._check_all()
        return self

    @property
    def _is_parked(self) -> bool:
        """Nobody drives the run: it waits for a human, and no call is under way."""
        is_idle = self.planning is None and not self.calls and not self.arrived
        return self.state.status in WAITS_FOR_HUMAN and is_idle

    def _turn(self) -> int | None:
        """One pass of the loop: take, apply, decide, record, perform. Says when to wake."""
        step: list[Event] = []
        self._note(step, self.opening)
        self.opening = []
        items: list[Call | Planning | Signal] = [*self.arrived, *self.signals]
        self.arrived = []
        self.rng.shuffle(items)
        for item in items:
            if isinstance(item, Signal):
                self._note(step, self._consume(item))
            elif self.state.status.is_terminal:
                continue
            elif isinstance(item, Planning):
                self._note(step, self._planned(item))
            else:
                self._note(step, self._outcome(item))
        if not self.state.status.is_terminal:
            self._note(step, triggered(self.scenario.policies, step, self.state))
        to_call, wake_at = self._decide(step)
        self._record(step)
        self.signals = []
        for node_id in to_call:
            self._perform(node_id)
        self._crash_maybe("after the calls")
        return wake_at

    def _decide(self, step: list[Event]) -> tuple[list[str], int | None]:
        if self.state.status is not RunStatus.RUNNING:
            return [], None
        if self.state.plan is None:
            self._note(step, [self._plan_generated(self.plan)])
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
        elif decision.plan and self._plan(step):
            more, wake_at = self._decide(step)
            return [*to_call, *more], wake_at
        return to_call, decision.wake_at

    def _note(self, step: list[Event], events: list[Event]) -> None:
        for event in events:
            self.last_ts = max(self.now, self.last_ts)
            event.seq, event.ts = self.state.seq + 1, self.last_ts
            self._apply(event)
        step += events

    def _apply(self, event: Event) -> None:
        """Fold one event, and take a snapshot behind it that must be the state itself.

        A life that reads what an earlier one wrote must come to the same snapshot, byte for byte.
        """
        self.watch.apply(self.state, event)
        snapshot = orjson.dumps(state_as_dict(self.state))
        if event.seq <= len(self.snapshots):
            assert snapshot == self.snapshots[event.seq - 1]
            return
        self.snapshots.append(snapshot)
        restored = state_from_dict(RUN_ID, self.plans, orjson.loads(snapshot))
        assert restored is not None
        assert exact(restored) == exact(self.state)

    def _record(self, step: list[Event]) -> None:
        """Make the step durable; a crash keeps some prefix of it."""
        bodies = [encode_event(event, RUN_ID, "") for event in step]
        if self.rng.random() < self.scenario.crash:
            self._keep(step, bodies, self.rng.randint(0, len(bodies)))
            self.seen["crash in the append"] += 1
            raise _Crash
        self._keep(step, bodies, len(bodies))
        self._crash_maybe("before the calls")

    def _keep(self, step: list[Event], bodies: list[bytes], count: int) -> None:
        """The first events of the append are durable, with the plans that they put into force."""
        self.durable += bodies[:count]
        for event in step[:count]:
            if event.type is EventType.PLAN_GENERATED:
                version = event.data["version"]
                self.plan_rows[version] = _row_of(self.plans[version])

    def _crash_maybe(self, where: str) -> None:
        if not self.state.status.is_terminal and self.rng.random() < self.scenario.crash:
            self.seen[f"crash {where}"] += 1
            raise _Crash

    def _wait(self, wake_at: int | None) -> None:
        """Let time pass until outcomes arrive, a timer rings or another run gives slots back."""
        assert wake_at is None or wake_at > self.now, "the loop would spin"
        under_way = self._under_way()
        if not under_way and wake_at is None:
            self._wait_for_slots()
            return
        times = sorted(item.ends_at for item in under_way)
        if self.planning is not None:
            times[:0] = [self.now] * 8  # a planner says how it comes along, and so wakes the loop
        if times:
            until = times[self.rng.randrange(len(times))]
            self.now = max(self.now, until if wake_at is None else min(until, wake_at))
        elif wake_at is not None:
            self.now = wake_at + self.rng.choice([0, 0, 7])
        self.arrived = [item for item in under_way if item.ends_at <= self.now]
        self.calls = [call for call in self.calls if call.ends_at > self.now]
        if self.planning in self.arrived:
            self.planning = None

    def _under_way(self) -> list[Call | Planning]:
        return [*self.calls, *([] if self.planning is None else [self.planning])]

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

    # Plans

    def _plan(self, step: list[Event]) -> bool:
        """Plan at once, or let a model do it, unless it does already. Whether it is done."""
        if self.planning is not None:
            return False
        if self.rng.random() < 0.5:
            ends_at = self.now + self.rng.choice([0, 10, 100])
            self.planning = Planning(ends_at, self._kept())
            return False
        self._note(step, self._next_plan())
        return True

    def _planned(self, planning: Planning) -> list[Event]:
        """What a model came to. It is dropped when an operator changed what it was made for."""
        if planning.kept != self._kept():
            self.seen["dropped a plan"] += 1
            return []
        return self._next_plan()

    def _kept(self) -> frozenset[str]:
        return frozenset(i for i, node in self.state.nodes.items() if is_kept(node))

    def _next_plan(self) -> list[Event]:
        """The next version takes the place of the one in force, or none is found."""
        cause = {None: "next goal", "": "operator"}.get(self.state.replan, "policy")
        attempt: dict[str, Any] = {"attempt": 1, "phase": "replan"}
        events = [Event(EventType.PLAN_REQUESTED, attempt)]
        if self.rng.random() < 0.3:
            events.append(Event(EventType.PLAN_REJECTED, {**attempt, "diagnostics": []}))
        if self.rng.random() < self.scenario.no_plan:
            self.seen[f"no plan for {cause}"] += 1
            final = {**attempt, "diagnostics": [], "final": True}
            events.append(Event(EventType.PLAN_REJECTED, final))
            if cause == "next goal":
                error = error_data("plan_rejected", "There is no plan.")
                failed = {"error": error, "failed_nodes": []}
                events.append(Event(EventType.RUN_FAILED, failed))
            return events
        self.seen[f"replan by {cause}"] += 1
        self.seen["replan of a pause"] += self.state.status is not RunStatus.RUNNING
        plan = next_plan(self.state, self.rng)
        self.plans[plan.version] = plan
        updated = {"version": plan.version, "previous_version": self.plan.version}
        return [*events, self._plan_generated(plan), Event(EventType.PLAN_UPDATED, updated)]

    def _plan_generated(self, plan: Plan) -> Event:
        data = {"version": plan.version, "planning_ms": 0.25}
        return Event(EventType.PLAN_GENERATED, data, plan_version=plan.version)

    # Calls

    def _perform(self, node_id: str) -> None:
        node, state = self.plan.nodes[node_id], self.state.nodes[node_id]
        assert state.status is NodeStatus.RUNNING
        assert node_id not in [call.node.id for call in self.calls]
        ends_at = self.now + self.rng.choice([0, 1, 10, 100])
        call = Call(node, state.attempt, state.round, ends_at, self._failure())
        if self.rng.random() < self.scenario.refusal:
            call.refused_ms = self.rng.choice([1, 20, 500])
        else:
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
        if call.refused_ms is not None:
            data = {"reason": BlockReason.BREAKER_OPEN, "delay_ms": call.refused_ms}
            return [Event(EventType.NODE_BLOCKED, data, node_id=call.node.id, attempt=call.attempt)]
        if call.failure is not None:
            events = judge_failure(call.node, node, call.failure)
            if call.failure.retryable and events[-1].type is EventType.NODE_FAILED:
                tries = self.watch.starts[call.node.id, call.round]
                assert tries == call.node.max_attempts, f"{call.node.id} gave up after {tries}"
            return events
        data = {"output": {"from": call.node.id}, "duration_ms": 1.5}
        done = Event(EventType.NODE_DONE, data, node_id=call.node.id, attempt=call.attempt)
        return [Event(EventType.LOG, {"text": "soon"}, node_id=call.node.id), done]

    def _complete(self) -> list[Event]:
        if not self.scenario.trouble or self.rng.random() < 0.9:
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
        if self.state.replan is not None:
            assert decision.events == []
            assert decision.plan is not bool(self.state.running)
            assert decision.wake_at == deadline
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

    def _operators_interfere(self) -> None:
        """Orders come at any time, whether they fit or not, and sometimes twice."""
        for kind, chance in (
            (SignalKind.CANCEL, self.scenario.cancel),
            (SignalKind.PAUSE, self.scenario.pause),
            (SignalKind.RESUME, 0.05 if self.planning is None else 0.5),
        ):
            if self.rng.random() < chance:
                nodes = self._decisions() if kind is SignalKind.RESUME else {}
                for _ in range(self.rng.choice([1, 1, 2])):
                    self._send(kind, nodes=nodes, paused_seq=self.state.paused_seq or 0)

    def _send(self, kind: SignalKind, **body: Any) -> None:
        signal_id = UUID(int=self.rng.getrandbits(128))
        self.signals.append(Signal(signal_id, UUID(int=1), kind, {"operator": "ada", **body}))

    def _signalled(self) -> bool:
        """A signal brings a parked run back, in another process; False: the operator went home."""
        if not self.signals:
            if self.rng.random() < 0.1:
                self.seen["nobody came"] += 1
                return False
            self.now += self.rng.choice([0, 30, 5_000])
            self._operator_answers()
        self._begin()
        self._replay()
        self.opening = self._take_up(was_lost=False)
        return True

    def _operator_answers(self) -> None:
        """What becomes of the nodes that wait; sometimes late, or about the wrong node."""
        assert self.state.paused_seq is not None
        paused_seq = self.state.paused_seq
        nodes = self._decisions()
        self.orders_left -= 1
        fault = self.rng.random()
        if fault < 0.05:
            paused_seq -= 1
        elif fault < 0.1:
            nodes[self.rng.choice(list(self.plan.nodes))] = {"decision": "retry"}
        self._send(SignalKind.RESUME, nodes=nodes, paused_seq=paused_seq)

    def _decisions(self) -> dict[str, dict[str, Any]]:
        nodes: dict[str, dict[str, Any]] = {}
        for node_id in self.state.awaiting_human():
            decision = self.rng.choice(["done", "retry", "fail", "nothing"])
            if self.orders_left <= 0 and decision in ("retry", "nothing"):
                decision = "done"
            if decision != "nothing":
                nodes[node_id] = {"decision": decision, "output": {"said": "so"}}
        return nodes

    def _consume(self, signal: Signal) -> list[Event]:
        before = self.state.status
        applied = apply_signal(self.state, signal)
        events, outcome = applied.events, applied.outcome
        self.seen[f"{signal.kind} {outcome.split(':')[0]}"] += 1
        assert (outcome == "applied") is bool(events)
        match signal.kind:
            case SignalKind.CANCEL:
                assert bool(events) is not before.is_terminal
            case SignalKind.PAUSE:
                assert bool(events) is (before is RunStatus.RUNNING)
            case SignalKind.RESUME if events:
                assert before in WAITS_FOR_HUMAN
                assert signal.body["paused_seq"] == self.watch.paused_seq
        done = {e.node_id for e in events if e.type is EventType.NODE_DONE}
        assert set(applied.outputs) == done
        return events

    # Other processes

    def _restart(self) -> None:
        """The process is gone; another one, with a clock of its own, folds what is durable."""
        self.crashes += 1
        self.now += self.rng.choice([-40, 0, 10, 1_000])
        lost = self.state.running
        self.seen["crash while a plan is made"] += self.planning is not None
        self._begin()
        self._replay()
        self.seen["recovered with calls under way"] += bool(lost)
        self.opening = self._take_up(was_lost=True)

    def _replay(self) -> None:
        for body in self.durable:
            self._apply(decode_event(body))
        self.last_ts = self.state.last_ts

    def _take_up(self, *, was_lost: bool) -> list[Event]:
        """What the journal must say first: nothing when the run was parked and nothing was lost."""
        if not self.durable:
            return [Event(EventType.RUN_QUEUED, {}), *self._started()]
        if self.state.status is RunStatus.QUEUED:
            return self._started()
        if self.state.status.is_terminal:
            return []
        events, self.recall = recover(self.state)
        self._check_recovery(events)
        if not was_lost and self.state.status is not RunStatus.RUNNING:
            self.seen["went on with calls of before the pause"] += bool(self.recall)
            if not events and not self.recall:
                return []
        return [Event(EventType.RUN_RECOVERED, {"called_again": self.recall}), *events]

    def _accept(self, inherits: Inheritance) -> None:
        """The first append of a successor, which is durable before anybody drives it."""
        error = error_data("unknown_outcome", "The earlier run does not know how the call ended.")
        skipped = {"reason": SkipReason.RESUME, "output": {}}
        step: list[Event] = []
        self._note(step, [Event(EventType.RUN_QUEUED, {}), self._plan_generated(self.plan)])
        self._note(
            step, [Event(EventType.NODE_SKIPPED, dict(skipped), node_id=i) for i in inherits.kept]
        )
        self._note(step, [unknown_outcome(node_id, 1, error) for node_id in inherits.uncertain])
        self.durable = [encode_event(event, RUN_ID, "") for event in step]

    def successor(self, seed: int) -> Simulation:
        """The run that goes on where this one failed or was cancelled."""
        inherits = Inheritance(
            kept=tuple(i for i, node in self.state.nodes.items() if node.done_seq is not None),
            uncertain=tuple(uncertain_nodes(self.state)),
        )
        for node_id, number in self.outside.effects:
            if node_id in self.state.retired:
                continue  # decided upon, or it would still be part of the plan
            node = self.state.nodes[node_id]
            is_once = self.plan.nodes[node_id].effect is Effect.AT_MOST_ONCE
            is_open = node.status not in (*FINISHED, NodeStatus.FAILED)
            if is_once and is_open and node.round == number:
                assert node_id in inherits.uncertain, f"{node_id} may have happened"
        plan = replace(self.plan, version=1)
        return Simulation(replace(self.scenario, plan=plan, seed=seed, inherits=inherits))

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
        if self.state.plan is not None:
            return started
        return [*started, self._plan_generated(self.plan)] if self.rng.random() < 0.8 else started

    # The end

    def _check_all(self) -> None:
        events = [decode_event(body) for body in self.durable]
        self.seen[f"ended {self.state.status}"] += 1
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        terminal = [event for event in events if event.type in TERMINAL_EVENTS]
        assert terminal == ([events[-1]] if self.state.status.is_terminal else [])
        assert self.signals == [], "a signal was never judged"
        cut_short = self.state.status in (RunStatus.CANCELLED, RunStatus.PAUSED) or (
            bool(terminal) and terminal[0].data.get("error", {}).get("code") == "deadline_exceeded"
        )
        if not cut_short:
            self.watch.check_end(self.state)
        self.outside.check(self.lives, self.scenario.inherits or Inheritance())
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


def _row_of(plan: Plan) -> bytes:
    return orjson.dumps(plan_as_dict(plan))
