"""50 planted texts, and that none of them is where it must not be.

The rule. A *secret* of the operator (keys, passwords, header values of providers) is nowhere: in no
log line, event, span, problem, view, row or key of Redis. *Waste*, an answer that could not be used
or the words of an error, is nowhere either. A *prompt* and an *answer* that was used are data of
their run: its envelope, outputs and views hold them, and the answer the cache; no other event, no
log line, span, problem or instrument does. Which texts, and what is caught, is in `tests/canaries`.

One story is told to a whole service with real stores: models of every wire, tools and sinks, all of
which repeat what they hear where it hurts most. Lines are those of a process at DEBUG, for which
`kit/log.py` keeps libraries quiet that quote what others answered.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import pytest
import pytest_asyncio

from app.adapters.capabilities.mcp_protocol import pin_of
from app.bootstrap import open_catalog, open_providers
from app.domain.chat import ChatAnswer, LlmUnavailableError, StopReason
from app.llm.models_file import ModelsInvalid
from app.llm.search import MODELS_MAX
from app.ports import Provider
from tests.canaries import (
    WIRES,
    Caught,
    Kind,
    Sink,
    breaks_off,
    catch_redis,
    catch_rows,
    catch_spans,
    echoes,
    far,
    is_in,
    judge,
    lines_of_the_process,
    listen,
    lock_out,
    locked_out,
    make_canary,
    mcp_file,
    models_file,
    postgres_role,
    redis_user,
    says_badly,
    secrets_file,
    speaks,
)
from tests.conftest import fresh_database, make_settings
from tests.envelopes import graph
from tests.far_side import Behaviour, Exchange, FarSide, answer, far_side
from tests.mcp_server import TOOLS, McpServer, over_http
from tests.model_server import USAGE, ModelServer, running_model_server
from tests.otlp_sink import OtlpSink, otlp_sink
from tests.providers import asked
from tests.redis_kit import until as eventually
from tests.servers import RunningRedis
from tests.service import RunningService, running_service
from tests.shared_service import audit, problem, register

pytestmark = pytest.mark.asyncio(loop_scope="module")

PLACES: dict[Kind, list[str]] = {
    Kind.SECRET: [
        *(f"key of {wire}" for wire in WIRES),
        *(f"header of {wire}" for wire in WIRES),
        *("user in a base_url", "password of Postgres", "password of Redis"),
        *("secret key of Langfuse", "header of OTLP"),
        *("secret of an http tool", "secret of an MCP server", "environment of an MCP server"),
    ],
    Kind.PROMPT: [
        *(f"prompt for {wire}" for wire in WIRES),
        *("system prompt", "objective", "directive", "prompt of infer_sync", "text to embed"),
        *("queued prompt", "prompt in a refused body"),
    ],
    Kind.ANSWER: [
        *(f"answer of {wire}" for wire in WIRES),
        *("rationale of a refused plan", "capability of a refused plan"),
    ],
    Kind.WASTE: [
        *(f"no JSON of {wire}" for wire in WIRES),
        *("answer of a wrong type", "name in an answer", "name twice in an answer"),
        *("cut off answer", "refusal", "garbage", "cut stream"),
        "words of an error",
    ],
}
KINDS = {place: kind for kind, places in PLACES.items() for place in places}
OUTCOMES = (
    *("ok", "invalid_json", "schema_validation_failed", "cut_off", "refused"),
    *("provider_refused", "provider_busy", "provider_failed", "provider_garbage"),
)
STATUSES = (400, 401, 429, 500)
CUT_AT = 300
"""Reasons of tools are cut behind so many characters."""
SIGNS = {
    Sink.LOG: (
        *('"flexrun.events"', '"NODE_FAILED"', '"uvicorn.error"', "urllib3", "ModelsInvalid"),
        *("Redis gives no hot copies", "Failed to export", "stderr of MCP server"),
        *("the connection broke off", "the answer is an error"),
    ),
    Sink.SPANS: ("invoke_workflow", "execute_tool judge.", "chat ollama", "langfuse.trace.name"),
    Sink.PROBLEMS: ("llm_unavailable", "invalid_request", "malformed_json"),
    Sink.INSTRUMENTS: ("llm_calls_total", "tokens_in", "ctx_window", "llm::openai"),
    Sink.EVENTS: (
        *("MODEL_SELECTED", "LLM_REQUEST", "CACHE_MISS", "NODE_FAILED", "RUN_FAILED"),
        *("VALIDATION_ERROR", "PLAN_REQUESTED"),
        *(f'"outcome":"{outcome}"' for outcome in OUTCOMES),
    ),
    Sink.DATA: ("RUN_QUEUED", "judge.openai", "plan_version", '"lease"'),
}
"""What each sink holds, if it is caught as a whole."""


@dataclass
class World:
    """The service with its far sides, and the canaries `c` by their places."""

    c: dict[str, str]
    caught: Caught
    service: RunningService
    models: dict[str, ModelServer]
    tool: FarSide
    mcp: FarSide
    traces: tuple[OtlpSink, OtlpSink]

    async def ask(self, wire: str, who: str = "judge", **more: Any) -> dict[str, Any]:
        """A run in which the model of this wire is asked first; by `judge.last` last."""
        inputs = {"text": {"from": "inputs", "pointer": "/text"}}
        envelope = graph({"id": "A", "capability": f"{who}.{wire}", "inputs": inputs})
        given = {"objective": self.c["objective"], "inputs": {"text": self.c[f"prompt for {wire}"]}}
        return await self.service.finished({**envelope, **given, **more})

    async def call(self, capability: str) -> dict[str, Any]:
        return await self.service.finished(graph({"id": "A", "capability": capability}))

    async def badly(self, behaviour: Behaviour) -> None:
        """Until further notice all models behave like this."""
        for server in self.models.values():
            server.side.behave = behaviour

    async def well(self) -> None:
        for server in self.models.values():
            server.side.behave = server._serve


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def world(
    postgres_dsn: str, redis_server: RunningRedis, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[World]:
    """The story is over, and everything that came out of it is caught."""
    c = {place: make_canary() for place in KINDS}
    caught, folder = Caught(), tmp_path_factory.mktemp("canaries")
    async with AsyncExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        servers = {w: await stack.enter_async_context(running_model_server()) for w in WIRES}
        tool, mcp = [await stack.enter_async_context(far_side()) for _ in range(2)]
        sinks = [await stack.enter_async_context(otlp_sink()) for _ in range(2)]
        access = await stack.enter_async_context(
            postgres_role(postgres_dsn, c["password of Postgres"])
        )
        plain = await stack.enter_async_context(fresh_database(postgres_dsn))
        dsn = f"postgresql://{access}@{plain.rpartition('@')[2]}"
        user, redis_url = await stack.enter_async_context(
            redis_user(redis_server, c["password of Redis"])
        )
        for wire in WIRES:
            patch.setenv(f"CANARY_{wire.upper()}", c[f"key of {wire}"])
        patch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"x-sink-key={c['header of OTLP']}")
        settings = make_settings(
            database_url=dsn,
            redis_url=redis_url,
            redis_budget_ms=10_000,  # a busy machine is no outage, or there are no hot copies
            models_file=models_file(folder, servers, c),
            secrets_file=secrets_file(folder, c),
            mcp_file=mcp_file(folder, c),
            otel_exporter_otlp_endpoint=sinks[0].url,
            langfuse_public_key=f"pk-lf-{make_canary()}",
            langfuse_secret_key=c["secret key of Langfuse"],
            langfuse_base_url=sinks[1].url,
            trace_cpu_share=1.0,
            log_events=True,
            max_retries=0,
            cb_threshold=10_000,
        )
        with lines_of_the_process(caught):
            async with running_service(settings, dsn) as service:
                listen(service.client, caught)
                world = World(c, caught, service, servers, tool, mcp, (sinks[0], sinks[1]))
                await tell(world)
                await catch_redis(caught, redis_server.url)
                assert await lock_out(redis_server, user) > 0
                await without_stores(world, postgres_dsn, access.partition(":")[0])
                caught.seen += [dsn, redis_url]
            refuse_to_start(folder, c, caught)
        caught.seen.append((folder / "seen").read_text())
        await catch_rows(caught, plain)
        await audit(plain)
        catch_spans(caught, *sinks)
        for server in servers.values():
            caught.see(server.requests)
        for side in (tool, mcp, *(sink.side for sink in sinks)):
            caught.see(side.exchanges)
        yield world


# --- the story ------------------------------------------------------------------------------------


async def tell(world: World) -> None:
    prompt = f"{world.c['system prompt']}: of text make verdict"
    for wire in WIRES:
        others = [name for name in WIRES if name != wire][: MODELS_MAX - 1]
        first = judge(f"judge.{wire}", prompt, wire)
        await register(world.service, first, judge(f"judge.last.{wire}", prompt, *others, wire))
    # What an answer calls a property is part of the place of its fault.
    schema = {"type": "object", "additionalProperties": {"type": "integer"}}
    named = {**judge("judge.open.ollama", prompt, "ollama"), "output_contract": {"schema": schema}}
    await register(world.service, named)
    await models_answer(world)
    await models_fail(world)
    await models_are_asked_without_a_plan(world)
    await a_model_plans(world)
    await streams_break(world)
    await tools_repeat_what_they_hear(world)
    await everything_is_looked_at(world)


async def models_answer(world: World) -> None:
    """Well, and in every way that is of no use."""
    for wire, server in world.models.items():
        speaks(server, world.caught, f'{{"verdict": "{world.c[f"answer of {wire}"]}"}}')
        assert (await world.ask(wire))["status"] == "done"
        text = f"I say {world.c[f'no JSON of {wire}']}"
        speaks(server, world.caught, text, text)
        await fails(world, wire, "invalid_json")
    wrong, name, twice = (
        world.c[place]
        for place in ("answer of a wrong type", "name in an answer", "name twice in an answer")
    )
    for text, code, who in (
        (f'{{"verdict": ["{wrong}"]}}', "schema_validation_failed", "judge"),
        (f'{{"verdict": "v", "{name}": 1}}', "schema_validation_failed", "judge"),
        (f'{{"verdict": 1, "{name}": "x"}}', "schema_validation_failed", "judge.open"),
        (f'{{"{twice}": 1, "{twice}": 2}}', "invalid_json", "judge"),
    ):
        speaks(world.models["ollama"], world.caught, text, text)
        await fails(world, "ollama", code, who)
    for place, stop in (
        ("cut off answer", StopReason.LENGTH),
        ("refusal", StopReason.REFUSED),
    ):
        world.models["openai"].say(ChatAnswer(world.c[place], stop, USAGE))
        await fails(world, "openai", "cut_off" if stop is StopReason.LENGTH else "refused")
        world.caught.said.append(world.c[place])


async def fails(world: World, wire: str, code: str, who: str = "judge") -> None:
    """A run that fails by what a model of this wire gives. None is like another to the cache."""
    run = await world.ask(wire, who, special_instructions=[make_canary()])
    [node] = run["nodes"]
    assert (run["status"], node["error"]["code"]) == ("failed", code), run


async def models_fail(world: World) -> None:
    """Each failure repeats the request, with a part of it as its name. Of all models that fail in
    a run only the last one is heard."""
    for wire in WIRES:
        names = (key_header(wire), "x-team", world.c[f"prompt for {wire}"], "server_error")
        for status, name in zip(STATUSES, names, strict=True):
            await world.badly(echoes(world.caught, status, name, world.c["words of an error"]))
            await fails(world, wire, "llm_unavailable", "judge.last")
    await world.badly(says_badly(world.caught, 200, f"{{{world.c['garbage']}"))
    for wire in WIRES:
        await fails(world, wire, "llm_unavailable", "judge.last")


def key_header(wire: str) -> str:
    return "x-api-key" if wire == "anthropic" else "authorization"


async def models_are_asked_without_a_plan(world: World) -> None:
    c, post = world.c, world.service.client.post
    await world.badly(echoes(world.caught, 401, c["prompt of infer_sync"]))
    response = await post("/v1/infer_sync", json={"prompt": c["prompt of infer_sync"]})
    problem(response, 502, "llm_unavailable")
    await world.badly(echoes(world.caught, 400, c["text to embed"]))
    response = await post("/v1/embedding", json={"text": c["text to embed"]})
    problem(response, 502, "llm_unavailable")
    await world.badly(echoes(world.caught, 500, c["queued prompt"]))
    payload = {"prompt": c["queued prompt"]}
    response = await post("/v1/requests", json={"mode": "infer_sync", "payload": payload})
    await world.service.events(response.json()["request_id"])
    await world.service.client.get(response.headers["location"])
    told = c["prompt in a refused body"]
    world.caught.seen.append(told)
    for body in ({"prompt": {"text": told}}, {"prompt": told, "role": told}, {"prompt": [told]}):
        problem(await post("/v1/infer_sync", json=body), 422, "invalid_request")
    half, is_json = f'{{"objective": "{told}', {"Content-Type": "application/json"}
    problem(await post("/v1/runs", content=half, headers=is_json), 400, "malformed_json")


async def a_model_plans(world: World) -> None:
    """A draft that is refused, and one that is good."""
    await world.well()
    sentence = f"I would pray: {world.c['capability of a refused plan']}"
    refused = {
        "rationale": world.c["rationale of a refused plan"],
        "stages": [{"stage": "first", "capability": sentence}],
    }
    taken = {"start": {"from": "inputs", "pointer": "/text"}}
    good = {"stages": [{"stage": "first", "capability": "util.echo", "inputs": taken}]}
    drafts = [orjson.dumps(draft).decode() for draft in (refused, good)]
    speaks(world.models["openai"], world.caught, *drafts)
    envelope = {
        "objective": world.c["objective"],
        "inputs": {"text": "loam"},
        "output_contract": {"mode": "freeform", "instructions": "whatever comes out"},
        "policies": {"planner": {"strategy": "llm", "directives": [world.c["directive"]]}},
    }
    run = await world.service.finished(envelope)
    assert run["output"] == {"start": "loam"}, run


async def streams_break(world: World) -> None:
    """What a stream was about is in no error of the provider."""
    for wire, server in world.models.items():
        server.say(f"{world.c['cut stream']} and more")
        server.behave(server.cut_off, breaks_off(world.caught, key_header(wire)))
        for _ in range(2):
            error = await broken(world.service.services.providers[wire])
            world.caught.sinks[Sink.LOG].append("".join(traceback.format_exception(error)))
    world.caught.said.append(world.c["cut stream"])


async def broken(provider: Provider) -> LlmUnavailableError:
    with pytest.raises(LlmUnavailableError) as caught:
        await provider.chat(asked(), lambda _: None)
    return caught.value


async def tools_repeat_what_they_hear(world: World) -> None:
    secret_headers = {"Authorization": "tool"}
    tool = far("far.tool", "http", {"url": world.tool.url, "secret_headers": secret_headers})
    at = {"url": world.mcp.url, "secret_headers": {"X-Key": "mcp"}}
    remote = {**at, "tool": "say", "description_sha256": pin_of(TOOLS["say"])}
    local = {"server": "local", "tool": "env", "description_sha256": pin_of(TOOLS["env"])}
    await register(
        world.service, tool, far("far.mcp", "mcp", remote), far("far.local", "mcp", local)
    )
    failed = echoes(world.caught, 500, "failed")
    for behaviour in (told_back(200), told_back(404), told_back(404, CUT_AT - 20), failed):
        world.tool.behave = behaviour
        await world.call("far.tool")
    for is_error in (False, True):
        world.mcp.behave = tool_result_told_back(is_error)
        await world.call("far.mcp")
    assert (await world.call("far.local"))["status"] == "done"


def told_back(status: int, chars_before: int = 0) -> Behaviour:
    """What came in, as an output or as a reason, behind so many other characters."""

    async def behave(writer: asyncio.StreamWriter, exchange: Exchange) -> None:
        title = "x" * chars_before + exchange.headers["authorization"]
        body = orjson.dumps({"title": title})
        await answer(status, body)(writer, exchange)

    return behave


def tool_result_told_back(is_error: bool) -> Behaviour:
    plain = over_http(McpServer())

    async def behave(writer: asyncio.StreamWriter, exchange: Exchange) -> None:
        if exchange.json.get("method") != "tools/call":
            await plain(writer, exchange)
            return
        text = {"type": "text", "text": str(exchange.headers)}
        result = {"content": [text], "isError": is_error, "resultType": "complete"}
        message = {"jsonrpc": "2.0", "id": exchange.json["id"], "result": result}
        await answer(200, orjson.dumps(message))(writer, exchange)

    return behave


async def everything_is_looked_at(world: World) -> None:
    get = world.service.client.get
    for path in ("metrics", "v1/slm/metrics", "v1/models", "v1/breakers", "v1/capabilities"):
        assert (await get(f"/{path}")).status_code == 200, path
    runs = (await get("/v1/runs?limit=100")).json()["runs"]
    assert len(runs) < 100, "there is a second page"
    await asyncio.gather(*(get(f"/v1/runs/{run['run_id']}/debug") for run in runs))


async def without_stores(world: World, postgres_dsn: str, role: str) -> None:
    """Sinks and stores refuse us, the sinks with what they heard."""
    for sink in world.traces:
        sink.side.behave = echoes(world.caught, 401, "refused")
    world.models["ollama"].say('{"verdict": "late"}')
    run = await world.ask("ollama")
    assert run["status"] == "done"
    for sink in world.traces:
        await eventually(partial(has_told, sink, run["run_id"]), "the sinks refuse the run")
    # An exporter that is closed before it reads the answer prints nothing. Only OTLP's tells us.
    counted = world.service.services.metrics.traced_runs
    await eventually(lambda: counted["failed"] >= 1, "the refusal is heard")
    async with locked_out(postgres_dsn, role) as connections:
        assert connections > 0
        response = await world.service.client.get(f"/v1/runs/{run['run_id']}")
        assert response.status_code >= 500, response.text


def has_told(sink: OtlpSink, run_id: str) -> bool:
    return any(run_id.encode() in body for body in sink.bodies())


def refuse_to_start(folder: Path, c: dict[str, str], caught: Caught) -> None:
    file = folder / "refused.yaml"
    where = f"http://me:{c['user in a base_url']}@127.0.0.1:1"
    file.write_text(f"providers:\n  one: {{kind: ollama, base_url: '{where}'}}")
    caught.seen.append(file.read_text())
    with pytest.raises(ModelsInvalid) as error:
        open_providers(open_catalog(make_settings(models_file=file)))
    caught.sinks[Sink.LOG].append("".join(traceback.format_exception(error.value)))


# --- what came of it ------------------------------------------------------------------------------


async def test_there_are_fifty() -> None:
    assert len(KINDS) == sum(map(len, PLACES.values())) == 50


@pytest.mark.parametrize("place", KINDS)
async def test_a_canary_stays_where_it_belongs(world: World, place: str) -> None:
    leaks = world.caught.leaks(world.c[place], KINDS[place])
    assert leaks == {}, f"{place} is in {sorted(leaks)}"


async def test_every_canary_came_to_where_it_can_be_betrayed(world: World) -> None:
    assert [place for place in KINDS if not world.caught.is_planted(world.c[place])] == []


async def test_what_is_caught_is_everything(world: World) -> None:
    """A net with a hole catches nothing, either."""
    caught = {sink: "\n".join(found) for sink, found in world.caught.sinks.items()}
    for wire in WIRES:
        for sink in (Sink.CACHE, Sink.REDIS, Sink.DATA):
            assert is_in(world.c[f"answer of {wire}"], caught[sink]), (wire, sink)
        assert is_in(world.c[f"prompt for {wire}"], caught[Sink.DATA])
    for sink, parts in SIGNS.items():
        assert [part for part in parts if part not in caught[sink]] == [], sink
