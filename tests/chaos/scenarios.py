"""Short stories, each the shortest way to where one kind of bug would show.

For `mutants.py`: a scenario is run once on the service as it is, where the checker has to find
nothing, and once on every mutant that it is meant for, where the checker has to find something.
They wait for conditions, never for a time, but for leases, which are what some of them are about.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

from tests.chaos import archive
from tests.chaos.fleet import Slot
from tests.chaos.history import TERMINAL
from tests.chaos.ledger import read_ledgers
from tests.chaos.proxy import Weather
from tests.chaos.rig import LOOK_S, Rig
from tests.chaos.wire import Broken, Exchange, ask
from tests.chaos.workload import STAGES, Meddling, Order, envelope, node, poison, staged

PATIENCE_S = 30.0
DEATHS_MAX = 6
OPENINGS = 2

Scenario = Callable[[Rig], Awaitable[None]]


def _order(name: str, *nodes: dict[str, Any], **more: Any) -> Order:
    return Order(key=name, kind=name, envelope=envelope(name, list(nodes)), **more)


def _tool(node_id: str, *requires: str, effect: str = "idem", **values: Any) -> dict[str, Any]:
    return node(node_id, *requires, capability=f"chaos.{effect}_1", **values)


async def _until(rig: Rig, query: str, *arguments: Any) -> None:
    """Until the query (`select exists …`) is true."""
    async with asyncio.timeout(PATIENCE_S):
        while not (await archive.fetch(rig.postgres.dsn(), query, *arguments))[0][0]:
            await asyncio.sleep(LOOK_S)


async def _until_started(rig: Rig, run_id: str, node_id: str) -> None:
    """Until the journal says that the node was started."""
    await _until(
        rig,
        """select exists (select from events
        where run_id = $1::text::uuid and type = 'NODE_START' and node_id = $2)""",
        run_id,
        node_id,
    )


async def _until_called(rig: Rig, run_id: str, node_id: str) -> None:
    """Until the call of a node has reached its tool, which is after its start is durable."""
    async with asyncio.timeout(PATIENCE_S):
        while not any(c.node_id == node_id for c in read_ledgers(rig.folder).get(run_id, ())):
            await asyncio.sleep(LOOK_S)


async def _driver_of(rig: Rig, run_id: str) -> Slot:
    """The slot whose worker owns the run."""
    query = "select owner from run_heads where run_id = $1::text::uuid"
    async with asyncio.timeout(PATIENCE_S):
        while True:
            owner = (await archive.fetch(rig.postgres.dsn(), query, run_id))[0][0]
            for slot in rig.fleet.drivers():
                if owner and slot.process and owner.split(":")[-2] == str(slot.pid):
                    return slot
            await asyncio.sleep(LOOK_S)


async def everyday(rig: Rig) -> None:
    """Retries, a question, a pause, a cancel, replans, repeated POSTs, cut streams; nobody dies."""
    await rig.add("api")
    await rig.add("api")
    await rig.add("worker")
    await rig.add("worker")
    await rig.start()
    chain = [_tool("a", behave="500"), node("b", "a"), _tool("c", "b"), node("d", "c")]
    long = [_tool("a", work_s=2.5), node("b", "a"), _tool("c", "b", work_s=2.5)]
    # Long enough to tell a cancel that acts from one that came too late.
    slow = [_tool("a", work_s=0.5), *(_tool(f"b{n}", "a", work_s=3.5) for n in range(2))]
    slow += [_tool("c", "b0", work_s=3.5), node("d", "c")]
    question = [node("a"), _tool("b", "a", effect="once", behave="reset"), node("c", "b")]
    orders = [
        _order("retry", *chain, breaks=(2, 5, 3)),
        _order("question", *question, breaks=(4,)),
        _order("pause", *long, meddling=Meddling.PAUSE, meddle_after=3),
        _order("cancel", *slow, meddling=Meddling.CANCEL, meddle_after=4, by_stream=False),
        _order("long", *long),
        Order("anew", "stages", staged("anew", {STAGES[2]: "refuse"}), breaks=(5, 3)),
        *(_order(f"twin-{n}", node("a"), posts=6, by_stream=False) for n in range(8)),
    ]
    await _live(rig, *orders)
    for run_id in list(rig.clients.log.frames):
        readers = (_replay(rig, run_id, rig.fleet.apis()[0].port, after) for after in (4, 3, 2, 1))
        await asyncio.gather(*readers)


async def _replay(rig: Rig, run_id: str, port: int, after: int) -> None:
    """Read a finished run again from somewhere on. Several at once share what the API has of it."""
    headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
    async with Exchange(port) as exchange:
        await exchange.send("GET", f"/v1/runs/{run_id}/events", None, headers)
        connection = rig.clients.connection(run_id, after)
        async for event in exchange.events():
            if event.id is not None:
                rig.clients.log.saw(connection, event.id, event.data)
                connection.saw_terminal = event.event in TERMINAL


async def take_over(rig: Rig) -> None:
    """A worker is killed in the middle of a call that may be repeated, and of one that may not."""
    await rig.add("api")
    await rig.add("worker")
    await rig.add("worker")
    await rig.start()
    # Long enough that a busy machine finds the driver and kills it before the tool has answered,
    # and short enough that the call ends within its time limit of 4 s, should it be made again.
    nodes = [_tool("idem", work_s=1.5), _tool("once", effect="once", work_s=3.5)]
    nodes.append(_tool("tail", "idem", work_s=1.5))
    order = _order("taken", *nodes, node("end", "tail", "once"), by_stream=False)
    run_id = await rig.clients.submit(order)
    assert run_id is not None
    following = asyncio.create_task(rig.clients.follow(order, run_id))
    await _until_called(rig, run_id, "once")
    victim = await _driver_of(rig, run_id)
    victim.stays_down = True
    await rig.fleet.kill(victim)
    await _ended(following)


async def late_append(rig: Rig) -> None:
    """A worker's append is on its way for longer than its lease; meanwhile the run was claimed.

    The one that claimed it dies before it writes anything, so that the epoch alone tells the late
    append that it comes too late.
    """
    await rig.add("api")
    late = await rig.add("worker", linked=True)
    await rig.start()
    order = _order("late", _tool("a", work_s=1.0), node("b", "a"), by_stream=False)
    run_id = await rig.clients.submit(order)
    assert run_id is not None
    following = asyncio.create_task(rig.clients.follow(order, run_id))
    await _until_started(rig, run_id, "a")
    rig.fleet.disturbed.add(late.pid)
    rig.links[late.name].set(Weather(stalled=True))
    heir = await rig.add("worker")
    heir.stays_down = True
    heir.once = {"FLEXRUN_FAILPOINT": "claim.after_commit"}
    over = "select lease_until < clock_timestamp() from workers where pid = $1"
    await _until(rig, over, late.pid)
    async with asyncio.timeout(PATIENCE_S):
        await rig.fleet.live_once(heir)  # it dies of its first claim
        while rig.watcher.sightings[run_id][-1][0] < 2:
            await asyncio.sleep(LOOK_S)
    # The bytes are with the proxy. While they arrive their sender is frozen: what they do stays.
    rig.fleet.freeze(late)
    rig.links[late.name].clear()
    looks = rig.watcher.looks
    while rig.watcher.looks < looks + 3:
        await asyncio.sleep(LOOK_S)
    rig.fleet.thaw(late)
    await _ended(following)
    await rig.note_stale_writes(late)
    if not rig.stale_writes:
        rig.report("I4 stale writes", "the late append was not refused")


async def lost_append(rig: Rig) -> None:
    """A process is cut off from Postgres for good, and killed: what it did not get durable it may
    not have shown, nor acknowledged."""
    lost = await rig.add("serve", linked=True)
    await rig.start()
    order = _order("lost", _tool("a", work_s=1.0), node("b", "a"), _tool("c", "b"))
    following = asyncio.create_task(rig.clients.live(order))
    await _until(rig, "select exists (select from events where type = 'NODE_START')")
    lost.stays_down = True
    rig.links[lost.name].set(Weather(half_open=True))
    async with asyncio.timeout(PATIENCE_S):
        # Its result is decided on, and on its way, before anything else is.
        while not any(c.end for calls in read_ledgers(rig.folder).values() for c in calls):
            await asyncio.sleep(LOOK_S)
    # Without a key, which would be looked up first.
    unsure = _order("unsure", node("a"))
    with contextlib.suppress(Broken):
        answer = await ask(lost.port, "POST", "/v1/runs", unsure.envelope)
        if answer.status == 202:
            rig.clients.post_of(unsure).run_ids.append(answer.json["run_id"])
    await rig.fleet.kill(lost)
    await rig.add("serve")
    await rig.fleet.start_all()
    await _ended(following)


async def poisoned(rig: Rig) -> None:
    """A run kills whoever drives it; its neighbours live on."""
    await rig.add("api")
    await rig.add("worker")
    await rig.add("worker")
    await rig.start()
    order = poison("poison")
    run_id = await rig.clients.submit(order)
    assert run_id is not None
    rig.expected_poison.add(run_id)
    following = asyncio.create_task(rig.clients.follow(order, run_id))
    neighbour = asyncio.create_task(
        rig.clients.live(_order("neighbour", _tool("a", work_s=2.0), node("b", "a")))
    )
    async with asyncio.timeout(2 * PATIENCE_S):
        while not following.done() and sum(s.lives for s in rig.fleet.drivers()) < 2 + DEATHS_MAX:
            await asyncio.sleep(LOOK_S)
    await _ended(neighbour)
    following.cancel()


async def outage(rig: Rig) -> None:
    """A tool fails for all; many calls of two workers meet its breaker at once."""
    await rig.add("api")
    await rig.add("worker")
    await rig.add("worker")
    await rig.start()
    await rig.outage(1, down=True)
    fan = [_tool(f"w{n}", work_s=0.2) for n in range(8)]
    lives: list[asyncio.Task[None]] = []
    shared = """select count(*) from breaker_transitions
        where kind = 'tripped' and worker_id = ''"""
    async with asyncio.timeout(PATIENCE_S):
        # A process that is short of time takes Redis to be away, and judges alone: try again.
        while (await archive.fetch(rig.postgres.dsn(), shared))[0][0] < OPENINGS:
            orders = [_order(f"outage-{len(lives)}-{n}", *fan) for n in range(2)]
            lives += [asyncio.create_task(rig.clients.live(order)) for order in orders]
            await asyncio.sleep(1)
    await rig.outage(1, down=False)
    await _ended(*lives)


async def _live(rig: Rig, *orders: Order) -> None:
    await _ended(*(asyncio.create_task(rig.clients.live(order)) for order in orders))


async def _ended(*tasks: asyncio.Task[None]) -> None:
    """All of them, or what there is after a while: what is missing then the checker will say."""
    done, late = await asyncio.wait(tasks, timeout=PATIENCE_S)
    for task in late:
        task.cancel()
    for task in done:
        task.result()


SCENARIOS: dict[str, Scenario] = {
    "everyday": everyday,
    "take_over": take_over,
    "late_append": late_append,
    "lost_append": lost_append,
    "poisoned": poisoned,
    "outage": outage,
}
