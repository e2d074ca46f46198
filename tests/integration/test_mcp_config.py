"""Registrations of the kind `mcp`: what they may say, and secrets that stay secret."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from app.adapters.capabilities.egress import EgressPolicy
from app.adapters.capabilities.egress_transport import EgressTransport
from app.adapters.capabilities.mcp import McpAdapter
from app.adapters.capabilities.mcp_process import commands_of
from app.ports import CallFailed
from tests.capability_samples import call_of, mcp_capability
from tests.far_side import FarSide, answer, far_side
from tests.mcp_server import McpServer, over_http
from tests.mcp_sides import CANARY, Side, but, far_adapter, rpc, tool_call


@pytest.fixture
async def far() -> AsyncIterator[FarSide]:
    async with far_side() as running:
        yield running


@pytest.fixture
async def side(far: FarSide) -> AsyncIterator[Side]:
    async with far_adapter(far) as running:
        yield running


async def test_a_secret_is_sent_and_never_seen_again(
    side: Side, far: FarSide, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    side.at["secret_headers"] = {"Authorization": "token"}
    bare = CANARY.removeprefix("Bearer ")
    assert await side.call("say", {"text": CANARY}) == {"text": '{"text": "[secret]"}'}
    assert {found.headers["authorization"] for found in far.exchanges} == {CANARY}
    seen = [await side.failure("fail", {"why": f"bad {bare}"})]
    seen.append(await side.failure("refuse", {"code": -32602, "message": f"bad {CANARY}"}))
    assert [failed.message for failed in seen] == ["bad [secret]"] * 2
    for status in (400, 401, 500):
        for body in (
            json.dumps({"detail": f"bad {bare}"}).encode(),
            rpc(None, error={"code": -32603, "message": f"bad {bare}"}),
            bare.encode(),
        ):
            far.behave = but(McpServer(), "tools/call", answer(status, body))
            seen.append(await side.failure("say"))
    told = "".join(repr(failed) + str(vars(failed)) for failed in seen) + caplog.text
    told += (
        repr(side.adapter) + str(vars(side.adapter)) + str(list(side.adapter._sessions.values()))
    )
    assert "c4n4ry" not in told


async def test_sessions_of_other_credentials_are_not_shared(side: Side, far: FarSide) -> None:
    for team in ("blue", "red", "blue"):
        side.at["headers"] = {"X-Team": team}
        await side.call("add", {"a": 1, "b": 1})
    assert [found.json["method"] for found in far.exchanges].count("server/discover") == 2


async def test_private_addresses_are_refused(far: FarSide) -> None:
    async def to_us(_host: str, _port: int) -> list[str]:
        return ["127.0.0.1"]

    far.behave = over_http(McpServer())
    transport = EgressTransport(EgressPolicy(resolver=to_us))
    adapter = McpAdapter(transport)
    for url in (far.url, f"http://tools.example.com:{far.port}/mcp"):
        with pytest.raises(CallFailed) as caught:
            await adapter.invoke(tool_call({"url": url}, "add"))
        assert caught.value.code == "egress_refused"
        assert not caught.value.retryable
        assert caught.value.target_failed is None
    assert far.connections == 0
    await transport.aclose()


GOOD = {"url": "https://example.org/mcp", "tool": "add", "description_sha256": "0" * 64}


@pytest.mark.parametrize(
    ("config", "pointers"),
    [
        (GOOD, []),
        (GOOD | {"headers": {"X-A": "b"}, "secret_headers": {}}, []),
        ({}, ["/url", "/tool", "/description_sha256"]),
        (GOOD | {"tool": ""}, ["/tool"]),
        (GOOD | {"tool": 5}, ["/tool"]),
        (GOOD | {"description_sha256": "A" * 64}, ["/description_sha256"]),
        (GOOD | {"command": ["sh"]}, ["/command"]),
        (GOOD | {"url": "http://10.0.0.1/"}, ["/url"]),
        (GOOD | {"headers": {"Mcp-Session-Id": "x"}}, ["/headers/Mcp-Session-Id"]),
        (GOOD | {"headers": {"mcp-param-a": "x"}}, ["/headers/mcp-param-a"]),
        (GOOD | {"headers": {"Last-Event-ID": "x"}}, ["/headers/Last-Event-ID"]),
        (GOOD | {"secret_headers": {"A": "none"}}, ["/secret_headers/A"]),
        (GOOD | {"server": "local"}, ["/url", "/server"]),
        ({"server": 5, "tool": "a", "description_sha256": "0" * 64}, ["/server"]),
        (
            {"server": "a", "tool": "a", "description_sha256": "0" * 64, "env": {}},
            ["/env", "/server"],
        ),
    ],
)
async def test_configs(side: Side, config: dict[str, Any], pointers: list[str]) -> None:
    faults = side.adapter.check(mcp_capability(config))
    assert [fault.pointer for fault in faults] == ["/config" + pointer for pointer in pointers]
    if pointers:
        with pytest.raises(CallFailed) as caught:
            await side.adapter.invoke(call_of(mcp_capability(config), {}))
        assert caught.value.target_failed is None


def test_scopes_of_breakers() -> None:
    adapter = McpAdapter(EgressTransport(EgressPolicy()))
    scopes: list[tuple[dict[str, Any], str]] = [
        (GOOD, "far.tool::example.org"),
        (GOOD | {"headers": {"A": "b"}}, "far.tool::example.org::t1"),
        ({"server": "local"}, "far.tool::stdio:local"),
    ]
    for config, scope in scopes:
        assert adapter.breaker_scope(mcp_capability(config), "t1") == scope


def test_the_file_of_servers(tmp_path: Path) -> None:
    files = {"command": ["npx", "x"], "env": {"TOKEN": "t0k3n"}}
    path = tmp_path / "mcp.json"
    path.write_text(json.dumps({"servers": {"files": files, "b": {"command": ["b"]}}}))
    found = commands_of(path)
    assert found["files"].arguments == ("npx", "x")
    assert dict(found["files"].env) == {"TOKEN": "t0k3n"}
    assert dict(found["b"].env) == {}
    assert "t0k3n" not in repr(found)


@pytest.mark.parametrize(
    "found",
    [
        None,
        "t0k3n",
        [],
        {},
        {"servers": []},
        {"servers": {}, "more": 1},
        {"servers": {"A": {"command": ["a"]}}},
        {"servers": {"a": ["a"]}},
        {"servers": {"a": {"command": "a"}}},
        {"servers": {"a": {"command": []}}},
        {"servers": {"a": {"command": ["a\0"]}}},
        {"servers": {"a": {"command": ["a"], "cwd": "/"}}},
        {"servers": {"a": {"command": ["a"], "env": {"A": "t0k3n", "B": 1}}}},
    ],
)
def test_a_file_that_is_none(tmp_path: Path, found: object) -> None:
    path = tmp_path / "mcp.json"
    if found is not None:
        path.write_text(found if isinstance(found, str) else json.dumps(found))
    with pytest.raises(ValueError, match=r"server|has to be|can not be read") as caught:
        commands_of(path)
    assert "t0k3n" not in str(caught.value)
