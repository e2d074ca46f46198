"""Cancel, pause, resume and the manifest on the command line, against a real service."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from app.cli.client import DEFAULT_URL
from app.cli.next_steps import refusal
from tests.conftest import with_database
from tests.e2e.cli import DEADLINE_S, Cli, Serving
from tests.e2e.ledger import (
    Ledger,
    at_the_gate,
    signals_of,
    status_of,
    submit,
    three,
    types_of,
    write,
)
from tests.envelopes import diamond
from tests.servers import eventually, free_port

BREAKERS = {"CB_THRESHOLD": "2", "CB_COOLDOWN_S": "5", "MAX_RETRIES": "19"}


async def _execute(dsn: str, statement: str, *arguments: Any) -> None:
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(statement, *arguments)
    finally:
        await connection.close()


def execute(dsn: str, statement: str, *arguments: Any) -> None:
    """A statement past the service. In a thread of its own: pytest-asyncio keeps a loop in ours."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, _execute(dsn, statement, *arguments)).result()


@pytest.fixture(scope="module")
def cli(postgres_dsn: str, tmp_path_factory: pytest.TempPathFactory) -> Cli:
    """Commands of an operator called ada, on a migrated database of this file."""
    folder = tmp_path_factory.mktemp("cli")  # has a number: the file may be taken up twice
    execute(postgres_dsn, f"create database {folder.name}")
    dsn = with_database(postgres_dsn, folder.name)
    cli = Cli(folder, DATABASE_URL=dsn, USER="ada", **BREAKERS)
    cli.ok("migrate")
    return cli


@pytest.fixture(scope="module")
def serving(cli: Cli) -> Iterator[Serving]:
    """One service for the whole file; `cli` speaks to it."""
    with Serving(cli, "--port", "0") as serving:
        cli.env["FLEXRUN_URL"] = serving.url
        yield serving
    assert serving.process.poll() == 0


@pytest.fixture
def ledger(serving: Serving) -> Iterator[Ledger]:
    ledger = Ledger()
    ledger.register(serving)
    yield ledger
    ledger.close()


# --- cancel ---------------------------------------------------------------------------------------


def test_cancel_waits_until_the_run_is_cancelled_and_says_what_next(
    cli: Cli, serving: Serving, ledger: Ledger
) -> None:
    run_id = at_the_gate(serving, ledger, "cancel")

    done = cli("cancel", run_id, "--note", "wrong document")

    assert done.returncode == 0, done.stderr
    assert "Accepted as signal " in done.stdout
    assert "\ncancelled in " in done.stdout
    assert f"as a new run: flexrun resume {run_id} --url {serving.url}" in done.stdout
    assert types_of(serving, run_id)[-1] == "RUN_CANCELLED"
    [stored] = signals_of(serving, run_id)
    assert stored["body"]["operator"]["id"] == "ada"
    assert (stored["body"]["note"], stored["outcome"]) == ("wrong document", "applied")


def test_a_cancel_with_one_idempotency_key_acts_once(
    cli: Cli, serving: Serving, ledger: Ledger
) -> None:
    run_id = at_the_gate(serving, ledger, "once")

    first = cli.json("cancel", run_id, "--no-wait", "--idempotency-key", "k1")
    again = cli("cancel", run_id, "--idempotency-key", "k1")

    assert again.returncode == 0, again.stderr
    assert first["signal_id"] in again.stdout
    assert len(signals_of(serving, run_id)) == 1
    assert types_of(serving, run_id).count("RUN_CANCELLED") == 1


@pytest.mark.usefixtures("serving")
def test_a_signal_for_no_run_is_refused(cli: Cli) -> None:
    done = cli("pause", "nope")
    assert done.returncode == 2
    assert "run_not_found" in done.stderr
    assert "flexrun runs" in done.stderr


def test_a_signal_without_a_service_exits_3(cli: Cli) -> None:
    done = cli("cancel", "x", "--url", f"http://127.0.0.1:{free_port()}")
    assert done.returncode == 3
    assert "flexrun serve" in done.stderr


def test_a_finished_run_takes_no_signal_and_the_reason_is_said(cli: Cli, serving: Serving) -> None:
    run_id = submit(serving, diamond(), "wait=30")

    done = cli("cancel", run_id)

    assert done.returncode == 2
    said = f"Run {run_id} is done: there is nothing left to cancel."
    assert done.stderr.startswith(f"invalid_run_state: {said}\n")
    assert f"Its result: flexrun show {run_id}" in done.stderr


