"""A real Postgres for a service that was given none: started here, shared between processes,
stopped by the last one.

For `bootstrap/` and the tests. The server itself belongs to a supervisor process
(`embedded_supervisor.py`), so that no user of it has to stay alive for the others. Each user holds
a shared flock on `users.lock`; the kernel gives that back however the process ends, and with the
last one the server is stopped.

Locks, always taken in this order: `start.lock` (only while starting), `users.lock`,
`supervisor.lock` (held by the supervisor from before its birth until its end).

Must never lower the durability of the server by itself, and never stop a server that somebody still
uses.
"""

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import asyncpg

from app.store import embedded_binaries as postgres
from app.store import embedded_files as files
from app.store import embedded_supervisor as supervisor
from app.store.embedded_files import EmbeddedPostgresError

__all__ = ["EmbeddedPostgres", "EmbeddedPostgresError"]

log = logging.getLogger(__name__)

# fsync, synchronous_commit and full_page_writes stay as Postgres has them: on.
DEFAULT_SETTINGS = {
    "max_connections": "100",
    "shared_buffers": "96MB",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_checkpoints": "off",
}
CONNECT_DEADLINE_S = 15.0
# As long as the supervisor itself may take: for recovery, and for a shutdown that hangs.
READY_DEADLINE_S = supervisor.READY_DEADLINE_S + supervisor.RETRY_DEADLINE_S
STOP_DEADLINE_S = 80.0
LOG_LINES_SHOWN = 12


class _Server(NamedTuple):
    dsn: str
    version: str


