"""MCP from the command line to a run: import tools, register them, call them from plans."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.cli import Cli, Serving
from tests.envelopes import graph
from tests.far_side import FarSide, far_side
from tests.mcp_server import TOOLS, McpServer, over_http
from tests.mcp_sides import CANARY, SCRIPT
from tests.servers import eventually


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Commands in a folder with the operator's files."""
    servers = {"local": {"command": [sys.executable, "-I", SCRIPT]}}
    (tmp_path / "mcp.json").write_text(json.dumps({"servers": servers}))
    return Cli(tmp_path, FLEXRUN_MCP_FILE=str(tmp_path / "mcp.json"))


@pytest.fixture
async def far() -> AsyncIterator[FarSide]:
    async with far_side() as running:
        running.behave = over_http(McpServer())
        yield running


def plan(capability: str, inputs: dict[str, Any]) -> str:
    bound = {name: {"value": value} for name, value in inputs.items()}
    return json.dumps(graph({"id": "call", "capability": capability, "inputs": bound}))


def test_tools_are_imported_registered_and_called(cli: Cli, dsn: str) -> None:
    cli.env["DATABASE_URL"] = dsn
    imported = cli.ok("capabilities", "import-mcp", "local", "--tool", "add", "--tool", "die")
    assert [each["capability_id"] for each in json.loads(imported)] == ["local.add", "local.die"]
    assert {each["effect"] for each in json.loads(imported)} == {"at_most_once"}
    with Serving(cli, "--port", "0") as serving:
        cli.env["FLEXRUN_URL"] = serving.url
        assert cli.ok("capabilities", "register", "-", stdin=imported).count("(active)") == 2
        run = json.loads(cli.ok("run", "-", "--json", stdin=plan("local.add", {"a": 2, "b": 40})))
        assert run["output"] == {"sum": 42}
        (child,) = psutil.Process(serving.process.pid).children()
        # The server dies with the call in its hands: nobody knows, so nobody tries again.
        died = cli("run", "-", "--json", stdin=plan("local.die", {}))
        assert json.loads(died.stdout)["status"] == "awaiting_human"
        # The run knows of its end from the closed pipe, a moment before anybody has reaped it.
        eventually(lambda: not child.is_running(), "the server is gone")
        again = json.loads(cli.ok("run", "-", "--json", stdin=plan("local.add", {"a": 1, "b": 1})))
        assert again["output"] == {"sum": 2}
        (child,) = psutil.Process(serving.process.pid).children()
    assert not child.is_running()
    assert "Traceback" not in serving.log.read_text()


async def test_import_over_http_with_a_secret(cli: Cli, far: FarSide) -> None:
    secrets = {"token": {"value": CANARY, "hosts": [f"127.0.0.1:{far.port}"]}}
    path = cli.folder / "secrets.json"
    path.write_text(json.dumps(secrets))
    cli.env["FLEXRUN_SECRETS_FILE"] = str(path)
    options = ["--secret-header", "Authorization=token", "--header", "X-Team=blue"]
    done = await asyncio.to_thread(
        cli, "capabilities", "import-mcp", far.url, *options, "--effect", "pure", "--prefix", "t"
    )
    found = {each["capability_id"]: each for each in json.loads(done.stdout)}
    assert set(found) == {f"t.{name}" for name in TOOLS if name != "twisted"}
    assert found["t.add"]["effect"] == "pure"
    assert found["t.add"]["config"]["secret_headers"] == {"Authorization": "token"}
    assert found["t.add"]["input_contract"]["schema"] == TOOLS["add"]["inputSchema"]
    assert far.exchanges[0].headers["authorization"] == CANARY
    assert "c4n4ry" not in done.stdout + done.stderr


async def test_what_can_not_be_imported(cli: Cli) -> None:
    cases: list[tuple[list[str], int, str]] = [
        (["nobody"], 1, "no MCP server of this name"),
        (["local", "--tool", "none"], 1, "offers no tool none"),
        (["local", "--header", "A=b"], 2, "Headers are for servers with a URL"),
        (["http://127.0.0.1:1234/mcp"], 3, "capability_unreachable"),
        (["broken"], 2, "the command of server 'broken' has to be a list"),
    ]
    (cli.folder / "broken.json").write_text('{"servers": {"broken": {"command": "sh"}}}')
    broken = {"FLEXRUN_MCP_FILE": str(cli.folder / "broken.json")}
    found = await asyncio.gather(
        *(
            asyncio.to_thread(
                cli, "capabilities", "import-mcp", *args, **(broken if "broken" in args else {})
            )
            for args, _, _ in cases
        )
    )
    for (_, code, said), done in zip(cases, found, strict=True):
        assert (done.returncode, done.stdout) == (code, "")
        assert said in done.stderr
        assert "Traceback" not in done.stderr
