"""`python -m bench.against_peer --peers FOLDER`: Flexrun and FastAPI + LangGraph, taking turns.

FOLDER holds the peer's scripts and the load client, which are run as they are: `http_load.py`,
`common.py`, `peer_langgraph_api.py` and `peer_langgraph.py`. Both sides use the same Postgres
server with durable settings, each a database of its own, made anew every round, and the same load
client in the same Python. LangGraph saves synchronously, through eight savers.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import statistics
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import uvloop

from app.store.embedded import EmbeddedPostgres
from bench import envelopes, process
from bench.rig import make_database, scratch, with_database
from bench.run import machine
from bench.stats import Book, Figure, Goal, Ratio, spread, table

PACKAGES = (
    "langgraph==1.2.22",
    "langgraph-checkpoint-postgres==3.2.0",
    "psycopg[binary,pool]",
    "fastapi",
    "uvicorn",
    "uvloop",
    "httptools",
)
PEER_API = ("peer_langgraph_api.py", "fastapi-pg-sync")
PEER = ("peer_langgraph.py", "pg-sync", "8")
LOAD = "http_load.py"
SCRIPTS = (LOAD, "common.py", PEER_API[0], PEER[0])
SCRIPT_S = 600.0
CHAIN, WIDTH = 100, 200

# The peers ask for psql, which not every machine has: this does what they ask of it.
PSQL = """#!{python}
import sys
import psycopg
with psycopg.connect(sys.argv[1], autocommit=True) as connection:
    cursor = connection.execute(sys.argv[3])
    for row in cursor if cursor.description else ():
        print("|".join(map(str, row)))
"""


@dataclass(frozen=True, slots=True)
class Compared:
    """One line of the comparison, ours over the peer's, with the goal for it."""

    what: str
    unit: str
    goal: Goal

    @property
    def ours(self) -> str:
        return f"{self.what}: flexrun"

    @property
    def peers(self) -> str:
        return f"{self.what}: peer"


RATE = Compared("diamond runs/s over HTTP + SSE, 32 at once", "runs/s", Goal(4, 8, "more"))
DONE = Compared("one run alone, POST to last event, p50", "ms", Goal(0.5, 0.3))
FIRST = Compared("one run alone, first event, p50", "ms", Goal(0.5, 0.3))
STEP = Compared("100-node chain, per step", "ms", Goal(0.4, 0.3))
WIDE = Compared("200-wide fan-out, whole run", "ms", Goal(0.15, 0.08))
LINES = (RATE, DONE, FIRST, STEP, WIDE)


class ScriptFailed(RuntimeError):
    """A script of the peers' folder gave no result. The text is the end of what it said."""


