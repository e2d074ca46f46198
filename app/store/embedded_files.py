"""What an embedded Postgres has on disk beside its cluster: whose folder it is, where, its locks.

For `embedded.py`, and `remove_data` for the tests. As root, Postgres runs as another existing user.
Folders that this user cannot enter are left as they are: the cluster goes to a folder of its own
elsewhere, to which the data folder points.

Never changes the mode or owner of anything that was not made here.
"""

import contextlib
import errno
import fcntl
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from app.store.embedded_supervisor import (
    CLUSTER_NAME,
    LOG_NAME,
    STATE_NAME,
    USERS_LOCK_NAME,
)

DRAFT_PREFIX = "new-"
START_LOCK_NAME = "start.lock"
SUPERVISOR_LOCK_NAME = "supervisor.lock"
# In a data folder whose cluster lives elsewhere: a symbolic link to that place.
ELSEWHERE_NAME = "elsewhere"
# Not only /var/tmp: systemd clears away what was not touched there for 30 days.
ELSEWHERE_PARENTS = ("/var/lib", "/var/tmp")
SERVER_USERS = ("postgres", "nobody")
LOCK_DEADLINE_S = 90.0
REMOVE_DEADLINE_S = 1.0
ADVICE = "Or set DATABASE_URL to a Postgres of your own."


class EmbeddedPostgresError(Exception):
    """The embedded server cannot be had; the message says why and what to do next."""

    def __init__(self, message: str) -> None:
        super().__init__(f"embedded Postgres: {message.rstrip()}\n{ADVICE}")


class ServerUser(NamedTuple):
    uid: int
    gid: int


# --- locks ----------------------------------------------------------------------------------------


def open_lock(path: Path) -> int:
    """Open for flock; never inherited by programs we start, so the lock ends with this process."""
    return open_own(path, os.O_RDWR)


def open_own(path: Path, flags: int) -> int:
    """Open one of our files; what root makes in somebody else's folder must not lock them out."""
    fd = os.open(path, flags | os.O_CREAT, 0o600)
    if os.geteuid() == 0:
        owner = path.parent.stat()
        os.fchown(fd, owner.st_uid, owner.st_gid)
    return fd


def try_flock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        return False
    return True


def wait_flock(fd: int, kind: int, what: str) -> None:
    wait_until(lambda: try_flock(fd, kind), what, LOCK_DEADLINE_S)


def wait_until(is_done: Callable[[], bool], what: str, deadline_s: float) -> None:
    deadline = time.monotonic() + deadline_s
    while not is_done():
        if time.monotonic() > deadline:
            raise EmbeddedPostgresError(f"{what}, still after {deadline_s:.0f} s.")
        time.sleep(0.005)


@contextlib.contextmanager
def start_lock(data_dir: Path) -> Iterator[None]:
    """Only one process at a time looks for a server and starts one."""
    fd = open_lock(data_dir / START_LOCK_NAME)
    try:
        wait_flock(fd, fcntl.LOCK_EX, f"another process is starting a server in {data_dir}")
        yield
    finally:
        os.close(fd)


# --- whose and where ------------------------------------------------------------------------------


def server_user(home: Path) -> ServerUser | None:
    """As whom Postgres runs: None is ourselves; root has to become the owner of the data."""
    if os.geteuid() != 0:
        return None
    for path in (home / CLUSTER_NAME, home):
        with contextlib.suppress(FileNotFoundError):
            owner = path.stat()
            if owner.st_uid != 0:
                return ServerUser(owner.st_uid, owner.st_gid)
    for name in SERVER_USERS:
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return ServerUser(entry.pw_uid, entry.pw_gid)
    raise EmbeddedPostgresError(
        f"Postgres refuses to run as root, and there is no user {' or '.join(SERVER_USERS)}. "
        "Run Flexrun as an ordinary user."
    )


