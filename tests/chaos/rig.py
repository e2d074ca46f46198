"""Everything a scenario stands on: servers, tools, proxies, processes, clients, and the verdict.

One `Rig` is one database. Scenarios (the phases of `phases.py`, those of `mutants.py`) break things
through it and say nothing about right or wrong: `verdict` asks the checker.
"""

from __future__ import annotations

import asyncio
import compileall
import contextlib
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

import asyncpg

from app.store.migrate import migrate
from tests.chaos import archive
from tests.chaos.checker import Checker, Violation
from tests.chaos.clients import Clients
from tests.chaos.clock import ShiftedClock, make_clock
from tests.chaos.fleet import COMMAND, Fleet, Slot, clean_environment
from tests.chaos.history import WAITING, RunRecord
from tests.chaos.ledger import read_ledgers
from tests.chaos.proxy import FaultProxy
from tests.chaos.servers import ChaosPostgres, ChaosRedis
from tests.chaos.wire import ask
from tests.chaos.workload import TOOLS, capabilities, facets
from tests.servers import free_port

REPOSITORY = Path(__file__).parents[2]
SETTLE_S = 60.0
LOOK_S = 0.1

SETTINGS = {
    "FLEXRUN_EGRESS_ALLOW": "127.0.0.1",
    "FLEXRUN_BACKOFF_BASE_MS": "5",
    "FLEXRUN_BACKOFF_MAX_MS": "200",
    "FLEXRUN_DRAIN_GRACE_S": "2",
    # Few, so that the runs are spread over the processes and every fault meets some.
    "FLEXRUN_RUNS_MAX": "32",
    "CB_THRESHOLD": "5",
    "CB_COOLDOWN_S": "1",
}


@dataclass
class Rig:
    """A scenario's world. `links` are the ways of single slots to Postgres."""

    folder: Path
    seed: int
    postgres: ChaosPostgres
    redis: ChaosRedis
    fleet: Fleet
    clients: Clients
    watcher: archive.Watcher
    redis_proxy: FaultProxy
    tool_proxy: FaultProxy
    tool_ports: list[int]
    app_root: Path
    links: dict[str, FaultProxy] = field(default_factory=dict)
    doors: dict[str, FaultProxy] = field(default_factory=dict)
    clock: ShiftedClock | None = None
    postgres_up_at: float = 0.0
    postgres_down_since: float = 0.0
    frozen_at_once: int = 1
    dead_clients: int = 20
    zombies: int = 0
    expected_poison: set[str] = field(default_factory=set)
    inflicted: Counter[str] = field(default_factory=Counter)
    violations: list[Violation] = field(default_factory=list)
    stale: dict[int, int] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    async def add(
        self, role: str, *, linked: bool = False, environment: dict[str, str] | None = None
    ) -> Slot:
        """A slot; `linked`: its way to Postgres leads through a proxy of its own."""
        slot = self.fleet.add(role, environment or {})
        if linked:
            link = FaultProxy(lambda: self.postgres.port, self.seed)
            await link.start()
            self.links[slot.name] = link
            slot.environment["DATABASE_URL"] = self.postgres.dsn(link.port)
        if slot.is_api:
            door = FaultProxy(lambda: slot.port, self.seed)
            await door.start()
            self.doors[slot.name] = door
        return slot

    async def start(self) -> None:
        """Start all slots, and tell them of the tools."""
        await self.fleet.start_all()
        ports = [self.tool_proxy.port, *self.tool_ports[1:]]
        registrations = {
            "/v1/facets": facets(),
            "/v1/capabilities": capabilities(ports, self.tool_ports[0]),
        }
        for path, bodies in registrations.items():
            for body in bodies:
                answer = await self.clients.insist("POST", path, body)
                assert answer.status in (200, 201), answer.body
        self.watcher.start()

    def clear(self) -> None:
        """No proxy misbehaves any more."""
        for proxy in (
            *self.links.values(),
            *self.doors.values(),
            self.redis_proxy,
            self.tool_proxy,
        ):
            proxy.clear()

    def report(self, rule: str, what: str) -> None:
        """A violation that only the one who caused the fault can see."""
        self.violations.append(Violation(rule, "", what))

    async def note_stale_writes(self, slot: Slot) -> None:
        """Ask a process, while it lives, how many of its appends were refused as stale."""
        pid = slot.pid
        found = await self.fleet.stale_writes(slot)
        self.stale[pid] = max(found, self.stale.get(pid, 0))

    @property
    def stale_writes(self) -> int:
        return sum(self.stale.values())

    async def outage(self, tool: int, *, down: bool) -> None:
        """Let every call to a tool fail, or no longer."""
        await ask(self.tool_ports[tool], "POST", "/outage", {"down": down})

    async def settle(self, limit_s: float = SETTLE_S) -> float:
        """The faults have stopped: wait until nothing is under way any more, at most 60 s.

        Returns how long it took. What is not over by then the checker will find.
        """
        started = monotonic()
        await self.fleet.all_ready()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while await self._busy():
                    await asyncio.sleep(LOOK_S)
        return monotonic() - started

    async def _busy(self) -> bool:
        """Whether a run is under way, or waits for somebody who is going to answer it, or a signal
        has no answer yet."""
        if await archive.signals_open(self.postgres.dsn()):
            return True
        left = self.clients.log.left_waiting
        return any(
            status not in WAITING or run_id not in left
            for run_id, status in await archive.unfinished(self.postgres.dsn())
        )

    async def verdict(self) -> Checker:
        """Judge everything: client logs, ledger, database."""
        assert self.watcher.is_watching
        connection = await asyncpg.connect(self.postgres.dsn())
        try:
            around = await archive.surroundings(connection)
            around.disturbed, around.struck = self.fleet.disturbed, self.fleet.struck
            around.expected_poison = self.expected_poison
            around.may_wait = self.clients.log.left_waiting
            checker = Checker(self.clients.log, around, list(self.violations))
            ledger = read_ledgers(self.folder)
            async for run in archive.runs(connection, self.clients.log, ledger, self.watcher):
                known = len(checker.violations)
                checker.judge(run)
                if len(checker.violations) > known:
                    self._keep(run)
            checker.finish()
            if not await archive.refuses_change(connection):
                what = "the database lets stored events be changed"
                checker.violations.append(Violation("I1 never changes", "", what))
        finally:
            await connection.close()
        return checker

    def _keep(self, run: RunRecord) -> None:
        """The journal of a run that something is wrong with, beside the output of processes."""
        path = self.fleet.folder / f"run-{run.run_id}.jsonl"
        path.write_bytes(b"".join(row.body + b"\n" for row in run.rows))


