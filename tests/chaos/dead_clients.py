"""Clients that open a stream and never read: what they cost, and that they are dropped (I18)."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import psutil

from tests.chaos.plan import Step
from tests.chaos.rig import LOOK_S, Rig
from tests.chaos.workload import Order, envelope, node

VALUE_BYTES = 50_000
VALUES = 160
SERVED_WITHIN_S = 30.0
DROPPED_WITHIN_S = 60.0
COST_EACH_BYTES = 128 * 1024
NOISE_BYTES = 24 * 1024 * 1024
"""What the rest of the load may add to a process in the meantime."""
KILLED = "not judged: the process that served them was killed"


async def dead_clients(rig: Rig, step: Step) -> None:
    """Many streams of a run that is larger than any socket buffer, and nobody reads."""
    key = f"big-{rig.seed}-{step.choice}"
    order = Order(key=key, kind="big", envelope=envelope(key, _big()))
    run_id = await rig.clients.submit(order)
    assert run_id is not None
    await rig.clients.follow(order, run_id)

    slot = rig.fleet.apis()[step.choice % len(rig.fleet.apis())]
    await asyncio.wait_for(slot.ready.wait(), DROPPED_WITHIN_S)
    try:
        process = psutil.Process(slot.pid)
        before = process.memory_info().rss
    except psutil.NoSuchProcess:
        rig.notes["dead clients"] = KILLED
        return
    request = (
        f"GET /v1/runs/{run_id}/events HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n"
        "Connection: close\r\n\r\n"
    )
    sockets: list[socket.socket] = []
    try:
        for _ in range(rig.dead_clients):
            sockets.append(_deaf(slot.port, request.encode()))
        peak = await _until_dropped(rig, sockets, process)
    except ConnectionError:
        rig.notes["dead clients"] = KILLED
        return
    finally:
        for each in sockets:
            each.close()
    if peak is None:
        return
    allowed = rig.dead_clients * COST_EACH_BYTES + NOISE_BYTES
    rig.notes["dead clients"] = (
        f"{rig.dead_clients} clients that never read cost {max(0, peak - before) >> 20} MiB"
    )
    if peak - before > allowed:
        rig.report("I18 dead clients", f"they cost {peak - before} bytes, {allowed} are allowed")


def _big() -> list[dict[str, Any]]:
    """One value that many nodes repeat: a journal of 8 MB, more than a socket's buffers hold."""
    copies = [
        {**node(f"n{i}", "root"), "inputs": {"text": {"from": "root", "pointer": "/text"}}}
        for i in range(VALUES)
    ]
    last = node("last", *(copy["id"] for copy in copies))
    return [node("root", text="x" * VALUE_BYTES), *copies, last]


def _deaf(port: int, request: bytes) -> socket.socket:
    """A connection that asks and takes as little as a socket can."""
    found = socket.socket()
    found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    found.connect(("127.0.0.1", port))
    found.sendall(request)
    return found


async def _until_dropped(
    rig: Rig, sockets: list[socket.socket], process: psutil.Process
) -> int | None:
    """Until the service has let go of every one of them; the most memory it used meanwhile.

    None when other faults came between: in the small size everything happens at once.

    What the kernel still has to deliver keeps the other end open: only the process's own list of
    connections says that it let go.
    """
    ports = {each.getsockname()[1] for each in sockets}

    def served() -> set[tuple[int, int]]:
        # With the number of the file: once it is dropped, a port may be somebody else's.
        found = process.net_connections("tcp")
        return {(c.fd, c.raddr.port) for c in found if c.raddr and c.raddr.port in ports}

    peak = 0
    try:
        async with asyncio.timeout(SERVED_WITHIN_S):
            while len(taken := served()) < len(ports):  # the kernel takes them before the process
                await asyncio.sleep(LOOK_S)
    except (TimeoutError, psutil.NoSuchProcess):
        rig.notes["dead clients"] = "not judged: other faults kept them from being served"
        return None
    try:
        async with asyncio.timeout(DROPPED_WITHIN_S):
            while taken & served():
                peak = max(peak, process.memory_info().rss)
                await asyncio.sleep(LOOK_S)
    except TimeoutError:
        what = f"{len(taken & served())} of {len(ports)} were not dropped in time"
        rig.report("I18 dead clients", what)
    except psutil.NoSuchProcess:
        rig.notes["dead clients"] = KILLED
        return None
    return peak
