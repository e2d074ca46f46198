"""Traces of real runs as a receiver of OTLP and a Langfuse get them over the line."""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio

from app.kit.ids import span_id
from tests.conftest import fresh_database, make_settings
from tests.envelopes import diamond, echo_node, graph
from tests.far_side import Behaviour, Exchange, FarSide, answer, far_side, raw
from tests.model_server import ModelServer, running_model_server
from tests.model_service import KEY, service_with
from tests.otlp_sink import OtlpSink, ReceivedSpan, hang, otlp_sink
from tests.redis_kit import until as eventually
from tests.service import RunningService, running_service
from tests.shared_service import audit, register, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

CALLER = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER_SPAN = "00f067aa0ba902b7"
JUDGE = {
    "capability_id": "soil.judge",
    "version": "1.0.0",
    "display_name": "a judge of soils",
    "summary": "Says what grows where.",
    "kind": "llm",
    "effect": "pure",
    "input_contract": {"schema": {"type": "object", "required": ["soil"]}},
    "output_contract": {
        "schema": {
            "type": "object",
            "properties": {"verdict": {"type": "string"}},
            "required": ["verdict"],
        }
    },
}
SECRET = "sk-lf-canary-0815"
CANARY = "canary"


def otlp(sink: OtlpSink) -> dict[str, Any]:
    return {"otel_exporter_otlp_endpoint": sink.url, "otel_service_name": "flexrun-under-test"}


def langfuse(sink: OtlpSink) -> dict[str, Any]:
    return {
        "langfuse_public_key": "pk-lf-1",
        "langfuse_secret_key": SECRET,
        "langfuse_base_url": sink.url,
    }


@dataclass
class Traced:
    """A service with everything that it speaks to."""

    service: RunningService
    models: ModelServer
    side: FarSide
    otlp: OtlpSink
    langfuse: OtlpSink

    async def told(self, trace_id: str, roots: int = 1) -> list[ReceivedSpan]:
        """The spans of a trace at the OTLP receiver, once so many runs of it are there."""
        return await _told(self.otlp, trace_id, roots)


async def _told(sink: OtlpSink, trace_id: str, roots: int = 1) -> list[ReceivedSpan]:
    async with asyncio.timeout(20):
        while True:
            sink.side.arrived.clear()
            spans = sink.traces().get(trace_id, [])
            if len([span for span in spans if "flexrun.run.status" in span.attributes]) >= roots:
                return spans
            await sink.side.arrived.wait()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def traced(
    postgres_dsn: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Traced]:
    """One service for the tests of what is told."""
    folder = tmp_path_factory.mktemp("models")
    async with AsyncExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        dsn = await stack.enter_async_context(fresh_database(postgres_dsn))
        stack.push_async_callback(audit, dsn)
        models = await stack.enter_async_context(running_model_server())
        models.say('{"verdict": "oats"}')
        side = await stack.enter_async_context(far_side())
        sinks = [await stack.enter_async_context(otlp_sink()) for _ in range(2)]
        settings = {**otlp(sinks[0]), **langfuse(sinks[1]), "log_events": True}
        tools = (JUDGE, far_tool(side, "idempotent"), far_tool(side, "at_most_once"))
        service = await stack.enter_async_context(
            service_with(models, dsn, folder, patch, *tools, llm_cache_days=0, **settings)
        )
        yield Traced(service, models, side, *sinks)


def far_tool(side: FarSide, effect: str) -> dict[str, Any]:
    """The capability `far.idempotent` or `far.at_most_once`; an output has a title."""
    return {
        "capability_id": f"far.{effect}",
        "version": "1.0.0",
        "display_name": "far tool",
        "summary": "A tool far away.",
        "kind": "http",
        "effect": effect,
        "input_contract": {"schema": {"type": "object"}},
        "output_contract": {
            "schema": {
                "type": "object",
                "properties": {"title": {"type": "string"}},
                "required": ["title"],
            }
        },
        "config": {"url": side.url},
    }


GOOD = answer(200, b'{"title": "x"}')


def in_turn(*behaviours: Behaviour) -> Behaviour:
    left = iter(behaviours)

    async def behave(writer: asyncio.StreamWriter, exchange: Exchange) -> None:
        await next(left)(writer, exchange)

    return behave


def ask(node_id: str, **more: Any) -> dict[str, Any]:
    """A run of one node that asks the model."""
    inputs = {"soil": {"value": f"loam {node_id}"}}
    node = {"id": node_id, "capability": "soil.judge", "requires": [], "inputs": inputs}
    return graph(node, **{"metadata": {"label": "nightly"}, **more})


