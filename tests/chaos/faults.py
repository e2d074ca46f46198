"""Does what the plan says: one function a fault. Each returns when its fault is over.

A function takes the `Rig` and a `Step`, and judges nothing, but for two faults whose effect only
the one who caused it can see: clients that never read, and the full disk (`disk.py`).
"""

from __future__ import annotations

import asyncio
import signal
import time
import traceback
from collections.abc import Awaitable, Callable

from tests.chaos import archive
from tests.chaos.dead_clients import dead_clients
from tests.chaos.disk import full_disk
from tests.chaos.fleet import Slot
from tests.chaos.plan import Fault, Step
from tests.chaos.proxy import Weather
from tests.chaos.rig import LOOK_S, Rig
from tests.chaos.workload import poison

LEASE_S = 10.0
TAKE_OVER_S = 30.0
BUSY_WITHIN_S = 5.0
OUTAGE_OF_A_LEASE_S = 2.0
"""A worker's renewal may be 3 s old, and the next try to connect may take as long."""
COMES_BACK_S = 5.0
OVER_WITHIN_S = 300.0


async def _choose(rig: Rig, step: Step, candidates: Callable[[], list[Slot]]) -> Slot:
    """One of the slots that are ready now; waits for one."""
    async with asyncio.timeout(60):
        while not (ready := [s for s in candidates() if s.ready.is_set() and not s.is_frozen]):
            await asyncio.sleep(LOOK_S)
    return ready[step.choice % len(ready)]


async def _kill_worker(rig: Rig, step: Step) -> None:
    await rig.fleet.kill(await _choose(rig, step, rig.fleet.drivers))


async def _kill_api(rig: Rig, step: Step) -> None:
    await rig.fleet.kill(await _choose(rig, step, rig.fleet.apis))


async def _drain(rig: Rig, step: Step) -> None:
    """SIGTERM: an orderly end, after which the slot comes back."""
    slot = await _choose(rig, step, lambda: rig.fleet.slots)
    assert slot.process is not None
    rig.fleet.strike(slot)
    process = slot.process
    process.send_signal(signal.SIGTERM)
    await process.wait()


async def _kill_postgres(rig: Rig, step: Step) -> None:
    """Down for `amount` seconds. A database that is away for as long as a lease disturbs all, and
    so do several outages in which nobody had the time to come back."""
    if time.monotonic() - rig.postgres_up_at > COMES_BACK_S:
        rig.postgres_down_since = time.monotonic()
    rig.postgres.kill()
    await asyncio.sleep(step.amount)
    await rig.postgres.start()
    rig.postgres_up_at = time.monotonic()
    if rig.postgres_up_at - rig.postgres_down_since > OUTAGE_OF_A_LEASE_S:
        _disturb_all(rig)


async def _cut_sessions(rig: Rig, step: Step) -> None:
    """`pg_terminate_backend` for a third of the sessions."""
    _disturb_all(rig)
    await archive.fetch(
        rig.postgres.dsn(),
        """select pg_terminate_backend(pid) from pg_stat_activity
        where datname = current_database() and pid <> pg_backend_pid() and pid % 3 = $1""",
        step.choice % 3,
    )


def _disturb_all(rig: Rig) -> None:
    """Any worker may be taken for dead now: it lost its lock session, or its lease."""
    for slot in rig.fleet.drivers():
        if slot.process is not None:
            rig.fleet.strike(slot)


async def _freeze(rig: Rig, step: Step) -> None:
    """SIGSTOP for several, until others drive their runs; then SIGCONT, and count stale writes."""
    chosen = [slot for slot in await _busiest(rig) if slot.is_alive]
    for slot in chosen:
        rig.fleet.freeze(slot)
    held = {slot.pid: await _owned(rig, slot.pid) for slot in chosen}
    await asyncio.sleep(LEASE_S)
    try:
        async with asyncio.timeout(TAKE_OVER_S):
            for pid in held:
                while await _owned(rig, pid):
                    await asyncio.sleep(LOOK_S)
    except TimeoutError:
        rig.report("I4 take-over", f"runs of {[s.name for s in chosen]} were not taken over")
    for slot in chosen:
        rig.fleet.thaw(slot)
    rig.zombies += sum(count > 0 for count in held.values())
    await asyncio.sleep(step.amount)
    await asyncio.gather(*(rig.note_stale_writes(slot) for slot in chosen))


async def _busiest(rig: Rig) -> list[Slot]:
    """Those that drive most at this moment, but not all: a zombie without a run writes nothing."""
    deadline = asyncio.get_running_loop().time() + BUSY_WITHIN_S
    while True:
        ready = [s for s in rig.fleet.drivers() if s.ready.is_set() and not s.is_frozen]
        held = {slot.pid: await _owned(rig, slot.pid) for slot in ready}
        chosen = sorted(ready, key=lambda slot: -held[slot.pid])[: rig.frozen_at_once]
        enough = len(ready) > rig.frozen_at_once and all(held[slot.pid] for slot in chosen)
        if enough or (asyncio.get_running_loop().time() > deadline and len(ready) > 1):
            return chosen[: len(ready) - 1]
        await asyncio.sleep(LOOK_S)


async def _owned(rig: Rig, pid: int) -> int:
    """How many runs the worker with this pid owns."""
    return await archive.owned_by(rig.postgres.dsn(), pid)


# --- lines ----------------------------------------------------------------------------------------


async def _linked(rig: Rig, step: Step) -> Slot:
    return await _choose(rig, step, lambda: [s for s in rig.fleet.drivers() if s.name in rig.links])


