"""MCP over streamable HTTP: what goes over the wire, and a far side that misbehaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from app.domain.capability import Effect
from tests.far_side import Behaviour, Exchange, FarSide, answer, far_side, raw
from tests.mcp_server import TOOLS, McpServer, over_http
from tests.mcp_sides import VALUE_MAX, Side, but, far_adapter, rpc


@pytest.fixture
async def far() -> AsyncIterator[FarSide]:
    async with far_side() as running:
        yield running


@pytest.fixture
async def side(far: FarSide) -> AsyncIterator[Side]:
    async with far_adapter(far) as running:
        yield running


def hang(far: FarSide) -> Behaviour:
    async def behave(_writer: asyncio.StreamWriter, exchange: Exchange) -> None:
        assert not await exchange.reader.read(1)  # until the client goes
        raise ConnectionError

    return behave


# --- the wire -------------------------------------------------------------------------------------


async def test_the_requests_of_a_modern_server(side: Side, far: FarSide) -> None:
    side.at["headers"] = {"X-Team": "blue"}
    inputs = {"region": " pad\u00e9", "deep": {"level": 7, "on": True}}
    await side.call("region", inputs, effect=Effect.AT_MOST_ONCE)
    discover, *lists, call = far.exchanges
    assert [found.json["method"] for found in lists] == ["tools/list"] * 5
    assert [found.json["params"].get("cursor") for found in lists] == [None, "4", "8", "12", "16"]
    assert discover.headers["mcp-method"] == "server/discover"
    assert call.headers == {
        "host": f"127.0.0.1:{far.port}",
        "x-team": "blue",
        "accept": "application/json, text/event-stream",
        "accept-encoding": "identity",
        "content-type": "application/json",
        "content-length": str(len(call.body)),
        "mcp-protocol-version": "2026-07-28",
        "mcp-method": "tools/call",
        "mcp-name": "region",
        "mcp-param-region": "=?base64?IHBhZMOp?=",
        "mcp-param-level": "7",
        "mcp-param-on": "true",
    }
    # A call that must not happen twice does not ride on a connection that may be dying.
    assert [found.connection for found in far.exchanges] == [1, 2, 3, 4, 5, 6, 7]
    await side.call("region", effect=Effect.PURE)
    assert far.exchanges[-1].connection == 1


async def test_the_session_of_an_older_server(side: Side, far: FarSide) -> None:
    server = McpServer("legacy", ttl_ms=None)
    far.behave = over_http(server)
    for _ in range(2):
        assert await side.call("add", {"a": 1, "b": 2}) == {"sum": 3}
    await side.adapter.aclose()
    sent = [
        (found.method, found.json.get("method") if found.body else "", found.headers)
        for found in far.exchanges
    ]
    assert [(verb, method) for verb, method, _ in sent] == [
        ("POST", "server/discover"),
        ("POST", "initialize"),
        ("POST", "notifications/initialized"),
        ("POST", "tools/list"),
        ("POST", "tools/call"),
        ("POST", "tools/call"),
        ("DELETE", ""),
    ]
    versions = [headers.get("mcp-protocol-version") for _, _, headers in sent]
    assert versions == ["2026-07-28", None, *["2025-11-25"] * 4, None]
    sessions = [headers.get("mcp-session-id") for _, _, headers in sent]
    assert sessions == [None, None, *["session-1"] * 5]
    assert not any("mcp-method" in headers for _, _, headers in sent[1:])


async def test_a_lost_session_is_opened_again_and_the_call_made_once(
    side: Side, far: FarSide
) -> None:
    far.behave = over_http(McpServer("legacy", ttl_ms=None))
    await side.call("add", {"a": 1, "b": 1})
    restarted = McpServer("legacy", ttl_ms=None)
    far.behave = over_http(restarted)
    results = await asyncio.gather(
        *(side.call("add", {"a": n, "b": 1}, effect=Effect.AT_MOST_ONCE) for n in range(10))
    )
    assert results == [{"sum": n + 1} for n in range(10)]
    assert restarted.methods().count("tools/call") == 10
    assert restarted.methods().count("initialize") == 1


async def test_a_session_that_is_lost_again_and_again(side: Side, far: FarSide) -> None:
    server = McpServer("legacy")
    far.behave = but(server, "tools/call", answer(404, b""))
    failed = await side.failure("add", effect=Effect.AT_MOST_ONCE)
    assert (failed.code, failed.retryable, failed.unknown_outcome) == (
        "capability_refused",
        False,
        False,
    )
    assert server.methods().count("initialize") == 2


async def test_a_listing_is_believed_as_long_as_the_server_says(side: Side, far: FarSide) -> None:
    server = McpServer(ttl_ms=0)
    far.behave = over_http(server)
    for _ in range(3):
        await side.call("add", {"a": 1, "b": 1})
    assert server.methods().count("tools/list") == 3
    server.tools["add"]["inputSchema"] = {"type": "object"}
    assert (await side.failure("add")).code == "mcp_tool_changed"
    del server.tools["add"]
    assert "not offered" in (await side.failure("add")).message
    server.tools["add"] = dict(TOOLS["add"])
    assert await side.call("add", {"a": 1, "b": 1}) == {"sum": 2}
    assert server.methods().count("tools/call") == 4


async def test_calls_at_once_share_a_look(side: Side, far: FarSide) -> None:
    server = McpServer(ttl_ms=0)
    far.behave = over_http(server)
    await asyncio.gather(*(side.call("add", {"a": n, "b": 1}) for n in range(20)))
    assert server.methods().count("tools/call") == 20
    # The first look began before the others came, so they had to take the next one.
    assert server.methods().count("tools/list") <= 2


async def test_a_server_of_another_revision_now(side: Side, far: FarSide) -> None:
    await side.call("add", {"a": 1, "b": 1})
    far.behave = over_http(McpServer("legacy"))
    assert (await side.failure("add", {"a": 1, "b": 1})).code == "capability_refused"
    assert await side.call("add", {"a": 1, "b": 1}) == {"sum": 2}


# --- revisions ------------------------------------------------------------------------------------


UNSUPPORTED = {"code": -32022, "message": "Unsupported protocol version"}


@pytest.mark.parametrize(
    ("method", "behave", "code"),
    [
        (
            "server/discover",
            answer(400, rpc(1, error={**UNSUPPORTED, "data": {"supported": ["2027-01-01"]}})),
            "mcp_version_unsupported",
        ),
        (
            "server/discover",
            answer(200, rpc(1, result={"supportedVersions": ["2027-01-01"]})),
            "mcp_version_unsupported",
        ),
        (
            "server/discover",
            answer(400, rpc(None, error={"code": -32020, "message": "Header mismatch"})),
            "capability_refused",
        ),
        ("initialize", answer(200, rpc(2, result={})), "mcp_version_unsupported"),
        (
            "initialize",
            answer(200, rpc(2, result={"protocolVersion": "2023-01-01"})),
            "mcp_version_unsupported",
        ),
        (
            "initialize",
            answer(200, rpc(2, result={"protocolVersion": "2025-06-18"}), Mcp_Session_Id="a b"),
            "capability_garbage",
        ),
        ("notifications/initialized", answer(500), "capability_unavailable"),
    ],
)
async def test_no_revision_in_common(
    side: Side, far: FarSide, method: str, behave: Behaviour, code: str
) -> None:
    far.behave = but(McpServer("legacy"), method, behave)
    failed = await side.failure("add", effect=Effect.AT_MOST_ONCE)
    assert (failed.code, failed.unknown_outcome) == (code, False)


@pytest.mark.parametrize(
    "behave",
    [
        answer(400, rpc(1, error={**UNSUPPORTED, "data": {"supported": ["2025-06-18"]}})),
        answer(200, rpc(1, error={"code": -32601, "message": "Method not found"})),
        answer(404, b"<h1>nothing here</h1>", "text/html"),
        answer(405, b""),
        answer(200, rpc(1, result={})),
    ],
)
async def test_signs_of_an_older_server(side: Side, far: FarSide, behave: Behaviour) -> None:
    server = McpServer("legacy")
    far.behave = but(server, "server/discover", behave)
    assert await side.call("add", {"a": 1, "b": 1}) == {"sum": 2}
    assert server.methods()[0] == "initialize"


# --- what goes wrong ------------------------------------------------------------------------------

STATUSES = [
    (400, "capability_refused", False, False),
    (401, "capability_refused", False, False),
    (403, "capability_refused", False, False),
    (404, "capability_refused", False, False),
    (302, "capability_refused", False, False),
    (429, "capability_overloaded", True, False),
    (408, "capability_unavailable", True, True),
    (500, "capability_unavailable", True, True),
    (503, "capability_unavailable", True, True),
]


@pytest.mark.parametrize(("status", "code", "retryable", "unknown"), STATUSES)
async def test_statuses(
    side: Side, far: FarSide, status: int, code: str, retryable: bool, unknown: bool
) -> None:
    body = b'{"detail": "why\\nso"}'
    refusal = answer(status, body, Location="http://x/")
    far.behave = but(McpServer(ttl_ms=0), "tools/call", refusal)
    for effect in Effect:
        failed = await side.failure("add", effect=effect)
        assert (failed.code, failed.retryable, failed.unknown_outcome) == (code, retryable, unknown)
        assert str(status) in failed.message
    # Before the call the same statuses leave no doubt.
    far.behave = but(McpServer(), "tools/list", refusal)
    failed = await side.failure("add", effect=Effect.AT_MOST_ONCE)
    assert (failed.code, failed.retryable, failed.unknown_outcome) == (code, retryable, False)


async def test_an_error_in_the_body_of_a_status(side: Side, far: FarSide) -> None:
    body = rpc(1, error={"code": -32603, "message": "boom\n\x1b[2J"})
    far.behave = but(McpServer(), "tools/call", answer(400, body))
    failed = await side.failure("add")
    assert (failed.code, failed.message, failed.unknown_outcome) == (
        "capability_unavailable",
        "boom [2J",
        True,
    )
    far.behave = but(McpServer(), "tools/call", answer(401, body))
    failed = await side.failure("add")
    assert (failed.code, failed.message) == ("capability_refused", "answered 401: boom [2J")


GARBAGE = [
    answer(200, b"not json"),
    answer(200, b""),
    answer(202, b"", None),
    answer(200, b"[]"),
    answer(200, b'{"jsonrpc": "2.0", "id": 99, "result": {}}'),
    answer(200, b'{"jsonrpc": "2.0", "id": null, "result": NaN}'),
    answer(200, b"<html>", "text/html"),
    answer(200, b"x" * (4 * VALUE_MAX + 1)),
    answer(200, b"{}", Content_Encoding="br"),
    answer(200, b"data: {\n\n", "text/event-stream"),
    answer(200, b"data: {}\n\n", "text/event-stream", Content_Encoding="gzip"),
    answer(200, b"data: " + b"x" * (4 * VALUE_MAX + 10), "text/event-stream"),
    answer(200, b"data: x\n" * VALUE_MAX * 5, "text/event-stream"),
]


@pytest.mark.parametrize("behave", GARBAGE)
async def test_garbage_is_definite(side: Side, far: FarSide, behave: Behaviour) -> None:
    far.behave = but(McpServer(), "tools/call", behave)
    for effect in Effect:
        failed = await side.failure("add", effect=effect)
        assert (failed.code, failed.unknown_outcome) == ("capability_garbage", False)
        assert failed.retryable == (effect is not Effect.AT_MOST_ONCE)


@pytest.mark.parametrize("method", ["server/discover", "tools/list"])
@pytest.mark.parametrize("behave", GARBAGE[:8])
async def test_garbage_before_the_call(
    side: Side, far: FarSide, method: str, behave: Behaviour
) -> None:
    far.behave = but(McpServer(), method, behave)
    failed = await side.failure("add", effect=Effect.AT_MOST_ONCE)
    assert (failed.code, failed.retryable) == ("capability_garbage", True)


PAGES = [{"tools": 5}, {"tools": [], "nextCursor": 5}, {"tools": [], "nextCursor": "again"}]


@pytest.mark.parametrize("page", PAGES)
async def test_a_listing_that_is_none(side: Side, far: FarSide, page: dict[str, Any]) -> None:
    async def behave(writer: asyncio.StreamWriter, exchange: Exchange) -> None:
        await answer(200, rpc(exchange.json["id"], result=page))(writer, exchange)

    far.behave = but(McpServer(), "tools/list", behave)
    failed = await side.failure("add")
    assert failed.code == "capability_garbage"
    assert len(far.exchanges) <= 1 + 100


@pytest.mark.parametrize(
    "behave",
    [
        raw(b"", reset=True),
        raw(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"),
        raw(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: {"),
        answer(200, b": still working\n\n", "text/event-stream"),
        answer(200, b"id: 1\nretry: 1\ndata:\n\n", "text/event-stream"),
    ],
)
async def test_a_cut_answer_leaves_the_outcome_unknown(
    side: Side, far: FarSide, behave: Behaviour
) -> None:
    far.behave = but(McpServer(), "tools/call", behave)
    failed = await side.failure("add")
    assert (failed.code, failed.unknown_outcome) == ("capability_connection_lost", True)


@pytest.mark.parametrize(
    ("method", "unknown"), [("server/discover", False), ("tools/list", False), ("tools/call", True)]
)
async def test_no_answer_before_the_deadline(
    side: Side, far: FarSide, method: str, unknown: bool
) -> None:
    if method == "tools/call":
        await side.call("add", {"a": 1, "b": 1})  # or the time might be over while it is looked up
    far.behave = but(McpServer(), method, hang(far))
    failed = await side.failure("add", deadline_ms=2_000)
    assert (failed.code, failed.unknown_outcome) == ("capability_timeout", unknown)
    await far.gone.wait()


async def test_cancelling_closes_the_exchange(side: Side, far: FarSide) -> None:
    await side.call("add", {"a": 1, "b": 1})
    far.behave = hang(far)
    far.arrived.clear()
    call = asyncio.create_task(side.call("add", {"a": 1, "b": 1}))
    await far.arrived.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await far.gone.wait()


async def test_nobody_there(side: Side) -> None:
    async with far_side() as other:
        side.at["url"] = other.url
    failed = await side.failure("add")
    assert (failed.code, failed.unknown_outcome) == ("capability_unreachable", False)
