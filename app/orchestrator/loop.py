"""The loop that drives one run, as a page of prose.

    hold the lease; resume the state; until the run is finished:
        take every outcome and signal that has arrived;
        apply them;
        decide what may happen now;
        record outcomes, consumed signals and decisions as one append;
        when it is durable, perform: call the nodes that were started;
        if all that is left waits on a human or for long, or this process leaves, give it back.

Kill points: before record; after record and before the call; after the call and before the next
record. At each of them the journal alone says how the run goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import orjson

from app.domain.decide import decide
from app.domain.events import Event, EventType
from app.domain.run import RunStatus
from app.domain.signals import Signal
from app.domain.snapshot import state_as_dict
from app.domain.state import CapabilityKey, apply
from app.domain.triggers import triggered
from app.journal.errors import HeadDiverged, JournalClosed, JournalRejected, KeyTaken, LeaseLost
from app.journal.record import Append, Journal
from app.kit import failpoints
from app.kit.clock import now_ms
from app.kit.metrics import Metrics
from app.orchestrator.ask import count_models
from app.orchestrator.execute import Executor
from app.orchestrator.lease import Lease
from app.orchestrator.outcomes import (
    complete,
    consume_signal,
    event_limit,
    outcome_events,
    run_failed,
    said_events,
)
from app.orchestrator.planning import ModelPlanner
from app.orchestrator.plans import make_plan, planned_events
from app.orchestrator.run import PLANNING, DrivenRun, Outcome, Planned, Said
from app.planner.plan_envelope import PlanLimits
from app.registry.image import RegistryImage

log = logging.getLogger("flexrun.loop")

SNAPSHOT_EVENTS_MIN = 500
PARK_MS_MIN = 5_000
HANDED_OVER = 0
"""A time to wake up that has always passed, on whatever clock: any worker may go on at once."""


@dataclass(frozen=True, slots=True)
class LoopLimits:
    """`events_max` bounds the journal of one run; room for the terminal event is kept."""

    events_max: int = 50_000
    latency_record: bool = True


@dataclass(slots=True)
class Drive:
    """What the loop needs besides the run.

    `lease` says who we are in the heads, and whether we may still write. `is_leaving`: start
    nothing new and give every run back as soon as no call of it is under way; `announce_work`
    tells others, `nudge_worker` makes our own worker look.
    """

    journal: Journal
    executor: Executor
    image: Callable[[str], RegistryImage]
    lease: Lease
    limits: LoopLimits
    plan_limits: PlanLimits
    metrics: Metrics = field(default_factory=Metrics)
    announce_work: Callable[[], None] = lambda: None
    nudge_worker: Callable[[], None] = lambda: None
    planner: ModelPlanner | None = None
    is_leaving: bool = False


@dataclass(slots=True)
class _Step:
    """One turn of the loop: the append in the making, and what to do when it is durable."""

    append: Append
    now: int
    to_call: list[str] = field(default_factory=list)
    to_plan: ModelPlanner | None = None
    wake_at: int | None = None

    def note(self, run: DrivenRun, events: list[Event]) -> None:
        """Number events, fold them into the state, and put them into the append."""
        run.handle.stamp(events, self.now)
        state = run.state
        for event in events:
            apply(state, event)
            if event.type is EventType.NODE_START and event.node_id is not None:
                self.to_call.append(event.node_id)
        self.append.events += events


async def drive_run(run: DrivenRun, drive: Drive) -> None:
    """Drive the run until it is finished, parked, or no longer ours. Never raises for the run."""
    try:
        await _drive(run, drive)
    except LeaseLost as lost:
        log.warning("run %s is driven elsewhere now: %s", run.handle.text_id, lost)
        run.refuse(lost)
    except (JournalClosed, HeadDiverged, KeyTaken) as stopped:
        run.refuse(stopped)
    except JournalRejected as rejected:
        run.refuse(rejected)
        await _fail(run, drive, "JOURNAL_REJECTED", "The journal refused the data of the run.")
    except Exception as error:
        log.exception("driving run %s failed", run.handle.text_id)
        run.refuse(error)
        await _fail(run, drive, "internal_error", "The run met an error of the service itself.")
    finally:
        run.refuse(JournalClosed("let go before it was durable"))
        run.cancel_calls()
        drive.executor.slots.release_all(run)


async def _drive(run: DrivenRun, drive: Drive) -> None:
    failpoints.hit("drive.before_first_record")
    while True:
        step = _next_step(run, drive)
        if step.append.has_rows:
            await _record(run, drive, step.append)
        if step.append.owner is None:
            if step.append.wake_at == HANDED_OVER:
                drive.announce_work()
            return  # finished, parked until a human decides or a time comes, or handed over
        if step.to_plan is not None:
            step.to_plan.start(run, drive.image(run.tenant_id))
        for node_id in step.to_call:
            drive.executor.perform(run, node_id)
        if not run.inbox.poked:
            _ask_for_slots(run, drive)
            await run.inbox.wait(None if step.wake_at is None else (step.wake_at - now_ms()) / 1000)


def _next_step(run: DrivenRun, drive: Drive) -> _Step:
    """Take what arrived, apply it, decide, and shape all of it into one append."""
    state = run.state
    # Never below what the journal says: another process may have been a little ahead.
    now = max(now_ms(), run.handle.last_ts)
    step = _Step(run.opening or Append([], state.status, None), now)
    opening_events, step.append.events = step.append.events, []
    run.opening = None
    step.note(run, opening_events)
    for item in run.inbox.take():
        if isinstance(item, Said):
            if not state.status.is_terminal:
                step.note(run, said_events(item, step.append))
                count_models(item, drive.metrics)
            continue  # no progress yet: the call may still take the process down
        step.append.is_progress = True
        if run.takes:
            run.takes = 0
            drive.nudge_worker()  # another run that lost workers may be driven now
        if isinstance(item, Signal):
            failpoints.hit("signal.before_apply")
            step.note(run, consume_signal(run, item, step.append))
            drive.metrics.signals[item.kind] += step.append.signals[-1][1] == "applied"
        elif state.status.is_terminal:
            continue  # what comes after a cancel is not recorded any more
        elif isinstance(item, Planned):
            timed = drive.limits.latency_record
            step.note(run, planned_events(run, item, step.append, timed=timed))
        else:
            failpoints.hit("outcome.before_judged")
            step.note(run, outcome_events(run, item, step.append))
            _measure(run, item, drive.metrics)
    _ask_policies(run, step)
    if state.status is RunStatus.RUNNING and not drive.is_leaving:
        if state.plan is None:
            _plan(run, drive, step)
        step.to_call += run.recall
        run.recall = []
        _decide(run, drive, step)
    _close(run, drive, step)
    return step


def _ask_policies(run: DrivenRun, step: _Step) -> None:
    """What ended in this turn may set a runtime policy off, in the same append."""
    policies = run.envelope.policies.runtime
    if policies and not run.state.status.is_terminal:
        step.note(run, triggered(policies, step.append.events, run.state))


def _plan(run: DrivenRun, drive: Drive, step: _Step) -> bool:
    """Plan at once, or let a model do it once this append is durable, unless it does already.

    Whether it is done.
    """
    planner = drive.planner
    if PLANNING in run.calls:
        return False
    if planner is not None and planner.takes(run):
        step.to_plan = planner
        return False
    planned = make_plan(
        *(run, drive.image(run.tenant_id), drive.plan_limits, step.append),
        models_up=planner is not None and planner.gateway.is_up,
        timed=drive.limits.latency_record,
    )
    step.note(run, planned)
    return True


def _measure(run: DrivenRun, outcome: Outcome, metrics: Metrics) -> None:
    """How long a call took. What was never called has no duration."""
    assert run.state.plan is not None
    failure = outcome.failure
    duration_ms = outcome.duration_ms if failure is None else failure.duration_ms
    if outcome.refused is None and (failure is None or duration_ms > 0):
        capability_id = run.state.plan.nodes[outcome.node_id].capability_id
        metrics.calls.observe(capability_id, duration_ms / 1000)


def _decide(run: DrivenRun, drive: Drive, step: _Step) -> None:
    """Let the domain decide, and end the run when there is nothing left to do."""
    state = run.state
    if state.seq + 2 * len(state.nodes) + 10 > drive.limits.events_max:
        step.note(run, [event_limit(drive.limits.events_max)])
        return
    limits = run.limits
    if state.ready_limited or state.waiting:
        limits = replace(limits, free_slots=drive.executor.slots.free(_limited(run)))
    decision = decide(state, step.now, limits)
    step.note(run, decision.events)
    step.wake_at = decision.wake_at
    if decision.complete:
        step.note(run, complete(run, step.append))
    elif decision.plan and _plan(run, drive, step):
        _decide(run, drive, step)
        return
    if state.plan is not None:
        for node_id in step.to_call:
            drive.executor.slots.take(run, state.plan.nodes[node_id])
        drive.executor.slots.pass_on()


def _close(run: DrivenRun, drive: Drive, step: _Step) -> None:
    """Status, owner and snapshot of an append, from the state that it leads to."""
    state, append = run.state, step.append
    is_running = state.status is RunStatus.RUNNING
    # What starts nothing more is held until the calls under way have ended and are recorded.
    is_held = (is_running and not drive.is_leaving) or (
        bool(run.calls) and not state.status.is_terminal
    )
    if is_running and not is_held:
        append.wake_at = HANDED_OVER
    elif is_running and _only_waits(run, step):
        # It holds no place while it waits: a far side that is down must not keep others from work.
        is_held = False
        append.wake_at = step.wake_at
    append.owner = drive.lease.worker_id if is_held else None
    append.status = state.status
    unsaved = state.seq - run.snapshot_seq
    parked = append.owner is None and not state.status.is_terminal
    replanned = any(version > 1 for version, _ in append.plans)
    if unsaved > (0 if parked or replanned else max(SNAPSHOT_EVENTS_MIN, len(state.nodes))):
        append.snapshots.append((state.seq, orjson.dumps(state_as_dict(state)).decode()))
        run.snapshot_seq = state.seq


def _only_waits(run: DrivenRun, step: _Step) -> bool:
    """Whether nothing of the run can happen for long: all that is left is a time to come."""
    state = run.state
    if run.calls or step.to_plan or step.wake_at is None:
        return False
    if state.running or state.ready or state.ready_limited:
        return False
    if any(retry_at <= step.now for retry_at in state.waiting.values()):
        return False  # due, and only lacks a slot
    return step.wake_at - step.now >= PARK_MS_MIN


async def _record(run: DrivenRun, drive: Drive, append: Append) -> None:
    """Make the append durable; only then does anything of it count."""
    if not drive.lease.held:
        await drive.lease.regain()
    point = "park." if append.is_parking else "drive."
    finish = "finish_record" if append.status.is_terminal else "record"
    failpoints.hit(f"{point}before_{finish}")
    await drive.journal.record(run.handle, append)
    run.durable_seq = run.handle.seq
    if not run.accepted.done():
        run.accepted.set_result(None)
    failpoints.hit(f"{point}after_{finish}")


def _limited(run: DrivenRun) -> dict[CapabilityKey, int]:
    """The capabilities of the plan that bound how many of their calls run at once."""
    plan = run.state.plan
    assert plan is not None
    if run.limited is None or run.limited[0] is not plan:
        found = {
            (node.capability_id, node.capability_version): node.concurrency
            for node in plan.nodes.values()
            if node.concurrency is not None
        }
        run.limited = (plan, found)
    return run.limited[1]


def _ask_for_slots(run: DrivenRun, drive: Drive) -> None:
    """Nodes that only lack a slot of their capability: look again when one is free.

    A run that may start nothing does not ask: it would be woken at once, for ever.
    """
    state = run.state
    may_start = state.status is RunStatus.RUNNING and state.replan is None
    if not may_start or drive.is_leaving:
        drive.executor.slots.pass_on()  # what woke us may have been our turn
        return
    if not state.ready_limited and not state.waiting:
        return
    assert state.plan is not None
    first_in_line = [next(iter(queue)) for queue in state.ready_limited.values()]
    due = [node_id for node_id, at in state.waiting.items() if at <= now_ms()]
    if len(state.running) < run.limits.max_parallel:
        for node_id in (*first_in_line, *due):
            drive.executor.slots.wait(run, state.plan.nodes[node_id])


async def _fail(run: DrivenRun, drive: Drive, code: str, message: str) -> None:
    """End a run that can not go on, from its last durable event. Should that fail too, the run is
    taken over when this worker's lease ends."""
    if run.durable_seq == 0:
        return  # nothing was accepted: whoever submitted it got the error
    handle = run.handle
    handle.rewind(run.durable_seq)
    failed = run_failed(code, message)
    handle.stamp([failed], now_ms())
    try:
        await drive.journal.record(handle, Append([failed], RunStatus.FAILED, None))
    except (LeaseLost, JournalRejected, HeadDiverged, JournalClosed) as error:
        log.error("run %s could not be failed: %s", handle.text_id, type(error).__name__)
