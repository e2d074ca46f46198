"""The Postgres and the Redis of the suite: real, on fixed ports, to be killed and started again.

Postgres runs with fsync, full_page_writes and synchronous_commit on, as in service: `kill` is
SIGKILL for the postmaster, after which all its children end by themselves, and `start` recovers
from the write-ahead log. Its data folder can be put on a small volume, to be filled.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import asyncpg

from app.store import embedded_binaries as binaries
from app.store import embedded_files as files
from app.store.embedded_supervisor import CLUSTER_NAME, read_state
from tests.servers import DIE_WITH_PARENT, HOST, free_port, redis_binary

UP_S = 60.0
SETTINGS = {
    "max_connections": "300",
    "shared_buffers": "128MB",
    "timezone": "UTC",
    "log_checkpoints": "off",
    # Recovery replays what came since the last checkpoint: often enough that it is quick.
    "checkpoint_timeout": "30s",
    "max_wal_size": "256MB",
    "log_min_messages": "fatal",
}


class ChaosPostgres:
    """One cluster on one port. `dsn` goes straight to it."""

    def __init__(self, folder: Path, wal: Path | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        files.make_data_dir(folder)
        self.home = files.find_home(folder)
        self.port = free_port()
        self.kills = 0
        self.restarts = 0
        self._user = files.server_user(self.home)
        found = binaries.find_binaries(self.home / CLUSTER_NAME)
        self._binaries = binaries.runnable(found, self._user, self.home)
        if not (self.home / CLUSTER_NAME).exists():
            binaries.make_cluster(self.home, self._binaries, self._user)
        if wal is not None:
            self._move_wal(wal)
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = folder

    def _move_wal(self, wal: Path) -> None:
        """Put the write-ahead log of a new cluster on another volume."""
        shutil.move(self.cluster / "pg_wal", wal)
        if self._user is not None:
            for path in (wal, *wal.rglob("*")):
                os.chown(path, *self._user)
        (self.cluster / "pg_wal").symlink_to(wal)

    @property
    def cluster(self) -> Path:
        return self.home / CLUSTER_NAME

    def dsn(self, port: int | None = None, database: str = "flexrun") -> str:
        state = read_state(self.home)
        who = f"{state['user']}:{state['password']}"
        return f"postgresql://{who}@{HOST}:{port or self.port}/{database}"

    async def start(self) -> None:
        """Start and wait until it takes queries. A start that is too early is tried again."""
        async with asyncio.timeout(UP_S):
            while True:
                self._spawn()
                if await self._answers():
                    break
        await self._ensure_database()

    def _spawn(self) -> None:
        postgres = self._binaries.folder / "postgres"
        settings = {**SETTINGS, "listen_addresses": HOST, "port": str(self.port)}
        command = [sys.executable, "-I", "-S", "-c", _AS_USER, str(os.getpid())]
        user = self._user
        command += [str(user.uid if user else -1), str(user.gid if user else -1)]
        command += [str(postgres), "-D", str(self.cluster), "-c", "unix_socket_directories="]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        with (self._folder / "postgres.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    async def _answers(self) -> bool:
        """Until it answers (True), or has ended because children of the last one still live."""
        assert self._process is not None
        while self._process.poll() is None:
            try:
                connection = await asyncpg.connect(self.dsn(database="postgres"), timeout=5)
            except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError):
                await asyncio.sleep(0.05)
                continue
            await connection.close()
            return True
        await asyncio.sleep(0.1)
        return False

    async def _ensure_database(self) -> None:
        connection = await asyncpg.connect(self.dsn(database="postgres"))
        try:
            await connection.execute("create database flexrun")
        except asyncpg.DuplicateDatabaseError:
            pass
        finally:
            await connection.close()

    async def supervise(self) -> None:
        """Start it again whenever it ended by itself, as its operator's supervisor would."""
        while True:
            assert self._process is not None
            if self._process.poll() is not None:
                self.restarts += 1
                with contextlib.suppress(TimeoutError):
                    await self.start()
            await asyncio.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL for the postmaster."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self.kills += 1

    def stop(self) -> None:
        """Fast shutdown, and away with the data."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        shutil.rmtree(self.home, ignore_errors=True)
        shutil.rmtree(self._folder, ignore_errors=True)


# Becomes Postgres as an ordinary user, which gets SIGINT (fast shutdown) when the suite ends.
_AS_USER = (
    "import ctypes, os, sys\n"
    "parent, uid, gid = map(int, sys.argv[1:4])\n"
    "if gid >= 0: os.setgroups([]); os.setgid(gid)\n"
    "if uid >= 0: os.setuid(uid)\n"
    "os.umask(0o077); os.chdir('/')\n"
    "ctypes.CDLL(None).prctl(1, 2, 0, 0, 0)\n"
    "if os.getppid() != parent: sys.exit(1)\n"
    "os.execv(sys.argv[4], sys.argv[4:])\n"
)


class ChaosRedis:
    """One redis-server on one port, without persistence: what it forgets must not matter."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.kills = 0
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def url(self, port: int | None = None) -> str:
        return f"redis://{HOST}:{port or self.port}/0"

    async def start(self) -> None:
        self._spawn()
        async with asyncio.timeout(UP_S):
            while await self.command("PING") != b"+PONG\r\n":
                await asyncio.sleep(0.02)

    def _spawn(self) -> None:
        command = [sys.executable, "-I", "-S", "-c", DIE_WITH_PARENT, str(os.getpid())]
        command += [str(redis_binary()), "--port", str(self.port), "--bind", HOST, "--save", ""]
        command += ["--appendonly", "no", "--dir", str(self._folder), "--logfile", "redis.log"]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    async def command(self, *words: str) -> bytes:
        """Send one command by hand; the first 64 KiB of the answer, b"" when it is away."""
        try:
            reader, writer = await asyncio.open_connection(HOST, self.port)
        except OSError:
            return b""
        line = b"*%d\r\n" % len(words)
        line += b"".join(b"$%d\r\n%b\r\n" % (len(word.encode()), word.encode()) for word in words)
        try:
            writer.write(line)
            async with asyncio.timeout(5):
                return await reader.read(1 << 16)
        except (OSError, TimeoutError):
            return b""
        finally:
            writer.close()

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self.kills += 1

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
