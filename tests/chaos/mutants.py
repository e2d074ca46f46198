"""Planted bugs: does the checker bite? `python -m tests.chaos.mutants [name …]`

A mutant is a small textual change to a copy of `app/`; each part of it has to match exactly once,
so that a mutant can not silently become no change. It is run through the scenario in which it would
show, and the checker has to find a violation. The same scenarios on the unchanged service are the
control: there it has to find none. Exit code 1: a mutant survived, or a control did not pass.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import uvloop

from tests.chaos.checker import Checker, shown
from tests.chaos.rig import open_rig
from tests.chaos.scenarios import SCENARIOS

SETTLE_S = 15.0


@dataclass(frozen=True, slots=True)
class Patch:
    """In `file` of `app/`, `old` becomes `new`."""

    file: str
    old: str
    new: str

    def apply(self, app: Path) -> None:
        path = app / self.file
        text = path.read_text()
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.file} has {count} of {self.old!r}: the mutant needs an update")
        path.write_text(text.replace(self.old, self.new))


@dataclass(frozen=True, slots=True)
class Mutant:
    """One planted bug. `schema` is run on the empty database, for bugs that it would refuse."""

    name: str
    scenario: str
    patches: tuple[Patch, ...]
    schema: str = ""

    def apply(self, app: Path) -> None:
        for patch in self.patches:
            patch.apply(app)
            compile((app / patch.file).read_text(), patch.file, "exec")


MUTANTS = (
    Mutant(
        "no epoch in the fence",
        "late_append",
        (
            Patch(
                "store/append.py",
                "where run_id = {run_id} and epoch = {epoch} and seq = {seq} returning",
                "where run_id = {run_id} and {epoch} > 0 and seq = {seq} returning",
            ),
            Patch(
                "store/append.py",
                "and h.epoch = w.epoch\n            and h.seq = w.seq for update",
                "and h.seq = w.seq for update",
            ),
            Patch(
                "store/append.py",
                "where h.run_id = w.run_id and h.epoch = w.epoch and h.seq = w.seq",
                "where h.run_id = w.run_id and h.seq = w.seq",
            ),
        ),
    ),
    Mutant(
        "published before the commit",
        "lost_append",
        (
            Patch(
                "journal/writer.py",
                "        landed = await append_batch(",
                "        for pending in batch:\n"
                "            self._feed.publish(pending.move.run_id, pending.frames)\n"
                "        landed = await append_batch(",
            ),
        ),
    ),
    Mutant(
        "acknowledged before it is durable",
        "lost_append",
        (
            Patch(
                "orchestrator/commands.py",
                "                await submission.accepted\n",
                "                await asyncio.sleep(0)\n",
            ),
        ),
    ),
    Mutant(
        "replay from the last event on, not behind it",
        "everyday",
        (
            Patch(
                "store/events.py",
                "and events.seq > behind.after",
                "and events.seq >= behind.after",
            ),
        ),
    ),
    Mutant(
        "an idempotency key is not unique",
        "everyday",
        (
            Patch(
                "store/append.py",
                "where key is null or run_id in (select run_id from new_keys)",
                "where key is null or run_id is not null",
            ),
        ),
    ),
    Mutant(
        "a gap in the numbers",
        "everyday",
        (
            Patch(
                "journal/record.py",
                "            self.seq += 1\n",
                '            self.seq += 2 if event.type == "NODE_RETRY" else 1\n',
            ),
        ),
    ),
    Mutant(
        "two results for one attempt",
        "take_over",
        (
            Patch(
                "orchestrator/take_up.py",
                "*blocked], again\n",
                "*blocked], again + again\n",
            ),
        ),
        schema="drop index events_one_result",
    ),
    Mutant(
        "an at_most_once call is repeated after a take-over",
        "take_over",
        (
            Patch(
                "domain/decide.py",
                "if state.plan.nodes[node_id].effect is Effect.AT_MOST_ONCE:",
                "if state.plan.nodes[node_id].effect is None:",
            ),
        ),
    ),
    Mutant(
        "an unknown outcome is taken for a failure",
        "everyday",
        (
            Patch(
                "domain/decide.py",
                "if failure.unknown_outcome and node.effect is Effect.AT_MOST_ONCE:",
                "if failure.unknown_outcome and node.effect is None:",
            ),
        ),
    ),
    Mutant(
        "a lease is stolen while its worker lives",
        "everyday",
        (
            Patch(
                "store/leases.py",
                "w.lease_until < clock_timestamp() as lease_over",
                "w.lease_until < clock_timestamp() + interval '9 seconds' as lease_over",
            ),
        ),
    ),
    Mutant(
        "a cancelled run goes on",
        "everyday",
        (
            Patch(
                "domain/state.py",
                "    _finish(state, event, RunStatus.CANCELLED)",
                "    state.finished_at = event.ts",
            ),
        ),
    ),
    Mutant(
        "a snapshot forgets what is blocked",
        "everyday",
        (
            Patch(
                "domain/snapshot.py",
                "list(getattr(state, name)) for name in _ORDERED",
                'list(getattr(state, name)) if name != "blocked" else [] for name in _ORDERED',
            ),
        ),
    ),
    Mutant(
        "a new plan forgets what is done",
        "everyday",
        (
            Patch(
                "domain/plan_change.py",
                "elif _is_same(before.nodes[node.id], node) and not _is_lost(earlier):",
                "elif earlier.done_seq is None and not _is_lost(earlier):",
            ),
        ),
    ),
    Mutant(
        "a new plan is not waited for",
        "everyday",
        (Patch("domain/decide.py", "if state.replan is not None:", "if False:"),),
    ),
    Mutant(
        "a signal is not consumed",
        "everyday",
        (Patch("store/append.py", "set outcome = found.outcome", "set outcome = null"),),
    ),
    Mutant(
        "a cancel does not reach its run",
        "everyday",
        (
            Patch(
                "store/signals.py",
                "rows = await connection.fetch(_OPEN.format(mine), worker_id)",
                'rows = await connection.fetch(_OPEN.format("false and " + mine), worker_id)',
            ),
        ),
    ),
    Mutant(
        "an opening is announced by every worker",
        "outage",
        (
            Patch(
                "adapters/breakers/scripts.py",
                "if generation ~= tonumber(ARGV[1]) then return {} end\n",
                "if status == 'open' and not ok then return record('tripped', holder) end\n",
            ),
        ),
    ),
    Mutant(
        "poison is never given up",
        "poisoned",
        (
            Patch(
                "orchestrator/take_up.py",
                "if claim.takes >= TAKES_MAX:",
                "if claim.takes >= 1_000:",
            ),
        ),
    ),
)


async def judged(scenario: str, mutant: Mutant | None = None, seed: int = 1) -> Checker:
    """The verdict on a scenario, with the bug or without."""

    def change(app: Path) -> None:
        if mutant is not None:
            mutant.apply(app)

    async with open_rig(seed, change=change) as rig:
        if mutant is not None and mutant.schema:
            connection = await asyncpg.connect(rig.postgres.dsn())
            await connection.execute(mutant.schema)
            await connection.close()
        await SCENARIOS[scenario](rig)
        await rig.settle(SETTLE_S)
        return await rig.verdict()


async def main(names: list[str], tell: Callable[[str], None]) -> int:
    """The controls of what is asked for, then the mutants; how many went wrong."""
    chosen = [m for m in MUTANTS if not names or m.name in names or m.scenario in names]
    wrong = 0
    for scenario in dict.fromkeys(mutant.scenario for mutant in chosen):
        violations = (await judged(scenario)).violations
        tell(f"control {scenario}: {len(violations)} violations")
        if violations:
            wrong += 1
            tell(shown(violations))
    for mutant in chosen:
        try:
            violations = (await judged(mutant.scenario, mutant)).violations
        except ValueError as outdated:
            tell(f"OUTDATED: {mutant.name}: {outdated}")
            wrong += 1
            continue
        rules = sorted({violation.rule for violation in violations})
        tell(f"{'caught' if violations else 'SURVIVED'}: {mutant.name} {rules}")
        wrong += not violations
    tell(f"{len(chosen)} mutants, {wrong} went wrong")
    return wrong


def _tell(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        sys.exit(1 if runner.run(main(sys.argv[1:], _tell)) else 0)
