"""The commands of README.md and OPERATIONS.md, run as they stand, against a service.

Every bash block has a comment in front of it that says how it is tested:

    <!-- test: run; expect: TEXT; refuse: TEXT -->

    run      run by bash; what it prints must hold every `expect` and no `refuse`
    service  starts the service: the fixture has started one
    tool     starts the tool server, which stays up for the blocks that follow
    models   starts the service with models at hand: that of the fixture has them
    make     targets of the Makefile, which are run elsewhere
    parse    read by bash and not run (`tests/unit/test_docs.py` checks the arguments)

Only the addresses differ: both servers listen on free ports. `$RUN` lives on from block to block,
as in a terminal.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import orjson
import pytest

from tests.model_server import running_model_server
from tests.process import service_process
from tests.servers import free_port

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"(?:<!-- test: (.*?) -->\n)?```bash\n(.*?)```", re.DOTALL)
BLOCK_S = 90.0
KINDS = {"run", "service", "tool", "models", "make", "parse"}
HEADLINE = '{"headline": "Orders are in the warehouse within 5 seconds"}'
DRAFT = {
    "stages": [
        {"stage": name, "capability": capability}
        for name, capability in (
            ("outline", "document.outline"),
            ("points", "document.key_points"),
            ("facts", "document.facts"),
            ("compose", "brief.compose"),
            ("check", "brief.check"),
        )
    ]
}

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("bash", "curl", "sed"))), reason="the README needs bash, curl, sed"
)
CHOICES = (
    '{"node": "outline", "capability": "document.outline"}',
    '{"node": "headline", "capability": "release.headline"}',
)


@dataclass(frozen=True)
class Block:
    """One block of commands and what is said of it."""

    kind: str
    body: str
    expected: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def blocks_of(page: str) -> list[Block]:
    """The bash blocks of a page, in order."""
    found = []
    for comment, body in BLOCK.findall((ROOT / page).read_text(encoding="utf-8")):
        kind, *rest = [part.strip() for part in comment.split(";")]
        said = [part.partition(": ")[::2] for part in rest]
        found.append(
            Block(
                kind,
                body,
                [text for name, text in said if name == "expect"],
                [text for name, text in said if name == "refuse"],
            )
        )
    return found


@dataclass
class Terminal:
    """A folder like the repository, with `flexrun` on the PATH and servers on free ports."""

    folder: Path
    url: str
    dsn: str
    tool_port: int

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "NO_PROXY": "127.0.0.1",
            "FLEXRUN_URL": self.url,
            "DATABASE_URL": self.dsn,
            "FLEXRUN_ALLOW_UNSAFE_POSTGRES": "true",
            "FLEXRUN_MODELS_FILE": str(ROOT / "models.yaml"),
        }

    def prepare(self) -> None:
        """Put in place what the blocks use."""
        shutil.copytree(ROOT / "examples", self.folder / "examples")
        shutil.copy(ROOT / "CONTRIBUTING.md", self.folder)
        example = self.folder / "examples" / "http_capability.json"
        text = example.read_text()
        assert ":9009/" in text
        example.write_text(text.replace(":9009/", f":{self.tool_port}/"))
        (self.folder / "bin").mkdir()
        script = f'#!/bin/sh\nexec "{sys.executable}" -m app.cli.main "$@"\n'
        (self.folder / "bin" / "flexrun").write_text(script)
        (self.folder / "bin" / "flexrun").chmod(0o755)
        (self.folder / "bin" / "python3").symlink_to(sys.executable)

    async def run(self, body: str) -> str:
        """What a block prints; fails when any of its commands does."""
        script = (
            f"test ! -e .run || . ./.run\n{body.replace('http://127.0.0.1:8000', self.url)}\n"
            "declare -p RUN > .run 2>&- || rm .run\n"
        )
        process = await self._bash("-euo", "pipefail", "-c", script)
        async with asyncio.timeout(BLOCK_S):
            printed, _ = await process.communicate()
        assert process.returncode == 0, f"{body}\n{printed.decode()}"
        return printed.decode()

    async def parse(self, body: str) -> None:
        process = await self._bash("-n", "-c", body)
        async with asyncio.timeout(BLOCK_S):
            assert await process.wait() == 0, body

    @asynccontextmanager
    async def tool(self, body: str) -> AsyncIterator[None]:
        """The tool server of a block, for the time of the context."""
        process = await self._bash("-c", f"exec {body.strip()} {self.tool_port}")
        try:
            async with asyncio.timeout(BLOCK_S):
                while not await _answers(self.tool_port):
                    assert process.returncode is None, body
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            await process.wait()

    async def _bash(self, *arguments: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            "bash",
            *arguments,
            cwd=self.folder,
            env=self.environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )


async def _answers(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionRefusedError:
        await asyncio.sleep(0.02)
        return False
    writer.close()
    await writer.wait_closed()
    return True


@pytest.fixture
async def terminal(
    dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Terminal]:
    async with running_model_server() as models:
        models.say(HEADLINE, orjson.dumps(DRAFT).decode(), *CHOICES, HEADLINE)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-none")
        monkeypatch.setenv("OPENAI_BASE_URL", f"{models.url}/v1")
        async with _terminal(dsn, tmp_path) as terminal:
            yield terminal


@asynccontextmanager
async def _terminal(dsn: str, tmp_path: Path) -> AsyncIterator[Terminal]:
    async with service_process(dsn, models_file=str(ROOT / "models.yaml")) as service:
        assert service.url is not None, "\n".join(service.lines)
        terminal = Terminal(tmp_path, service.url, dsn, free_port())
        terminal.prepare()
        yield terminal
        assert await service.stop() == 0


async def follow(terminal: Terminal, blocks: list[Block]) -> None:
    """Do what a reader does, from top to bottom."""
    for place, block in enumerate(blocks):
        if block.kind == "tool":
            async with terminal.tool(block.body):
                await follow(terminal, blocks[place + 1 :])
            return
        if block.kind == "parse":
            await terminal.parse(block.body)
        elif block.kind == "run":
            printed = await terminal.run(block.body)
            for text in block.expected:
                assert text in printed, f"{text!r} is missing after\n{block.body}\n{printed}"
            for text in block.refused:
                assert text not in printed, f"{text!r} should not be there after\n{block.body}"


@pytest.mark.parametrize("page", ["README.md", "docs/OPERATIONS.md"])
def test_every_block_says_how_it_is_tested(page: str) -> None:
    blocks = blocks_of(page)

    assert blocks
    assert {block.kind for block in blocks} <= KINDS
    assert [block.body for block in blocks if block.kind == "run" and not block.expected] == []


def test_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    [block] = [block for block in blocks_of("README.md") if block.kind == "make"]

    assert block.body.split("\n") == ["make demo", "make test", ""]
    for line in block.body.splitlines():
        assert f"\n{line.removeprefix('make ')}:" in makefile


def test_the_service_is_started_as_the_fixture_does() -> None:
    started = [block.body for block in blocks_of("README.md") if block.kind == "service"]

    assert len(started) == 1
    assert started[0].endswith("FLEXRUN_EGRESS_ALLOW=127.0.0.1 flexrun serve\n")

    [models] = [block.body for block in blocks_of("README.md") if block.kind == "models"]
    variables = re.findall(r"export (\w+)=", models)
    assert variables == ["OPENAI_API_KEY", "OPENAI_BASE_URL"]
    assert models.endswith("FLEXRUN_EGRESS_ALLOW=127.0.0.1 flexrun serve\n")


async def test_the_commands_of_the_readme_do_what_it_says(terminal: Terminal) -> None:
    await follow(terminal, blocks_of("README.md"))


async def test_the_commands_of_operations_do_what_it_says(terminal: Terminal) -> None:
    [tool] = [block for block in blocks_of("README.md") if block.kind == "tool"]
    async with terminal.tool(tool.body):
        run_id = await waiting_run(terminal)
        (terminal.folder / ".run").write_text(f"RUN={run_id}\n")
        await follow(terminal, blocks_of("docs/OPERATIONS.md"))

        async with httpx.AsyncClient(base_url=terminal.url, trust_env=False) as client:
            headers = {"Accept": "text/event-stream"}
            events = (await client.get(f"/v1/runs/{run_id}/events", headers=headers)).text

    assert "event: RUN_DONE" in events


async def waiting_run(terminal: Terminal) -> str:
    """A run that awaits a human: its tool lost the answer."""
    examples = terminal.folder / "examples"
    async with httpx.AsyncClient(base_url=terminal.url, trust_env=False) as client:
        capability = orjson.loads((examples / "http_capability.json").read_bytes())
        assert (await client.post("/v1/capabilities", json=capability)).status_code == 201
        envelope = orjson.loads((examples / "announce.json").read_bytes())
        run = (await client.post("/v1/runs", json=envelope)).json()
        async with asyncio.timeout(BLOCK_S):
            while run["status"] != "awaiting_human":
                await asyncio.sleep(0.02)
                run = (await client.get(f"/v1/runs/{run['run_id']}")).json()
    return str(run["run_id"])
