"""The schedule of faults: made of the seed and the size alone, the same on every machine.

A plan is a list of phases; the lanes of a phase run side by side, the steps of a lane one after the
other. What the seed does not decide is the interleaving: which run a fault meets.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum


class Fault(StrEnum):
    """What can be done to the world. `faults.py` does it."""

    KILL_WORKER = "kill -9 of a worker"
    KILL_API = "kill -9 of an API"
    KILL_POSTGRES = "kill -9 of Postgres"
    CUT_SESSIONS = "sessions terminated"
    FREEZE = "workers frozen"
    DRAIN = "SIGTERM"
    STALL_LINK = "worker cut off, late bytes"
    HALF_OPEN_LINK = "worker cut off, lost bytes"
    RESET_LINK = "worker connections reset"
    KILL_REDIS = "kill -9 of Redis"
    FLUSH_REDIS = "Redis flushed"
    SLOW_REDIS = "Redis 5 s late"
    READ_ONLY_REDIS = "Redis read-only"
    SPOIL_REDIS = "Redis keys of a wrong type"
    TOOL_OUTAGE = "tool down"
    BAD_TOOL_LINE = "bad line to a tool"
    BAD_CLIENT_LINE = "bad line to clients"
    CLOCK_JUMP = "wall clock jumps"
    POISON = "poison envelope"
    DEAD_CLIENTS = "clients that never read"
    FULL_DISK = "disk full under Postgres"


REDIS_FAULTS = (
    Fault.KILL_REDIS,
    Fault.FLUSH_REDIS,
    Fault.SLOW_REDIS,
    Fault.READ_ONLY_REDIS,
    Fault.SPOIL_REDIS,
)


@dataclass(frozen=True, slots=True)
class Step:
    """One fault, `pause_s` after the step before it. What `choice` and `amount` mean, the fault
    says: which slot, how long, how much."""

    fault: Fault
    pause_s: float
    choice: int
    amount: float


@dataclass(frozen=True, slots=True)
class Phase:
    name: str
    lanes: tuple[tuple[Step, ...], ...]

    def count(self, fault: Fault) -> int:
        return sum(step.fault is fault for lane in self.lanes for step in lane)


@dataclass(frozen=True, slots=True)
class Size:
    """How much of everything.

    `frozen_at_once`: workers of one zombie batch. `others`: how often each fault that has no count
    of its own. `spell_s`: how long something stays broken.
    """

    name: str
    workers: int
    apis: int
    serves: int
    clients: int
    worker_kills: int
    api_kills: int
    postgres_kills: int
    zombies: int
    frozen_at_once: int
    others: int
    spell_s: tuple[float, float]
    dead_clients: int
    runs: int
    events: int
    reconnects: int


SIZES = {
    "ci": Size(
        name="ci",
        workers=2,
        apis=1,
        serves=1,
        clients=16,
        worker_kills=5,
        api_kills=2,
        postgres_kills=2,
        zombies=1,
        frozen_at_once=2,
        others=1,
        spell_s=(0.5, 1.5),
        dead_clients=20,
        runs=60,
        events=3_000,
        reconnects=30,
    ),
    "full": Size(
        name="full",
        workers=9,
        apis=3,
        serves=2,
        clients=48,
        worker_kills=310,
        api_kills=105,
        postgres_kills=52,
        zombies=200,
        frozen_at_once=9,
        others=8,
        spell_s=(1.0, 6.0),
        dead_clients=200,
        runs=5_000,
        events=500_000,
        reconnects=2_000,
    ),
}


def make_plan(seed: int, size: Size) -> list[Phase]:
    """All phases of a size. The small one does everything at once, to be quick."""
    rng = random.Random(f"{seed}:plan")
    kills = _lane(rng, Fault.KILL_WORKER, size.worker_kills, (0.1, 1.0))
    api_kills = _lane(rng, Fault.KILL_API, size.api_kills, (1.0, 4.0))
    # Not every frozen worker drives something at that moment.
    batches = max(1, round(1.15 * size.zombies / size.frozen_at_once))
    zombies = _lane(rng, Fault.FREEZE, batches, (0.5, 1.5), (0.0, 1.0))
    postgres = _lane(rng, Fault.KILL_POSTGRES, size.postgres_kills, (1.0, 3.0), (0.0, 1.5))
    redis = tuple(
        step
        for fault in REDIS_FAULTS
        for step in _lane(rng, fault, max(1, size.others // 2), (0.2, 1.5), size.spell_s)
    )
    lines = _network(rng, size)
    trouble = tuple(_trouble(rng, size))
    dead = _lane(rng, Fault.DEAD_CLIENTS, 1, (0.0, 0.1))
    disk = _lane(rng, Fault.FULL_DISK, 1, (0.0, 0.1))
    if size.name == "ci":
        return [
            Phase("everything", (kills, api_kills, zombies, lines, _shuffled(rng, trouble))),
            Phase("servers", (postgres, redis, dead, disk)),
        ]
    return [
        Phase("kills", (kills, api_kills)),
        Phase("zombies", (zombies,)),
        Phase("Postgres", (postgres, _lane(rng, Fault.CUT_SESSIONS, size.others, (3.0, 9.0)))),
        Phase("Redis", (redis,)),
        Phase("network", (lines,)),
        Phase("clocks, poison, drains, outages", (_shuffled(rng, trouble),)),
        Phase("dead clients", (dead,)),
        Phase("disk", (disk,)),
    ]


def more_freezing(seed: int) -> Iterator[Step]:
    """Further zombie batches, without end, for when chance gave too few."""
    rng = random.Random(f"{seed}:more")
    while True:
        yield from _lane(rng, Fault.FREEZE, 1, (0.1, 0.5))


def _network(rng: random.Random, size: Size) -> tuple[Step, ...]:
    """What the proxies do, to workers, tools and clients, in any order."""
    often = size.others
    long = (11.0, 13.0)
    steps = [
        *_lane(rng, Fault.STALL_LINK, max(1, often // 2), (0.1, 1.0), long),
        *_lane(rng, Fault.HALF_OPEN_LINK, often // 2, (0.1, 1.0), (1.0, 12.0)),
        *_lane(rng, Fault.RESET_LINK, often, (0.1, 1.0)),
        *_lane(rng, Fault.BAD_TOOL_LINE, often, (0.1, 1.0), size.spell_s),
        *_lane(rng, Fault.BAD_CLIENT_LINE, 2 * often, (0.1, 1.0), size.spell_s),
    ]
    return _shuffled(rng, tuple(steps))


def _trouble(rng: random.Random, size: Size) -> Iterator[Step]:
    """What is no fault of a server: wrong clocks, orderly stops, outages of tools, poison."""
    yield from _lane(rng, Fault.CLOCK_JUMP, 3 * size.others, (0.2, 1.0), (-3600.0, 3600.0))
    yield from _lane(rng, Fault.DRAIN, size.others, (0.2, 1.0))
    yield from _lane(rng, Fault.TOOL_OUTAGE, size.others, (0.2, 1.0), size.spell_s)
    yield from _lane(rng, Fault.POISON, max(1, size.others // 4), (0.2, 1.0))


def _lane(
    rng: random.Random,
    fault: Fault,
    count: int,
    pause_s: tuple[float, float],
    amount: tuple[float, float] = (0.0, 1.0),
) -> tuple[Step, ...]:
    return tuple(
        Step(
            fault,
            round(rng.uniform(*pause_s), 3),
            rng.randrange(1 << 16),
            round(rng.uniform(*amount), 3),
        )
        for _ in range(count)
    )


def _shuffled(rng: random.Random, steps: tuple[Step, ...]) -> tuple[Step, ...]:
    found = list(steps)
    rng.shuffle(found)
    return tuple(found)
