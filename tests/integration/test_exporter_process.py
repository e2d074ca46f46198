"""An exporter in a process of its own: it lives as long as its service, and costs it nothing."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import orjson
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.adapters.tracing import OTLP
from app.adapters.tracing import process as module
from app.adapters.tracing.__main__ import NICENESS, serve
from app.adapters.tracing.pipe import END, batches, lines_of
from app.adapters.tracing.process import FAILED, ExporterProcess
from app.domain.event_json import encode_event
from app.domain.events import Event, EventType
from app.kit.ids import span_id
from app.ports import RunTrace
from tests.otlp_sink import hang, otlp_sink

RUN_ID = "0190a5b0-0000-7000-8000-000000000000"
TRACE_ID = "a" * 32
SECRET = "sk-canary-0815"


def a_run() -> RunTrace:
    types = (EventType.RUN_QUEUED, EventType.RUN_DONE)
    events = [Event(found, {"lane": "standard"}, seq=seq) for seq, found in enumerate(types, 1)]
    bodies = [encode_event(event, RUN_ID, TRACE_ID) for event in events]
    return RunTrace(RUN_ID, f"00-{TRACE_ID}-{span_id(RUN_ID)}-01", bodies)


@pytest.fixture(autouse=True)
def _children_know_our_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


class Scripted:
    """What an SDK may do in the child: the first word of a traceparent says."""

    def export(self, runs: Sequence[RunTrace]) -> bool:
        word, _, rest = runs[0].traceparent.partition("-")
        if word == "print":
            sys.stdout.write(f"{rest}\n")
        if word == "raise":
            raise RuntimeError(rest)
        if word == "die":
            os._exit(3)
        if word == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        return word != "refuse"

    def close(self) -> None:
        sys.stdout.write("closed\n")


SCRIPTED = f"{__name__}:{Scripted.__name__}"


def told(word: str) -> RunTrace:
    return RunTrace(RUN_ID, f"{word}-{SECRET}", [])


@asynccontextmanager
async def scripted() -> AsyncIterator[ExporterProcess]:
    async with opened(ExporterProcess(SCRIPTED, {})) as exporter:
        yield exporter


def otlp(url: str) -> ExporterProcess:
    return ExporterProcess(OTLP, {"endpoint": url, "service_name": "x"})


@asynccontextmanager
async def opened(exporter: ExporterProcess) -> AsyncIterator[ExporterProcess]:
    try:
        yield exporter
    finally:
        await exporter.aclose()


def children_of(pid: int) -> list[psutil.Process]:
    """The exporters of a process that are ours: the servers of the tests are its children, too."""
    found = []
    for child in psutil.Process(pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.cmdline()[-1] == SCRIPTED:
                found.append(child)
    return found


# --- the pipe -------------------------------------------------------------------------------------

_texts = st.text(st.characters(codec="utf-8"), max_size=8)
_bodies = st.dictionaries(_texts, _texts, max_size=3).map(orjson.dumps)
_runs = st.builds(RunTrace, _texts, _texts, st.lists(_bodies, max_size=4))
_batches = st.lists(st.lists(_runs, max_size=3), max_size=3)


@given(_batches, st.data())
def test_what_goes_down_the_pipe_comes_out_and_what_is_cut_off_does_not(
    sent: list[list[RunTrace]], data: st.DataObject
) -> None:
    ends, written = [], b""
    for runs in sent:
        written += b"".join(map(lines_of, runs)) + END
        ends.append(len(written))
    assert list(batches(io.BytesIO(written))) == sent
    cut = data.draw(st.sampled_from([0, *ends, len(written)]) | st.sampled_from(_lines(written)))
    complete = sum(end <= cut for end in ends)
    assert list(batches(io.BytesIO(written[:cut]))) == sent[:complete]


def _lines(written: bytes) -> list[int]:
    """Where each line ends."""
    return [0, *(at + 1 for at, byte in enumerate(written) if byte == ord("\n"))]


def test_a_batch_that_breaks_is_answered_and_the_next_one_is_exported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    words = ("raise", "refuse", "take")
    lines = b"".join(lines_of(told(word)) + END for word in words)
    answers = io.BytesIO()
    serve(Scripted(), io.BytesIO(lines), answers)
    arrived = [orjson.loads(line)["arrived"] for line in answers.getvalue().splitlines()]
    assert arrived == [False, False, True]
    assert "1 runs are not traced" in caplog.text


# --- the process ----------------------------------------------------------------------------------


async def test_it_takes_what_is_left_of_a_core_and_says_how_much() -> None:
    async with scripted() as exporter:
        exported = await exporter.export([told("take")])
        assert exported.arrived
        assert exported.cpu_s >= 0
        [child] = children_of(os.getpid())
        assert child.nice() == NICENESS
        assert not (await exporter.export([told("refuse")])).arrived


async def test_what_an_sdk_prints_is_no_answer(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is printed is written when the child ends, which takes long where its turn comes last.
    monkeypatch.setattr(module, "CLOSING_S", 30.0)
    async with scripted() as exporter:
        assert (await exporter.export([told("print")])).arrived
    out, err = capfd.readouterr()
    assert (out, err) == ("", f"{SECRET}\nclosed\n")


async def test_signals_for_the_service_do_not_end_it() -> None:
    async with scripted() as exporter:
        assert (await exporter.export([told("signal")])).arrived
        assert (await exporter.export([told("take")])).arrived


async def test_one_that_died_is_started_again_but_not_at_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with scripted() as exporter:
        assert await exporter.export([told("die")]) == FAILED
        assert caplog.messages == [f"{SCRIPTED} ended with 3; the next runs start it again"]
        assert await exporter.export([told("take")]) == FAILED
        assert children_of(os.getpid()) == []
        monkeypatch.setattr(module, "AGAIN_S", 0.0)
        assert (await exporter.export([told("take")])).arrived


async def test_a_folder_of_the_name_of_the_package_is_not_taken_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    async with scripted() as exporter:
        assert (await exporter.export([told("take")])).arrived


async def test_one_that_is_killed_between_batches_is_noticed() -> None:
    async with scripted() as exporter:
        assert (await exporter.export([told("take")])).arrived
        [child] = children_of(os.getpid())
        child.kill()
        assert await exporter.export([told("take")] * 10_000) == FAILED


class Refusing(Scripted):
    def __init__(self, key: str) -> None:
        raise ValueError(key)


async def test_a_configuration_that_can_not_be_used_is_told_without_its_values(
    capfd: pytest.CaptureFixture[str],
) -> None:
    name = f"{__name__}:{Refusing.__name__}"
    async with opened(ExporterProcess(name, {"key": SECRET})) as exporter:
        assert await exporter.export([told("take")]) == FAILED
    line = orjson.loads(capfd.readouterr().err)
    assert line["message"] == f"{name} can not be used as it is configured"
    assert line["error"] == "ValueError"
    assert SECRET not in str(line)


async def test_an_export_that_hangs_is_not_waited_for() -> None:
    async with otlp_sink() as sink, opened(otlp(sink.url)) as exporter:
        sink.side.behave = hang
        before = psutil.Process().children()
        export = asyncio.create_task(exporter.export([a_run()]))
        await sink.side.arrived.wait()
        [child] = set(psutil.Process().children()) - set(before)
        export.cancel()
        await asyncio.gather(export, return_exceptions=True)
        await exporter.aclose()
        assert not child.is_running()


SERVICE = f"""
import asyncio, uvloop
from tests.integration.{__name__.rpartition(".")[2]} import Scripted, scripted, told

async def main():
    async with scripted() as exporter:
        assert (await exporter.export([told("take")])).arrived
        print("exported", flush=True)
        await asyncio.Event().wait()

uvloop.run(main())
"""


def test_it_ends_with_a_service_that_is_killed() -> None:
    service = subprocess.Popen([sys.executable, "-c", SERVICE], stdout=subprocess.PIPE)
    assert service.stdout is not None
    assert service.stdout.readline() == b"exported\n"
    [child] = children_of(service.pid)
    service.kill()
    _gone, alive = psutil.wait_procs([child], timeout=60)
    service.wait()
    service.stdout.close()
    assert alive == []
