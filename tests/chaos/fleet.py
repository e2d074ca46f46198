"""The processes under test: API, worker and serve processes in slots, to be killed and frozen.

A slot keeps its role, its HTTP port and its way to Postgres over all the lives of its process. A
process that was killed is started again at once, unless the suite is ending. The fleet remembers
which processes it disturbed, so that the checker can tell a take-over from a theft.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.wire import Broken, ask
from tests.servers import DIE_WITH_PARENT, free_port

START_S = 180.0
READY_S = 25.0
END_S = 30.0
LOOK_S = 0.05
STALE = re.compile(r"^flexrun_journal_stale_writes_total(?:\{[^}]*\})? (\S+)$", re.MULTILINE)
COMMAND = [sys.executable, "-I", "-S", "-c", DIE_WITH_PARENT, str(os.getpid()), sys.executable]


@dataclass(eq=False)
class Slot:
    """A place for one process. `environment` is what it has besides that of the fleet, `once` what
    only its next life has."""

    name: str
    role: str
    port: int
    environment: dict[str, str] = field(default_factory=dict)
    once: dict[str, str] = field(default_factory=dict)
    process: asyncio.subprocess.Process | None = None
    lives: int = 0
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    is_frozen: bool = False
    stays_down: bool = False
    keeper: asyncio.Task[None] | None = None
    log: Path = Path()

    @property
    def is_api(self) -> bool:
        return self.role in ("api", "serve")

    @property
    def drives(self) -> bool:
        return self.role in ("worker", "serve")

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.returncode is None


def clean_environment(root: Path) -> dict[str, str]:
    """Nobody's settings, nobody's coverage: what ends by SIGKILL is never measured."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FLEXRUN_", "COVERAGE_"))}
    return {**kept, "PYTHONPATH": str(root)}


class Fleet:
    """All slots.

    `disturbed` are processes whose runs others may take, `struck` those among them that the suite
    did something to; the others ended by themselves, or were killed by what they ran. `app_root` is
    the folder in which `app` lies: a copy of it, or a mutant.
    """

    def __init__(self, folder: Path, environment: dict[str, str], app_root: Path) -> None:
        self.slots: list[Slot] = []
        self.disturbed: set[int] = set()
        self.struck: set[int] = set()
        self.kills: Counter[str] = Counter()
        self.folder = folder
        self._app_root = app_root
        self._environment = {**clean_environment(app_root), **environment}
        self._is_closing = False

    def add(self, role: str, environment: dict[str, str]) -> Slot:
        name = f"{role}-{sum(slot.role == role for slot in self.slots)}"
        slot = Slot(name, role, free_port(), dict(environment))
        self.slots.append(slot)
        return slot

    def drivers(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.drives]

    def apis(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.is_api]

    async def start_all(self) -> None:
        """Start every slot that has no process yet; returns when all are ready."""
        for slot in self.slots:
            if slot.keeper is None:
                slot.keeper = asyncio.create_task(self._keep(slot), name=slot.name)
        await self.all_ready()

    async def all_ready(self) -> None:
        """Until every process that should be there is there."""
        async with asyncio.timeout(START_S):
            for slot in self.slots:
                if not slot.stays_down:
                    await slot.ready.wait()

    async def live_once(self, slot: Slot) -> None:
        """One life of a slot that `stays_down`, from its start to its end."""
        await self._keep(slot)

    async def _keep(self, slot: Slot) -> None:
        """Start the process again whenever it ends, whoever or whatever ended it."""
        while True:
            await self._spawn(slot)
            assert slot.process is not None
            up = asyncio.create_task(self._wait_up(slot))
            await slot.process.wait()
            up.cancel()
            self.disturbed.add(slot.pid)
            slot.ready.clear()
            if self._is_closing or slot.stays_down:
                return
            await asyncio.sleep(LOOK_S)

    async def _spawn(self, slot: Slot) -> None:
        slot.lives += 1
        slot.log = self.folder / f"{slot.name}-{slot.lives}.log"
        where = ("--host", "127.0.0.1", "--port", str(slot.port))
        once, slot.once = slot.once, {}
        with slot.log.open("ab") as log:
            slot.process = await asyncio.create_subprocess_exec(
                *(*COMMAND, "-m", "app.cli.main", slot.role, *where),
                cwd=self._app_root,
                env={**self._environment, **slot.environment, **once},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    async def _wait_up(self, slot: Slot) -> None:
        assert slot.process is not None
        try:
            async with asyncio.timeout(READY_S):
                while not await self._is_up(slot):
                    await asyncio.sleep(LOOK_S)
        except TimeoutError:
            # As a liveness probe would. The report counts it.
            self.kills["never ready"] += 1
            self.strike(slot)
            _send(slot.process, signal.SIGKILL)
        else:
            slot.ready.set()

    async def _is_up(self, slot: Slot) -> bool:
        if b"ready at" not in slot.log.read_bytes():
            return False
        try:
            return (await ask(slot.port, "GET", "/livez")).status == 200
        except Broken:
            return False

    async def kill(self, slot: Slot) -> int:
        """SIGKILL; its pid. The next life starts by itself, unless the slot `stays_down`."""
        assert slot.process is not None
        process = slot.process
        slot.ready.clear()
        self.struck.add(process.pid)
        if process.returncode is None:
            process.kill()
        await process.wait()
        self.kills[slot.role] += 1
        return process.pid

    def strike(self, slot: Slot) -> None:
        """Something is done to this process: others may take its runs."""
        self.disturbed.add(slot.pid)
        self.struck.add(slot.pid)

    def freeze(self, slot: Slot) -> None:
        assert slot.process is not None
        self.strike(slot)
        slot.is_frozen = True
        _send(slot.process, signal.SIGSTOP)

    def thaw(self, slot: Slot) -> None:
        assert slot.process is not None
        _send(slot.process, signal.SIGCONT)
        slot.is_frozen = False

    async def stale_writes(self, slot: Slot) -> int:
        """How many appends of this process were refused because the lease was lost."""
        try:
            answer = await ask(slot.port, "GET", "/metrics")
        except Broken:
            return 0
        found = STALE.search(answer.body.decode())
        return int(float(found[1])) if found else 0

    async def close(self) -> list[int]:
        """SIGTERM for all; those that do not end are killed. The exit codes."""
        self._is_closing = True
        codes = await asyncio.gather(*(self._stop(slot) for slot in self.slots if slot.is_alive))
        keepers = [slot.keeper for slot in self.slots if slot.keeper is not None]
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)
        return codes

    async def _stop(self, slot: Slot) -> int:
        assert slot.process is not None
        _send(slot.process, signal.SIGCONT)
        _send(slot.process, signal.SIGTERM)
        try:
            return await asyncio.wait_for(slot.process.wait(), END_S)
        except TimeoutError:
            slot.process.kill()
            return await slot.process.wait()


def _send(process: asyncio.subprocess.Process, number: int) -> None:
    """A process that has ended by now needs no signal."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)
