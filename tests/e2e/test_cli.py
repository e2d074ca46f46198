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

from app.cli.client import Api
from app.cli.config import load_settings, masked
from app.cli.database import days_of
from app.cli.errors import Unreachable, UsageError
from app.cli.follow import Follower, SseReader
from app.cli.inputs import make_envelope
from app.cli.output import as_json, plain
from app.cli.picture import laid_out
from app.store.database import Database
from app.store.partitions import make_partitions
from app.store.revisions import head_revision
from tests.conftest import with_database
from tests.e2e.cli import COMMAND, Cli, CuttingProxy, Serving, Tool, environment
from tests.envelopes import chain, diamond, graph
from tests.servers import eventually, free_port

WAITING = {"id": "wait", "capability": "tool.slow", "inputs": {}}
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
def cli(postgres_dsn: str, tmp_path_factory: pytest.TempPathFactory) -> Cli:
    """Commands on a database that the first `flexrun migrate` fills."""
    folder = tmp_path_factory.mktemp("cli")  # has a number: the file may be taken up twice
    # In a thread of its own: pytest-asyncio keeps a loop in this one.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, _execute(postgres_dsn, f"create database {folder.name}")).result()
    cli = Cli(folder, DATABASE_URL=with_database(postgres_dsn, folder.name))
    refused = cli("serve", "--port", "0")
    assert refused.returncode == 3
    assert "flexrun migrate" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert head_revision() in cli.executed.ok("migrate")
    return cli


@pytest.fixture(scope="module")
def serving(cli: Cli) -> Iterator[Serving]:
    """One service for all tests that do not stop it; `cli` speaks to it."""
    with Serving(cli, "--port", "0") as serving:
        cli.env["FLEXRUN_URL"] = serving.url
        yield serving
    assert serving.process.poll() == 0


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


def register(serving: Serving, registration: dict[str, Any]) -> None:
    httpx.post(f"{serving.url}/v1/capabilities", json=registration).raise_for_status()


def seqs_of(printed: str) -> list[int]:
    """The seqs of printed event lines."""
    return [int(line.split()[0]) for line in printed.splitlines() if line[:4].strip().isdigit()]


# --- run ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("serving")
def test_run_from_a_file_prints_every_event_and_the_output(cli: Cli, tmp_path: Path) -> None:
    envelope = write(tmp_path, "diamond.json", diamond())
    done = cli.executed("run", envelope, "--label", "from-file")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
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
def test_inputs_are_texts_or_the_json_of_files(cli: Cli, tmp_path: Path) -> None:
    value = write(tmp_path, "value.json", {"a": [1, 2, 3]})
    given = ("-i", "query=a[1]", "-i", f"json_value=@{value}")
    assert cli.json("run", *given, "-o", "json_result")["output"] == {"json_result": 2}


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
        (["-"], "is no JSON"),
        (["-o", "brief", "--deadline", "-1"], "/constraints/deadline_s"),
    ],
)
@pytest.mark.usefixtures("serving")
def test_run_exits_2_for_what_can_not_be_understood(cli: Cli, args: list[str], said: str) -> None:
    done = cli("run", *args)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("document", "is not of the form"),
        ("document:={", "line 1, column 2"),
        ("document:=@missing.json", "can not be read"),
        ("document:=[" + "[" * 100_000, "nested too deeply"),
    ],
)
def test_inputs_that_can_not_be_read_are_explained(given: str, said: str) -> None:
    with Api("http://127.0.0.1:1") as api, pytest.raises(UsageError, match=said):
        make_envelope(api, None, [given], ["brief"], None)


def test_commands_exit_3_without_a_service(cli: Cli) -> None:
    done = cli("tail", "x", "-f", "--url", f"http://127.0.0.1:{free_port()}")
    assert done.returncode == 3
    assert "flexrun serve" in done.stderr


def test_a_run_that_awaits_a_human_is_shown_with_commands_and_resumed(
    cli: Cli, serving: Serving, tool: Tool, tmp_path: Path
) -> None:
    broken = json.dumps(tool.registration("broken", "at_most_once"))
    assert "Registered tool.broken" in cli.ok("capabilities", "register", "-", stdin=broken)
    node = {"id": "pay", "capability": "tool.broken", "inputs": {}}
    done = cli("run", write(tmp_path, "pay.json", graph(node)))
    assert done.returncode == 4
    run_id = done.stdout.split()[1]
    shown = cli.ok("show", run_id)
    assert "■ pay" in shown
    assert "unknown_outcome" in shown
    assert f"flexrun resume {run_id} --node pay=retry" in shown

    missing = cli("resume", run_id)
    assert missing.returncode == 2
    assert "DECISION_MISSING" in missing.stderr
    output = write(tmp_path, "output.json", {"paid": True})
    given = ("--node", "pay=done", "--output", f"pay=@{output}", "--operator", "ann")
    cli.ok("resume", run_id, *given)
    assert "RUN_RESUMED" in cli.ok("tail", run_id, "-f")
    run = httpx.get(f"{serving.url}/v1/runs/{run_id}").json()
    assert run["output"] == {"paid": True}