def call(effect: str, *requires: str, **more: Any) -> dict[str, Any]:
    return echo_node("A", *requires, capability=f"far.{effect}", **more)


async def trace_of(service: RunningService, run_id: str) -> str:
    events = await service.events(run_id)
    return str(events[0].json["trace_id"])


def named(spans: Iterable[ReceivedSpan], name: str) -> ReceivedSpan:
    [found] = [span for span in spans if span.name == name]
    return found


def edges(spans: list[ReceivedSpan]) -> set[tuple[str, str]]:
    """Each span's name with the name of its parent; "" for a span that is not there."""
    names = {span.span_id: span.name for span in spans}
    assert len(names) == len(spans), "a span was sent twice"
    return {(span.name, names.get(span.parent, "")) for span in spans}


# --- what is told ---------------------------------------------------------------------------------

ASKED = {
    ("invoke_workflow nightly", ""),
    ("plan", "invoke_workflow nightly"),
    ("execute_tool soil.judge", "invoke_workflow nightly"),
    ("chat small", "execute_tool soil.judge"),
}


async def test_three_runs_are_three_traces_with_tokens_and_cost(traced: Traced) -> None:
    runs = [await traced.service.finished(ask(node)) for node in ("A", "B", "C")]
    trace_ids = [await trace_of(traced.service, run["run_id"]) for run in runs]
    assert len(set(trace_ids)) == 3
    traces = [await traced.told(trace_id) for trace_id in trace_ids]
    assert [edges(spans) for spans in traces] == [ASKED] * 3
    run_id, spans = runs[0]["run_id"], traces[0]
    root = named(spans, "invoke_workflow nightly")
    assert (root.span_id, root.parent, root.error) == (span_id(run_id), "", "")
    assert root.resource["service.name"] == "flexrun-under-test"
    assert root.attributes == {
        "gen_ai.operation.name": "invoke_workflow",
        "gen_ai.workflow.name": "nightly",
        "flexrun.run.id": run_id,
        "flexrun.run.lane": "standard",
        "flexrun.run.status": "done",
    }
    node = named(spans, "execute_tool soil.judge")
    assert node.span_id == span_id(run_id, "A", 1)
    assert node.attributes == {
        "gen_ai.operation.name": "execute_tool",
        "gen_ai.tool.name": "soil.judge",
        "flexrun.node.id": "A",
        "flexrun.node.attempt": 1,
    }
    chat = named(spans, "chat small")
    assert chat.kind == 3  # CLIENT
    assert chat.attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "near",
        "gen_ai.request.model": "small",
        "gen_ai.usage.input_tokens": 12,
        "gen_ai.usage.output_tokens": 5,
        "flexrun.cost.usd": 0.000022,
        "flexrun.usage.is_estimated": False,
        "flexrun.outcome": "ok",
        "flexrun.node.id": "A",
    }
    assert root.start_ms <= node.start_ms <= chat.start_ms <= chat.end_ms <= node.end_ms
    assert node.end_ms <= root.end_ms


async def test_langfuse_gets_generations_with_tokens_and_cost(traced: Traced) -> None:
    runs = [await traced.service.finished(ask(node)) for node in ("A", "B", "C")]
    for run in runs:
        trace_id = await trace_of(traced.service, run["run_id"])
        spans = await _told(traced.langfuse, trace_id)
        assert edges(spans) == ASKED
        found = {span.attributes["langfuse.observation.type"] for span in spans}
        assert found == {"chain", "span", "tool", "generation"}
        chat = named(spans, "chat small")
        assert chat.attributes["langfuse.observation.model.name"] == "small"
        assert chat.json("langfuse.observation.usage_details") == {"input": 12, "output": 5}
        assert chat.json("langfuse.observation.cost_details") == {"total": 0.000022}
        root = named(spans, "invoke_workflow nightly")
        assert root.attributes["langfuse.trace.name"] == "invoke_workflow nightly"
    [target] = {exchange.target for exchange in traced.langfuse.exchanges}
    assert target == "/api/public/otel/v1/traces"
    headers = traced.langfuse.exchanges[0].headers
    assert headers["x-langfuse-ingestion-version"] == "4"
    scheme, pair = headers["authorization"].split(" ")
    public_key = traced.service.services.settings.langfuse_public_key
    assert (scheme, base64.b64decode(pair)) == ("Basic", f"{public_key}:{SECRET}".encode())


