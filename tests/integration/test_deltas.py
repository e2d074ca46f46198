"""What models say while they say it: a real service, a server that streams piece by piece."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import pytest_asyncio

from app.adapters.capabilities.builtin import Pack
from app.adapters.capabilities.pack import standard_packs
from app.adapters.wake.deltas import CHANNEL
from app.cli.client import Api
from app.cli.follow import Follower
from app.domain.capability import Effect
from app.ports import Call
from tests.conftest import fresh_database, make_settings
from tests.envelopes import graph
from tests.far_side import Behaviour, Exchange
from tests.model_server import ModelServer
from tests.model_service import MODELS, shared_models
from tests.redis_kit import make_client, until
from tests.servers import RunningRedis
from tests.service import RunningService, running_service
from tests.shared_service import rows
from tests.sse import SseEvent, SseParser

pytestmark = pytest.mark.asyncio(loop_scope="module")

STRING = {"type": "string"}
SSE = {"Accept": "text/event-stream"}
OATS = '{"verdict": "oats"}'
OATS_PIECES = ['{"ve', "rdic", 't": ', '"oat', 's"}']
ALL = 1_000
_soils = count()

pack = Pack("tests")


@pack.capability(
    capability_id="tests.speaker",
    version="1.0.0",
    display_name="A speaker",
    summary="Says what it does.",
    input_schema={"type": "object"},
    output_schema={"type": "object"},
    effect=Effect.PURE,
)
def speak(call: Call) -> dict[str, Any]:
    """Sync, so that it speaks from a thread."""
    for word in ("look", "ing", " around"):
        call.delta(word)
    return {}


JUDGE = {
    "capability_id": "soil.judge",
    "version": "1.0.0",
    "display_name": "a judge of soils",
    "summary": "Says what grows where.",
    "kind": "llm",
    "effect": "pure",
    "input_contract": {"schema": {"type": "object", "properties": {"soil": STRING}}},
    "output_contract": {
        "schema": {"type": "object", "properties": {"verdict": STRING}, "required": ["verdict"]}
    },
}


def ask(*nodes: str, soil: str = "") -> dict[str, Any]:
    """A chain of nodes that ask a model, each about a soil that it was not asked about before."""
    return graph(
        *(
            {
                "id": node_id,
                "capability": "soil.judge",
                "requires": [] if before is None else [before],
                "inputs": {"soil": {"value": soil or f"soil {next(_soils)}"}},
            }
            for before, node_id in zip((None, *nodes), nodes, strict=False)
        )
    )


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def shared(
    postgres_dsn: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[RunningService, ModelServer]]:
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "app.bootstrap.standard_packs", lambda transport: [*standard_packs(transport), pack]
        )
        async with shared_models(postgres_dsn, folder, JUDGE) as found:
            yield found


@pytest_asyncio.fixture(loop_scope="module")
async def service(shared: tuple[RunningService, ModelServer]) -> RunningService:
    return shared[0]


@pytest_asyncio.fixture(loop_scope="module")
async def models(shared: tuple[RunningService, ModelServer]) -> ModelServer:
    models = shared[1]
    models.requests.clear()
    models.say(OATS)
    return models


class Reader:
    """An open stream. Whoever reads says what is enough."""

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._chunks = chunks
        self._parser = SseParser()
        self.raw = b""

    @property
    def events(self) -> list[SseEvent]:
        return self._parser.events

    @property
    def types(self) -> list[str]:
        return [event.event for event in self.events]

    @property
    def deltas(self) -> list[dict[str, Any]]:
        return [event.json for event in self.events if event.event == "delta"]

    def has_deltas(self, number: int) -> bool:
        return len(self.deltas) == number

    async def read(self, is_enough: Callable[[], bool] = lambda: False) -> None:
        """Until then, or to the end."""
        async with asyncio.timeout(20):
            while not is_enough():
                try:
                    chunk = await anext(self._chunks)
                except StopAsyncIteration:
                    return
                self.raw += chunk
                self._parser.feed(chunk)


@asynccontextmanager
async def submitted(service: RunningService, envelope: dict[str, Any]) -> AsyncIterator[Reader]:
    async with service.client.stream("POST", "/v1/runs", json=envelope, headers=SSE) as response:
        assert response.status_code == 200, await response.aread()
        yield Reader(response.aiter_bytes())


@asynccontextmanager
async def followed(
    service: RunningService, run_id: str, query: dict[str, Any], after: int = 0
) -> AsyncIterator[Reader]:
    headers = {**SSE, "Last-Event-ID": str(after)}
    url = f"/v1/runs/{run_id}/events"
    async with service.client.stream("GET", url, params=query, headers=headers) as response:
        assert response.status_code == 200, await response.aread()
        yield Reader(response.aiter_bytes())


def release(steps: asyncio.Semaphore, number: int) -> None:
    for _ in range(number):
        steps.release()


def behind(gate: asyncio.Semaphore, models: ModelServer) -> Behaviour:
    """Speaks when the gate lets it."""

    async def behave(writer: asyncio.StreamWriter, exchange: Exchange) -> None:
        await gate.acquire()
        await models.speak(writer, exchange)

    return behave


def is_streamed(models: ModelServer) -> list[bool]:
    return [bool(request.json.get("stream")) for request in models.requests]


async def test_each_piece_is_a_frame_between_request_and_response_and_nothing_is_stored(
    service: RunningService, models: ModelServer
) -> None:
    steps = asyncio.Semaphore(0)
    models.behave(models.speak_in_steps(steps))
    async with submitted(service, ask("A")) as stream:
        await stream.read(lambda: "LLM_REQUEST" in stream.types)
        release(steps, 1)  # the role
        for number in range(1, len(OATS_PIECES) + 1):
            release(steps, 1)
            await stream.read(partial(stream.has_deltas, number))
        release(steps, ALL)
        await stream.read()

    asked = stream.types.index("LLM_REQUEST")
    assert stream.types[asked:] == [
        *("LLM_REQUEST", *["delta"] * len(OATS_PIECES), "LLM_RESPONSE", "NODE_DONE", "RUN_DONE")
    ]
    run_id = stream.events[0].json["run_id"]
    assert stream.deltas == [
        {"run_id": run_id, "node_id": "A", "attempt": 1, "call": 1, "piece": number, "text": text}
        for number, text in enumerate(OATS_PIECES, 1)
    ]
    frames = [frame for frame in stream.raw.split(b"\n\n") if b"event: delta" in frame]
    assert all(frame.startswith(b"event: delta\ndata: {") for frame in frames)
    assert {event.id for event in stream.events[asked : asked + 6]} == {str(asked + 1)}

    stored = await rows(
        service, "select type, body from events where run_id = $1 order by seq", UUID(run_id)
    )
    told = [event for event in stream.events if event.event != "delta"]
    assert [(row["type"], row["body"]) for row in stored] == [(e.event, e.data) for e in told]
    page = (await service.client.get(f"/v1/runs/{run_id}/events")).json()["events"]
    assert [event["type"] for event in page] == [event.event for event in told]
    query = {"type": "delta"}
    page = (await service.client.get(f"/v1/runs/{run_id}/events", params=query)).json()
    assert [event["type"] for event in page["events"]] == ["RUN_DONE"], "it passes every filter"
    assert is_streamed(models) == [True]


async def test_what_comes_at_once_is_few_frames(
    service: RunningService, models: ModelServer
) -> None:
    answer = '{"verdict": "' + "oats and rye and " * 200 + '"}'
    models.say(answer)
    async with submitted(service, ask("A")) as stream:
        await stream.read()
    assert "".join(delta["text"] for delta in stream.deltas) == answer
    assert [delta["piece"] for delta in stream.deltas] == list(range(1, len(stream.deltas) + 1))
    [response] = [event for event in stream.events if event.event == "LLM_RESPONSE"]
    joins = response.json["data"]["duration_ms"] / 30
    assert len(stream.deltas) <= joins + 1 < len(answer) / 4


@pytest.mark.parametrize("query", [None, {"type": "LLM_RESPONSE"}, {"level": "ERROR"}])
async def test_nobody_takes_deltas_and_no_model_streams(
    service: RunningService, models: ModelServer, query: dict[str, str] | None
) -> None:
    if query is None:
        assert (await service.finished(ask("A")))["status"] == "done"
    else:
        gate = asyncio.Semaphore(0)
        models.behave(behind(gate, models))
        run = await service.submit(ask("A", "B"))
        await models.reached(1)
        async with followed(service, run["run_id"], query) as stream:
            gate.release()
            await stream.read()
        assert stream.deltas == []
    assert not any(is_streamed(models))


async def test_filters_and_a_follower_who_comes_in_the_middle_of_a_call(
    service: RunningService, models: ModelServer
) -> None:
    gate = asyncio.Semaphore(0)
    models.behave(behind(gate, models))
    run_id = (await service.submit(ask("A", "B")))["run_id"]
    await models.reached(1)  # A is asked while nobody follows
    async with (
        followed(service, run_id, {"type": "delta"}) as texts,
        followed(service, run_id, {"node": "A"}) as of_a,
        followed(service, run_id, {"node": "B"}) as of_b,
        followed(service, run_id, {"type": ["delta", "NODE_DONE"], "node": "B"}) as both,
    ):
        gate.release()
        for stream in (texts, of_a, of_b, both):
            await stream.read()
    assert is_streamed(models) == [False, True]
    assert set(texts.types) == {"delta", "RUN_DONE"}
    assert {delta["node_id"] for delta in texts.deltas} == {"B"}
    assert of_a.deltas == []
    assert of_b.deltas == both.deltas == texts.deltas
    assert [name for name in both.types if name != "delta"] == ["NODE_DONE", "RUN_DONE"]
    assert "".join(delta["text"] for delta in texts.deltas) == OATS


async def test_a_repaired_answer_is_another_text(
    service: RunningService, models: ModelServer
) -> None:
    models.say('{"verdict": 7}', OATS)
    async with submitted(service, ask("A")) as stream:
        await stream.read()
    said: dict[int, str] = {}
    over: set[int] = set()
    for event in stream.events:
        if event.event == "delta":
            call = event.json["call"]
            assert call not in over
            said[call] = said.get(call, "") + event.json["text"]
        elif event.event == "LLM_RESPONSE":
            over.add(event.json["data"]["call"])
    assert said == {1: '{"verdict": 7}', 2: OATS}


async def test_a_cached_answer_says_nothing(service: RunningService, models: ModelServer) -> None:
    async with submitted(service, ask("A", soil="known")) as stream:
        await stream.read()
    assert "".join(delta["text"] for delta in stream.deltas) == OATS
    async with submitted(service, ask("A", soil="known")) as stream:
        await stream.read()
    assert "CACHE_HIT" in stream.types
    assert stream.deltas == []


async def test_a_reconnect_goes_on_with_events_and_with_what_is_said_from_then_on(
    service: RunningService, models: ModelServer
) -> None:
    steps = asyncio.Semaphore(0)
    models.behave(models.speak_in_steps(steps))
    feed = service.services.feed
    async with submitted(service, ask("A")) as stream:
        release(steps, 3)
        await stream.read(lambda: "ve" in "".join(delta["text"] for delta in stream.deltas))
        run_id = stream.deltas[0]["run_id"]
        last = int(stream.events[-1].id)
    release(steps, 1)  # nobody hears it: it is when something is to be sent that a cut is seen
    await until(lambda: feed.listeners == 0, "the line is cut")
    async with followed(service, run_id, {}, last) as rest:
        release(steps, ALL)
        await rest.read()
    told = [event.seq for event in (*stream.events, *rest.events) if event.event != "delta"]
    assert told == list(range(1, len(told) + 1))
    assert rest.types[-1] == "RUN_DONE"
    assert OATS.endswith("".join(delta["text"] for delta in rest.deltas))
    assert rest.deltas[0]["piece"] > stream.deltas[-1]["piece"]


async def test_a_capability_speaks_for_itself(service: RunningService) -> None:
    envelope = graph({"id": "A", "capability": "tests.speaker", "requires": [], "inputs": {}})
    async with submitted(service, envelope) as stream:
        await stream.read()
    assert "".join(delta["text"] for delta in stream.deltas) == "looking around"
    assert all("call" not in delta for delta in stream.deltas)
    assert stream.types[-3:] == ["delta", "NODE_DONE", "RUN_DONE"]


async def test_the_command_line_passes_deltas_over(
    service: RunningService, models: ModelServer
) -> None:
    gate = asyncio.Semaphore(0)
    models.behave(behind(gate, models))
    run_id = (await service.submit(ask("A", "B")))["run_id"]
    await models.reached(1)
    api = Api(service.url)
    follower = asyncio.create_task(asyncio.to_thread(lambda: list(Follower(api, run_id))))
    await until(lambda: service.services.feed.listeners == 1 or follower.done(), "it follows")
    gate.release()
    events = await follower
    assert is_streamed(models) == [False, True]
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert events[-1]["type"] == "RUN_DONE"


async def test_streams_of_an_api_process_show_what_a_worker_hears(
    models: ModelServer,
    postgres_dsn: str,
    redis_server: RunningRedis,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TESTS_MODEL_KEY", "sk-tests")
    file = tmp_path / "models.yaml"
    file.write_text(MODELS.format(url=models.url))
    settings = make_settings(models_file=file, redis_url=redis_server.url, redis_budget_ms=10_000)
    redis = make_client(redis_server.url)
    gate, steps = asyncio.Semaphore(0), asyncio.Semaphore(0)
    models.behave(models.speak, behind(gate, models), models.speak_in_steps(steps))

    async def is_heard() -> bool:
        return int((await redis.pubsub_numsub(CHANNEL))[0][1]) == 1

    async with (
        fresh_database(postgres_dsn) as dsn,
        running_service(settings, dsn, "api") as api,
        running_service(settings, dsn, "worker") as worker,
    ):
        await until(lambda: worker.services.lease.has_company, "the worker knows of the API")
        assert (await api.client.post("/v1/capabilities", json=JUDGE)).status_code == 201
        assert (await api.finished(ask("A")))["status"] == "done"
        assert is_streamed(models) == [False], "who waits for the result takes no deltas"
        async with submitted(api, ask("X")) as first:  # its API begins to listen
            await until(is_heard, "the API listens")
            gate.release()
            await first.read()
        async with submitted(api, ask("A")) as stream:
            # The end of a call comes by another road: deltas that it overtakes are dropped.
            release(steps, 1 + len(OATS_PIECES))
            await stream.read(lambda: "".join(delta["text"] for delta in stream.deltas) == OATS)
            release(steps, ALL)
            await stream.read()
        asked = stream.types.index("LLM_REQUEST")
        assert is_streamed(models)[-1]
        assert "".join(delta["text"] for delta in stream.deltas) == OATS
        assert set(stream.types[asked + 1 : -3]) == {"delta"}
        assert stream.types[-3:] == ["LLM_RESPONSE", "NODE_DONE", "RUN_DONE"]
        assert worker.services.feed.listeners == 0
    await redis.aclose()
