"""The command line as processes of its own: the real CLI, the real service, and what stands between
and behind them in these tests (a proxy that cuts connections, a tool that is called over HTTP).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "app.cli.main")
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


class Cli:
    """Runs commands in a folder, against a service or a database."""

    def __init__(self, folder: Path, **env: str) -> None:
        self.folder = folder
        self.env = environment(**env)

    def __call__(
        self, *args: str | Path, stdin: str = "", **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(
            [*COMMAND, *map(str, args)],
            input=stdin,
            capture_output=True,
            text=True,
            cwd=self.folder,
            env={**self.env, **env},
            timeout=DEADLINE_S,
            check=False,
        )

    def ok(self, *args: str | Path, stdin: str = "") -> str:
        """Run a command that has to succeed; its output."""
        done = self(*args, stdin=stdin)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def json(self, *args: str | Path) -> Any:
        """Run a command with `--json`; its output as a value."""
        return json.loads(self.ok(*args, "--json"))

    def start(self, *args: str | Path, **env: str) -> subprocess.Popen[str]:
        """Start a command and leave it running."""
        return subprocess.Popen(
            [*COMMAND, *map(str, args)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
            env={**self.env, **env},
        )


class Serving:
    """A `flexrun serve` (or `api`) that is ready. Leaves as SIGTERM wants it."""

    def __init__(self, cli: Cli, *args: str, command: str = "serve", **env: str) -> None:
        self.log = cli.folder / "serve.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*COMMAND, command, *args],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=cli.folder,
                env={**cli.env, **env},
            )
        assert self.process.stdout is not None
        self.ready_line = self.process.stdout.readline().strip()
        assert READY in self.ready_line, self.log.read_text()
        self.url = self.ready_line.partition(READY)[2].split(" ")[0]
        self.port = int(self.url.rpartition(":")[2])

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(DEADLINE_S)
        if self.process.stdout is not None:
            self.process.stdout.close()
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
        with client, socket.create_connection(self._target) as server:
            while request := client.recv(65_536):
                server.sendall(request)
                is_stream = b"/events" in request.split(b"\r\n", 1)[0]
                self.streams += is_stream
                if not self._answer(client, server, is_cut=is_stream and self.cuts_left > 0):
                    return

    def _answer(self, client: socket.socket, server: socket.socket, *, is_cut: bool) -> bool:
        """Pass one answer on; False when the connection is over."""
        passed = 0
        server.settimeout(None if is_cut else 0.05)
        while True:
            try:
                answer = server.recv(65_536)
            except TimeoutError:
                return True  # the answer is complete, or a stream is idle: look at the client
            if is_cut and passed + len(answer) >= self._after_bytes:
                client.sendall(answer[: self._after_bytes - passed])
                self.cuts_left -= 1
                return False
            passed += len(answer)
            if not answer:
                return False
            client.sendall(answer)


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