@dataclass(slots=True)
class Match:
    """The two sides with what they share. `server` is the address of the server's own database."""

    peers: Path
    python: Path
    scratch: Path
    server: str
    scale: float
    book: Book

    async def play(self, *, peer_first: bool) -> None:
        """One round, each side once."""
        for side in (self._peer, self._ours) if peer_first else (self._ours, self._peer):
            await side()

    async def _peer(self) -> None:
        found = await self._script(*PEER_API)
        alone, crowd = found["W4-latency"], found["W4-throughput"]
        self.book.add(FIRST.peers, FIRST.unit, alone["first_p50_ms"])
        self.book.add(DONE.peers, DONE.unit, alone["done_p50_ms"])
        self.book.add(RATE.peers, RATE.unit, crowd["runs_s"])
        found = await self._script(*PEER)
        self.book.add(STEP.peers, STEP.unit, found["W3-chain"]["ms_per_step"])
        self.book.add(WIDE.peers, WIDE.unit, found["W2-wide"]["total_ms"])

    async def _ours(self) -> None:
        await make_database(self.server, "bench_flexrun")
        dsn = with_database(self.server, "bench_flexrun")
        await process.migrate(dsn)
        async with process.running(database_url=dsn) as service:
            body = envelopes.encoded(envelopes.diamond(), at_least=envelopes.BODY_BYTES)
            found = await self._load(service.port, body, alone=100, crowd=(600, 32))
            alone, crowd = found["W4-latency"], found["W4-throughput"]
            self.book.add(FIRST.ours, FIRST.unit, alone["first_p50_ms"])
            self.book.add(DONE.ours, DONE.unit, alone["done_p50_ms"])
            self.book.add(RATE.ours, RATE.unit, crowd["runs_s"])
            for line, envelope, share in (
                (STEP, envelopes.chain(CHAIN), CHAIN),
                (WIDE, envelopes.wide(WIDTH), 1),
            ):
                body = envelopes.encoded(envelope)
                found = await self._load(service.port, body, alone=5, crowd=(1, 1))
                took = found["W4-latency"]["done_p50_ms"]
                self.book.add(line.ours, line.unit, took / share)

    async def _load(
        self, port: int, body: bytes, *, alone: int, crowd: tuple[int, int]
    ) -> dict[str, Any]:
        """Runs one by one, then some at once, by the peers' own load client."""
        path = self.scratch / "body.json"
        path.write_bytes(body)
        count, clients = crowd
        load = {"LAT_N": str(alone), "THR_N": str(count), "CONC": str(clients)}
        arguments = ("flexrun", str(port), "stream:/v1/runs", str(path), "RUN_DONE")
        return await self._script(LOAD, *arguments, **load)

    async def _script(self, name: str, *arguments: str, **more: str) -> dict[str, Any]:
        """Run a script of the folder; its last result of each workload."""
        environment = {
            **os.environ,
            "PATH": f"{self.scratch / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}",
            "BENCH_PG": self.server.rpartition("/")[0],
            "BENCH_TMP": str(self.scratch / "tmp"),
            "BENCH_SCALE": str(self.scale),
            **more,
        }
        script = await asyncio.create_subprocess_exec(
            str(self.python),
            str(self.peers / name),
            *arguments,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            said, _ = await asyncio.wait_for(script.communicate(), SCRIPT_S)
        finally:
            if script.returncode is None:
                script.kill()
                await script.wait()
        text = said.decode(errors="replace")
        results = results_in(text)
        if script.returncode != 0 or not results:
            raise ScriptFailed(f"{name} {' '.join(arguments)}:\n{text[-2_000:]}")
        return results


def results_in(text: str) -> dict[str, Any]:
    """The `RESULT {json}` lines of a script, by workload."""
    found: dict[str, Any] = {}
    for line in text.splitlines():
        if line.startswith("RESULT "):
            result = orjson.loads(line.removeprefix("RESULT "))
            found[result["workload"]] = result
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Play, print, and answer with the exit code."""
    parser = _parser()
    asked = parser.parse_args(arguments)
    missing = [name for name in SCRIPTS if not (asked.peers / name).is_file()]
    if missing:
        parser.error(f"--peers: no {', '.join(missing)} in {asked.peers}")
    book = Book([Ratio(line.what, line.ours, line.peers, line.goal) for line in LINES])
    with scratch() as folder:
        python = asked.peer_python or make_venv(folder / "venv")
        prepare(folder, python)
        with EmbeddedPostgres.start(folder / "data") as server:
            match = Match(asked.peers.resolve(), python, folder, server.dsn, asked.scale, book)
            uvloop.run(_play(match, asked.rounds))
        facts = {**machine(), "postgres": server.version}
    print(", ".join(f"{name} {value}" for name, value in facts.items()), end="; ")
    print(f"rounds {asked.rounds}, scale {asked.scale:g}\n")
    print(comparison(book, markdown=asked.markdown))
    if asked.json is not None:
        content = {"machine": facts, "scale": asked.scale, **book.as_dict()}
        asked.json.write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.against_peer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--peers", type=Path, required=True, metavar="FOLDER")
    parser.add_argument(
        "--peer-python",
        type=Path,
        metavar="PYTHON",
        help=f"one that has {', '.join(PACKAGES)}; without it a virtual environment is made",
    )
    parser.add_argument("--rounds", type=int, default=3, help="times each side plays [3]")
    parser.add_argument("--scale", type=float, default=1.0, help="size of the loads [1.0]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every value there")
    parser.add_argument("--markdown", action="store_true", help="print a table to be pasted")
    return parser


async def _play(match: Match, rounds: int) -> None:
    for number in range(1, rounds + 1):
        await match.play(peer_first=number % 2 == 1)
        print(f"round {number} of {rounds} is over", file=sys.stderr, flush=True)


def make_venv(folder: Path) -> Path:
    """A virtual environment with what the peer needs; its Python."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    return python


def prepare(folder: Path, python: Path) -> None:
    """The folders that the scripts use, with a psql for machines that have none."""
    (folder / "tmp").mkdir()
    (folder / "bin").mkdir()
    if shutil.which("psql") is None:
        psql = folder / "bin" / "psql"
        psql.write_text(PSQL.format(python=python.absolute()))
        psql.chmod(0o755)


def comparison(book: Book, *, markdown: bool) -> str:
    """Both sides, the ratio of each round, and whether it reaches its goal."""
    figures = {figure.what: figure for figure in book.figures()}
    ratios = {figure.what: figure for figure in book.ratios()}
    rows = [
        _row(line, figures[line.ours], figures[line.peers], ratios[line.what])
        for line in LINES
        if line.what in ratios
    ]
    head = ("what", "unit", "flexrun", "FastAPI + LangGraph", "ratio", "must", "aim", "")
    return table(head, rows, markdown=markdown)


def _row(line: Compared, ours: Figure, peers: Figure, ratio: Figure) -> tuple[str, ...]:
    goal = line.goal
    return (
        line.what,
        line.unit,
        spread(ours.values),
        spread(peers.values),
        spread(ratio.values),
        f"{goal.must:g}x",
        f"{goal.aim:g}x",
        goal.verdict(statistics.median(ratio.values)),
    )


if __name__ == "__main__":
    sys.exit(main())
