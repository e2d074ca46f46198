"""The compose file as it would run, without its engine: its commands, health checks and order.

Each service's own command becomes a process of this machine, with the environment of the file; only
addresses are mapped, from `service:port` and `0.0.0.0` to 127.0.0.1 and a free port. The images of
Postgres and Redis are replaced by the same servers from wheels. Postgres has no command in the file
but its image's; the embedded one has the same user and database, and its password is given to the
file as an operator would, by POSTGRES_PASSWORD. Health checks run as they stand; `pg_isready` and
`redis-cli` come with the servers. The model backend has no server here: its check asks a small one
that knows its one route.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from app.store.embedded import EmbeddedPostgres
from app.store.embedded_binaries import find_binaries
from app.store.embedded_files import remove_data
from tests.e2e.cli import COMMAND, ROOT
from tests.envelopes import diamond
from tests.servers import HOST, eventually, free_port, redis_binary

WORKERS = ("worker-1", "worker-2")
OURS = ("api", *WORKERS)
PATIENCE_S = 60.0
EVENTS_OF_A_DIAMOND = 12


def services_of_the_file(**variables: str) -> dict[str, dict[str, Any]]:
    """Its services as compose sees them with these variables set, and no others."""
    text = (ROOT / "docker-compose.yml").read_text("utf-8")
    text = re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: variables.get(found[1], found[2]), text)
    services: dict[str, dict[str, Any]] = yaml.safe_load(text)["services"]
    return services


class Stack:
    """The services of the compose file, without those of a profile, as processes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._services = services_of_the_file()
        self._ports = {"redis": (6379, free_port()), "models": (11434, free_port())}
        for name in OURS:
            command = self._services[name]["command"]
            self._ports[name] = (int(command[command.index("--port") + 1]), free_port())
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._postgres: EmbeddedPostgres | None = None
        self.started: list[str] = []
        programs = [
            Path(sys.executable).parent,
            redis_binary().parent,
            find_binaries(folder / "none").folder,
        ]
        self._path = os.pathsep.join([*map(str, programs), os.environ["PATH"]])

    # --- up and down ------------------------------------------------------------------------------

    def up(self) -> None:
        """Start each service when what it depends on is as far as the file wants it to be."""
        waiting = [name for name, found in self._services.items() if "profiles" not in found]
        while waiting:
            name = next(n for n in waiting if not set(self._needs(n)) & set(waiting))
            for needed, how in self._needs(name).items():
                self._await(needed, how["condition"])
            self.start(name)
            waiting.remove(name)
            self.started.append(name)

    def _needs(self, name: str) -> dict[str, dict[str, str]]:
        needs: dict[str, dict[str, str]] = self._services[name].get("depends_on", {})
        return needs

    def _await(self, name: str, condition: str) -> None:
        if condition == "service_healthy":
            eventually(lambda: self.is_healthy(name), f"{name} is healthy", PATIENCE_S)
        else:
            assert condition == "service_completed_successfully"
            assert self._processes[name].wait(PATIENCE_S) == 0, self.log(name)

    def start(self, name: str) -> None:
        if name == "postgres":
            self._start_postgres()
            return
        arguments = [self._here(name, word) for word in self._services[name]["command"]]
        program = {"flexrun": COMMAND, "redis-server": (str(redis_binary()),)}[arguments[0]]
        with (self._folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [*program, *arguments[1:]],
                env=self._environment(name),
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def stop(self, name: str) -> int:
        """SIGTERM, and the exit code; it has to come within the time that the file gives it."""
        if name == "postgres":
            assert self._postgres is not None
            self._postgres.stop()
            return 0
        process = self._processes.pop(name)
        process.terminate()
        grace = re.fullmatch(r"(\d+)s", self._services[name]["stop_grace_period"])
        assert grace is not None
        return process.wait(int(grace[1]))

    def clean_up(self) -> None:
        """Leave nothing behind, however the test went."""
        for process in self._processes.values():
            process.kill()
            process.wait()
        for name in self.started:
            sys.stdout.write(f"--- {name} ---\n{self.log(name)}\n")  # pytest shows it if it failed
        if self._postgres is not None:
            self._postgres.stop()
            remove_data(self._folder / "postgres")

    def log(self, name: str) -> str:
        path = self._folder / f"{name}.log"
        return path.read_text(errors="replace")[-4000:] if path.exists() else ""

    # --- Postgres ---------------------------------------------------------------------------------

    def _start_postgres(self) -> None:
        """On the port and the data that it had, if it had any."""
        self._postgres = EmbeddedPostgres.start(self._folder / "postgres")
        address = httpx.URL(self._postgres.dsn)
        assert address.port is not None
        assert self._ports.setdefault("postgres", (5432, address.port))[1] == address.port
        self._services = services_of_the_file(POSTGRES_PASSWORD=address.password)
        given = self._services["postgres"]["environment"]
        assert (address.username, address.path) == (
            given["POSTGRES_USER"],
            f"/{given['POSTGRES_DB']}",
        )

    # --- health -----------------------------------------------------------------------------------

    def is_healthy(self, name: str) -> bool:
        """Run the health check of the file once, with its own time limit."""
        process = self._processes.get(name)
        assert process is None or process.poll() is None, f"{name} ended by itself"
        check = self._services[name]["healthcheck"]
        kind, *words = [self._here(name, word) for word in check["test"]]
        command = ["/bin/sh", "-c", *words] if kind == "CMD-SHELL" else words
        try:
            done = subprocess.run(
                command,
                env=self._environment(name),
                capture_output=True,
                timeout=int(check["timeout"].removesuffix("s")),
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0

    def url(self, name: str) -> str:
        return f"http://{HOST}:{self._ports[name][1]}"

    def port(self, name: str) -> int:
        return self._ports[name][1]

    def _here(self, name: str, text: str) -> str:
        """A word of the file with its addresses as they are on this machine."""
        for other, (inside, outside) in self._ports.items():
            text = text.replace(f"{other}:{inside}", f"{HOST}:{outside}")
        if name in self._ports:
            inside, outside = self._ports[name]
            text = re.sub(rf"\b{inside}\b", str(outside), text)
        return text.replace("0.0.0.0", HOST)

    def _environment(self, name: str) -> dict[str, str]:
        kept = {
            variable: value
            for variable, value in os.environ.items()
            if not variable.startswith("FLEXRUN_") and variable not in ("DATABASE_URL", "REDIS_URL")
        }
        given = self._services[name].get("environment", {})
        mapped = {variable: self._here(name, str(value)) for variable, value in given.items()}
        return {**kept, "PATH": self._path, "PYTHONPATH": str(ROOT), **mapped}


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    stack = Stack(tmp_path)
    try:
        yield stack
    finally:
        stack.clean_up()


# --- what a user sees -----------------------------------------------------------------------------


def readiness(stack: Stack, name: str) -> tuple[int, str]:
    answer = httpx.get(f"{stack.url(name)}/readyz", timeout=15)
    return answer.status_code, answer.json()["status"]


def all_say(stack: Stack, *expected: object) -> None:
    """Until every process of ours answers its readiness probe like this."""
    eventually(
        lambda: all(readiness(stack, name) == expected for name in OURS),
        f"all are {expected}",
        PATIENCE_S,
    )


def all_healthy(stack: Stack, *names: str) -> None:
    """Until each passes its health check: one that runs into its time limit is made again."""
    for name in names:
        eventually(partial(stack.is_healthy, name), f"{name} is healthy", PATIENCE_S)


def finished_run(stack: Stack) -> str:
    """Submit a diamond to the API, and see it done."""
    api = stack.url("api")
    accepted = httpx.post(f"{api}/v1/runs", json=diamond(), timeout=15)
    assert accepted.status_code == 202, accepted.text
    run_id: str = accepted.json()["run_id"]

    def is_done() -> bool:
        return bool(httpx.get(f"{api}/v1/runs/{run_id}", timeout=15).json()["status"] == "done")

    eventually(is_done, f"run {run_id} is done", PATIENCE_S)
    return run_id


def events(stack: Stack, run_id: str) -> Any:
    answer = httpx.get(f"{stack.url('api')}/v1/runs/{run_id}/events", timeout=15)
    assert answer.status_code == 200, answer.text
    return answer.json()["events"]


def finished_by(stack: Stack, name: str) -> float:
    """How many runs a process has brought to their end, by its own word."""
    text = httpx.get(f"{stack.url(name)}/metrics", timeout=15).text
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "flexrun_runs_finished_total"
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_the_compose_file_says_comes_up_heals_and_stops(stack: Stack) -> None:
    stack.up()
    assert stack.started[-3:] == list(OURS)
    assert stack.started.index("migrate") == 2  # behind Postgres and Redis
    all_healthy(stack, *OURS)
    all_say(stack, 200, "ok")
    first = finished_run(stack)
    told = events(stack, first)
    assert [event["seq"] for event in told] == list(range(1, len(told) + 1))
    assert len(told) >= EVENTS_OF_A_DIAMOND
    assert finished_by(stack, "api") == 0
    eventually(
        lambda: sum(finished_by(stack, name) for name in WORKERS) == 1,
        "the worker has heard that the end is durable, which the API may have read before",
    )

    without_redis(stack)
    without_postgres(stack, first, told)

    for name in reversed(stack.started):
        if name != "migrate":
            assert stack.stop(name) == 0, (name, stack.log(name))


def without_redis(stack: Stack) -> None:
    """Degraded is ready, and runs go on; with Redis back, all is as before."""
    assert stack.stop("redis") == 0
    assert not stack.is_healthy("redis")
    all_say(stack, 200, "degraded")
    all_healthy(stack, *OURS)
    finished_run(stack)
    stack.start("redis")
    all_healthy(stack, "redis")
    all_say(stack, 200, "ok")


def without_postgres(stack: Stack, run_id: str, told: Any) -> None:
    """Nothing is accepted, nothing is lost, and all comes back by itself."""
    stack.stop("postgres")
    assert not stack.is_healthy("postgres")
    all_say(stack, 503, "unavailable")
    assert not any(stack.is_healthy(name) for name in OURS)
    refused = httpx.post(f"{stack.url('api')}/v1/runs", json=diamond(), timeout=30)
    assert refused.status_code == 503, refused.text
    assert refused.headers["content-type"] == "application/problem+json"
    assert int(refused.headers["retry-after"]) >= 1
    assert all(httpx.get(f"{stack.url(name)}/livez").status_code == 200 for name in OURS)
    stack.start("postgres")
    all_say(stack, 200, "ok")
    all_healthy(stack, "postgres", *OURS)
    assert events(stack, run_id) == told
    finished_run(stack)


# --- the model backend ----------------------------------------------------------------------------


@contextmanager
def backend(port: int, status: int) -> Iterator[None]:
    """The one route of a model backend that its health check asks."""

    class Version(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/api/version"
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b'{"version":"0.9.0"}' if status == 200 else b'{"error":"loading"}')

        def log_message(self, format: str, *args: object) -> None:
            """Not to the terminal."""

    server = ThreadingHTTPServer((HOST, port), Version)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_health_check_of_the_model_backend_knows_a_good_one(stack: Stack) -> None:
    assert not stack.is_healthy("models")
    with backend(stack.port("models"), 200):
        assert stack.is_healthy("models")
    with backend(stack.port("models"), 503):
        assert not stack.is_healthy("models")


def test_words_of_the_file_are_mapped_and_nothing_else(stack: Stack) -> None:
    api = stack.port("api")
    assert stack._here("api", "--port 8000 --host 0.0.0.0") == f"--port {api} --host {HOST}"
    assert stack._here("api", "redis://redis:6379/0") == f"redis://{HOST}:{stack.port('redis')}/0"
    assert stack._here("worker-1", "8000 18001") == "8000 18001"