REFUSALS = [
    ("cancel", "failed", "is failed: there is nothing left to cancel.", "flexrun resume R"),
    ("pause", "paused", "is paused: there is nothing to pause.", "flexrun resume R"),
    ("pause", "awaiting_human", "awaits a human: there is nothing to pause.", "flexrun cancel R"),
    ("pause", "done", "is done: there is nothing to pause.", "flexrun show R"),
    ("resume", "queued", "is queued: there is nothing to resume.", "flexrun tail R -f"),
    ("resume", "done", "is done: there is nothing to resume.", "flexrun show R"),
    ("resume", "failed", "is failed now.", "flexrun resume R"),
    ("cancel", "running", "is running now.", "flexrun tail R -f"),
]


@pytest.mark.parametrize(("kind", "status", "said", "next_step"), REFUSALS)
def test_a_refusal_says_the_state_and_what_can_be_done(
    kind: str, status: str, said: str, next_step: str
) -> None:
    reason, hint = refusal(kind, {"run_id": "R", "status": status, "nodes": []}, DEFAULT_URL)
    assert reason == f"Run R {said}"
    assert next_step in (hint or "")


def test_a_plan_that_changed_meanwhile_is_refused_with_both_versions(
    cli: Cli, serving: Serving, ledger: Ledger
) -> None:
    run_id = at_the_gate(serving, ledger, "stale")

    done = cli("cancel", run_id, "--expected-plan-version", "7")

    assert done.returncode == 2
    assert "stale_plan_version" in done.stderr
    assert "version 1, not 7" in done.stderr
    assert status_of(serving, run_id) == "running"
    run = cli.json("cancel", run_id, "--expected-plan-version", "1", "--operator", "night shift")
    assert run["status"] == "cancelled"
    [stored] = signals_of(serving, run_id)
    assert stored["body"]["operator"]["id"] == "night shift", "not who the terminal belongs to"


# --- pause and resume -----------------------------------------------------------------------------


def test_a_paused_run_goes_on_when_it_is_resumed(
    cli: Cli, serving: Serving, ledger: Ledger
) -> None:
    run_id = at_the_gate(serving, ledger, "pause")
    paused = cli("pause", run_id)
    assert paused.returncode == 0, paused.stderr
    assert "\npaused, " in paused.stdout
    assert f"Go on with it: flexrun resume {run_id}" in paused.stdout

    ledger.gate.set()
    eventually(
        lambda: types_of(serving, run_id).count("NODE_DONE") == 2,
        "the call under way ends, and its result is kept",
        DEADLINE_S,
    )
    assert ledger.of(run_id) == {"A": 1, "B": 1}

    twice = cli("pause", run_id)
    assert twice.returncode == 2
    assert "is paused: there is nothing to pause." in twice.stderr
    assert f"flexrun resume {run_id}" in twice.stderr

    done = cli("resume", run_id, "--note", "go on")
    assert done.returncode == 0, done.stderr
    eventually(lambda: status_of(serving, run_id) == "done", "the run is done", DEADLINE_S)
    types = types_of(serving, run_id)
    assert types.index("RUN_PAUSED") < types.index("RUN_RESUMED") < types.index("RUN_DONE")
    assert ledger.of(run_id) == {"A": 1, "B": 1, "C": 1}


def test_resume_of_a_running_run_says_how_to_watch_it(
    cli: Cli, serving: Serving, ledger: Ledger
) -> None:
    run_id = at_the_gate(serving, ledger, "running")

    done = cli("resume", run_id)

    assert done.returncode == 2
    assert f"Run {run_id} is running: there is nothing to resume." in done.stderr
    assert f"Watch it: flexrun tail {run_id} -f" in done.stderr
    cli.ok("cancel", run_id)


def test_resume_of_a_failed_run_is_a_new_run_that_calls_only_what_is_left(
    cli: Cli, serving: Serving, ledger: Ledger
) -> None:
    old = submit(serving, three("bad"), "wait=30")
    failed = cli("show", old)
    assert f"as a new run: flexrun resume {old}" in failed.stdout
    assert ledger.of(old) == {"A": 1, "B": 1}
    ledger.mended = True

    done = cli("resume", old)

    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()[:2]
    new = second.split()[1]
    assert first == f"Run {old} goes on as run {new}."
    assert "NODE_SKIPPED" in done.stdout
    assert "RUN_DONE" in done.stdout
    assert ledger.of(new) == {"B": 1, "C": 1}
    assert status_of(serving, old) == "failed"
    manifest = json.loads(cli.ok("show", new, "--manifest"))
    assert manifest["resumed_from"]["run_id"] == old
    assert manifest["completed_nodes"] == ["A", "B", "C"]
    assert manifest["nodes"]["A"]["attempts"] == []


def test_resume_without_waiting_names_the_new_run(
    cli: Cli, serving: Serving, ledger: Ledger
) -> None:
    old = submit(serving, three("bad"), "wait=30")

    answer = cli.json("resume", old, "--no-wait")

    assert answer["signal_id"] is None
    assert answer["resumed_from"]["run_id"] == old
    assert answer["run_id"] != old
    eventually(
        lambda: status_of(serving, answer["run_id"]) == "failed", "it fails again", DEADLINE_S
    )


