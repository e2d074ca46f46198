"""Records of real runs in the log, with models that answer, misbehave, or are not there."""

from __future__ import annotations

import asyncio
import logging
import re
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import orjson
import pytest
import pytest_asyncio

from app.domain.event_json import encode_event
from app.domain.events import TERMINAL_EVENTS, Event, EventType
from app.domain.record_shapes import RECORDS, EventLine, RecordKind
from app.journal import event_log, record_log
from app.journal.frames import Frame, frame_of
from app.journal.record_log import RecordLog, RecordsWanted
from app.kit.ids import new_id
from app.kit.log import JsonFormatter
from app.kit.metrics import Metrics
from app.store.database import Database
from app.store.events import EventReader
from docs.records import COPY, GUIDES, TABLE
from tests.conftest import fresh_database, make_settings
from tests.envelopes import diamond, graph
from tests.far_side import Behaviour, answer, raw
from tests.model_server import ModelServer, running_model_server, say_nothing
from tests.model_wires import vector_of
from tests.providers import WIRES, Wire
from tests.service import RunningService, running_service
from tests.shared_service import audit, rows, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

CANARY = "canary"
CHAT, LAST = "chat", "spare"
LIMITS = (
    "ctx_window: 8000, output_tokens_max: 500, json_mode: true, function_calling: false, "
    'prices: {input_usd_per_mtok: "1", output_usd_per_mtok: "2"}'
)
ROOTS = {"openai": "/v1", "yandex": "/v1", "anthropic": "", "ollama": ""}
FLAGS = {"log_generations": True, "log_fallbacks": True, "log_latencies": True}


def name_of(wire: Wire) -> str:
    return "-".join(wire)


def models_file(good: ModelServer, mute: ModelServer) -> str:
    """A model for every wire at both servers, one that comes last, and those of other roles."""
    providers, models = [], []
    for kind, api in WIRES:
        for server, word, limit in ((good, "", ""), (mute, "mute-", ", timeout_s: 0.1")):
            name, url = f"{word}{kind}-{api}", server.url + ROOTS[kind]
            providers.append(f'{name}: {{kind: {kind}, api: {api}, base_url: "{url}"{limit}}}')
            models.append(f"{name}: {{provider: {name}, cost_tier: high, roles: [chat], {LIMITS}}}")
    at, tiers = "openai-chat", {LAST: "low"}
    for name, role in ((LAST, CHAT), ("coder", "code"), ("planner", "planning")):
        tier = tiers.get(name, "high")
        models.append(f"{name}: {{provider: {at}, cost_tier: {tier}, roles: [{role}], {LIMITS}}}")
    models.append(
        f"vectors: {{provider: {at}, cost_tier: high, roles: [embedding], {LIMITS}}}".replace(
            "output_tokens_max: 500", "output_tokens_max: 0"
        )
    )
    return "\n  ".join(["providers:", *providers]) + "\n" + "\n  ".join(["models:", *models])


def fields_of(line: dict[str, Any]) -> dict[str, Any]:
    """A line without what every line of the log has."""
    return {k: v for k, v in line.items() if k not in ("ts", "level", "logger", "message")}


class Lines(logging.Handler):
    """What was written to the log, as it is written."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonFormatter())
        self.written: list[bytes] = []
        self._of: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self._ended: set[str] = set()
        self._loop = asyncio.get_running_loop()
        self._came = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record).encode()
        self._loop.call_soon_threadsafe(self._take, line)

    def _take(self, line: bytes) -> None:
        self.written.append(line)
        found = orjson.loads(line)
        self._of[found.get("command_id", "")].append(found)
        if found.get("eventType") in TERMINAL_EVENTS:
            self._ended.add(found["runId"])
        self._came.set()

    async def ended(self, run_id: str) -> None:
        """The last event of a run is told; the log of events waits for no record, nor it for it."""
        async with asyncio.timeout(20):
            while run_id not in self._ended:
                self._came.clear()
                await self._came.wait()

    async def of(self, run_id: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The generations of a run, and its fallback record, once its last record is there."""
        async with asyncio.timeout(20):
            while not [x for x in self._of[run_id] if x["message"] == RecordKind.LATENCY]:
                self._came.clear()
                await self._came.wait()
        kinds = [line["message"] for line in self._of[run_id]]
        assert kinds[-2:] == [RecordKind.FALLBACK, RecordKind.LATENCY]
        assert set(kinds[:-2]) <= {RecordKind.GENERATION}
        for line in self._of[run_id]:
            fields = {
                k: v for k, v in line.items() if k not in ("ts", "level", "logger", "message")
            }
            RECORDS[RecordKind(line["message"])].model_validate(fields)
        return self._of[run_id][:-2], self._of[run_id][-2]


