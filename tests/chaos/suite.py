"""Runs a plan: load all the time, faults phase by phase, then calm, then the verdict.

`run_suite` is what the command and the tests call. Load goes on until all phases are over and there
were enough runs, events and reconnects; then the faults stop, and within 60 s everything has to be
over or in the hands of a human (I26).
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos import archive
from tests.chaos.checker import Violation
from tests.chaos.faults import run_lane
from tests.chaos.plan import Fault, Phase, Size, make_plan, more_freezing
from tests.chaos.rig import Rig, open_rig
from tests.chaos.workload import order

TELL_EVERY_S = 10.0
LOOK_S = 0.5
LOAD_ENDS_S = 60.0
MORE_BATCHES_MAX = 15


@dataclass
class Result:
    """What a run of the suite found. `counts` in the order of the report."""

    seed: int
    size: str
    counts: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    violations: list[Violation] = field(default_factory=list)


class Load:
    """Clients that live one run after the other, until they are stopped."""

    def __init__(self, rig: Rig, size: Size) -> None:
        self._rig = rig
        self._size = size
        self._numbers = itertools.count()
        self._stopped = False
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._live()) for _ in range(self._size.clients)]

    async def _live(self) -> None:
        while not self._stopped:
            await self._rig.clients.live(order(self._rig.seed, next(self._numbers)))

    async def until_enough(self) -> None:
        """Until the size's counts of runs, events and reconnects are reached."""
        clients, size = self._rig.clients, self._size
        while True:
            self.check()
            reconnects = len(clients.log.connections) - len(clients.log.frames)
            events = await archive.event_count(self._rig.postgres.dsn())
            reached = (clients.finished, reconnects, events)
            wanted = (size.runs, size.reconnects, size.events)
            if all(have >= want for have, want in zip(reached, wanted, strict=True)):
                return
            await asyncio.sleep(LOOK_S)

    def check(self) -> None:
        """A client that failed is an error of the suite: say so at once."""
        for task in self._tasks:
            if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                raise error

    async def stop(self) -> None:
        """No new runs; those under way are followed to their end."""
        self._stopped = True
        done, late = await asyncio.wait(self._tasks, timeout=LOAD_ENDS_S)
        for task in late:
            task.cancel()
        await asyncio.gather(*done, return_exceptions=False)
        if late:
            what = f"{len(late)} clients did not see the end of their runs"
            self._rig.report("I26 progress", what)


async def run_suite(
    seed: int, size: Size, tell: Callable[[str], None], *, logs: Path | None = None
) -> Result:
    """One run of everything. `tell` gets a line of progress every 10 s."""
    started = time.monotonic()
    async with open_rig(seed, logs=logs) as rig:
        await _populate(rig, size)
        await rig.start()
        result = Result(seed, size.name)
        load = Load(rig, size)
        load.start()
        progress = asyncio.create_task(_tell(rig, tell, started))
        try:
            for phase in make_plan(seed, size):
                result.seconds[phase.name] = await _run_phase(rig, phase, load, tell)
            await _calm(rig)
            for step in itertools.islice(more_freezing(seed), MORE_BATCHES_MAX):
                if rig.zombies < size.zombies:
                    await run_lane(rig, (step,))
            await load.until_enough()
            await load.stop()
            result.seconds["settling"] = await rig.settle()
        finally:
            progress.cancel()
        tell("the faults are over and everything has settled; judging")
        await _judge(rig, size, result)
    result.seconds["in all"] = time.monotonic() - started
    return result


async def _populate(rig: Rig, size: Size) -> None:
    """Roles, proxies and clocks: every second driver has a line of its own, one a shifted clock."""
    rig.frozen_at_once, rig.dead_clients = size.frozen_at_once, size.dead_clients
    shifted = rig.clock.environment if rig.clock is not None else {}
    for number in range(size.workers):
        clock = shifted if number == 0 else {}
        await rig.add("worker", linked=number % 2 == 1, environment=clock)
    for number in range(size.apis):
        await rig.add("api", environment=shifted if number == 0 else {})
    for _ in range(size.serves):
        await rig.add("serve", linked=True)