def find_home(data_dir: Path) -> Path:
    """The folder with cluster, locks and log: `data_dir`, or the place it points to.

    Caller holds the start lock. A new place is made when the server's user cannot enter `data_dir`,
    for example because it lies under /root.
    """
    pointer = data_dir / ELSEWHERE_NAME
    if pointer.is_symlink():
        if not pointer.is_dir():
            raise EmbeddedPostgresError(
                f"the data are in {pointer.readlink()}, to which {pointer} points, but that is not "
                "there. Bring it back, or remove the pointer to begin anew."
            )
        return pointer.resolve()
    user = server_user(data_dir)
    if user is None or _can_enter(user, data_dir):
        return data_dir
    if (data_dir / CLUSTER_NAME).exists():
        raise EmbeddedPostgresError(
            f"the user with UID {user.uid}, who owns the data in {data_dir}, cannot enter that "
            "folder. Make it and its parents enterable for that user, or move it where they are."
        )
    home = _make_elsewhere(user)
    pointer.symlink_to(home)
    return home


def _make_elsewhere(user: ServerUser) -> Path:
    reasons = []
    for parent in map(Path, ELSEWHERE_PARENTS):
        try:
            home = Path(tempfile.mkdtemp(prefix="flexrun-", dir=parent))
        except OSError as error:
            reasons.append(str(error))
            continue
        home.chmod(0o711)
        if _can_enter(user, home):
            return home
        home.rmdir()
        reasons.append(f"UID {user.uid} cannot enter {parent}")
    raise EmbeddedPostgresError(
        f"there is no folder for the data that the user with UID {user.uid} can enter "
        f"({'; '.join(reasons)}). Choose a data folder that this user can enter."
    )


def _can_enter(user: ServerUser, folder: Path) -> bool:
    """Tried rather than computed from the modes, since access lists have a say too."""
    tried = call(["/bin/sh", "-c", 'cd -- "$0"', str(folder)], user)
    return tried is not None and tried.returncode == 0


def make_data_dir(data_dir: Path) -> None:
    if data_dir.is_dir():
        return
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        if os.geteuid() == 0:
            data_dir.chmod(0o711)  # whatever the umask: the server's user has to pass
    except OSError as error:
        raise EmbeddedPostgresError(
            f"the data folder cannot be made: {error}. Choose another data folder."
        ) from error


def clear_drafts(home: Path) -> None:
    """What a starter that was killed left half-made. Caller holds the start lock."""
    for leftover in home.glob(f"{DRAFT_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def remove_data(data_dir: Path) -> None:
    """Delete cluster, log and locks, wherever they are; refuses while somebody uses them."""
    with start_lock(data_dir):
        home = find_home(data_dir)
        users_fd = open_lock(home / USERS_LOCK_NAME)
        try:
            # A supervisor that has just stopped the server may hold it for a moment yet.
            what = f"somebody uses the data in {data_dir}"
            wait_until(lambda: try_flock(users_fd, fcntl.LOCK_EX), what, REMOVE_DEADLINE_S)
            for name in (CLUSTER_NAME, "binaries-*", f"{DRAFT_PREFIX}*"):
                for folder in home.glob(name):
                    shutil.rmtree(folder)
            for name in (f"{STATE_NAME}*", f"{LOG_NAME}*", SUPERVISOR_LOCK_NAME, USERS_LOCK_NAME):
                for file in home.glob(name):
                    file.unlink()
            if home != data_dir:
                home.rmdir()
                (data_dir / ELSEWHERE_NAME).unlink()
        finally:
            os.close(users_fd)


def call(command: list[str], user: ServerUser | None) -> subprocess.CompletedProcess[str] | None:
    """Run as `user` with nothing of our environment; None if that cannot be."""
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            env=bare_environment(),
            cwd="/",
            umask=0o077,
            user=user.uid if user else None,
            group=user.gid if user else None,
            extra_groups=[] if user else None,
            check=False,
        )
    except OSError:
        return None


def bare_environment() -> dict[str, str]:
    """PGDATA and its kin would mislead Postgres, and a locale would translate its messages.

    With a TZ given, initdb need not search for the zone of this machine.
    """
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    return {**kept, "LC_ALL": "C", "TZ": "UTC"}
