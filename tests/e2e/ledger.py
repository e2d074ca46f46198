"""A tool that counts its calls, runs that call it, and looks at what became of them.

For tests of the command line: the service and the commands are processes of their own.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.cli import DEADLINE_S, Serving
from tests.envelopes import graph
from tests.servers import eventually

FAILING = {"/bad": 400, "/down": 503, "/lost": 500}


class Ledger:
    """A tool that counts its calls by run and node: `/good` answers, `/gate` once it is open.

    `/bad` refuses for good and `/down` for now, until they are `mended`; `/lost` loses its answer.
    """

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, str]] = Counter()
        self.gate = threading.Event()
        self.mended = False
        ledger = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                call = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                ledger.calls[call["run_id"], call["node_id"]] += 1
                if self.path == "/gate":
                    ledger.gate.wait(DEADLINE_S)
                failing = {"/lost": 500} if ledger.mended else FAILING
                status = failing.get(self.path, 200)
                body = b'{"ok": true}'
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)
                except OSError:
                    self.close_connection = True  # the call was cancelled meanwhile

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def of(self, run_id: str) -> dict[str, int]:
        """How often each node of a run was called."""
        return {node: count for (run, node), count in self.calls.items() if run == run_id}

    def register(self, serving: Serving, effect: str = "idempotent") -> None:
        anything = {"mode": "json_schema", "schema": {"type": "object"}}
        for path in ("good", "bad", "down", "gate", "lost"):
            registration = {
                "capability_id": f"ledger.{path}",
                "version": "1.0.0",
                "display_name": path,
                "summary": "A tool of the tests.",
                "kind": "http",
                "effect": "at_most_once" if path == "lost" else effect,
                "input_contract": anything,
                "output_contract": anything,
                "config": {"url": f"http://127.0.0.1:{self.port}/{path}"},
            }
            httpx.post(f"{serving.url}/v1/capabilities", json=registration).raise_for_status()

    def close(self) -> None:
        self.gate.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def node(node_id: str, path: str, *requires: str) -> dict[str, Any]:
    capability = f"ledger.{path}"
    return {"id": node_id, "capability": capability, "inputs": {}, "requires": list(requires)}


def three(second: str, **more: Any) -> dict[str, Any]:
    """A good node, the one that matters, and a good one behind it."""
    return graph(node("A", "good"), node("B", second, "A"), node("C", "good", "B"), **more)


def submit(serving: Serving, envelope: dict[str, Any], prefer: str = "") -> str:
    headers = {"Prefer": prefer} if prefer else {}
    answer = httpx.post(
        f"{serving.url}/v1/runs", json=envelope, headers=headers, timeout=DEADLINE_S
    ).raise_for_status()
    run_id: str = answer.json()["run_id"]
    return run_id


def status_of(serving: Serving, run_id: str) -> str:
    status: str = httpx.get(f"{serving.url}/v1/runs/{run_id}").json()["status"]
    return status


def types_of(serving: Serving, run_id: str) -> list[str]:
    events = httpx.get(f"{serving.url}/v1/runs/{run_id}/events").json()["events"]
    return [event["type"] for event in events]


def signals_of(serving: Serving, run_id: str) -> list[dict[str, Any]]:
    view = httpx.get(f"{serving.url}/v1/runs/{run_id}/debug").json()
    signals: list[dict[str, Any]] = view["signals"]
    return signals


def at_the_gate(serving: Serving, ledger: Ledger, label: str) -> str:
    """A run whose second node is called and gets no answer yet."""
    run_id = submit(serving, three("gate", metadata={"label": label}))
    eventually(lambda: ledger.calls[run_id, "B"] == 1, "the second node is called", DEADLINE_S)
    return run_id


def write(folder: Path, envelope: dict[str, Any], name: str = "envelope.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(envelope))
    return path
