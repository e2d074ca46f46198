"""The program in processes of its own that start at once: forked instead of executed.

Python needs more than a second of CPU to import the whole app, and the suite starts the program
hundreds of times. So each test process has one helper (`python -m tests.forks`) that has imported
it, runs none of it, and forks when it is told to. The child takes the arguments, the environment,
the folder and the standard streams that it is given, and from there on is `python -m app.cli.main`:
it has a pid of its own, takes signals, is measured if its environment says so, and ends as a Python
that ends. What it shares with its siblings is what importing made, the seed of `hash` included.

`launch` does both; what is about starting itself is executed.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol, TypedDict

import coverage

ROOT = Path(__file__).parents[1]
COMMAND = (sys.executable, "-m", "app.cli.main")
LENGTH = struct.Struct("!I")
FDS = 4  # stdin, stdout, stderr, and the pipe on which pid and exit code are told


class Process(Protocol):
    """What is the same for a forked process and for one that was executed."""

    pid: int

    def poll(self) -> int | None:
        """Its exit code, minus the signal that killed it; None while it lives."""

    def wait(self, timeout: float | None = None) -> int:
        """The exit code. Raises subprocess.TimeoutExpired."""

    def send_signal(self, sig: int) -> None:
        """Does nothing when it is dead."""


def launch(
    *args: str,
    env: Mapping[str, str],
    stdout: int,
    stderr: int,
    stdin: int | None = None,
    cwd: Path = ROOT,
    executed: bool = False,
) -> Process:
    """Start the program. The descriptors stay the caller's, to close; without a `stdin` there is
    nothing to read."""
    with open(os.devnull, "rb") as nothing:
        streams = (nothing.fileno() if stdin is None else stdin, stdout, stderr)
        if not executed:
            return _helper().fork({"args": args, "env": dict(env), "cwd": str(cwd)}, streams)
        stdin, stdout, stderr = streams
        command = [*COMMAND, *args]
        return subprocess.Popen(
            command, env=env, cwd=cwd, stdin=stdin, stdout=stdout, stderr=stderr
        )


class Order(TypedDict):
    """What a child is to be."""

    args: Sequence[str]
    env: dict[str, str]
    cwd: str


# --- in the test process --------------------------------------------------------------------------


class Forked:
    """A forked process. It is no child of ours: a thread waits for what the helper tells."""

    def __init__(self, told: IO[bytes]) -> None:
        self.pid = int(told.readline())
        self._code: int | None = None
        self._is_over = threading.Event()
        threading.Thread(target=self._watch, args=(told,), daemon=True).start()

    def _watch(self, told: IO[bytes]) -> None:
        try:
            with told:
                self._code = int(told.readline())
        finally:
            self._is_over.set()

    def poll(self) -> int | None:
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        self._is_over.wait(timeout)
        if self._code is None:
            raise subprocess.TimeoutExpired(f"the forked {self.pid}", timeout or 0.0)
        return self._code

    def send_signal(self, sig: int) -> None:
        if self._code is None:
            with contextlib.suppress(ProcessLookupError):  # it has died a moment ago
                os.kill(self.pid, sig)


class Helper:
    """Orders for the process that forks. Threads may call it side by side."""

    def __init__(self) -> None:
        self._orders, theirs = socket.socketpair()
        self._lock = threading.Lock()
        # A child is measured from its fork on, if it is to be; the import is not.
        env = {name: value for name, value in os.environ.items() if "COVERAGE" not in name}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.forks", str(theirs.fileno())],
                env=env,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )

    def fork(self, order: Order, streams: Sequence[int]) -> Forked:
        told, tell = os.pipe()
        body = json.dumps(order).encode()
        try:
            with self._lock:
                socket.send_fds(self._orders, [LENGTH.pack(len(body))], [*streams, tell])
                self._orders.sendall(body)
        finally:
            os.close(tell)
        return Forked(os.fdopen(told, "rb"))

    def close(self) -> None:
        """The helper ends, and kills whom the tests left behind."""
        self._orders.close()
        self._process.wait()


_HELPERS: list[Helper] = []
_STARTING = threading.Lock()


def _helper() -> Helper:
    """The one of this test process, started when it is first needed."""
    with _STARTING:
        if not _HELPERS:
            _HELPERS.append(Helper())
            atexit.register(_HELPERS[0].close)
        return _HELPERS[0]


# --- in the helper --------------------------------------------------------------------------------


def serve(orders: socket.socket) -> Order:
    """Fork for every order until the tests are gone. Returns in a child, with what it is to be."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which then let us go
    signal.signal(signal.SIGCHLD, lambda _signal, _frame: None)
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    living: dict[int, int] = {}  # pid: the pipe on which its end is told
    while True:
        ready, _, _ = select.select([orders, woken], [], [])
        if woken in ready:
            woken.recv(4096)
            _reap(living)
        if orders not in ready:
            continue
        order, fds = _received(orders)
        if order is None:
            for pid in living:
                os.kill(pid, signal.SIGKILL)
            sys.exit()
        *streams, tell = fds
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            for end in (orders, woken, wake):
                end.close()
            for fd in (tell, *living.values()):
                os.close(fd)
            _take_over(streams)
            return order
        os.write(tell, b"%d\n" % pid)
        living[pid] = tell
        for fd in streams:
            os.close(fd)


def _reap(living: dict[int, int]) -> None:
    """Tell the end of each child that has ended."""
    while living:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        tell = living.pop(pid)
        with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
            os.write(tell, b"%d\n" % os.waitstatus_to_exitcode(status))
        os.close(tell)


def _received(orders: socket.socket) -> tuple[Order | None, list[int]]:
    """The next order and its descriptors; None when there will be no more."""
    head, fds, _, _ = socket.recv_fds(orders, LENGTH.size, FDS)
    if not head:
        return None, fds
    [left] = LENGTH.unpack(head)
    body = b""
    while len(body) < left:
        body += orders.recv(left - len(body))
    order: Order = json.loads(body)
    return order, fds


def _take_over(streams: list[int]) -> None:
    """In a child: its own standard streams, and signals as at the start of a Python."""
    for number, fd in enumerate(streams):
        os.dup2(fd, number)
        os.close(fd)
    # Files know of what kind they are from when they are opened.
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def become(order: Order) -> None:
    """In a child: be the program."""
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    time.tzset()
    sys.argv = ["flexrun", *order["args"]]
    code: object = 1

    def vanish() -> None:
        # Taking the interpreter apart would copy what it shares with the helper. A flush that
        # fails raises: then Python ends as it does, with the code for that.
        sys.stdout.flush()
        os._exit(code if isinstance(code, int) else 1)

    atexit.register(vanish)  # the last at exit: coverage saves before it
    if os.environ.get("COVERAGE_PROCESS_CONFIG"):
        coverage.process_startup()
    try:
        app.cli.main.main()
    except SystemExit as ended:
        code = ended.code
        raise


if __name__ == "__main__":
    import app.cli.main
    import app.cli.service
    import app.cli.upkeep
    import app.store.embedded

    gc.freeze()  # a child's look for garbage need not copy what all of them share
    become(serve(socket.socket(fileno=int(sys.argv[1]))))