async def test_spans_go_below_the_base_url(traced: Traced) -> None:
    await traced.service.stream(diamond(), traceparent=f"00-{'1' * 32}-{CALLER_SPAN}-01")
    await traced.told("1" * 32)
    assert {exchange.target for exchange in traced.otlp.exchanges} == {"/v1/traces"}


async def test_a_trace_goes_on_from_the_caller_and_into_the_tool(traced: Traced) -> None:
    traced.side.behave = GOOD
    headers = {"traceparent": f"00-{CALLER}-{CALLER_SPAN}-01"}
    await traced.service.stream(graph(call("idempotent")), **headers)
    spans = await traced.told(CALLER)
    assert named(spans, "invoke_workflow").parent == CALLER_SPAN
    node = named(spans, "execute_tool far.idempotent")
    assert traced.side.exchanges[-1].headers["traceparent"] == f"00-{CALLER}-{node.span_id}-01"


async def test_what_the_caller_does_not_sample_is_not_sent(traced: Traced) -> None:
    for trace_id, flags in (("2" * 32, "00"), ("3" * 32, "01")):
        headers = {"traceparent": f"00-{trace_id}-{CALLER_SPAN}-{flags}"}
        await traced.service.stream(diamond(), **headers)
    await traced.told("3" * 32)
    assert "2" * 32 not in traced.otlp.traces()


async def test_attempts_and_broken_contracts_are_spans_with_a_code(traced: Traced) -> None:
    traced.side.behave = in_turn(answer(500), answer(200, b'{"title": 7}'), GOOD)
    run = await traced.service.finished(graph(call("idempotent")))
    assert run["status"] == "done"
    spans = await traced.told(await trace_of(traced.service, run["run_id"]))
    attempts = [span for span in spans if span.name == "execute_tool far.idempotent"]
    assert [span.span_id for span in attempts] == [
        span_id(run["run_id"], "A", attempt) for attempt in (1, 2, 3)
    ]
    codes = ["capability_unavailable", "invalid_output", ""]
    assert [span.error for span in attempts] == codes
    assert [span.attributes.get("error.type", "") for span in attempts] == codes
    verify = named(spans, "verify")
    assert (verify.parent, verify.error) == (attempts[1].span_id, "CONTRACT_TYPE")
    assert verify.attributes["flexrun.verify.scope"] == "capability_output"
    assert verify.attributes["flexrun.verify.faults"] == 1


async def test_a_run_that_is_cut_short_leaves_no_span_open(traced: Traced) -> None:
    traced.side.behave = hang
    traced.side.arrived.clear()
    run = await traced.service.submit(graph(call("idempotent")))
    await traced.side.arrived.wait()
    await traced.service.client.post(f"/v1/runs/{run['run_id']}/cancel", json={})
    spans = await traced.told(await trace_of(traced.service, run["run_id"]))
    assert named(spans, "execute_tool far.idempotent").error == "cancelled"
    root = named(spans, "invoke_workflow")
    assert (root.error, root.attributes["flexrun.run.status"]) == ("", "cancelled")


async def test_a_paused_run_is_told_in_parts_and_nothing_twice(traced: Traced) -> None:
    service, sink = traced.service, traced.otlp
    traced.side.behave = in_turn(raw(b""), GOOD)
    node = {**call("at_most_once"), "id": "B", "requires": ["A"]}
    trace_id = "4" * 32
    headers = {"traceparent": f"00-{trace_id}-{CALLER_SPAN}-01"}
    run = await service.submit(graph(echo_node("A"), node), **headers)
    await until(service, run["run_id"], "RUN_PAUSED")
    async with asyncio.timeout(20):
        while trace_id not in sink.traces():
            sink.side.arrived.clear()
            await sink.side.arrived.wait()
    before = sink.traces()[trace_id]
    decision = {"nodes": {"B": {"decision": "retry"}}}
    response = await service.client.post(f"/v1/runs/{run['run_id']}/resume", json=decision)
    assert response.status_code == 202, response.text
    spans = await traced.told(trace_id)
    assert [span.name for span in before] == [
        *("plan", "execute_tool util.echo", "execute_tool far.at_most_once")
    ]
    assert before[2].error == "capability_connection_lost"
    after = spans[len(before) :]
    assert [(span.name, span.error) for span in after] == [
        ("execute_tool far.at_most_once", ""),
        ("invoke_workflow", ""),
    ]
    assert len({span.span_id for span in spans}) == 5


