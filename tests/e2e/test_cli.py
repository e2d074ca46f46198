"""The command line against a real service, each as a process of its own."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest

from app.cli.config import masked
from app.cli.follow import SseReader
from app.cli.picture import laid_out
from app.store.database import Database
from app.store.migrate import head_revision
from app.store.partitions import make_partitions
from tests.conftest import with_database
from tests.e2e.cli import Cli, CuttingProxy, Serving, Tool, environment
from tests.envelopes import chain, diamond, graph
from tests.servers import eventually, free_port

DOCUMENT = """# The lighthouse

The lighthouse of Kiel was built in 1897 and is 17 metres high. It guides ships at night.

## Keepers

Three keepers lived there until 1967. Since then the light works without people.
"""


async def _execute(dsn: str, statement: str) -> None:
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


@pytest.fixture(scope="module")
def empty_dsn(postgres_dsn: str) -> str:
    """An empty database for the whole file; the first `flexrun migrate` fills it."""
    # In a thread of its own: pytest-asyncio keeps a loop in this one.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, _execute(postgres_dsn, "create database cli")).result()
    return with_database(postgres_dsn, "cli")


@pytest.fixture(scope="module")
def cli(empty_dsn: str, tmp_path_factory: pytest.TempPathFactory) -> Cli:
    """Commands on a migrated database."""
    cli = Cli(tmp_path_factory.mktemp("cli"), DATABASE_URL=empty_dsn)
    refused = cli("serve", "--port", "0")
    assert refused.returncode == 3
    assert "flexrun migrate" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert head_revision() in cli.ok("migrate")
    return cli


@pytest.fixture(scope="module")
def serving(cli: Cli) -> Iterator[Serving]:
    """One service for all tests that do not stop it; `cli` speaks to it."""
    with Serving(cli, "--port", "0") as serving:
        cli.env["FLEXRUN_URL"] = serving.url
        yield serving
    assert serving.process.returncode == 0


@pytest.fixture
def tool() -> Iterator[Tool]:
    tool = Tool()
    yield tool
    tool.close()


def write(folder: Path, name: str, content: Any) -> Path:
    """A file in the folder of the test, as JSON unless it is a text."""
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def lines_of(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert "Traceback" not in done.stderr
    return done.stdout.splitlines()


# --- run ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("serving")
def test_run_from_a_file_prints_every_event_and_the_output(cli: Cli, tmp_path: Path) -> None:
    done = cli("run", write(tmp_path, "diamond.json", diamond()), "--label", "from-file")
    assert done.returncode == 0, done.stderr
    lines = lines_of(done)
    types = [line.split()[1] for line in lines[1:13]]
    assert types[0] == "RUN_QUEUED"
    assert types[-1] == "RUN_DONE"
    assert types.count("NODE_DONE") == 4
    assert lines[14].startswith("done in ")
    (listed,) = cli.json("runs", "--label", "from-file")
    assert listed["run_id"] in lines[0]


@pytest.mark.usefixtures("serving")
def test_run_reads_standard_input_and_answers_json(cli: Cli) -> None:
    envelope = json.dumps(diamond())
    run = json.loads(cli.ok("run", "-", "--json", stdin=envelope))
    assert run["status"] == "done"
    assert [node["status"] for node in run["nodes"]] == ["done"] * 4


@pytest.mark.usefixtures("serving")
def test_run_shapes_a_file_as_its_facet_and_prints_the_brief_with_sources(
    cli: Cli, tmp_path: Path
) -> None:
    document = write(tmp_path, "tower.md", DOCUMENT)
    printed = cli.ok("run", "--input", f"document=@{document}", "--output", "brief")
    assert "The lighthouse\n======" in printed
    assert "↳ section “Keepers”, line 7" in printed
    run_id = printed.split()[1]
    sent = json.loads(cli.ok("show", run_id, "--debug"))["envelope"]["inputs"]["document"]
    assert sent == {
        "title": "The lighthouse",
        "text": DOCUMENT,
        "media_type": "text/markdown",
        "source": str(document),
    }


@pytest.mark.usefixtures("serving")
def test_inputs_are_texts_files_or_json(cli: Cli, tmp_path: Path) -> None:
    value = write(tmp_path, "value.json", {"a": [1, 2, 3]})
    query = write(tmp_path, "query.txt", "a[1]\n")
    for given in (f"query=@{query}", "query=a[1]", 'query:="a[1]"'):
        run = cli.json("run", "-i", given, "-i", f"json_value=@{value}", "-o", "json_result")
        assert run["output"] == {"json_result": 2}
    run = cli.json("run", "-i", "query=a", "-i", 'json_value:={"a": null}', "-o", "json_result")
    assert run["output"] == {"json_result": None}


@pytest.mark.usefixtures("serving")
def test_run_exits_1_for_a_failed_run_and_names_the_node(cli: Cli) -> None:
    done = cli("run", "-i", "query=a[", "-i", "json_value:={}", "-o", "json_result")
    assert done.returncode == 1
    assert "NODE_FAILED" in done.stdout
    assert "query_invalid" in done.stdout
    assert "flexrun show" in done.stdout


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "nothing to produce"),
        (["missing.json"], "can not be read"),
        (["-"], "is no JSON"),
        (["-i", "document", "-o", "brief"], "is not of the form"),
        (["-i", "document:={", "-o", "brief"], "line 1, column 2"),
        (["-o", "nonsense"], "UNKNOWN_FACET"),
        (["-o", "brief", "--deadline", "-1"], "/constraints/deadline_s"),
    ],
)
@pytest.mark.usefixtures("serving")
def test_run_exits_2_for_what_can_not_be_understood(cli: Cli, args: list[str], said: str) -> None:
    done = cli("run", *args)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_commands_exit_3_without_a_service(cli: Cli) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    for args in (("run", "-", "--url", url), ("tail", "x", "-f", "--url", url)):
        done = cli(*args, stdin="{}")
        assert done.returncode == 3
        assert "flexrun serve" in done.stderr


@pytest.mark.usefixtures("serving")
def test_a_run_that_awaits_a_human_is_shown_with_commands_and_resumed(
    cli: Cli, tool: Tool, tmp_path: Path
) -> None:
    cli.ok(
        "capabilities",
        "register",
        "-",
        stdin=json.dumps(tool.registration("broken", "at_most_once")),
    )
    node = {"id": "pay", "capability": "tool.broken", "inputs": {}}
    envelope = write(tmp_path, "pay.json", graph(node))
    done = cli("run", envelope)
    assert done.returncode == 4
    run_id = done.stdout.split()[1]
    shown = cli.ok("show", run_id)
    assert "■ pay" in shown
    assert "unknown_outcome" in shown
    assert f"flexrun resume {run_id} --node pay=retry" in shown

    output = write(tmp_path, "output.json", {"paid": True})
    missing = cli("resume", run_id)
    assert missing.returncode == 2
    assert "DECISION_MISSING" in missing.stderr
    cli.ok(
        "resume", run_id, "--node", "pay=done", "--output", f"pay=@{output}", "--operator", "ann"
    )
    events = cli.ok("tail", run_id, "-f")
    assert "RUN_RESUMED" in events
    assert cli.json("show", run_id)["output"] == {"paid": True}
    again = cli("resume", run_id, "--node", "pay=retry")
    assert again.returncode == 2
    assert "invalid_run_state" in again.stderr


# --- tail and show --------------------------------------------------------------------------------


FILTERS: list[dict[str, list[str]]] = [
    {},
    {"type": ["NODE_DONE"]},
    {"node": ["B", "C"]},
    {"type": ["NODE_START", "NODE_DONE"], "node": ["B"]},
    {"type": ["NODE_DONE"], "level": ["ERROR"]},
]


def test_tail_filters_as_the_api_does(cli: Cli, serving: Serving, tmp_path: Path) -> None:
    run_id = cli.json("run", write(tmp_path, "diamond.json", diamond()))["run_id"]
    for filters in FILTERS:
        answer = httpx.get(f"{serving.url}/v1/runs/{run_id}/events", params=filters)
        options = [
            f"--{name}={value.lower()}"
            for name in filters
            for value in filters[name]
            if name != "node"
        ]
        options += [f"--node={value}" for value in filters.get("node", ())]
        for follow in ((), ("-f",)):
            printed = cli.ok("tail", run_id, "--json", *options, *follow)
            assert [json.loads(line) for line in printed.splitlines()] == answer.json()["events"]
    behind = cli.ok("tail", run_id, "--after", "10").splitlines()
    assert [line.split()[0] for line in behind] == ["11", "12"]


def test_follow_goes_on_after_dropped_connections(
    cli: Cli, serving: Serving, tmp_path: Path
) -> None:
    proxy = CuttingProxy(serving.port, cuts=2, after_bytes=1_500)
    try:
        envelope = write(tmp_path, "chain.json", chain(20))
        live = cli("run", envelope, "--url", proxy.url)
        assert live.returncode == 0, live.stderr
        assert live.stderr.count("going on behind event") == 2
        seqs = [int(line.split()[0]) for line in lines_of(live) if line[:4].strip().isdigit()]
        run_id = live.stdout.split()[1]
        stored = [json.loads(line)["seq"] for line in cli.ok("tail", run_id, "--json").splitlines()]
        assert seqs == stored == list(range(1, 45))
        assert proxy.streams == 3
    finally:
        proxy.close()


@pytest.mark.usefixtures("serving")
def test_show_draws_the_nodes_with_what_they_wait_for(cli: Cli, tmp_path: Path) -> None:
    run_id = cli.json("run", write(tmp_path, "diamond.json", diamond()))["run_id"]
    shown = cli.ok("show", run_id, "--events", "--plan").splitlines()
    starts = ("✓ A", "├─ ✓ B", "└─ ✓ C", "   └─ ✓ D")
    drawn = [line for line in shown if line.startswith(starts)]
    assert len(drawn) == 4
    assert drawn[3].endswith("← B, C")
    assert any(line.startswith("Plan version 1 by caller") for line in shown)
    assert sum(" NODE_DONE " in line for line in shown) == 4
    unknown = cli("show", "nope")
    assert unknown.returncode == 2
    assert "run_not_found" in unknown.stderr


def test_big_and_deep_graphs_are_listed_in_order() -> None:
    requires: dict[str, tuple[str, ...]] = {f"n{i}": (f"n{i - 1}",) if i else () for i in range(50)}
    shuffled = dict(random.Random(1).sample(list(requires.items()), 50))
    lines = laid_out(shuffled, 16)
    assert [line.node_id for line in lines] == list(requires)
    assert {line.guide for line in lines} == {""}


# --- plan and registry ----------------------------------------------------------------------------


@pytest.mark.usefixtures("serving")
def test_plan_shows_the_proof_or_the_faults(cli: Cli, tmp_path: Path) -> None:
    document = write(tmp_path, "tower.md", DOCUMENT)
    shown = cli.ok("plan", "-i", f"document=@{document}", "-o", "brief")
    assert "brief ← check/brief  same_facet" in shown
    node = {"id": "A", "capability": "document.outline", "inputs": {"document": {"value": 7}}}
    rejected = cli("plan", write(tmp_path, "bad.json", graph(node)))
    assert rejected.returncode == 1
    assert "plan_rejected" in rejected.stderr
    assert "/goal_graph/nodes/0/inputs/document" in rejected.stderr


@pytest.mark.usefixtures("serving")
def test_capabilities_and_facets_are_looked_up(cli: Cli) -> None:
    assert cli.ok("capabilities") == cli.ok("capabilities", "list")
    assert "document.outline" in cli.ok("capabilities")
    assert '"type": "object"' in cli.ok("capabilities", "show", "util.echo")
    assert {facet["name"] for facet in cli.json("facets", "list")} >= {"document", "brief"}
    assert "Markdown" in cli.ok("facets", "show", "document")
    unknown = cli("capabilities", "show", "nope")
    assert unknown.returncode == 2
    assert "flexrun capabilities list" in unknown.stderr


# --- serve ----------------------------------------------------------------------------------------


def test_serve_refuses_an_address_that_others_can_reach(cli: Cli) -> None:
    done = cli("serve", "--host", "0.0.0.0", "--port", "0")
    assert done.returncode == 2
    assert "FLEXRUN_ALLOW_UNAUTHENTICATED" in done.stderr


def test_serve_says_that_its_port_is_in_use(cli: Cli, serving: Serving) -> None:
    done = cli("serve", "--port", str(serving.port))
    assert done.returncode == 4
    assert f"Port {serving.port}" in done.stderr
    assert "Traceback" not in done.stderr


def test_sigterm_during_a_run_ends_in_order_and_the_next_service_finishes_it(
    cli: Cli, tool: Tool, tmp_path: Path
) -> None:
    port = str(free_port())
    serving = Serving(cli, "--port", port)
    slow = write(tmp_path, "slow.json", tool.registration("slow", "idempotent"))
    cli.ok("capabilities", "register", slow, "--url", serving.url)
    node = {"id": "wait", "capability": "tool.slow", "inputs": {}}
    envelope = write(tmp_path, "wait.json", graph(node))
    client = cli.start("run", envelope, "--url", serving.url)
    assert tool.called.wait(30)
    assert serving.stop() == 0
    tool.release.set()
    with Serving(cli, "--port", port):
        printed, complained = client.communicate(timeout=60)
    assert client.returncode == 0, printed + complained
    assert "going on behind event" in complained
    assert "Traceback" not in serving.log.read_text()
    seqs = [int(line.split()[0]) for line in printed.splitlines() if line[:4].strip().isdigit()]
    assert seqs == list(range(1, len(seqs) + 1))


def test_a_second_interrupt_does_not_wait_for_running_calls(
    cli: Cli, tool: Tool, tmp_path: Path
) -> None:
    serving = Serving(cli, "--port", "0", FLEXRUN_DRAIN_GRACE_S="60")
    slow = write(tmp_path, "slow.json", tool.registration("slow", "idempotent"))
    cli.ok("capabilities", "register", slow, "--url", serving.url)
    serving.log.write_text("")
    node = {"id": "wait", "capability": "tool.slow", "inputs": {}}
    httpx.post(f"{serving.url}/v1/runs", json=graph(node)).raise_for_status()
    assert tool.called.wait(30)
    serving.process.send_signal(signal.SIGINT)
    eventually(lambda: "Shutting down" in serving.log.read_text(), "the service drains")
    serving.process.send_signal(signal.SIGINT)
    assert serving.process.wait(10) == 130
    serving.stop()


# --- this machine ---------------------------------------------------------------------------------


def test_doctor_finds_all_well_and_masks_the_password(cli: Cli, serving: Serving) -> None:
    done = cli("doctor")
    assert done.returncode == 0, done.stdout
    assert head_revision() in done.stdout
    assert f"ready at {serving.url}" in done.stdout
    password = cli.env["DATABASE_URL"].split("@")[0].rpartition(":")[2]
    assert ":***@" in done.stdout
    assert password not in done.stdout + done.stderr + serving.ready_line


def test_doctor_says_what_to_do_about_each_problem(cli: Cli) -> None:
    away = f"postgresql://u:hidden@127.0.0.1:{free_port()}/x"
    done = cli("doctor", DATABASE_URL=away, FLEXRUN_SECRETS_FILE="missing.json")
    assert done.returncode == 1
    assert "database_unreachable" in done.stdout
    assert "FLEXRUN_SECRETS_FILE" in done.stdout
    assert "2 problem(s)" in done.stdout
    assert "hidden" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:secret@h:5432/db", "postgresql://u:***@h:5432/db"),
        ("postgresql://h/db?password=secret", "postgresql://h/db"),
        ("postgresql:///db?host=/run", "postgresql:///db"),
        ("postgresql://u:secret/x@h/db", "(no valid address)"),
        ("postgresql://u:secret@h:port/db", "(no valid address)"),
        ("u:secret@h/db", "(no valid address)"),
    ],
)
def test_no_secret_of_an_address_is_shown(url: str, shown: str) -> None:
    assert masked(url) == shown


@pytest.mark.parametrize("variable", ["FLEXRUN_PORT", "FLEXRUN_RUNS_MAX", "DATABASE_URL"])
def test_settings_that_are_wrong_are_named_and_not_repeated(cli: Cli, variable: str) -> None:
    done = cli("serve", **{variable: "s3cret"})
    assert done.returncode == 2
    assert variable in done.stderr
    assert "s3cret" not in done.stderr


async def test_prune_drops_old_days_but_not_when_it_is_dry(dsn: str, tmp_path: Path) -> None:
    database = await Database.open(dsn)
    try:
        await make_partitions(database, datetime.now(UTC).date() - timedelta(days=90))
    finally:
        await database.close()
    cli = Cli(tmp_path, DATABASE_URL=dsn)
    dry = await asyncio.to_thread(cli.ok, "prune", "--older-than", "30d", "--dry-run")
    assert dry.count("would be dropped") == 9
    pruned = await asyncio.to_thread(cli.ok, "prune", "--older-than", "30d")
    assert pruned.count("dropped") == 9
    empty = await asyncio.to_thread(cli.ok, "prune", "--older-than", "30d")
    assert "Nothing is kept" in empty
    wrong = await asyncio.to_thread(cli, "prune", "--older-than", "0d")
    assert wrong.returncode == 2


def test_migrate_is_repeatable(cli: Cli) -> None:
    assert "already" in cli.ok("migrate")


def test_demo_runs_on_an_embedded_postgres_of_its_own(tmp_path: Path) -> None:
    write(tmp_path, "tower.md", DOCUMENT)
    # What the terminal is set up for must not matter.
    cli = Cli(tmp_path, DATABASE_URL="postgresql://nobody@127.0.0.1:1/x", FLEXRUN_HOST="0.0.0.0")
    printed = cli.ok("demo", "tower.md", "--data-dir", "data")
    assert "(data in data)" in printed
    assert "RUN_DONE" in printed
    assert "↳ section “Keepers”" in printed
    repeated = cli.ok("migrate", "--data-dir", "data") if "DATABASE_URL" not in cli.env else ""
    assert repeated == ""


# --- without a service ----------------------------------------------------------------------------


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys, app.cli.main\n"
        "heavy = {'fastapi', 'sqlalchemy', 'asyncpg', 'httpx', 'alembic', 'uvicorn', 'app.settings'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=environment())


def test_version(cli: Cli) -> None:
    assert cli.ok("version").startswith("flexrun ")


STREAM = (
    '\ufeffretry: 700\n\n: comment\nid: 1\nevent: A\ndata: {"x": "a\u2028b"}\n\n'
    "id: 2\r\ndata: one\r\ndata:two\r\n\r\n"
    "event: B\rdata\r\r"
    "id: 3\nevent: none\n\n"
    "data: unfinished\n"
)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 64, 10_000])
def test_the_sse_reader_reads_the_same_in_any_cut(size: int) -> None:
    reader = SseReader()
    raw = STREAM.encode()
    found = [m for i in range(0, len(raw), size) for m in reader.feed(raw[i : i + size])]
    assert [(m.event, m.data, m.id) for m in found] == [
        ("A", '{"x": "a\u2028b"}', "1"),
        ("message", "one\ntwo", "2"),
        ("B", "", "2"),
    ]
    assert reader.retry_ms == 700
