"""The embedded Postgres with real processes: shared, killed, raced, and run by several users.

Every data folder here has a space and letters beyond ASCII in its path, and every one is checked
at the end for processes left behind.
"""

import ast
import asyncio
import contextlib
import json
import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import asyncpg
import pytest

from app.store import embedded, embedded_binaries, embedded_supervisor
from app.store.embedded import EmbeddedPostgres, EmbeddedPostgresError
from app.store.embedded_files import DRAFT_PREFIX, ELSEWHERE_NAME, remove_data, server_user
from app.store.embedded_supervisor import live_postmaster, read_state
from tests.servers import FAST_SETTINGS, eventually, free_port, start_redis

SOURCE = Path(embedded.__file__).parents[2]
SITE = Path(asyncpg.__file__).parents[1]
IS_ROOT = os.geteuid() == 0
as_root = pytest.mark.skipif(not IS_ROOT, reason="only root can become another user")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs the parent-death signal")

# Uses the server until its input ends; writes down each row that was acknowledged, if asked to.
USER_PROGRAM = """
import asyncio, sys
from pathlib import Path
import asyncpg
from app.store.embedded import EmbeddedPostgres

async def insert_for_ever(dsn):
    connection = await asyncpg.connect(dsn)
    await connection.execute("create table if not exists acked (id bigserial primary key)")
    while True:
        row = await connection.fetchval("insert into acked default values returning id")
        print(row, flush=True)

with EmbeddedPostgres.start(Path(sys.argv[1])) as server:
    print(server.dsn, flush=True)
    if sys.argv[2] == "insert":
        asyncio.run(insert_for_ever(server.dsn))
    sys.stdin.read()
"""


class UserProcess:
    """Another process that uses the server of a data folder."""

    def __init__(
        self,
        data_dir: Path,
        task: str = "wait",
        *,
        python: str = sys.executable,
        source: Path = SOURCE,
        user: str | None = None,
    ) -> None:
        self.process = subprocess.Popen(
            [python, "-c", USER_PROGRAM, str(data_dir), task],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd="/",
            env=python_environment(source),
            user=user,
            group=pwd.getpwnam(user).pw_gid if user else None,
            extra_groups=[] if user else None,
            text=True,
        )

    def read_line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the process has ended"
        return line.strip()

    def kill(self) -> list[str]:
        """kill -9; returns what it had said before."""
        self.process.kill()
        said, _ = self.process.communicate()
        return str(said).split()

    def leave(self) -> None:
        self.process.communicate(timeout=30)
        assert self.process.returncode == 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.kill()


def python_environment(source: Path) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": f"{source}{os.pathsep}{SITE}",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A folder that everybody can enter, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp(prefix="flexrun-test-")).resolve()
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def data_dir(place: Path) -> Iterator[Path]:
    folder = place / "a täst ☃"
    yield folder
    check_and_remove(folder)


@pytest.fixture(scope="module")
def used_dir(place: Path) -> Iterator[Path]:
    """A data folder made and left in good order, for tests that begin with a warm start."""
    folder = place / "üsed before"
    EmbeddedPostgres.start(folder, settings=FAST_SETTINGS).stop()
    yield folder
    check_and_remove(folder)


def check_and_remove(data_dir: Path) -> None:
    eventually(lambda: not processes_of(data_dir), f"no process left of {data_dir}")
    if data_dir.exists():
        remove_data(data_dir)


def check_stopped(data_dir: Path) -> None:
    """The server is down; its supervisor is, but for the moment between its lock and its end."""
    assert live_postmaster(home_of(data_dir) / "cluster") == 0
    eventually(lambda: not processes_of(data_dir), "the supervisor has ended")


def home_of(data_dir: Path) -> Path:
    pointer = data_dir / ELSEWHERE_NAME
    return pointer.resolve() if pointer.is_symlink() else data_dir


def processes_of(data_dir: Path) -> list[int]:
    """The supervisor and all processes of the server, wherever they are still running."""
    home = home_of(data_dir)
    state = read_state(home)
    pids = {state["supervisor"], state["postmaster"]} if "supervisor" in state else set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (entry / "cwd").samefile(home / "cluster"):
                pids.add(int(entry.name))
    return [pid for pid in pids if is_running(pid)]