# --- tail and show --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def diamond_id(serving: Serving) -> str:
    """A finished run."""
    answer = httpx.post(f"{serving.url}/v1/runs", json=diamond(), headers={"Prefer": "wait=30"})
    run_id: str = answer.json()["run_id"]
    return run_id


@pytest.mark.parametrize(
    ("filters", "follow"),
    [
        ({"type": ["NODE_START", "NODE_DONE"], "node": ["B", "C"], "after": "6"}, False),
        ({"type": ["NODE_START", "NODE_DONE"], "node": ["B", "C"], "level": ["INFO"]}, True),
    ],
)
def test_tail_filters_as_the_api_does(
    cli: Cli, serving: Serving, diamond_id: str, filters: dict[str, Any], follow: bool
) -> None:
    answer = httpx.get(f"{serving.url}/v1/runs/{diamond_id}/events", params=filters)
    options = [f"--{n}={v}" for n, vs in filters.items() for v in ([vs] if n == "after" else vs)]
    printed = cli.ok("tail", diamond_id, "--json", *options, *(["-f"] if follow else []))
    assert [json.loads(line) for line in printed.splitlines()] == answer.json()["events"]


def test_follow_goes_on_after_dropped_connections(
    cli: Cli, serving: Serving, tmp_path: Path
) -> None:
    proxy = CuttingProxy(serving.port, cuts=2, after_bytes=1_500)
    try:
        envelope = write(tmp_path, "chain.json", chain(20))
        live = cli("run", envelope, "--url", proxy.url)
    finally:
        proxy.close()
    assert live.returncode == 0, live.stderr
    assert live.stderr.count("going on behind event") == 2
    assert proxy.streams == 3
    run_id = live.stdout.split()[1]
    page = httpx.get(f"{serving.url}/v1/runs/{run_id}/events").json()["events"]
    assert seqs_of(live.stdout) == [event["seq"] for event in page] == list(range(1, 45))


def test_show_draws_the_nodes_with_what_they_wait_for(cli: Cli, diamond_id: str) -> None:
    shown = cli.ok("show", diamond_id, "--events", "--plan").splitlines()
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


def test_nothing_that_others_wrote_steers_the_terminal() -> None:
    assert plain("a\x1b[31mb\x9bc\td\ne\x7f") == "a\ufffd[31mb\ufffdc\td\ne\ufffd"
    assert json.loads(as_json({"a": "\x1b\x9b"})) == {"a": "\x1b\x9b"}
    assert "\x9b" not in as_json({"a": "\x9b"})


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
    assert "document.outline" in cli.ok("capabilities")
    assert {facet["name"] for facet in cli.json("facets")} >= {"document", "brief"}
    assert "Markdown" in cli.ok("facets", "show", "document")
    unknown = cli("capabilities", "show", "nope")
    assert unknown.returncode == 2
    assert "flexrun capabilities list" in unknown.stderr


class Waits(Exception):
    """The follower is about to try again, which it would do for two minutes."""


def test_a_service_that_was_there_a_moment_ago_is_waited_for() -> None:
    """Nobody listens at the port: is it the wrong one, or is the service being restarted?"""
    run_id = "019a0000-0000-7000-8000-000000000000"

    def say(sentence: str) -> None:
        raise Waits(sentence)

    with Api(f"http://127.0.0.1:{free_port()}") as api:
        for was_there, error in ((False, Unreachable), (True, Waits)):
            follower = Follower(api, run_id, was_there=was_there, say=say)
            with pytest.raises(error, match="Flexrun does not answer"):
                next(iter(follower))
            with pytest.raises(error, match="Flexrun does not answer"):
                follower.get("/v1/runs")


# --- serve ----------------------------------------------------------------------------------------


def test_serve_refuses_an_address_that_others_can_reach(cli: Cli) -> None:
    done = cli("serve", "--host", "0.0.0.0", "--port", "0")
    assert done.returncode == 2
    assert "FLEXRUN_ALLOW_UNAUTHENTICATED" in done.stderr


def test_serve_says_that_its_port_is_in_use(cli: Cli, serving: Serving) -> None:
    for role in ("serve", "api", "worker"):
        done = cli(role, "--port", str(serving.port))
        assert done.returncode == 4
        assert f"Port {serving.port}" in done.stderr
        assert f"flexrun {role} --port {serving.port + 1} " in done.stderr
        assert "Traceback" not in done.stderr


