"""The disk under Postgres runs full, and is freed again (I20): in a world of its own.

The data of Postgres lie on a small tmpfs, its write-ahead log beside it: a full log volume stops
any Postgres, a full data volume makes single statements fail, which is what the service has to
live with. Needs root for the mount; without, the phase says that it was not run.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path

from tests.chaos.plan import Step
from tests.chaos.rig import LOOK_S, Rig, open_rig
from tests.chaos.wire import Broken, ask
from tests.chaos.workload import Order, order

VOLUME = "160m"
REFUSED_WITHIN_S = 60.0
FULL_S = 3.0
RUNS = 20


async def full_disk(rig: Rig, step: Step) -> None:
    """Fill it under load, see POST refused with 503, free it, and let everything end."""
    volume = rig.folder / f"volume-{step.choice}"
    volume.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={VOLUME},mode=755", "tmpfs", str(volume)]
    mounted = await asyncio.create_subprocess_exec(*command, stderr=subprocess.DEVNULL)
    if await mounted.wait() != 0:
        rig.notes["full disk"] = "not run: a volume can not be mounted here"
        return
    try:
        async with open_rig(
            rig.seed,
            app_root=rig.app_root,
            logs=rig.fleet.folder / "disk",
            data=volume / "postgres",
            wal=rig.folder / f"wal-{step.choice}",
        ) as small:
            watchdog = asyncio.create_task(small.postgres.supervise())
            try:
                await _fill_and_free(small, volume / "ballast")
            finally:
                watchdog.cancel()
            checker = await small.verdict()
            refused = small.clients.log.unavailable
            rig.notes["full disk"] = (
                f"{checker.counts['runs']} runs, {refused} requests answered 503, Postgres gave up "
                f"{small.postgres.restarts} times and was started again"
            )
            rig.violations += checker.violations
    finally:
        unmounted = await asyncio.create_subprocess_exec("umount", "-l", str(volume))
        await unmounted.wait()


async def _fill_and_free(small: Rig, ballast: Path) -> None:
    for role in ("api", "worker"):
        await small.add(role)
    await small.start()
    lives = [asyncio.create_task(small.clients.live(order(small.seed, n))) for n in range(RUNS)]
    while small.clients.finished < RUNS // 4:
        await asyncio.sleep(LOOK_S)
    _fill(ballast)
    try:
        extra = await _refused(small)
        await asyncio.sleep(FULL_S)
    finally:
        os.unlink(ballast)
        # No lease could be renewed: whoever was too late for that gave its runs up.
        for slot in small.fleet.drivers():
            small.fleet.strike(slot)
    await asyncio.gather(*lives, *(small.clients.live(order) for order in extra))
    await small.settle()


def _fill(ballast: Path) -> None:
    """Take everything that is left of the volume."""
    with ballast.open("wb") as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    os.write(file.fileno(), b"\0" * size)
            except OSError:
                continue


async def _refused(small: Rig) -> list[Order]:
    """POST new work until it is refused as the API promises; what was sent, accepted or not."""
    port = small.fleet.apis()[0].port
    number = 10_000
    sent: list[Order] = []
    try:
        async with asyncio.timeout(REFUSED_WITHIN_S):
            while True:
                number += 1
                extra = order(small.seed, number)
                sent.append(extra)
                headers = {"Idempotency-Key": extra.key}
                try:
                    answer = await ask(port, "POST", "/v1/runs", extra.envelope, headers)
                except Broken:
                    await asyncio.sleep(LOOK_S)
                    continue
                if answer.status == 503 and answer.is_problem and "retry-after" in answer.headers:
                    small.clients.log.unavailable += 1
                    return sent
                if answer.status >= 500:
                    small.report("I20 full disk", f"POST answered {answer.status} {answer.body!r}")
                    return sent
    except TimeoutError:
        small.report("I20 full disk", "a full disk never refused a POST")
    return sent