def makers_of(data_dir: Path) -> list[int]:
    """The processes of an initdb in a draft of this folder, also of one whose starter is dead."""
    draft = os.fsencode(home_of(data_dir) / DRAFT_PREFIX)
    pids = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            works_in = os.fsencode((entry / "cwd").readlink())
            if works_in.startswith(draft) or draft in (entry / "cmdline").read_bytes():
                pids.append(int(entry.name))
    return pids


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except ProcessLookupError:
        return False
    except FileNotFoundError:
        return not Path("/proc/self").exists()


def sql(dsn: str, statement: str) -> Any:
    async def ask() -> Any:
        connection = await asyncpg.connect(dsn)
        try:
            return await connection.fetchval(statement)
        finally:
            await connection.close()

    return asyncio.run(ask())


def answers(dsn: str) -> bool:
    try:
        return bool(sql(dsn, "select 1") == 1)
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
        return False


# --- start, share, stop ---------------------------------------------------------------------------


def test_data_and_port_survive_a_restart(data_dir: Path) -> None:
    with EmbeddedPostgres.start(data_dir) as cold:
        sql(cold.dsn, "create table kept as select 42 as answer")
        assert cold.dsn.endswith("/flexrun")
        assert sql(cold.dsn, "show server_version").startswith(cold.version)
    assert not processes_of(data_dir)
    with EmbeddedPostgres.start(data_dir) as warm:
        assert warm.dsn == cold.dsn
        assert sql(warm.dsn, "select answer from kept") == 42
        for setting in ("fsync", "synchronous_commit", "full_page_writes"):
            assert sql(warm.dsn, f"show {setting}") == "on"
    warm.stop()  # a second time does nothing
    for name in ("server.json", "postgres.log"):
        assert stat.S_IMODE((home_of(data_dir) / name).stat().st_mode) == 0o600


def test_a_wrong_password_is_refused(used_dir: Path) -> None:
    with EmbeddedPostgres.start(used_dir) as server:
        password = read_state(home_of(used_dir))["password"]
        with pytest.raises(asyncpg.InvalidPasswordError):
            sql(server.dsn.replace(password, "guessed"), "select 1")


def test_settings_reach_the_server(used_dir: Path) -> None:
    with EmbeddedPostgres.start(used_dir, settings={"max_connections": "33"}) as server:
        assert sql(server.dsn, "show max_connections") == "33"


async def test_starts_within_a_running_event_loop(used_dir: Path) -> None:
    with EmbeddedPostgres.start(used_dir) as server:
        connection = await asyncpg.connect(server.dsn)
        await connection.close()


def test_the_last_user_stops_the_server(used_dir: Path) -> None:
    with UserProcess(used_dir) as other:
        dsn = other.read_line()
        with EmbeddedPostgres.start(used_dir) as server:
            assert server.dsn == dsn
            other.leave()
            assert answers(dsn)
    check_stopped(used_dir)


def test_the_first_user_may_leave_first(used_dir: Path) -> None:
    server = EmbeddedPostgres.start(used_dir)
    with UserProcess(used_dir) as other:
        assert other.read_line() == server.dsn
        server.stop()
        assert answers(server.dsn)
        other.leave()
    check_stopped(used_dir)


def test_a_dropped_database_is_made_anew(used_dir: Path) -> None:
    with EmbeddedPostgres.start(used_dir) as server:
        sql(server.dsn.removesuffix("flexrun") + "postgres", "drop database flexrun")
        with EmbeddedPostgres.start(used_dir) as again:
            assert answers(again.dsn)


def test_four_processes_race_for_a_cold_start(data_dir: Path) -> None:
    with contextlib.ExitStack() as stack:
        racers = [stack.enter_context(UserProcess(data_dir)) for _ in range(4)]
        assert len({racer.read_line() for racer in racers}) == 1
        for racer in racers:
            racer.leave()


# --- things that die ------------------------------------------------------------------------------