def test_a_run_whose_journal_is_gone_is_not_resumed(
    cli: Cli, serving: Serving, ledger: Ledger
) -> None:
    old = submit(serving, three("bad"), "wait=30")
    execute(
        cli.env["DATABASE_URL"],
        "update runs set envelope = null, pruned_at = now() where run_id = $1",
        old,
    )

    done = cli("resume", old)

    assert done.returncode == 2
    assert "missing_snapshot" in done.stderr
    assert "Run its envelope again" in done.stderr


def test_missing_decisions_are_answered_with_the_commands_that_give_them(
    cli: Cli, serving: Serving, ledger: Ledger
) -> None:
    run_id = submit(serving, three("lost"), "wait=30")

    done = cli("resume", run_id)

    assert done.returncode == 2
    assert "DECISION_MISSING" in done.stderr
    assert f"flexrun resume {run_id} --node B=retry" in done.stderr
    cli.ok("resume", run_id, "--node", "B=fail")
    eventually(lambda: status_of(serving, run_id) == "failed", "it is given up", DEADLINE_S)


# --- run --resume ---------------------------------------------------------------------------------


def test_run_resume_takes_up_the_failed_run_of_the_same_envelope(
    cli: Cli, serving: Serving, ledger: Ledger, tmp_path: Path
) -> None:
    envelope = write(tmp_path, three("bad", objective="find me"))
    old = cli("run", envelope)
    assert old.returncode == 1
    other = write(tmp_path, three("bad", objective="not me"), "other.json")
    assert cli("run", other).returncode == 1
    ledger.mended = True

    done = cli("run", envelope, "--resume")

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Run {old.stdout.split()[1]} goes on as run ")
    new = done.stdout.splitlines()[1].split()[1]
    assert ledger.of(new) == {"B": 1, "C": 1}

    again = cli("run", envelope, "--resume")
    assert again.returncode == 2, "what was resumed and is done by now is not resumed once more"
    assert "There is nothing to resume" in again.stderr


def test_run_resume_by_id_takes_up_that_run_wherever_the_id_stands(
    cli: Cli, serving: Serving, ledger: Ledger
) -> None:
    old = submit(serving, three("bad"), "wait=30")

    again = cli("run", "--resume", old)
    assert again.returncode == 1
    ledger.mended = True
    run = cli.json("run", old, "--resume")

    assert run["status"] == "done"
    assert run["resumed_from"]["run_id"] == old


def test_run_resume_watches_a_run_that_is_under_way(
    cli: Cli, serving: Serving, ledger: Ledger
) -> None:
    run_id = at_the_gate(serving, ledger, "watched")

    watching = cli.start("run", "--resume", run_id)
    head = watching.stdout.readline()
    ledger.gate.set()
    code, printed, complained = watching.end()

    assert head == f"run {run_id}\n"
    assert code == 0, complained
    assert "is there already: it is running" in complained
    assert "RUN_DONE" in printed
    assert "RUN_START" not in printed, "only what is new is told"


def test_run_resume_lets_a_paused_run_go_on(
    cli: Cli, serving: Serving, ledger: Ledger, tmp_path: Path
) -> None:
    envelope = three("gate", objective="pause me")
    run_id = submit(serving, envelope)
    eventually(lambda: ledger.calls[run_id, "B"] == 1, "the second node is called", DEADLINE_S)
    cli.ok("pause", run_id)
    ledger.gate.set()

    done = cli("run", write(tmp_path, envelope), "--resume")

    assert done.returncode == 0, done.stderr
    assert f"run {run_id}" in done.stdout
    assert types_of(serving, run_id)[-1] == "RUN_DONE"


def test_run_resume_shows_what_a_waiting_run_needs(
    cli: Cli, serving: Serving, ledger: Ledger, tmp_path: Path
) -> None:
    envelope = three("lost", objective="decide me")
    run_id = submit(serving, envelope, "wait=30")

    done = cli("run", write(tmp_path, envelope), "--resume")

    assert done.returncode == 4
    assert f"flexrun resume {run_id} --node B=retry" in done.stdout
    assert "RUN_RESUMED" not in types_of(serving, run_id)


@pytest.mark.usefixtures("serving")
def test_run_resume_without_a_run_to_resume_is_refused(cli: Cli, tmp_path: Path) -> None:
    envelope = write(tmp_path, diamond(objective="only once"))

    nothing = cli("run", envelope, "--resume")
    cli.ok("run", envelope)
    finished = cli("run", envelope, "--resume")

    for done in (nothing, finished):
        assert done.returncode == 2
        assert "There is nothing to resume" in done.stderr
        assert "without --resume" in done.stderr


