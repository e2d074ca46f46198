"""The command line as processes of its own: the real CLI, the real service, and what stands between
and behind them in these tests (a proxy that cuts connections, a tool that is called over HTTP).
"""

from __future__ import annotations

import copy
import json
import os
import select
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from tests.forks import COMMAND, ROOT, launch

__all__ = ["COMMAND", "ROOT"]  # for who executes the program itself

DEADLINE_S = 60.0
READY = " is ready at "


def environment(**more: str) -> dict[str, str]:
    """Ours without what an operator may have set; subprocesses find the program anywhere."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("FLEXRUN_") and name not in ("DATABASE_URL", "REDIS_URL")
    }
    return {
        **kept,
        "PYTHONPATH": str(ROOT),
        "FLEXRUN_ALLOW_UNSAFE_POSTGRES": "true",
        "FLEXRUN_EGRESS_ALLOW": "127.0.0.1",
        "FLEXRUN_DRAIN_GRACE_S": "0.5",
        **more,
    }


class Running:
    """A command that was started: what it prints can be read as it comes."""

    def __init__(self, cli: Cli, args: Sequence[str], env: dict[str, str], stdin: str) -> None:
        out, write_end = os.pipe()
        self.stdout: IO[str] = os.fdopen(out)
        self._complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `end`
        with os.fdopen(write_end, "wb") as printed, tempfile.TemporaryFile("w+") as asked:
            asked.write(stdin)
            asked.seek(0)
            self.process = launch(
                *args,
                env={**cli.env, **env},
                cwd=cli.folder,
                stdin=asked.fileno(),
                stdout=printed.fileno(),
                stderr=self._complaints.fileno(),
                executed=cli.executes,
            )

    def end(self) -> tuple[int, str, str]:
        """Wait for its end: exit code, the rest of its output, and what it said on stderr."""
        with self.stdout, self._complaints:
            printed = self.stdout.read()
            code = self.process.wait(DEADLINE_S)
            self._complaints.seek(0)
            return code, printed, self._complaints.read()


class Cli:
    """Runs commands in a folder, against a service or a database."""

    def __init__(self, folder: Path, **env: str) -> None:
        self.folder = folder
        self.env = environment(**env)
        self.executes = False

    @property
    def executed(self) -> Cli:
        """The same, but commands are executed and not forked (`tests/forks.py`)."""
        other = copy.copy(self)
        other.executes = True
        return other

    def __call__(
        self, *args: str | Path, stdin: str = "", **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        command = [str(arg) for arg in args]
        return subprocess.CompletedProcess(command, *Running(self, command, env, stdin).end())

    def ok(self, *args: str | Path, stdin: str = "") -> str:
        """Run a command that has to succeed; its output."""
        done = self(*args, stdin=stdin)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def json(self, *args: str | Path) -> Any:
        """Run a command with `--json`; its output as a value."""
        return json.loads(self.ok(*args, "--json"))

    def start(self, *args: str | Path, **env: str) -> Running:
        """Start a command and leave it running."""
        return Running(self, [str(arg) for arg in args], env, "")


class Serving:
    """A `flexrun serve` (or `api`) that is ready. Leaves as SIGTERM wants it."""

    def __init__(self, cli: Cli, *args: str, command: str = "serve", **env: str) -> None:
        self.log = cli.folder / "serve.log"
        out, write_end = os.pipe()
        self._stdout = os.fdopen(out)
        with os.fdopen(write_end, "wb") as printed, self.log.open("ab") as log:
            self.process = launch(
                *(command, *args),
                env={**cli.env, **env},
                cwd=cli.folder,
                stdout=printed.fileno(),
                stderr=log.fileno(),
                executed=cli.executes,
            )
        self.ready_line = self._stdout.readline().strip()
        assert READY in self.ready_line, self.log.read_text()
        self.url = self.ready_line.partition(READY)[2].split(" ")[0]
        self.port = int(self.url.rpartition(":")[2])

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(DEADLINE_S)
        self._stdout.close()
        return code

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


class CuttingProxy:
    """A TCP proxy that cuts the first `cuts` event streams after so many bytes of their answer."""

    def __init__(self, port: int, *, cuts: int, after_bytes: int) -> None:
        self.cuts_left = cuts
        self.streams = 0
        self._after_bytes = after_bytes
        self._target = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        # Wakes the thread that accepts; closing alone would not.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._relay, args=(client,), daemon=True).start()

    def _relay(self, client: socket.socket) -> None:
        bytes_left: int | None = None  # of the answer that passes, when it is to be cut
        with client, socket.create_connection(self._target) as server:
            while True:
                ready, _, _ = select.select([client, server], [], [])
                if client in ready:
                    if not (request := client.recv(65_536)):
                        return
                    is_stream = b"/events" in request.split(b"\r\n", 1)[0]
                    self.streams += is_stream
                    bytes_left = self._after_bytes if is_stream and self.cuts_left > 0 else None
                    server.sendall(request)
                if server in ready:
                    if not (answer := server.recv(65_536)):
                        return
                    client.sendall(answer[:bytes_left])
                    if bytes_left is not None:
                        bytes_left -= len(answer)
                        if bytes_left <= 0:
                            self.cuts_left -= 1
                            return


class Tool:
    """An HTTP tool for capabilities: `/slow` answers once it is released, `/broken` never well."""

    def __init__(self) -> None:
        self.called = threading.Event()
        self.release = threading.Event()
        tool = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                tool.called.set()
                if self.path == "/slow":
                    tool.release.wait(DEADLINE_S)
                status, body = (500, b"") if self.path == "/broken" else (200, b'{"ok": true}')
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)
                except OSError:
                    self.close_connection = True  # the caller left meanwhile

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def registration(self, path: str, effect: str) -> dict[str, Any]:
        """A capability `tool.<path>` that calls it."""
        anything = {"mode": "json_schema", "schema": {"type": "object"}}
        return {
            "capability_id": f"tool.{path}",
            "version": "1.0.0",
            "display_name": path,
            "summary": "A tool of the tests.",
            "kind": "http",
            "effect": effect,
            "input_contract": anything,
            "output_contract": anything,
            "config": {"url": f"http://127.0.0.1:{self.port}/{path}"},
        }

    def close(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