def test_kill_of_the_only_user_loses_no_commit_and_leaves_no_process(data_dir: Path) -> None:
    acked: set[int] = set()
    for _ in range(3):
        with UserProcess(data_dir, "insert") as user:
            user.read_line()
            acked |= {int(user.read_line()) for _ in range(100)}
            acked |= {int(row) for row in user.kill()}
        eventually(lambda: not processes_of(data_dir), "the server is gone", 30)
    with EmbeddedPostgres.start(data_dir) as server:
        stored = sql(server.dsn, "select array_agg(id) from acked")
    assert len(acked) >= 300
    assert acked <= set(stored)


def test_kill_of_the_starter_does_not_disturb_the_others(used_dir: Path) -> None:
    with UserProcess(used_dir) as starter:
        dsn = starter.read_line()
        with EmbeddedPostgres.start(used_dir) as server:
            postmaster = live_postmaster(home_of(used_dir) / "cluster")
            starter.kill()
            assert answers(server.dsn)
            assert server.dsn == dsn
            assert live_postmaster(home_of(used_dir) / "cluster") == postmaster


def test_kill_of_the_starter_while_it_starts(data_dir: Path) -> None:
    with UserProcess(data_dir) as starter:
        eventually(lambda: (data_dir / "start.lock").exists(), "it has begun")
        starter.kill()
    # Its initdb may live a moment longer, and write behind the back of whoever clears its draft.
    eventually(lambda: not makers_of(data_dir), "nobody makes a cluster any more")
    with EmbeddedPostgres.start(data_dir) as server:
        assert answers(server.dsn)
    assert not list(home_of(data_dir).glob("new-*"))


@on_linux
def test_kill_of_the_supervisor_ends_the_server_and_the_next_user_starts_it(
    used_dir: Path,
) -> None:
    with EmbeddedPostgres.start(used_dir) as first:
        os.kill(read_state(home_of(used_dir))["supervisor"], signal.SIGKILL)
        eventually(lambda: not processes_of(used_dir), "Postgres follows its supervisor")
        with EmbeddedPostgres.start(used_dir) as second:
            assert second.dsn == first.dsn  # so that the pools of the first come back
            assert answers(first.dsn)


def test_a_killed_postmaster_is_started_again(used_dir: Path) -> None:
    with EmbeddedPostgres.start(used_dir) as server:
        sql(server.dsn, "create table outlived as select 7 as answer")
        killed = read_state(home_of(used_dir))["postmaster"]
        os.kill(killed, signal.SIGKILL)
        eventually(lambda: answers(server.dsn), "the server is back on its port")
        assert sql(server.dsn, "select answer from outlived") == 7
        assert live_postmaster(home_of(used_dir) / "cluster") != killed


@pytest.mark.parametrize("owner", ["gone", "zombie", "stranger", "nobody"])
def test_a_stale_pid_file_does_not_hinder(used_dir: Path, owner: str) -> None:
    child = subprocess.Popen(["true"])
    try:
        eventually(lambda: not is_running(child.pid), "the child has ended")
        if owner == "gone":
            child.wait()
        # A child of ours that nobody has waited for is a zombie; we ourselves are a stranger.
        pid = os.getpid() if owner == "stranger" else child.pid
        lines = f"{pid}\n/somewhere\n1700000000\n5432\n\n127.0.0.1\n  123456  42\nready\n"
        pid_file = home_of(used_dir) / "cluster" / "postmaster.pid"
        pid_file.write_text("" if owner == "nobody" else lines)
        if IS_ROOT:
            cluster = pid_file.parent.stat()
            os.chown(pid_file, cluster.st_uid, cluster.st_gid)
        with EmbeddedPostgres.start(used_dir) as server:
            assert answers(server.dsn)
    finally:
        child.wait()