# --- show -----------------------------------------------------------------------------------------


def test_the_manifest_of_a_failed_run_lists_what_is_done_and_what_is_left(
    cli: Cli, serving: Serving, ledger: Ledger
) -> None:
    run_id = submit(serving, three("bad"), "wait=30")

    manifest = json.loads(cli.ok("show", run_id, "--manifest"))

    assert manifest["status"] == "failed"
    assert manifest["completed_nodes"] == ["A"]
    assert manifest["failed_nodes"] == ["B"]
    assert manifest["blocked_nodes"] == ["C"]
    assert manifest["failures"][0]["node_id"] == "B"
    [attempt] = manifest["nodes"]["B"]["attempts"]
    assert attempt["outcome"] == "failed"
    assert attempt["started_at"] <= attempt["finished_at"] <= manifest["finished_at"]
    assert manifest["duration_s"] >= 0
    assert manifest["files"] == []


def test_the_manifest_of_a_run_under_way_is_valid_too(
    cli: Cli, serving: Serving, ledger: Ledger
) -> None:
    run_id = at_the_gate(serving, ledger, "manifest")

    manifest = json.loads(cli.ok("show", run_id, "--manifest"))

    assert manifest["status"] == "running"
    assert manifest["completed_nodes"] == ["A"]
    assert manifest["running_nodes"] == ["B"]
    assert manifest["pending_nodes"] == ["C"]
    assert manifest["nodes"]["B"]["attempts"][0]["outcome"] is None
    cli.ok("cancel", run_id)
    [attempt] = json.loads(cli.ok("show", run_id, "--manifest"))["nodes"]["B"]["attempts"]
    assert attempt["outcome"] == "abandoned"


def test_show_names_who_drives_a_running_run_and_that_it_is_alive(
    cli: Cli, serving: Serving, ledger: Ledger
) -> None:
    run_id = at_the_gate(serving, ledger, "driven")

    shown = cli.ok("show", run_id)

    assert f"(pid {serving.process.pid} on " in shown
    assert "), which is alive" in shown
    cli.ok("cancel", run_id)
    assert "driven by" not in cli.ok("show", run_id)


# --- breakers -------------------------------------------------------------------------------------


def test_a_process_that_calls_nobody_says_that_it_knows_no_breakers(cli: Cli) -> None:
    with Serving(cli, "--port", "0", command="api") as api:
        done = cli("breakers", "--url", api.url)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "This process knows no breakers.\n"


def test_an_open_breaker_is_listed_and_reset(cli: Cli, serving: Serving, ledger: Ledger) -> None:
    run_id = submit(serving, three("down"))
    scope = f"ledger.down::127.0.0.1:{ledger.port}"

    def listed() -> dict[str, Any]:
        return next((b for b in cli.json("breakers") if b["scope"] == scope), {})

    eventually(lambda: listed().get("status") == "open", "the breaker opens", DEADLINE_S)
    table = cli("breakers")
    assert table.returncode == 0
    [line] = [line for line in table.stdout.splitlines() if line.startswith(scope)]
    assert line.split()[1] in ("open", "half_open")
    assert table.stderr == "", "without a Redis nothing is missing"
    ledger.mended = True
    assert f"{scope} is closed" in cli.ok("breakers", "reset", scope)
    assert listed()["status"] == "closed"
    eventually(lambda: status_of(serving, run_id) == "done", "the run goes on", DEADLINE_S)
    unknown = cli("breakers", "reset", "no::where")
    assert unknown.returncode == 2
    assert "breaker_not_found" in unknown.stderr
    assert "flexrun breakers" in unknown.stderr


# --- nobody there to apply it ---------------------------------------------------------------------


def test_a_signal_that_nobody_applies_stays_accepted(dsn: str, tmp_path: Path) -> None:
    cli = Cli(tmp_path, DATABASE_URL=dsn)
    with Serving(cli, "--port", "0", command="api") as serving:
        cli.env["FLEXRUN_URL"] = serving.url
        run_id = submit(serving, diamond())

        late = cli("cancel", run_id, "--timeout", "0.1")
        # Not measured: coverage loses an interrupt that comes while it notes a line.
        waiting = cli.start("cancel", run_id, COVERAGE_PROCESS_CONFIG="")
        assert waiting.stdout.readline().startswith("Accepted as signal ")
        waiting.process.send_signal(signal.SIGINT)
        code, _, complained = waiting.end()

        assert late.returncode == 1
        assert "accepted, but nobody applied it within 0.1 s" in late.stderr
        assert f"flexrun show {run_id} --debug" in late.stderr
        assert code == 130
        assert "The cancel stays accepted." in complained
        assert [stored["outcome"] for stored in signals_of(serving, run_id)] == [None, None]