async def test_a_run_that_was_taken_over_is_one_trace_of_the_process_that_ended_it(
    postgres_dsn: str,
) -> None:
    async with AsyncExitStack() as stack:
        dsn = await stack.enter_async_context(fresh_database(postgres_dsn))
        sinks = [await stack.enter_async_context(otlp_sink()) for _ in range(2)]
        side = await stack.enter_async_context(far_side())
        side.behave = in_turn(hang, GOOD)
        settings = make_settings(**otlp(sinks[0]), drain_grace_s=0.0)
        async with running_service(settings, dsn) as first:
            await register(first, far_tool(side, "idempotent"))
            node = {**call("idempotent"), "id": "B", "requires": ["A"]}
            run = await first.submit(graph(echo_node("A"), node))
            await side.arrived.wait()
        own = {"otel_exporter_otlp_traces_endpoint": f"{sinks[1].url}/spans"}
        async with running_service(make_settings(**{**otlp(sinks[0]), **own}), dsn) as second:
            await second.events(run["run_id"])
            await _told(sinks[1], await trace_of(second, run["run_id"]))
        assert sinks[0].exchanges == []
        assert {exchange.target for exchange in sinks[1].exchanges} == {"/spans"}
        spans = sinks[1].spans()
        await audit(dsn)
    assert edges(spans) == {
        ("invoke_workflow", ""),
        ("plan", "invoke_workflow"),
        ("execute_tool util.echo", "invoke_workflow"),
        ("execute_tool far.idempotent", "invoke_workflow"),
    }
    assert named(spans, "invoke_workflow").attributes["flexrun.run.takeovers"] == 1
    # The same attempt was called twice, and both calls were told the same span.
    told = [exchange.headers["traceparent"].split("-")[2] for exchange in side.exchanges]
    assert told == [named(spans, "execute_tool far.idempotent").span_id] * 2


# --- what must never get out ----------------------------------------------------------------------


async def test_no_content_and_no_key_is_in_any_byte_that_is_sent_or_logged(
    traced: Traced, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    refusal = f'{{"detail": "{CANARY}", "title": "{CANARY}", "code": "{CANARY}"}}'.encode()
    wrong = f'{{"title": ["{CANARY}"]}}'.encode()
    traced.side.behave = in_turn(
        answer(200, f'{{"title": "{CANARY}"}}'.encode()), answer(404, refusal), answer(200, wrong)
    )
    traced.models.say(f'{{"verdict": "{CANARY}"}}', f"{CANARY} that is no JSON")
    traceparent = f"00-{'5' * 32}-{CALLER_SPAN}-01"
    node = {**call("at_most_once", text=CANARY), "inputs": {"key": {"value": CANARY}}}
    for envelope in (graph(node), graph(node), graph(node), ask("A"), ask("B")):
        await traced.service.stream({**envelope, "objective": CANARY}, traceparent=traceparent)
    for sink in (traced.otlp, traced.langfuse):
        spans = await _told(sink, "5" * 32, roots=5)
        assert {span.error for span in spans} >= {"capability_refused", "invalid_json"}
        for body in sink.bodies():
            assert CANARY.encode() not in body
            assert KEY.encode() not in body

    def lines() -> list[logging.LogRecord]:
        return [record for record in caplog.records if record.name == "flexrun.events"]

    def are_written() -> bool:
        return sum(found.getMessage().startswith("RUN_") for found in lines()) >= 15

    await eventually(are_written, "three lines about each of the five runs")
    events = lines()
    assert not [found for found in events if CANARY in f"{found.getMessage()}{vars(found)}"]
    assert not [found for found in caplog.records if SECRET in f"{found.getMessage()}{vars(found)}"]
    traced.models.say('{"verdict": "oats"}')


# --- a sink that is not there ---------------------------------------------------------------------

TROUBLES = {"hanging": hang, "gone": hang}


@pytest.mark.parametrize("trouble", TROUBLES)
async def test_sinks_in_trouble_cost_no_run(
    postgres_dsn: str, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    async with fresh_database(postgres_dsn) as dsn, otlp_sink() as sink, asyncio.timeout(40):
        sink.side.behave = TROUBLES[trouble]
        settings = {**otlp(sink), **langfuse(sink)}
        if trouble == "gone":
            nowhere = "http://127.0.0.1:9"
            settings |= {"otel_exporter_otlp_endpoint": nowhere, "langfuse_base_url": nowhere}
        async with running_service(make_settings(**settings), dsn) as service:
            runs = await asyncio.gather(*(service.finished(diamond()) for _ in range(20)))
            if trouble != "gone":
                await sink.side.arrived.wait()
            runs.append(await service.finished(diamond()))
        assert [run["status"] for run in runs] == ["done"] * 21
        assert await audit(dsn) == 21
    assert service.services.metrics.traced_runs["failed"] > 0