def test_a_postgres_of_somebody_else_is_left_alone(used_dir: Path) -> None:
    cluster = home_of(used_dir) / "cluster"
    owner = cluster.stat()
    user = server_user(home_of(used_dir))
    binaries = embedded_binaries.find_binaries(cluster)
    binaries = embedded_binaries.runnable(binaries, user, home_of(used_dir))
    stranger = subprocess.Popen(
        [binaries.folder / "postgres", "-D", cluster, "-p", str(free_port()), "-k", ""],
        stderr=subprocess.DEVNULL,
        cwd="/",
        user=owner.st_uid if IS_ROOT else None,
        group=owner.st_gid if IS_ROOT else None,
        extra_groups=[] if IS_ROOT else None,
    )
    try:
        eventually(lambda: live_postmaster(cluster) == stranger.pid, "the stranger is up")
        with pytest.raises(EmbeddedPostgresError, match=rf"PID {stranger.pid}.*stop it first"):
            EmbeddedPostgres.start(used_dir).stop()
        assert stranger.poll() is None
    finally:
        stranger.send_signal(signal.SIGINT)
        stranger.wait()


def test_another_port_is_taken_if_the_last_one_is_not_free(used_dir: Path) -> None:
    home = home_of(used_dir)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        taken = listener.getsockname()[1]
        embedded_supervisor.write_state(home, read_state(home) | {"port": taken})
        with EmbeddedPostgres.start(used_dir) as server:
            assert f":{taken}/" not in server.dsn


# --- users and folders ----------------------------------------------------------------------------


@as_root
def test_as_root_the_server_runs_as_another_user(used_dir: Path) -> None:
    modes = [parent.stat().st_mode for parent in used_dir.parents]
    with EmbeddedPostgres.start(used_dir):
        postmaster = read_state(used_dir)["postmaster"]
        server_uid = Path(f"/proc/{postmaster}").stat().st_uid
    assert server_uid != 0
    assert server_uid == (used_dir / "cluster").stat().st_uid
    assert [parent.stat().st_mode for parent in used_dir.parents] == modes