class EmbeddedPostgres:
    """One use of a server, which runs at least until `stop()` or the end of this process."""

    def __init__(
        self, server: _Server, home: Path, users_fd: int, reaper: threading.Thread | None
    ) -> None:
        self.dsn = server.dsn
        self.version = server.version
        self.home = home
        self._users_fd: int | None = users_fd
        self._reaper = reaper
        self.launched = reaper is not None
        """Whether this use started the server: then nobody else was using it."""

    @classmethod
    def start(cls, data_dir: Path, *, settings: Mapping[str, str] | None = None) -> Self:
        """Attach to the server of `data_dir`, starting (and first making) it if there is none.

        Blocks for a second at most, as a rule: within a running event loop use `asyncio.to_thread`.
        `settings` are those of postgresql.conf and count only for the process that starts the
        server.
        """
        data_dir = data_dir.expanduser().resolve()
        files.make_data_dir(data_dir)
        try:
            with files.start_lock(data_dir):
                return cls._start_locked(data_dir, settings or {})
        except PermissionError as error:
            raise EmbeddedPostgresError(
                f"{error}. The data in {data_dir} belong to another user: run Flexrun as that "
                "user, or choose another data folder."
            ) from error
        except OSError as error:
            raise EmbeddedPostgresError(f"{error}.") from error

    @classmethod
    def _start_locked(cls, data_dir: Path, settings: Mapping[str, str]) -> Self:
        home = files.find_home(data_dir)
        users_fd = files.open_lock(home / supervisor.USERS_LOCK_NAME)
        try:
            # Waits if the server is just being stopped; once held, nobody stops it.
            files.wait_flock(users_fd, fcntl.LOCK_SH, f"the server in {home} is still stopping")
            server: _Server | None = None
            reaper: threading.Thread | None = None
            while server is None:
                lock_fd = files.open_lock(home / files.SUPERVISOR_LOCK_NAME)
                try:
                    if files.try_flock(lock_fd, fcntl.LOCK_EX):
                        server, reaper = _launch(home, lock_fd, settings)
                    else:
                        server = _attach(home, lock_fd)
                finally:
                    os.close(lock_fd)  # the supervisor has its own copy, and with it the lock
        except BaseException:
            os.close(users_fd)
            raise
        return cls(server, home, users_fd, reaper)

    def stop(self) -> None:
        """Leave. The last one to leave waits until the server is stopped."""
        users_fd, self._users_fd = self._users_fd, None
        if users_fd is None:
            return
        supervisor_pid = supervisor.read_state(self.home).get("supervisor")
        # Asking for the exclusive lock gives up ours. If it is refused and a shared one is to be
        # had, others are left; if not, the supervisor was quicker and is already stopping.
        is_last = files.try_flock(users_fd, fcntl.LOCK_EX) or not files.try_flock(
            users_fd, fcntl.LOCK_SH
        )
        os.close(users_fd)
        if is_last:
            with contextlib.suppress(FileNotFoundError):  # somebody removed it all already
                self._wait_stopped(supervisor_pid)

    def _wait_stopped(self, supervisor_pid: int | None) -> None:
        lock_fd = files.open_lock(self.home / files.SUPERVISOR_LOCK_NAME)

        def is_gone() -> bool:
            # Or followed by another one already, which somebody started this very moment.
            return (
                files.try_flock(lock_fd, fcntl.LOCK_SH)
                or supervisor.read_state(self.home).get("supervisor") != supervisor_pid
            )

        try:
            what = f"the server in {self.home} does not stop"
            files.wait_until(is_gone, what, STOP_DEADLINE_S)
        finally:
            os.close(lock_fd)
        if self._reaper is not None:
            self._reaper.join(CONNECT_DEADLINE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


def _launch(
    home: Path, lock_fd: int, settings: Mapping[str, str]
) -> tuple[_Server, threading.Thread]:
    """Start the supervisor, with it the server. Caller holds all three locks."""
    user = files.server_user(home)
    cluster = home / supervisor.CLUSTER_NAME
    binaries = postgres.runnable(postgres.find_binaries(cluster), user, home)
    files.clear_drafts(home)
    is_new = not cluster.exists()
    if is_new:
        log.info("making a Postgres %s cluster in %s", binaries.version, home)
        postgres.make_cluster(home, binaries, user)
    elif "password" not in supervisor.read_state(home):
        raise EmbeddedPostgresError(
            f"the password to the data in {cluster} is gone with {home / supervisor.STATE_NAME}. "
            f"Restore that file, or move {cluster} away to begin anew."
        )
    settings = {**DEFAULT_SETTINGS, **settings}
    order = supervisor.Order(
        home=str(home),
        postgres=str(binaries.folder / "postgres"),
        uid=user.uid if user else None,
        gid=user.gid if user else None,
        settings=settings,
        lock_fd=lock_fd,
        must_sync=is_new and settings.get("fsync") != "off",
    )
    log_start = _log_size(home)
    process = _spawn_supervisor(order)
    # Reaps the supervisor whenever it ends, which may be long after we have left.
    reaper = threading.Thread(target=process.wait, name="reap-embedded-postgres", daemon=True)
    reaper.start()

    def is_up() -> bool:
        return process.poll() is None

    state = _await_state(home, process.pid, is_up)
    server = _connect(state, is_up) if state else None
    if server is None:
        raise EmbeddedPostgresError(
            f"the server in {home} does not start. The end of its log:\n{_log_end(home, log_start)}"
        )
    return server, reaper


def _attach(home: Path, lock_fd: int) -> _Server | None:
    """Use the server that runs, or is just coming up; None if its supervisor ends meanwhile."""

    def is_up() -> bool:
        if not files.try_flock(lock_fd, fcntl.LOCK_SH):
            return True
        fcntl.flock(lock_fd, fcntl.LOCK_UN)
        return False

    state = _await_state(home, None, is_up)
    return _connect(state, is_up) if state else None


def _spawn_supervisor(order: supervisor.Order) -> subprocess.Popen[bytes]:
    log_path = Path(order.home, supervisor.LOG_NAME)
    log_fd = files.open_own(log_path, os.O_WRONLY | os.O_APPEND)
    try:
        return subprocess.Popen(
            # By its path and without site packages: nothing of ours is imported, it is up in some
            # 30 ms.
            [
                sys.executable,
                *("-I", "-S", "-W", "ignore::DeprecationWarning"),
                str(Path(supervisor.__file__).resolve()),
                json.dumps(order._asdict()),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log_fd,
            stderr=log_fd,
            cwd="/",
            env=files.bare_environment(),
            pass_fds=(order.lock_fd,),
            start_new_session=True,  # a Ctrl-C in the terminal is for us, not for the database
        )
    finally:
        os.close(log_fd)


def _await_state(
    home: Path, supervisor_pid: int | None, is_up: Callable[[], bool]
) -> dict[str, Any] | None:
    deadline = time.monotonic() + READY_DEADLINE_S
    while time.monotonic() < deadline and is_up():
        state = supervisor.read_state(home)
        if "port" in state and supervisor_pid in (None, state["supervisor"]):
            return state
        time.sleep(0.005)
    return None


def _connect(state: dict[str, Any], is_up: Callable[[], bool]) -> _Server | None:
    dsn = "postgresql://{user}:{password}@{host}:{port}/".format(**state)
    # A thread of its own, because the caller's thread may already have an event loop that runs.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(
            lambda: asyncio.run(_ensure_database(dsn, state["database"], is_up))
        ).result()


async def _ensure_database(dsn: str, database: str, is_up: Callable[[], bool]) -> _Server | None:
    """Log in for a proof that the server is ours and ready, and create the database if absent."""
    deadline = time.monotonic() + CONNECT_DEADLINE_S
    while is_up():
        try:
            return _Server(dsn + database, await _log_in(dsn, database))
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            if time.monotonic() > deadline:
                raise EmbeddedPostgresError(f"no connection to the server: {error}.") from error
        await asyncio.sleep(0.02)
    return None


async def _log_in(dsn: str, database: str) -> str:
    try:
        connection = await asyncpg.connect(dsn + database, ssl=False, timeout=10)
    except asyncpg.InvalidCatalogNameError:
        connection = await asyncpg.connect(dsn + "postgres", ssl=False, timeout=10)
        try:
            await connection.execute(f'create database "{database}"')
        finally:
            await connection.close()
        return await _log_in(dsn, database)
    try:
        return str(connection.get_settings().server_version).split()[0]
    finally:
        await connection.close()


def _log_size(home: Path) -> int:
    path = home / supervisor.LOG_NAME
    return path.stat().st_size if path.exists() else 0


def _log_end(home: Path, start: int) -> str:
    lines = (home / supervisor.LOG_NAME).read_bytes()[start:].decode(errors="replace").splitlines()
    return "\n".join(lines[-LOG_LINES_SHOWN:]) or "(empty)"