async def _stall_link(rig: Rig, step: Step) -> None:
    """Bytes between a worker and Postgres wait for longer than a lease, then they all arrive."""
    slot = await _linked(rig, step)
    rig.fleet.strike(slot)
    rig.links[slot.name].set(Weather(stalled=True))
    await asyncio.sleep(step.amount)
    rig.links[slot.name].clear()
    await asyncio.sleep(1)
    await rig.note_stale_writes(slot)


async def _half_open_link(rig: Rig, step: Step) -> None:
    slot = await _linked(rig, step)
    rig.fleet.strike(slot)
    rig.links[slot.name].set(Weather(half_open=True))
    await asyncio.sleep(step.amount)
    rig.links[slot.name].clear()
    rig.links[slot.name].reset_all()


async def _reset_link(rig: Rig, step: Step) -> None:
    slot = await _linked(rig, step)
    rig.fleet.strike(slot)
    rig.links[slot.name].reset_all()


async def _bad_tool_line(rig: Rig, step: Step) -> None:
    weathers = (
        Weather(latency_s=0.2),
        Weather(reset_share=0.3),
        Weather(refusing=True),
        Weather(cut_after=20),
    )
    rig.tool_proxy.set(weathers[step.choice % len(weathers)])
    await asyncio.sleep(step.amount)
    rig.tool_proxy.clear()


async def _bad_client_line(rig: Rig, step: Step) -> None:
    weathers = (
        Weather(cut_after=1 + step.choice % 20_000),
        Weather(reset_share=0.5),
        Weather(latency_s=0.1),
        Weather(rate=20_000),
    )
    for door in rig.doors.values():
        door.set(weathers[step.choice % len(weathers)])
    await asyncio.sleep(step.amount)
    for door in rig.doors.values():
        door.clear()
        door.reset_all()


# --- Redis ----------------------------------------------------------------------------------------


async def _kill_redis(rig: Rig, step: Step) -> None:
    rig.redis.kill()
    await asyncio.sleep(step.amount)
    await rig.redis.start()


async def _flush_redis(rig: Rig, step: Step) -> None:
    await rig.redis.command("FLUSHALL")


async def _slow_redis(rig: Rig, step: Step) -> None:
    rig.redis_proxy.set(Weather(latency_s=5.0))
    await asyncio.sleep(step.amount)
    rig.redis_proxy.clear()


async def _read_only_redis(rig: Rig, step: Step) -> None:
    """A replica of nobody refuses writes."""
    await rig.redis.command("REPLICAOF", "127.0.0.1", "1")
    await asyncio.sleep(step.amount)
    await rig.redis.command("REPLICAOF", "NO", "ONE")


async def _spoil_redis(rig: Rig, step: Step) -> None:
    """Every key that there is becomes a string."""
    script = "for _, k in ipairs(redis.call('keys', '*')) do redis.call('set', k, 'spoilt') end"
    await rig.redis.command("EVAL", script, "0")


# --- the rest -------------------------------------------------------------------------------------


async def _tool_outage(rig: Rig, step: Step) -> None:
    tool = step.choice % len(rig.tool_ports)
    await rig.outage(tool, down=True)
    await asyncio.sleep(step.amount)
    await rig.outage(tool, down=False)


async def _clock_jump(rig: Rig, step: Step) -> None:
    if rig.clock is not None:
        rig.clock.jump(int(step.amount))
        await asyncio.sleep(0.5)


async def _poison(rig: Rig, step: Step) -> None:
    """An envelope that kills its workers; it has to end without help."""
    order = poison(f"poison-{rig.seed}-{step.choice}")
    run_id = await rig.clients.submit(order)
    if run_id is not None:
        rig.expected_poison.add(run_id)
        await rig.clients.follow(order, run_id)


INFLICT: dict[Fault, Callable[[Rig, Step], Awaitable[None]]] = {
    Fault.KILL_WORKER: _kill_worker,
    Fault.KILL_API: _kill_api,
    Fault.KILL_POSTGRES: _kill_postgres,
    Fault.CUT_SESSIONS: _cut_sessions,
    Fault.FREEZE: _freeze,
    Fault.DRAIN: _drain,
    Fault.STALL_LINK: _stall_link,
    Fault.HALF_OPEN_LINK: _half_open_link,
    Fault.RESET_LINK: _reset_link,
    Fault.KILL_REDIS: _kill_redis,
    Fault.FLUSH_REDIS: _flush_redis,
    Fault.SLOW_REDIS: _slow_redis,
    Fault.READ_ONLY_REDIS: _read_only_redis,
    Fault.SPOIL_REDIS: _spoil_redis,
    Fault.TOOL_OUTAGE: _tool_outage,
    Fault.BAD_TOOL_LINE: _bad_tool_line,
    Fault.BAD_CLIENT_LINE: _bad_client_line,
    Fault.CLOCK_JUMP: _clock_jump,
    Fault.POISON: _poison,
    Fault.DEAD_CLIENTS: dead_clients,
    Fault.FULL_DISK: full_disk,
}


async def run_lane(rig: Rig, steps: tuple[Step, ...]) -> None:
    """The steps of a lane, one after the other."""
    for step in steps:
        await asyncio.sleep(step.pause_s)
        try:
            async with asyncio.timeout(OVER_WITHIN_S):
                await INFLICT[step.fault](rig, step)
        except TimeoutError as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{step.fault}: waited in vain, in {where.name} at line {where.lineno}"
            rig.report("I26 progress", what)
        rig.inflicted[step.fault] += 1
