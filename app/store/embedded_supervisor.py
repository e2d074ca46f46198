"""The small process that owns an embedded Postgres and lives as long as somebody uses it.

`embedded.py` starts it by its path, as `python -I -S embedded_supervisor.py <order as JSON>`;
nothing else may. Every process that uses the server holds a shared flock on `users.lock`; the
kernel drops it however that process ends, even by kill -9. We wait for the exclusive lock, and
getting it means that the last user has left: Postgres is stopped and we end. If we are killed
ourselves, the kernel sends Postgres a fast shutdown (Linux), and the next user starts us again.

It must never import anything of `app` nor anything outside the standard library (it has to be up in
some 30 ms), never delete or take over the lock file of a Postgres that lives and is not ours, and
never print a password.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

HOST = "127.0.0.1"
LOG_NAME = "postgres.log"
USERS_LOCK_NAME = "users.lock"
STATE_NAME = "server.json"
CLUSTER_NAME = "cluster"

LOG_BYTES_MAX = 8 * 1024 * 1024
LOG_CHECK_S = 5.0
SYNC_DELAY_S = 5.0
# Long, because recovery after a crash may have a gigabyte of WAL to read on a slow disk.
READY_DEADLINE_S = 300.0
RETRY_DEADLINE_S = 15.0
# A Postgres that is not known as ours may still be ours, on its way out.
STRANGER_PATIENCE_S = 2.0
# Postgres is started again when it dies under its users, but not for ever.
RESTARTS_MAX = 5
RESTART_WINDOW_S = 60.0

PR_SET_PDEATHSIG = 1


class Order(NamedTuple):
    """What the starter wants; it travels as JSON in our argument, so it must hold no secret."""

    home: str
    postgres: str
    uid: int | None
    gid: int | None
    settings: dict[str, str]
    lock_fd: int
    must_sync: bool


def _cluster_of(order: Order) -> Path:
    return Path(order.home, CLUSTER_NAME)


def main(argument: str) -> None:
    order = Order(**json.loads(argument))
    # The lock on supervisor.lock came with the process and goes with it: nobody can ever see "no
    # supervisor" while we are still coming up. Postgres must not inherit it.
    os.set_inheritable(order.lock_fd, False)
    os.umask(0o077)
    wake_fd = _install_wake()
    users_fd = os.open(Path(order.home, USERS_LOCK_NAME), os.O_RDWR)

    state = read_state(Path(order.home))
    _free_the_cluster(order, state.get("postmaster"))
    server, port = _bring_up(order, state.get("port"))
    _record(order, server, port)
    last_user_left = _watch_users(users_fd)
    if order.must_sync:
        later = threading.Timer(SYNC_DELAY_S, lambda: _start_sync(order).wait())
        later.daemon = True
        later.start()

    died_at: list[float] = []
    while not _watch(order, server, wake_fd, last_user_left):
        _say(f"Postgres ended with status {server.returncode} under its users, starting it again")
        died_at = [at for at in died_at if at > time.monotonic() - RESTART_WINDOW_S]
        died_at.append(time.monotonic())
        if len(died_at) > RESTARTS_MAX:
            _give_up(f"Postgres died {len(died_at)} times within {RESTART_WINDOW_S:.0f} s")
        server, port = _bring_up(order, port)
        _record(order, server, port)
    _shut_down(server)
    if order.must_sync:
        _start_sync(order)


# --- signs from outside ---------------------------------------------------------------------------


def _install_wake() -> int:
    """A pipe that becomes readable at every signal, so that `_watch` can sleep."""
    read_fd, write_fd = os.pipe()
    os.set_blocking(read_fd, False)
    os.set_blocking(write_fd, False)
    signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    # Only the lock decides when we go. A service manager that sends SIGTERM to the whole group
    # would otherwise take the database from a service that is still draining. Handlers, not
    # SIG_IGN: an ignored signal is inherited by Postgres.
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, _note_signal)
    return read_fd


def _note_signal(number: int, frame: FrameType | None) -> None:
    """Nothing to do: the wake-up pipe has been written to."""


def _watch_users(users_fd: int) -> threading.Event:
    last_user_left = threading.Event()

    def wait() -> None:
        fcntl.flock(users_fd, fcntl.LOCK_EX)
        # The lock is kept until we end, so whoever arrives now waits until the server is really
        # gone.
        last_user_left.set()
        signal.raise_signal(signal.SIGUSR1)

    threading.Thread(target=wait, daemon=True).start()
    return last_user_left


def _watch(
    order: Order, server: subprocess.Popen[bytes], wake_fd: int, last_user_left: threading.Event
) -> bool:
    """Wait until the last user has left (True) or the server has died (False)."""
    while not last_user_left.is_set():
        if server.poll() is not None:
            return False
        _cap_log(Path(order.home, LOG_NAME))
        select.select([wake_fd], [], [], LOG_CHECK_S)
        with contextlib.suppress(BlockingIOError):
            os.read(wake_fd, 512)
    return True


def _cap_log(log: Path) -> None:
    """Keep one old generation. Copied and cut, since Postgres has the file open (for appending)."""
    with contextlib.suppress(OSError):
        if log.stat().st_size > LOG_BYTES_MAX:
            shutil.copyfile(log, log.with_suffix(".log.1"))
            os.truncate(log, 0)


# --- the server -----------------------------------------------------------------------------------


def _bring_up(order: Order, last_port: int | None) -> tuple[subprocess.Popen[bytes], int]:
    """Start Postgres and wait until it takes connections; prefers the port it had before."""
    log = Path(order.home, LOG_NAME)
    port = last_port or _free_port()
    retry_until = time.monotonic() + RETRY_DEADLINE_S
    while True:
        log_start = log.stat().st_size
        adopt_pid_file(_cluster_of(order))
        server = _spawn(order, port)
        if _becomes_ready(server, _cluster_of(order)):
            return server, port
        said = log.read_bytes()[log_start:]
        if time.monotonic() > retry_until:
            _give_up("Postgres did not start")
        if b"could not bind" in said:
            port = _free_port()
        elif b"pre-existing shared memory block" in said:
            # Backends of a killed postmaster are still on their way out.
            time.sleep(0.1)
        else:
            _give_up(f"Postgres did not start, status {server.returncode}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _spawn(order: Order, port: int) -> subprocess.Popen[bytes]:
    settings = {
        **order.settings,
        "listen_addresses": HOST,
        "port": str(port),
        # TCP alone: the path of a socket may hold 107 bytes only, which a deep folder exceeds.
        "unix_socket_directories": "",
    }
    command = [order.postgres, "-D", str(_cluster_of(order))]
    for name, value in settings.items():
        command += ["-c", f"{name}={value}"]
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        stderr=sys.stderr,
        **_as_server_user(order),
        # Runs after the change of user, which would have cleared it. Safe here: always called from
        # the main thread (the kernel counts the death of the spawning thread), and the other
        # threads only wait in the kernel.
        preexec_fn=_die_with(os.getpid()) if sys.platform == "linux" else None,
    )


def _as_server_user(order: Order) -> dict[str, Any]:
    return {
        "cwd": "/",
        "umask": 0o077,
        "user": order.uid,
        "group": order.gid,
        "extra_groups": None if order.uid is None else [],
    }


def _die_with(parent: int) -> Any:
    libc = ctypes.CDLL(None, use_errno=True)

    def set_death_signal() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGINT, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)  # the parent died before the signal was armed

    return set_death_signal


def _becomes_ready(server: subprocess.Popen[bytes], cluster: Path) -> bool:
    """Postgres writes its status to the eighth line of its lock file, as pg_ctl knows too."""
    deadline = time.monotonic() + READY_DEADLINE_S
    while server.poll() is None:
        with contextlib.suppress(OSError):
            lines = (cluster / "postmaster.pid").read_bytes().split(b"\n")
            is_ours = lines[0].strip() == str(server.pid).encode()
            if is_ours and len(lines) > 7 and lines[7].strip() == b"ready":
                return True
        if time.monotonic() > deadline:
            _shut_down(server)
            _give_up(f"Postgres was not ready after {READY_DEADLINE_S:.0f} s")
        time.sleep(0.005)
    return False


def _shut_down(server: subprocess.Popen[bytes]) -> None:
    """Fast shutdown; if that hangs, the harsher ways, which cost a recovery but no commit."""
    for number, patience_s in ((signal.SIGINT, 60), (signal.SIGQUIT, 10), (signal.SIGKILL, 5)):
        server.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(patience_s)
            return


def _start_sync(order: Order) -> subprocess.Popen[bytes]:
    """initdb ran without syncing, for speed; catch up once the first rush is over.

    In a process of its own, which at our end goes on alone: nobody shall wait for a slow disk.
    """
    return subprocess.Popen(
        [Path(order.postgres).with_name("initdb"), "--sync-only", "-D", _cluster_of(order)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=sys.stderr,
        **_as_server_user(order),
    )


# --- what an earlier server left ------------------------------------------------------------------


def _free_the_cluster(order: Order, our_last_postmaster: int | None) -> None:
    """See to it that no living Postgres owns the cluster, and wait for one on its way out."""
    cluster = _cluster_of(order)
    started_at = time.monotonic()
    has_signalled = False
    while (pid := live_postmaster(cluster)) != 0:
        waited_s = time.monotonic() - started_at
        # One of ours whose supervisor was killed got its SIGINT from the kernel, except where there
        # is no such signal.
        if pid == our_last_postmaster and waited_s > 0.5 and not has_signalled:
            os.kill(pid, signal.SIGINT)
            has_signalled = True
        if waited_s > (60 if has_signalled else STRANGER_PATIENCE_S):
            _give_up(
                f"another Postgres (PID {pid}), not started here, owns {cluster}: stop it first"
            )
        time.sleep(0.02)


def live_postmaster(cluster: Path) -> int:
    """PID of the postmaster that really owns the cluster; 0 if its lock file is stale or absent."""
    try:
        pid = abs(int((cluster / "postmaster.pid").read_bytes().split(b"\n")[0]))
    except (OSError, ValueError):
        return 0
    if pid in (0, os.getpid()) or not _is_living_postgres(pid):
        return 0
    try:
        is_at_home = Path(f"/proc/{pid}/cwd").samefile(cluster)
    except OSError:
        is_at_home = (
            True  # cannot be told (no /proc, or not permitted): rather an error than two servers
        )
    return pid if is_at_home else 0


def _is_living_postgres(pid: int) -> bool:
    """False for a zombie (nobody reaped it), a PID that is gone, and one that is something else
    now."""
    try:
        name, _, rest = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")
        return rest.split()[0] not in (b"Z", b"X") and name.partition(b"(")[2] == b"postgres"
    except (OSError, IndexError):
        if Path("/proc/self/stat").exists():
            return False
    shown = subprocess.run(
        ["ps", "-o", "stat=,comm=", "-p", str(pid)], capture_output=True, check=False
    ).stdout.split(None, 1)
    return len(shown) == 2 and b"Z" not in shown[0] and shown[1].strip().endswith(b"postgres")


def adopt_pid_file(cluster: Path) -> None:
    """Put our own PID into a stale lock file, which Postgres overlooks as that of its parent.

    Better than to delete it: the file also names the shared memory segment of the dead server, by
    which Postgres sees backends that outlived their postmaster. Two servers on one cluster would
    destroy it.
    """
    path = cluster / "postmaster.pid"
    with contextlib.suppress(FileNotFoundError):
        first, newline, rest = path.read_bytes().partition(b"\n")
        if not first.strip().lstrip(b"-").isdigit():
            path.unlink()  # cut short by a full disk: names nobody
            return
        with path.open("r+b") as file:  # in place, so that its owner stays
            file.write(str(os.getpid()).encode() + newline + rest)
            file.truncate()


# --- what others read -----------------------------------------------------------------------------


def read_state(home: Path) -> dict[str, Any]:
    """`server.json`: host, port, user, password and database, and who runs the server."""
    try:
        state = json.loads((home / STATE_NAME).read_bytes())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def write_state(home: Path, state: dict[str, Any]) -> None:
    """Replaced in one go, so a reader sees the old or the new state; for the owner's eyes only."""
    draft = home / f"{STATE_NAME}.{os.getpid()}"
    draft.unlink(missing_ok=True)
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "w") as file:
        json.dump(state, file)
        file.flush()
        os.fsync(file.fileno())
    owner = home.stat()
    if os.geteuid() == 0:
        os.chown(draft, owner.st_uid, owner.st_gid)
    draft.replace(home / STATE_NAME)


def _record(order: Order, server: subprocess.Popen[bytes], port: int) -> None:
    home = Path(order.home)
    state = read_state(home) | {"port": port, "postmaster": server.pid, "supervisor": os.getpid()}
    write_state(home, state)


def _say(message: str) -> None:
    sys.stderr.write(f"supervisor: {message}\n")
    sys.stderr.flush()


def _give_up(message: str) -> NoReturn:
    _say(message)
    raise SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1])
