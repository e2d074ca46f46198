"""The process of an MCP server: its pipes, its environment, and an end that leaves nothing behind.

The child leads a process group of its own, so that what it starts ends with it. When we are killed
ourselves it reads the end of its stdin, and on Linux the kernel sends it SIGTERM.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from app.adapters.capabilities.http_outcome import plain_line
from app.adapters.capabilities.secrets import redacted
from app.kit.redact import redact

log = logging.getLogger("flexrun.mcp")

SECRET_CHARS_MIN = 6
STDERR_LINES_MAX = 200
UNREAD_BYTES_MAX = 8 * 1024 * 1024
PR_SET_PDEATHSIG = 1

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")


@dataclass(frozen=True, slots=True)
class Command:
    """How the operator wants a server started; its environment may hold secrets.

    The child gets `env` and our PATH, nothing else, and our working directory.
    """

    name: str
    arguments: tuple[str, ...]
    env: Mapping[str, str] = field(repr=False, default_factory=dict)

    @property
    def secrets(self) -> list[str]:
        """The values of `env` whose names say so, if they are long enough to be told apart."""
        shown = redact(dict(self.env))
        return [v for k, v in self.env.items() if shown[k] != v and len(v) >= SECRET_CHARS_MIN]


def commands_of(path: Path) -> dict[str, Command]:
    """The servers in the operator's file, by name.

        {"servers": {"files": {"command": ["npx", "…"], "env": {"TOKEN": "…"}}}}

    Raises ValueError with the name of the server that is wrong, never with a value.
    """
    try:
        found = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise ValueError(f"it can not be read ({type(error).__name__})") from None
    servers = found.get("servers") if isinstance(found, dict) and len(found) == 1 else None
    if not isinstance(servers, dict):
        raise ValueError('it has to be {"servers": {…}}')
    return {name: _command_of(name, given) for name, given in servers.items()}


def _command_of(name: str, given: Any) -> Command:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name[:80]!a} can not be the name of a server")
    if not isinstance(given, dict) or not given.keys() <= {"command", "env"}:
        raise ValueError(f"server {name!r} has to be an object of command and env")
    command, env = given.get("command"), given.get("env", {})
    if not isinstance(command, list) or not command or not all(map(_is_text, command)):
        raise ValueError(f"the command of server {name!r} has to be a list of texts")
    if not isinstance(env, dict) or not all(map(_is_text, env.values())):
        raise ValueError(f"the env of server {name!r} has to be an object of texts")
    return Command(name, tuple(command), env)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and "\0" not in value


class Child:
    """A running child. Whoever starts it has to call `end`."""

    def __init__(
        self, command: Command, process: asyncio.subprocess.Process, exit_grace_s: float
    ) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        self.name = command.name
        self.secrets = command.secrets
        self._process = process
        self._exit_grace_s = exit_grace_s
        self._stdin = process.stdin
        self._stdout = process.stdout
        self._stderr = asyncio.create_task(self._drain(process.stderr))
        self._ending: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, command: Command, line_bytes_max: int, exit_grace_s: float) -> Child:
        """Raises OSError when the command can not be run."""
        process = await asyncio.create_subprocess_exec(
            *command.arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={"PATH": os.pathsep.join(os.get_exec_path()), **command.env},
            limit=line_bytes_max,
            start_new_session=True,
            preexec_fn=_die_with(os.getpid()) if sys.platform == "linux" else None,
        )
        return cls(command, process, exit_grace_s)

    async def read_line(self) -> bytes:
        """The next line of stdout; b"" at its end. Raises ValueError for one over the limit."""
        return await self._stdout.readline()

    def has_room(self) -> bool:
        """Whether the child reads what it is sent, or at least not much is waiting for it."""
        return self._stdin.transport.get_write_buffer_size() < UNREAD_BYTES_MAX

    def write_line(self, line: bytes) -> None:
        """Send a line; after the end of the child it goes nowhere."""
        if not self._stdin.is_closing():
            self._stdin.write(line + b"\n")

    async def end(self) -> None:
        """End it, and all that it started; goes on when its caller does not wait for it."""
        if self._ending is None:
            self._ending = asyncio.create_task(self._end())
        await asyncio.shield(self._ending)

    async def _end(self) -> None:
        """First by the end of its stdin, at last by SIGKILL."""
        self._stdin.close()
        # A child that is stuck in writing would not notice.
        reading = (asyncio.create_task(_discard(self._stdout)), self._stderr)
        if not await self._exits():
            self._signal(signal.SIGTERM)
            await self._exits()
        # Also when it went by itself, for those of its group that it left behind.
        self._signal(signal.SIGKILL)
        await self._exits()
        _ended, stuck = await asyncio.wait(reading, timeout=self._exit_grace_s)
        for task in stuck:
            task.cancel()

    async def _exits(self) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._exit_grace_s):
                await self._process.wait()
                return True
        return False

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    async def _drain(self, stderr: asyncio.StreamReader) -> None:
        """Read what the server says for people, so that it never waits; the first lines are logged
        at DEBUG."""
        left = STDERR_LINES_MAX
        while part := await stderr.read(65_536):
            if not log.isEnabledFor(logging.DEBUG):
                continue
            for line in part.decode(errors="replace").splitlines()[:left]:
                left -= 1
                shown = plain_line(redacted(line, self.secrets))
                log.debug("stderr of MCP server %s: %s", self.name, shown)


async def _discard(stream: asyncio.StreamReader) -> None:
    while await stream.read(65_536):
        pass


def _die_with(parent: int) -> Callable[[], None]:
    """For the child, between fork and exec: have the kernel end it with its parent.

    The kernel means the thread that forked, which is the one of the event loop and lives as long as
    the process. Nothing but this one system call happens there, so that other threads' locks do
    not matter.
    """
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def set_death_signal() -> None:
        prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)  # the parent died before the signal was armed

    return set_death_signal