@asynccontextmanager
async def open_rig(
    seed: int,
    *,
    app_root: Path | None = None,
    change: Callable[[Path], None] = lambda app: None,
    data: Path | None = None,
    wal: Path | None = None,
    logs: Path | None = None,
    **settings: str,
) -> AsyncIterator[Rig]:
    """A world of its own, taken down at the end.

    The processes run a copy of `app/`, so that nobody edits what is being judged; `change` may
    spoil that copy. `app_root`: the copy of another world, to be shared. `data`: where Postgres
    keeps its files, `wal`: where its write-ahead log, if elsewhere. `logs`: where the output of the
    processes is left.
    """
    with tempfile.TemporaryDirectory(prefix="flexrun-chaos-") as name:
        folder = Path(name)
        os.chmod(folder, 0o755)
        if logs is not None:
            os.makedirs(logs, exist_ok=True)
        async with contextlib.AsyncExitStack() as stack:
            # Not in this loop, which carries all lines of the world that is there already.
            postgres = await asyncio.to_thread(ChaosPostgres, data or folder / "postgres", wal)
            stack.push_async_callback(asyncio.to_thread, postgres.stop)
            await postgres.start()
            redis = ChaosRedis(folder / "redis")
            stack.callback(redis.stop)
            await redis.start()
            await migrate(postgres.dsn())
            tool_ports = [await _start_tool(folder, n, stack) for n in range(TOOLS)]
            redis_proxy = await _proxy(stack, lambda: redis.port, seed)
            tool_proxy = await _proxy(stack, lambda: tool_ports[0], seed)
            environment = {
                **SETTINGS,
                "DATABASE_URL": postgres.dsn(),
                "REDIS_URL": redis.url(redis_proxy.port),
                **settings,
            }
            if app_root is None:
                app_root = await asyncio.to_thread(_copy, folder, change)
            fleet = Fleet(logs or folder, environment, app_root)
            stack.push_async_callback(fleet.close)
            watcher = archive.Watcher(postgres.dsn())
            stack.push_async_callback(watcher.close)
            rig = Rig(
                folder=folder,
                seed=seed,
                postgres=postgres,
                redis=redis,
                fleet=fleet,
                clients=Clients(lambda: _addresses(rig), seed),
                watcher=watcher,
                redis_proxy=redis_proxy,
                tool_proxy=tool_proxy,
                tool_ports=tool_ports,
                app_root=app_root,
                clock=make_clock(folder),
            )
            yield rig
            for proxy in (*rig.links.values(), *rig.doors.values()):
                stack.push_async_callback(proxy.close)


def _addresses(rig: Rig) -> list[int]:
    """Every API, straight and through its door; also those that are dead just now."""
    straight = [slot.port for slot in rig.fleet.apis()]
    return [*straight, *(door.port for door in rig.doors.values())]


async def _proxy(
    stack: contextlib.AsyncExitStack, target: Callable[[], int], seed: int
) -> FaultProxy:
    proxy = FaultProxy(target, seed)
    await proxy.start()
    stack.push_async_callback(proxy.close)
    return proxy


def _copy(folder: Path, change: Callable[[Path], None]) -> Path:
    """The service as it is now, in a folder of its own."""
    root = folder / "flexrun"
    for name in ("app", "migrations"):
        shutil.copytree(
            REPOSITORY / name, root / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(REPOSITORY / "alembic.ini", root)
    change(root / "app")
    compileall.compile_dir(root / "app", quiet=1)
    return root


async def _start_tool(folder: Path, number: int, stack: contextlib.AsyncExitStack) -> int:
    """A tool process that ends with the suite; its port, once it answers."""
    port = free_port()
    ledger = folder / f"tool-{number}.ledger"
    process = await asyncio.create_subprocess_exec(
        *(*COMMAND, "-m", "tests.chaos.tool_server", str(port), str(ledger)),
        cwd=REPOSITORY,
        env=clean_environment(REPOSITORY),
        stdout=asyncio.subprocess.PIPE,
        stderr=sys.stderr,
    )

    async def end() -> None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()

    stack.push_async_callback(end)
    assert process.stdout is not None
    assert await process.stdout.readline() == b"ready\n"
    return port