@pytest.fixture(scope="module")
def _quick() -> Iterator[None]:
    """Records are written a moment after their run has ended."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_log, "EVERY_S", 0.01)
        patch.setattr(event_log, "EVERY_S", 0.01)
        yield


@dataclass
class Office:
    """A service with all its models; `mute` are those that take what they are asked, no more."""

    service: RunningService
    good: ModelServer
    mute: ModelServer
    lines: Lines

    async def ask(self, model: str, role: str = CHAT, status: int = 200) -> str:
        """Ask a model through the API; the id of the run."""
        body = {"prompt": f"{CANARY} of a prompt", "model": model, "role": role}
        response = await self.service.client.post("/v1/infer_sync", json=body)
        assert response.status_code == status, response.text
        if status != 200:
            return str(response.json()["request_id"])
        return response.headers["content-location"].rpartition("/")[2]

    @property
    def requests(self) -> int:
        """How often a model that answers was asked. The time of a mute one may be over before its
        server has heard of the request."""
        return len(self.good.requests)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def lines(_quick: None) -> AsyncIterator[Lines]:
    handler, loggers = Lines(), [logging.getLogger(f"flexrun.{n}") for n in ("records", "events")]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    yield handler
    for logger in loggers:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def office(
    postgres_dsn: str, lines: Lines, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Office]:
    file = tmp_path_factory.mktemp("models") / "models.yaml"
    async with AsyncExitStack() as stack:
        dsn = await stack.enter_async_context(fresh_database(postgres_dsn))
        stack.push_async_callback(audit, dsn)
        good, mute = [await stack.enter_async_context(running_model_server()) for _ in range(2)]
        good.say(f"{CANARY} of an answer")
        mute.side.behave = say_nothing
        file.write_text(models_file(good, mute))
        settings = make_settings(
            models_file=file,
            llm_cache_days=0,
            max_retries=0,
            cb_threshold=10_000,
            log_events=True,
            **FLAGS,
        )
        service = await stack.enter_async_context(running_service(settings, dsn))
        office = Office(service, good, mute, lines)
        yield office
        await judge(office)


async def judge(office: Office) -> None:
    """All lines of this file: no content is in them, events have the declared fields, and every
    call that the journal has is told once."""
    assert [line for line in office.lines.written if CANARY.encode() in line] == []
    found = [orjson.loads(line) for line in office.lines.written]
    for line in found:
        if line["logger"] == "flexrun.events":
            EventLine.model_validate(fields_of(line))
    sql = "select body from events where type = 'LLM_RESPONSE'"
    stored = [orjson.loads(row["body"]) for row in await rows(office.service, sql)]
    calls = [(e["run_id"], e["data"]["call"], e["data"]["duration_ms"]) for e in stored]
    ids = {event["run_id"] for event in stored}
    told = [
        (line["command_id"], line["call"], line["latency_ms"])
        for line in found
        if line.get("command_id") in ids and line["message"] == RecordKind.GENERATION
    ]
    assert sorted(told) == sorted(calls)


# --- calls of models ------------------------------------------------------------------------------

FAILS = answer(500, f'{{"error": "{CANARY}"}}'.encode())
TROUBLES: dict[str, Behaviour] = {
    "provider_busy": answer(429, b"{}"),
    "provider_refused": answer(401, b"{}"),
    "provider_garbage": answer(200, CANARY.encode()),
    "provider_unreachable": raw(b"", reset=True),
}


@pytest.mark.parametrize("wire", WIRES, ids=name_of)
async def test_a_call_of_any_provider_has_exactly_one_record(office: Office, wire: Wire) -> None:
    before = office.requests
    generations, fallback = await office.lines.of(await office.ask(name_of(wire)))
    assert office.requests == before + 1
    [generation] = generations
    assert (generation["provider"], generation["model_id"]) == (name_of(wire), name_of(wire))
    assert (generation["outcome"], generation["refusal"]) == ("ok", False)
    assert (generation["node_id"], generation["attempt"], generation["call"]) == ("call", 1, 1)
    assert (generation["tokens_in"], generation["tokens_out"]) == (12, 5)
    assert generation["cost_usd"] == "0.000022"
    assert (fallback["llm_outcome"], fallback["fallback_reason"]) == ("success", None)
    assert fallback["components"] == {"node:call": "success"}
    assert fallback["llm_latency_ms"] == generation["latency_ms"] > 0
    assert fallback["deterministic_used"] is False


@pytest.mark.parametrize(
    ("wire", "trouble"),
    [
        *((wire, trouble) for wire in WIRES for trouble in ("provider_failed", "timeout")),
        *((WIRES[0], trouble) for trouble in TROUBLES),
    ],
    ids=str,
)
async def test_a_call_that_goes_wrong_has_one_too_and_the_next_model_is_a_fallback(
    office: Office, wire: Wire, trouble: str
) -> None:
    before, model = office.requests, name_of(wire)
    if trouble == "timeout":
        model = f"mute-{model}"
    else:
        office.good.behave(TROUBLES.get(trouble, FAILS))
    generations, fallback = await office.lines.of(await office.ask(model))
    assert office.requests == before + (1 if trouble == "timeout" else 2)
    told = [(found["model_id"], found["outcome"], found["call"]) for found in generations]
    assert told == [(model, trouble, 1), (LAST, "ok", 2)]
    assert (fallback["llm_outcome"], fallback["fallback_reason"]) == ("fallback", trouble)
    assert (fallback["status"], fallback["deterministic_used"]) == ("done", False)


async def test_an_embedding_is_a_call_like_any_other(office: Office) -> None:
    response = await office.service.client.post("/v1/embedding", json={"text": CANARY})
    assert response.json()["embedding"] == vector_of(CANARY)
    run_id = response.headers["content-location"].rpartition("/")[2]
    [generation], fallback = await office.lines.of(run_id)
    assert (generation["model_id"], generation["role"]) == ("vectors", "embedding")
    assert fallback["llm_outcome"] == "success"


# --- who gave the answer --------------------------------------------------------------------------


def brief(**more: Any) -> dict[str, Any]:
    """A run that a model is asked to plan, and that the assembler can plan as well."""
    return {
        "objective": f"{CANARY} of an objective",
        "inputs": {"document": {"title": "Notes", "text": f"# Notes\n\nThe {CANARY} sings."}},
        "output_contract": {"mode": "facets", "facets": ["brief"]},
        "policies": {"planner": {"strategy": "llm"}},
        "metadata": {"label": "nightly"},
        **more,
    }


async def test_a_plan_without_the_model_that_was_asked_for_it_is_a_fallback(office: Office) -> None:
    office.good.behave(FAILS)
    run = await office.service.finished(brief())
    [generation], fallback = await office.lines.of(run["run_id"])
    assert (generation["model_id"], generation["role"]) == ("planner", "planning")
    assert (generation["node_id"], generation["attempt"]) == (None, None)
    shown = {key: fallback[key] for key in ("intent", "decision_action", "status")}
    assert shown == {"intent": "nightly", "decision_action": "assembler", "status": "done"}
    assert (fallback["llm_outcome"], fallback["fallback_reason"]) == ("fallback", "provider_failed")
    assert fallback["components"] == {"planner": "fallback"}
    assert fallback["deterministic_used"] is True


async def test_no_answer_at_all_is_an_error(office: Office) -> None:
    office.good.behave(FAILS)
    [generation], fallback = await office.lines.of(await office.ask("coder", "code", status=502))
    assert generation["outcome"] == "provider_failed"
    assert (fallback["llm_outcome"], fallback["fallback_reason"]) == ("error", "provider_failed")
    assert (fallback["status"], fallback["deterministic_used"]) == ("failed", False)


async def test_a_call_that_is_cut_off_is_told_as_unfinished(office: Office) -> None:
    before = len(office.good.requests)
    office.good.behave(say_nothing)
    body = {"mode": "infer_sync", "payload": {"prompt": CANARY, "role": "code"}}
    run_id = (await office.service.client.post("/v1/requests", json=body)).json()["request_id"]
    await office.good.reached(before + 1)
    await until(office.service, run_id, "LLM_REQUEST")
    await office.service.client.post(f"/v1/runs/{run_id}/cancel", json={})
    [generation], fallback = await office.lines.of(run_id)
    assert (generation["outcome"], generation["tokens_in"]) == ("unfinished", None)
    assert generation["cost_usd"] is None
    assert (fallback["llm_outcome"], fallback["fallback_reason"]) == ("error", "unfinished")
    assert fallback["status"] == "cancelled"


async def test_a_run_that_asks_no_model_has_skipped_them(office: Office) -> None:
    run = await office.service.finished(diamond())
    generations, fallback = await office.lines.of(run["run_id"])
    assert generations == []
    assert (fallback["llm_outcome"], fallback["fallback_reason"]) == ("skipped", None)
    assert (fallback["components"], fallback["llm_latency_ms"]) == ({}, None)
    assert (fallback["decision_action"], fallback["deterministic_used"]) == ("caller", True)


async def test_without_models_a_run_is_deterministic_and_other_flags_write_nothing(
    postgres_dsn: str, lines: Lines
) -> None:
    async with fresh_database(postgres_dsn) as dsn:
        settings = make_settings(log_fallbacks=True)
        async with running_service(settings, dsn) as service:
            run = await service.finished(brief())
            assert run["status"] == "done"
        await audit(dsn)
    [record] = lines._of[run["run_id"]]
    assert record["message"] == RecordKind.FALLBACK
    assert (record["llm_outcome"], record["decision_action"]) == ("deterministic_only", "assembler")
    assert record["deterministic_used"] is True


async def test_what_can_not_be_read_is_counted_and_the_next_run_is_told(
    postgres_dsn: str, lines: Lines
) -> None:
    async with fresh_database(postgres_dsn) as dsn:
        database = await Database.open(dsn)
    metrics, kinds = Metrics(), frozenset(RecordKind)
    log = RecordLog(EventReader(database), metrics, RecordsWanted(kinds, has_models=True))
    broken, gone, whole = [new_id() for _ in range(3)]
    end = Event(EventType.RUN_DONE, {})
    log.publish(broken, frames_of(broken, Event(EventType.LLM_RESPONSE, {}), end))
    log.publish(gone, frames_of(gone, Event(EventType.RUN_QUEUED, {}), end)[1:])
    log.publish(whole, frames_of(whole, Event(EventType.RUN_QUEUED, {}), end))
    await log.aclose()
    assert metrics.unlogged_events == 4
    await lines.of(str(whole))
    assert [lines._of[str(run_id)] for run_id in (broken, gone)] == [[], []]
    await database.close()


def frames_of(run_id: UUID, *events: Event) -> list[Frame]:
    found = []
    for seq, event in enumerate(events, 1):
        event.seq, event.ts = seq, 1_764_000_000_000 + seq
        body = encode_event(event, str(run_id), "a" * 32)
        found.append(frame_of(seq, event.type, event.node_id, event.level, body))
    return found


async def test_a_run_that_is_taken_over_has_its_records_once(
    postgres_dsn: str, lines: Lines, tmp_path: Path
) -> None:
    async with AsyncExitStack() as stack:
        dsn = await stack.enter_async_context(fresh_database(postgres_dsn))
        models = await stack.enter_async_context(running_model_server())
        models.say(CANARY)
        models.behave(models.speak, say_nothing)
        file = tmp_path / "models.yaml"
        file.write_text(models_file(models, models))
        settings = make_settings(models_file=file, llm_cache_days=0, drain_grace_s=0.0, **FLAGS)

        def ask(node_id: str, *requires: str) -> dict[str, Any]:
            inputs = {"prompt": {"value": f"{CANARY} {node_id}"}, "role": {"value": "code"}}
            node = {"id": node_id, "capability": "models.infer", "inputs": inputs}
            return {**node, "requires": list(requires)}

        async with running_service(settings, dsn) as first:
            run = await first.submit(graph(ask("A"), ask("B", "A")))
            await models.reached(2)
            await until(first, run["run_id"], "LLM_REQUEST", after=8)  # seq 8 is A's NODE_DONE
        assert lines._of[run["run_id"]] == []
        async with running_service(settings, dsn) as second:
            await second.events(run["run_id"])
            generations, fallback = await lines.of(run["run_id"])
        await audit(dsn)
    told = [(found["node_id"], found["call"], found["outcome"]) for found in generations]
    assert told == [("A", 1, "ok"), ("B", 1, "unfinished"), ("B", 1, "ok")]
    assert fallback["components"] == {"node:A": "success", "node:B": "success"}


# --- where the time went, what is in a line, how lines are counted --------------------------------


async def test_the_steps_of_a_run_are_its_total(office: Office) -> None:
    run = await office.service.finished(diamond())
    await office.lines.of(run["run_id"])
    latency = office.lines._of[run["run_id"]][-1]
    assert latency["llm_enabled"] is True
    assert latency["total_ms"] == run["timings"]["total_ms"]
    assert latency["steps"]["queue_ms"] == run["timings"]["queue_ms"]
    assert sum(latency["steps"].values()) == pytest.approx(latency["total_ms"])
    assert min(latency["steps"].values()) >= 0


async def test_the_queries_of_the_guide_count_the_lines(office: Office) -> None:
    ids = {await office.ask(LAST), await office.ask("mute-openai-chat")}
    office.good.behave(FAILS)
    ids |= {await office.ask("coder", "code", status=502)}
    ids |= {(await office.service.finished(diamond()))["run_id"]}
    for run_id in ids:
        await office.lines.of(run_id)
        await office.lines.ended(run_id)
    lines = [line for line in office.lines.written if any(i.encode() in line for i in ids)]
    counted = await _counted(office, lines)
    answers = {guide.name: found for guide, found in zip(GUIDES, counted, strict=True)}
    attempts = {(r["capability"], r["status"]): r["attempts"] for r in answers["event"]}
    assert attempts == {
        ("models.infer", "done"): 2,
        ("models.infer", "failed"): 1,
        ("util.echo", "done"): 4,
    }
    models = {r["model"]: (r["calls"], r["ok"], r["usd"]) for r in answers[RecordKind.GENERATION]}
    assert models == {
        LAST: (2, 1, Decimal("0.000044")),
        "mute-openai-chat": (1, 0, 0),
        "coder": (1, 0, 0),
    }
    outcomes = {(r["outcome"], r["reason"]): r["share"] for r in answers[RecordKind.FALLBACK]}
    assert outcomes == {
        ("success", None): Decimal("0.25"),
        ("fallback", "timeout"): Decimal("0.25"),
        ("error", "provider_failed"): Decimal("0.25"),
        ("skipped", None): Decimal("0.25"),
    }
    steps = {r["step"]: r["ms"] for r in answers[RecordKind.LATENCY]}
    assert set(steps) == {"queue_ms", "planning_ms", "execution_ms", "paused_ms", "total_ms"}
    assert all(len(ms) == 3 and ms == sorted(ms) for ms in steps.values())


async def _counted(office: Office, lines: list[bytes]) -> list[list[asyncpg.Record]]:
    """What the queries say of these lines, loaded as the guide says."""
    quote, delimiter = [bytes.fromhex(code).decode() for code in re.findall(r"\\x(..)", COPY)]

    async def source() -> AsyncIterator[bytes]:
        yield b"\n".join(lines)

    connection = await asyncpg.connect(office.service.services.database.dsn)
    try:
        await connection.execute(TABLE.replace("create table", "create temp table"))
        await connection.copy_to_table(
            "log_lines", source=source(), format="csv", quote=quote, delimiter=delimiter
        )
        return [await connection.fetch(guide.query) for guide in GUIDES]
    finally:
        await connection.close()
