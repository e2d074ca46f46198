"""Many processes hammer one shared breaker while its target fails by a seeded schedule.

`storm` starts the processes, sweeps like a worker does, and gives what they saw; whoever calls it
judges. `python -m tests.breaker_storm` is the full size, with figures. Each process notes when its
probes began and ended, on the monotonic clock that all processes of a machine share.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from redis.exceptions import RedisError

from app.adapters.breakers.redis import RedisBreakers
from app.ports import Permit, Transition, TransitionKind
from tests.redis_kit import MortalRedis, make_client

SCOPE = "http::tool.example:443"
THRESHOLD = 5
COOLDOWN_S = 0.05
PROBE_CALL_S = 0.002
LIMIT_S = 60.0
TASKS = 8
PATIENT_S = 10.0
"""The budget of a step where exact counts are asked for: a busy machine is no outage of Redis."""
START_S = 0.2
CALM_S = 2.0
"""After the last outage: of all processes one must come by in it, or the breaker stays open."""
END_S = 60.0


@dataclass(frozen=True)
class Plan:
    """How a storm goes. `kill_at`: Redis dies at this part of the schedule, for `away_s`."""

    processes: int = 8
    outages: int = 6
    seed: int = 1
    budget_s: float = PATIENT_S
    kill_at: float | None = None
    away_s: float = 1.0

    @property
    def schedule(self) -> list[tuple[float, float]]:
        """From when to when the target fails, in seconds since the start."""
        rng = Random(self.seed)
        outages, now = [], 0.0
        for _ in range(self.outages):
            down = now + rng.uniform(0.1, 0.3)
            now = down + rng.uniform(0.15, 0.35)
            outages.append((down, now))
        return outages

    @property
    def length_s(self) -> float:
        return self.schedule[-1][1] + CALM_S


@dataclass
class Seen:
    """What one process saw of the shared breaker; `local_checks` it judged alone."""

    checks: int = 0
    local_checks: int = 0
    shared_after_local: int = 0
    generations: set[int] = field(default_factory=set)
    told: list[tuple[int, str]] = field(default_factory=list)
    probes: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Storm:
    """What all of them saw, what the sweeper found in Redis, and keys without a TTL."""

    seen: list[Seen]
    swept: list[tuple[int, str]]
    immortal_keys: set[str]
    final_status: str

    @property
    def checks(self) -> int:
        return sum(seen.checks for seen in self.seen)

    @property
    def openings(self) -> set[int]:
        return set().union(*(seen.generations for seen in self.seen)) - {0}

    def told(self, kind: TransitionKind) -> list[int]:
        return sorted(number for seen in self.seen for number, name in seen.told if name == kind)

    @property
    def probes(self) -> list[tuple[int, int]]:
        return sorted(probe for seen in self.seen for probe in seen.probes)

    @property
    def overlaps(self) -> int:
        """Probes that began while another one was under way."""
        count, busy_until = 0, 0
        for begin, end in self.probes:
            count += begin < busy_until
            busy_until = max(busy_until, end)
        return count


async def storm(plan: Plan, server: MortalRedis) -> Storm:
    processes = [await _start(plan, server.url) for _ in range(plan.processes)]
    try:
        for process in processes:
            assert process.stdout is not None
            assert await asyncio.wait_for(process.stdout.readline(), END_S) == b"ready\n"
        begin = time.monotonic() + START_S
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(f"{begin}\n".encode())
        over = asyncio.Event()
        sweeping = asyncio.create_task(_sweep(server.url, over))
        if plan.kill_at is not None:
            await asyncio.sleep(begin + plan.kill_at * plan.schedule[-1][1] - time.monotonic())
            server.kill()
            await asyncio.sleep(plan.away_s)
            server.start()
        ends = await asyncio.wait_for(
            asyncio.gather(*(process.communicate() for process in processes)),
            plan.length_s + END_S,
        )
        over.set()
        swept, immortal, status = await sweeping
    finally:
        for process in processes:
            if process.returncode is None:
                process.kill()
                await process.wait()
    return Storm([_seen(out) for out, _ in ends], swept, immortal, status)


async def _start(plan: Plan, url: str) -> Process:
    order = json.dumps({"url": url, "schedule": plan.schedule, "length_s": plan.length_s})
    command = (sys.executable, "-m", "tests.breaker_storm", "--work", order)
    return await asyncio.create_subprocess_exec(
        *command, "--budget-s", str(plan.budget_s), stdin=PIPE, stdout=PIPE
    )


def _seen(line: bytes) -> Seen:
    told = json.loads(line)
    return Seen(
        checks=told["checks"],
        local_checks=told["local_checks"],
        shared_after_local=told["shared_after_local"],
        generations=set(told["generations"]),
        told=[(number, kind) for number, kind in told["told"]],
        probes=[(begin, end) for begin, end in told["probes"]],
    )


async def _sweep(url: str, over: asyncio.Event) -> tuple[list[tuple[int, str]], set[str], str]:
    """Collect what Redis keeps for announcers that died, as a sweeper does, to the end."""
    swept: list[tuple[int, str]] = []
    immortal: set[str] = set()
    breakers = _breakers(url, PATIENT_S)
    client = make_client(url)
    is_last = False
    while not is_last:
        is_last = over.is_set() and not breakers.is_degraded
        found = [transition for transition, _ in await breakers.unannounced()]
        await breakers.forget(found)
        swept += [(transition.generation, transition.kind.value) for transition in found]
        with contextlib.suppress(RedisError):  # it may be killed at any moment
            immortal.update([key for key in await client.keys("*") if await client.pttl(key) == -1])
        await asyncio.sleep(0.02)
    (view,) = await breakers.views()
    await breakers.aclose()
    await client.aclose()
    return swept, immortal, view.status.value


def _breakers(url: str, budget_s: float) -> RedisBreakers:
    return RedisBreakers(
        url,
        threshold=THRESHOLD,
        cooldown_s=COOLDOWN_S,
        worker_id_of=lambda: "alone",
        budget_s=budget_s,
    )


# --- one process ---------------------------------------------------------------------------------


async def _work(order: dict[str, Any], budget_s: float) -> Seen:
    breakers = _breakers(order["url"], budget_s)
    await breakers.views()  # the first connection is not part of the storm
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    begin = float(await asyncio.to_thread(sys.stdin.readline))
    await asyncio.sleep(begin - time.monotonic())
    seen = Seen()
    await asyncio.gather(*(_hammer(breakers, order, begin, seen) for _ in range(TASKS)))
    await breakers.aclose()
    return seen


async def _hammer(breakers: RedisBreakers, order: dict[str, Any], begin: float, seen: Seen) -> None:
    """Ask, call, report, as fast as it goes."""
    while (now := time.monotonic() - begin) < order["length_s"]:
        answer = await breakers.allow(SCOPE, "run-1:1", LIMIT_S)
        _note(breakers, answer, seen)
        if not isinstance(answer, Permit):
            await asyncio.sleep(0)
            continue
        if answer.transition is not None:
            _note_told(answer.transition, seen)
        probe_begin = time.monotonic_ns()
        await asyncio.sleep(PROBE_CALL_S if answer.probe else 0)
        now = time.monotonic() - begin
        ok = not any(down <= now < up for down, up in order["schedule"])
        if answer.probe and not answer.is_local:
            seen.probes.append((probe_begin, time.monotonic_ns()))
        told = await breakers.report(answer, ok, "run-1:1")
        if told is not None:
            _note_told(told, seen)


def _note(breakers: RedisBreakers, answer: Any, seen: Seen) -> None:
    seen.checks += 1
    if breakers.is_degraded or getattr(answer, "is_local", False):
        seen.local_checks += 1
        return
    seen.generations.add(answer.generation)
    seen.shared_after_local += seen.local_checks > 0


def _note_told(transition: Transition, seen: Seen) -> None:
    if not transition.degraded:
        seen.told.append((transition.generation, transition.kind.value))


def _as_json(seen: Seen) -> str:
    return json.dumps({**vars(seen), "generations": sorted(seen.generations)}) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--outages", type=int, default=120)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--budget-s", type=float, default=PATIENT_S)
    parser.add_argument("--kill-at", type=float)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        sys.stdout.write(_as_json(asyncio.run(_work(json.loads(options.work), options.budget_s))))
        return
    plan = Plan(
        processes=options.processes,
        outages=options.outages,
        seed=options.seed,
        budget_s=options.budget_s,
        kill_at=options.kill_at,
    )
    with tempfile.TemporaryDirectory() as folder, MortalRedis(Path(folder)) as server:
        sys.stdout.write(json.dumps(figures(plan, asyncio.run(storm(plan, server))), indent=2))


def figures(plan: Plan, found: Storm) -> dict[str, Any]:
    return {
        "processes": plan.processes,
        "outages": plan.outages,
        "checks": found.checks,
        "checks judged alone": sum(seen.local_checks for seen in found.seen),
        "openings": len(found.openings),
        **{f"announced {kind}": len(found.told(kind)) for kind in TransitionKind},
        "announced tripped, distinct": len(set(found.told(TransitionKind.TRIPPED))),
        "swept": len(found.swept),
        "probes": len(found.probes),
        "probes at once": found.overlaps,
        "keys without TTL": len(found.immortal_keys),
        "breaker at the end": found.final_status,
    }


if __name__ == "__main__":
    main()