@as_root
def test_as_root_with_binaries_and_data_in_a_closed_folder(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = place / "clösed"
    closed.mkdir(mode=0o700)
    original = next(embedded_binaries.binary_folders()).parents[1]
    for package in (original, original.with_name(f"{original.name}.libs")):
        if package.exists():
            shutil.copytree(
                package,
                closed / package.name,
                ignore=shutil.ignore_patterns("include"),
                copy_function=embedded_binaries._link_or_copy,
            )
    folder = next((closed / original.name).glob("*/bin"))
    monkeypatch.setattr(embedded_binaries, "binary_folders", lambda: iter([folder]))
    data_dir = closed / "the data"
    for _ in range(2):
        with EmbeddedPostgres.start(data_dir) as server:
            assert answers(server.dsn)
    home = home_of(data_dir)
    assert home != data_dir
    assert len(list(home.glob("binaries-*"))) == 1
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700
    check_and_remove(data_dir)
    assert not home.exists()


@as_root
def test_as_an_ordinary_user(place: Path) -> None:
    user = "nobody"
    source = place / "source"
    (source / "app" / "store").mkdir(parents=True)
    for path in (SOURCE / "app" / "store").glob("embedded*.py"):
        shutil.copy(path, source / "app" / "store")
    python = python_for(user, source)
    own = place / "öwn"
    own.mkdir()
    os.chown(own, pwd.getpwnam(user).pw_uid, -1)
    data_dir = own / "the data"
    with UserProcess(data_dir, python=python, source=source, user=user) as process:
        assert answers(process.read_line())
        postmaster = read_state(data_dir)["postmaster"]
        assert Path(f"/proc/{postmaster}").owner() == user
        # Root joins in, and leaves nothing behind that would lock the user out.
        with EmbeddedPostgres.start(data_dir):
            process.leave()
    with UserProcess(data_dir, python=python, source=source, user=user) as process:
        assert answers(process.read_line())
        process.leave()
    check_and_remove(data_dir)


def python_for(user: str, source: Path) -> str:
    """An interpreter that this user can run; that of the tests may be in root's home."""
    for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        with contextlib.suppress(OSError):
            tried = subprocess.run(
                [python, "-c", "import app.store.embedded"],
                cwd="/",
                env=python_environment(source),
                user=user,
                extra_groups=[],
                stderr=subprocess.DEVNULL,
                check=False,
            )
            if tried.returncode == 0:
                return python
    pytest.skip(f"no Python with asyncpg that the user {user} can run")


# --- what goes wrong is said ----------------------------------------------------------------------


def test_missing_binaries_are_reported(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_binaries, "binary_folders", lambda: iter([]))
    with pytest.raises(EmbeddedPostgresError, match=r"pip install.*\n.*DATABASE_URL"):
        EmbeddedPostgres.start(data_dir)


def test_a_cluster_of_another_version_is_reported(data_dir: Path) -> None:
    cluster = data_dir / "cluster"
    cluster.mkdir(parents=True)
    (cluster / "PG_VERSION").write_text("9.6\n")
    with pytest.raises(EmbeddedPostgresError, match=r"made by Postgres 9\.6.*of Postgres \d+\.\d+"):
        EmbeddedPostgres.start(data_dir)


def test_a_half_made_cluster_is_not_taken_for_a_good_one(
    data_dir: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = place / "fake" / "bin"
    fake.mkdir(parents=True)
    (fake / "postgres").write_text("#!/bin/sh\necho 'postgres (PostgreSQL) 18.6'\n")
    (fake / "initdb").write_text(
        '#!/bin/sh\nmkdir "${1#--pgdata=}" && echo 18 > "${1#--pgdata=}/PG_VERSION"\n'
        "echo No space left on device >&2\nexit 1\n"
    )
    for program in fake.iterdir():
        program.chmod(0o755)
    monkeypatch.setattr(embedded_binaries, "binary_folders", lambda: iter([fake]))
    with pytest.raises(EmbeddedPostgresError, match="No space left"):
        EmbeddedPostgres.start(data_dir)
    assert not [path for path in data_dir.iterdir() if path.is_dir()]


def test_a_failing_start_shows_the_log(used_dir: Path) -> None:
    with pytest.raises(EmbeddedPostgresError, match='unrecognized configuration parameter "no_so"'):
        EmbeddedPostgres.start(used_dir, settings={"no_so": "1"})
    with EmbeddedPostgres.start(used_dir) as server:
        assert answers(server.dsn)


def test_a_lost_password_is_reported(used_dir: Path) -> None:
    state = home_of(used_dir) / "server.json"
    hidden = state.rename(state.with_suffix(".hidden"))
    try:
        with pytest.raises(EmbeddedPostgresError, match="Restore that file"):
            EmbeddedPostgres.start(used_dir)
    finally:
        hidden.rename(state)


def test_data_in_use_are_not_removed(used_dir: Path) -> None:
    with (
        EmbeddedPostgres.start(used_dir) as server,
        pytest.raises(EmbeddedPostgresError, match="somebody uses the data"),
    ):
        remove_data(used_dir)
    assert not answers(server.dsn)


# --- the supervisor itself ------------------------------------------------------------------------


def test_the_supervisor_needs_the_standard_library_alone() -> None:
    """Otherwise every start would wait for heavy imports."""
    tree = ast.parse(Path(embedded_supervisor.__file__).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert {alias.name for alias in node.names} <= sys.stdlib_module_names
        elif isinstance(node, ast.ImportFrom):
            assert node.module in sys.stdlib_module_names


def test_the_log_is_capped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_supervisor, "LOG_BYTES_MAX", 10)
    log = tmp_path / "postgres.log"
    with log.open("a") as writer:
        print("first generation", file=writer, flush=True)
        embedded_supervisor._cap_log(log)
        print("second", file=writer, flush=True)
    assert log.read_text() == "second\n"
    assert (tmp_path / "postgres.log.1").read_text() == "first generation\n"


# --- the Redis of the tests -----------------------------------------------------------------------


def test_redis_answers_and_stops(tmp_path: Path) -> None:
    with (
        start_redis(tmp_path) as redis,
        socket.create_connection(("127.0.0.1", redis.port)) as wire,
    ):
        wire.sendall(b"SET a 1\r\n")
        assert wire.recv(16) == b"+OK\r\n"
    assert redis.process.returncode == 0


@on_linux
def test_redis_dies_with_its_parent(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from tests.servers import start_redis\n"
        "print(start_redis(Path(sys.argv[1])).process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    said = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env=python_environment(SOURCE),
        stdout=subprocess.PIPE,
        check=False,
    ).stdout
    eventually(lambda: not is_running(int(json.loads(said))), "redis-server is gone")