async def _run_phase(rig: Rig, phase: Phase, load: Load, tell: Callable[[str], None]) -> float:
    """All lanes of a phase, side by side, under load."""
    began = time.monotonic()
    if phase.count(Fault.CLOCK_JUMP):
        await _fresh(rig)
    tell(f"phase {phase.name}: {sum(len(lane) for lane in phase.lanes)} faults")
    async with asyncio.TaskGroup() as group:
        for lane in phase.lanes:
            group.create_task(run_lane(rig, lane))
    load.check()
    return time.monotonic() - began


async def _fresh(rig: Rig) -> None:
    """New processes, which nothing was done to yet: what others take from them is stolen."""
    for slot in rig.fleet.drivers():
        await rig.fleet.kill(slot)
    await rig.fleet.all_ready()


async def _calm(rig: Rig) -> None:
    """Everything is healed, and every process is there."""
    rig.clear()
    if rig.clock is not None:
        rig.clock.jump(0)
    await rig.fleet.all_ready()


async def _tell(rig: Rig, tell: Callable[[str], None], started: float) -> None:
    while True:
        await asyncio.sleep(TELL_EVERY_S)
        clients, kills = rig.clients, rig.fleet.kills
        tell(
            f"{time.monotonic() - started:5.0f} s: {clients.finished} of {clients.submitted} runs, "
            f"{clients.log.frames_seen} frames, {kills['worker'] + kills['serve']} worker, "
            f"{kills['api']} API, {rig.postgres.kills} Postgres kills, {rig.zombies} zombies, "
            f"{rig.stale_writes} stale writes refused, {clients.log.unavailable} answers 503"
        )


async def _judge(rig: Rig, size: Size, result: Result) -> None:
    """The verdict of the checker, and the counts of what it judged."""
    for slot in rig.fleet.drivers():
        await rig.note_stale_writes(slot)
    checker = await rig.verdict()
    counts = checker.counts
    told = {
        "worker kills": rig.inflicted[Fault.KILL_WORKER],
        "API kills": rig.inflicted[Fault.KILL_API],
        "Postgres kills": rig.postgres.kills,
        "zombie take-overs": rig.zombies,
        "stale writes refused": rig.stale_writes,
        "runs": counts["runs"],
        "events": counts["events"],
        "frames compared": counts["frames"],
        "client reconnects": counts["reconnects"],
        "answers 503": rig.clients.log.unavailable,
        "given up after 3 losses in a row": counts["given up after 3 losses in a row"],
        "processes that never got ready": rig.fleet.kills["never ready"],
    }
    others = [fault for fault in Fault if fault not in (Fault.KILL_WORKER, Fault.KILL_API)]
    told |= {str(fault): rig.inflicted[fault] for fault in others}
    told |= {name: counts[name] for name in sorted(counts) if name not in told}
    result.counts, result.notes = told, rig.notes
    result.violations = checker.violations
    if rig.clock is None:
        result.notes["clock"] = "not run: there is no C compiler here"
    if size.name == "full" and not rig.stale_writes:
        what = "no stale write was ever refused: the zombies wrote nothing, or it was not refused"
        result.violations.append(Violation("I4 stale writes", "", what))
    if size.name == "full":
        for name, note in result.notes.items():
            if note.startswith("not "):
                result.violations.append(Violation("too few", "", f"{name}: {note}"))
    for name, wanted in _demands(size).items():
        if told[name] < wanted:
            what = f"{told[name]} {name}, {wanted} were wanted"
            result.violations.append(Violation("too few", "", what))


def _demands(size: Size) -> dict[str, int]:
    """What a run must reach for its result to mean anything."""
    return {
        "worker kills": size.worker_kills,
        "API kills": size.api_kills,
        "Postgres kills": size.postgres_kills,
        "zombie take-overs": size.zombies,
        "runs": size.runs,
        "events": size.events,
        "client reconnects": size.reconnects,
    }