def test_sigterm_during_a_run_ends_in_order_and_the_next_service_finishes_it(
    dsn: str, tool: Tool, tmp_path: Path
) -> None:
    cli = Cli(tmp_path, DATABASE_URL=dsn)
    port = str(free_port())
    serving = Serving(cli.executed, "--port", port)
    register(serving, tool.registration("slow", "idempotent"))
    envelope = write(tmp_path, "wait.json", graph(WAITING))
    client = cli.start("run", envelope, "--url", serving.url)
    assert tool.called.wait(30)
    assert serving.stop() == 0
    tool.release.set()
    with Serving(cli, "--port", port):
        code, printed, complained = client.end()
    assert code == 0, printed + complained
    assert "going on behind event" in complained
    assert "Traceback" not in serving.log.read_text()
    seqs = seqs_of(printed)
    assert seqs == list(range(1, len(seqs) + 1))


def test_a_second_interrupt_does_not_wait_for_running_calls(
    dsn: str, tool: Tool, tmp_path: Path
) -> None:
    cli = Cli(tmp_path, DATABASE_URL=dsn)
    serving = Serving(cli.executed, "--port", "0", FLEXRUN_DRAIN_GRACE_S="60")
    register(serving, tool.registration("slow", "idempotent"))
    httpx.post(f"{serving.url}/v1/runs", json=graph(WAITING)).raise_for_status()
    assert tool.called.wait(30)
    serving.process.send_signal(signal.SIGINT)
    eventually(lambda: b"Shutting down" in serving.log.read_bytes(), "the service drains")
    serving.process.send_signal(signal.SIGINT)
    assert serving.process.wait(10) == 130
    serving.stop()


def test_a_service_whose_output_can_not_be_written_serves(cli: Cli, tmp_path: Path) -> None:
    port = str(free_port())
    log = tmp_path / "serve.log"
    with Path("/dev/full").open("wb") as full, log.open("wb") as complaints:
        serving = subprocess.Popen(
            [*COMMAND, "serve", "--port", port], stdout=full, stderr=complaints, env=cli.env
        )
    eventually(lambda: b"could not print" in log.read_bytes(), "the service is ready", 30)
    assert f"ready at http://127.0.0.1:{port}" in log.read_text()
    assert httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
    serving.terminate()
    assert serving.wait(30) == 0


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


@pytest.mark.parametrize("variable", ["FLEXRUN_PORT", "MAX_RETRIES", "DATABASE_URL", "REDIS_URL"])
def test_settings_that_are_wrong_are_named_and_not_repeated(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "s3cret")
    with pytest.raises(UsageError) as refused:
        load_settings()
    assert variable in refused.value.message
    assert "s3cret" not in f"{refused.value.message}{refused.value.hint}"


def test_doctor_reports_what_a_start_would_refuse(cli: Cli) -> None:
    wrong = {"REDIS_URL": "redis://u:hidden@h:port/0"}
    for command, code in (("doctor", 1), ("serve", 2)):
        done = cli(command, **wrong)
        assert done.returncode == code
        assert "REDIS_URL is no address of a Redis." in done.stdout + done.stderr
        assert "redis://user:password@host:6379/0" in done.stdout + done.stderr
        assert "hidden" not in done.stdout + done.stderr


@pytest.mark.usefixtures("serving")
def test_a_password_in_the_address_is_never_shown(cli: Cli, serving: Serving) -> None:
    known = serving.url.replace("//", "//u:hidden@")
    away = f"http://u:hidden@127.0.0.1:{free_port()}"
    for args, url, said in (
        (("run", "-i", "query=a[", "-i", "json_value:={}", "-o", "json_result"), known, "--url"),
        (("doctor",), known, f"ready at {serving.url}"),
        (("doctor",), away, "not running at http://127.0.0.1"),
        (("runs",), away, "does not answer at http://127.0.0.1"),
        (("runs",), "http://u:hid/den@h", "is no URL"),
        (("runs",), "u:hidden@h", "is no http URL"),
    ):
        done = cli(*args, FLEXRUN_URL=url)
        assert said in done.stdout + done.stderr
        for secret in ("hidden", "hid/den", "Traceback"):
            assert secret not in done.stdout + done.stderr


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


@pytest.mark.parametrize("age", ["0d", "30", "-1d", "1y", "99999w"])
def test_ages_that_make_no_sense_are_refused(age: str) -> None:
    with pytest.raises(UsageError):
        days_of(age)


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


# --- without a service ----------------------------------------------------------------------------


HELP = "app.cli.main"
START = "app.cli.service, app.cli.upkeep"


@pytest.mark.parametrize(
    ("modules", "needless"),
    [
        (HELP, {"asyncio", "asyncpg", "fastapi", "httpx", "pydantic", "sqlalchemy", "uvicorn"}),
        (START, {"alembic", "mako", "redis", "app.domain.event_shapes"}),
    ],
)
def test_nothing_heavy_is_imported_that_is_not_needed(modules: str, needless: set[str]) -> None:
    script = (
        f"import sys, {modules}; found = {needless} & set(sys.modules); assert not found, found"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=environment())


def test_version(cli: Cli) -> None:
    assert cli.executed.ok("version").startswith("flexrun ")


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
