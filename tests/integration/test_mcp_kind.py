"""The kind `mcp` against real servers: the same over both transports and in both eras."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from app.adapters.capabilities.mcp_import import registrations
from app.adapters.capabilities.mcp_protocol import pin_of
from app.domain.capability import Effect
from app.version import VERSION
from tests.capability_samples import TRACEPARENT, call_of, compiled
from tests.mcp_server import TOOLS
from tests.mcp_sides import VALUE_MAX, Side, over_pipes, over_sockets

SIDES = {
    "pipes-modern": lambda: over_pipes("modern"),
    "pipes-legacy": lambda: over_pipes("legacy"),
    "http-modern": lambda: over_sockets("modern", streamed=False),
    "http-legacy": lambda: over_sockets("legacy", streamed=False),
    "events-modern": lambda: over_sockets("modern", streamed=True),
    "events-legacy": lambda: over_sockets("legacy", streamed=True),
}


@pytest.fixture(params=SIDES)
async def side(request: pytest.FixtureRequest) -> AsyncIterator[Side]:
    async with SIDES[request.param]() as running:
        yield running


PIPES = pytest.mark.parametrize("side", ["pipes-modern", "pipes-legacy"], indirect=True)


async def test_results(side: Side) -> None:
    assert await side.call("add", {"a": 2, "b": 40}) == {"sum": 42}
    assert await side.call("say", {"text": "é"}) == {"text": '{"text": "\\u00e9"}'}
    assert await side.call("pair") == {"result": [1, 2]}


async def test_what_a_server_hears(side: Side) -> None:
    await side.call("add", {"a": 1, "b": 2})
    await side.call("add", {"a": 3, "b": 4})
    heard = await side.heard()
    is_modern = "initialize" not in [message["method"] for message in heard]
    assert [message["method"] for message in heard if "listen" not in message["method"]] == [
        *(["server/discover"] if is_modern or "server" in side.at else []),
        *([] if is_modern else ["initialize", "notifications/initialized"]),
        "tools/list",
        "tools/call",
        "tools/call",
    ]
    called = heard[-1]["params"]
    assert (called["name"], called["arguments"]) == ("add", {"a": 3, "b": 4})
    assert called["_meta"] == {
        "dev.flexrun/idempotency-key": "run-1:A:1",
        "traceparent": TRACEPARENT,
        **(MODERN_META if is_modern else {}),
    }


MODERN_META = {
    "io.modelcontextprotocol/protocolVersion": "2026-07-28",
    "io.modelcontextprotocol/clientInfo": {"name": "flexrun", "version": VERSION},
    "io.modelcontextprotocol/clientCapabilities": {},
}


async def test_a_tool_that_failed(side: Side) -> None:
    for effect in Effect:
        failed = await side.failure("fail", {"why": "no\x1b[31m such\nfile"}, effect=effect)
        assert (failed.code, failed.message) == ("mcp_tool_failed", "no [31m such file")
        assert failed.retryable == (effect is not Effect.AT_MOST_ONCE)
        assert not failed.unknown_outcome
        assert failed.target_failed is False


async def test_protocol_errors(side: Side) -> None:
    for code, shown, retryable, unknown in [
        (-32602, "capability_refused", False, False),
        (-32601, "capability_refused", False, False),
        (-32603, "capability_unavailable", True, True),
        (-32000, "capability_unavailable", True, True),
        (-32042, "mcp_input_required", False, False),
    ]:
        failed = await side.failure("refuse", {"code": code})
        found = (failed.code, failed.retryable, failed.unknown_outcome)
        assert found == (shown, retryable, unknown), code


@pytest.mark.parametrize("side", ["pipes-modern", "pipes-legacy", "events-legacy"], indirect=True)
async def test_a_tool_that_changed_is_not_called(side: Side) -> None:
    assert await side.call("add", {"a": 1, "b": 2}) == {"sum": 3}
    await side.call("change")
    failed = await side.failure("add", {"a": 1, "b": 2})
    assert (failed.code, failed.retryable, failed.unknown_outcome) == (
        "mcp_tool_changed",
        False,
        False,
    )
    assert failed.target_failed is False
    calls = [
        message["params"]["name"]
        for message in await side.heard()
        if message["method"] == "tools/call"
    ]
    assert calls == ["add", "change"]


async def test_another_pin_is_not_called(side: Side) -> None:
    for pin in ("0" * 64, pin_of(TOOLS["say"])):
        assert (await side.failure("add", {"a": 1, "b": 2}, pin=pin)).code == "mcp_tool_changed"
    assert "tools/call" not in await side.methods()


async def test_a_tool_that_is_not_there_is_not_called(side: Side) -> None:
    for tool in ("twisted", "none"):
        failed = await side.failure(tool, pin="0" * 64)
        assert failed.code == "mcp_tool_changed"
        assert "not offered" in failed.message


async def test_a_question_back(side: Side) -> None:
    failed = await side.failure("ask")
    assert (failed.code, failed.retryable) == ("mcp_input_required", False)


async def test_a_result_that_is_none(side: Side) -> None:
    for result in (
        {},
        {"content": [{"type": "text", "text": '{"sum": 1}'}]},
        {"structuredContent": [1]},
        {"structuredContent": {"sum": 1}, "resultType": "later"},
    ):
        for effect in Effect:
            failed = await side.failure("odd", {"result": result}, effect=effect)
            assert failed.code == "capability_garbage"
            assert not failed.unknown_outcome
            assert failed.retryable == (effect is not Effect.AT_MOST_ONCE)


async def test_a_large_result(side: Side) -> None:
    assert len((await side.call("big", {"letters": 4 * VALUE_MAX - 1_000}))["text"]) > VALUE_MAX
    failed = await side.failure("big", {"letters": 4 * VALUE_MAX})
    assert (failed.code, failed.unknown_outcome) == ("capability_garbage", False)
    # The server goes on.
    assert await side.call("add", {"a": 1, "b": 1}) == {"sum": 2}
    assert (await side.methods()).count("tools/list") == 2 + 1


@PIPES
async def test_no_answer_before_the_deadline(side: Side) -> None:
    await side.call("add", {"a": 1, "b": 1})
    failed = await side.failure("hang", deadline_ms=2_000)  # it is looked up first
    assert (failed.code, failed.unknown_outcome) == ("capability_timeout", True)
    assert (await side.methods())[-1] == "notifications/cancelled"


async def test_no_time_left(side: Side) -> None:
    await side.call("add", {"a": 1, "b": 1})
    failed = await side.failure("add", {"a": 1, "b": 1}, deadline_ms=0)
    assert (failed.code, failed.unknown_outcome) == ("capability_timeout", False)
    assert (await side.methods()).count("tools/call") == 1


async def test_an_import_makes_registrations_that_run(side: Side) -> None:
    tools = await side.adapter.tools(side.at, timeout_s=20)
    assert [tool.name for tool in tools] == [name for name in TOOLS if name != "twisted"]
    made = registrations(tools, side.at, effect=Effect.PURE, prefix="Local Host")
    (add,) = [found for found in made if found.config["tool"] == "add"]
    assert (add.capability_id, add.summary) == ("local_host.add", "Adds two numbers.")
    assert add.config == {**side.at, "tool": "add", "description_sha256": pin_of(TOOLS["add"])}
    assert add.version == pin_of(TOOLS["add"])[:12]
    outputs = {}
    for found in made:
        capability = compiled(found)
        assert side.adapter.check(capability) == []
        inputs = {"add": {"a": 1, "b": 2}, "pair": {}, "say": {}}.get(found.config["tool"])
        if inputs is not None:
            output = await side.adapter.invoke(call_of(capability, inputs))
            assert capability.output.is_valid(output)
            outputs[found.config["tool"]] = output
    assert outputs == {"add": {"sum": 3}, "pair": {"result": [1, 2]}, "say": {"text": "{}"}}
