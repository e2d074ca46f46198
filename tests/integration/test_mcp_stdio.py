"""MCP servers as child processes: their start, their death, and what they must not do to us."""

from __future__ import annotations

import asyncio
import logging
import os
import select
import signal
import sys
from collections.abc import AsyncIterator, Callable

import psutil
import pytest

from app.adapters.capabilities.egress_transport import SendProgress
from app.adapters.capabilities.mcp_process import Child, Command
from app.adapters.capabilities.mcp_protocol import pin_of
from app.adapters.capabilities.mcp_session import ToolCall
from app.adapters.capabilities.mcp_stdio import StdioLimits, StdioServer
from app.domain.capability import Effect
from app.ports import CallFailed
from tests.mcp_server import TOOLS
from tests.mcp_sides import VALUE_MAX, Side, command, over_pipes

MESSAGE_MAX = 4 * VALUE_MAX
PATIENCE_S = 20.0
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs pidfds and death signals")

Starter = Callable[..., StdioServer]


@pytest.fixture(params=["modern", "legacy"])
async def side(request: pytest.FixtureRequest) -> AsyncIterator[Side]:
    async with over_pipes(request.param) as running:
        yield running


@pytest.fixture
async def start() -> AsyncIterator[Starter]:
    """Makes servers with limits of their own, and ends them."""
    made: list[StdioServer] = []

    def server(of: Command, **limits: float) -> StdioServer:
        made.append(StdioServer(of, MESSAGE_MAX, StdioLimits(**limits)))
        return made[-1]

    yield server
    for each in made:
        await each.aclose()


def asked(tool: str, **arguments: object) -> ToolCall:
    return ToolCall(tool, pin_of(TOOLS[tool]), arguments, {}, False, SendProgress())


def is_dead(pidfd: int) -> bool:
    """Wait for the end of a process, also of one that nobody reaps, by a file that tells of it."""
    with os.fdopen(pidfd):
        return bool(select.select([pidfd], [], [], 10)[0])


async def gone(process: psutil.Process) -> None:
    """Until a child of ours has ended and was reaped: a zombie counts as running."""
    async with asyncio.timeout(PATIENCE_S):
        while process.is_running():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)


async def heard(server: StdioServer) -> list[str]:
    _tool, result = await (await server.session()).call(asked("heard"))
    found = result["structuredContent"]["heard"]
    return [message["method"] for message in found]


async def unreachable(server: StdioServer) -> CallFailed:
    with pytest.raises(CallFailed) as caught:
        await server.session()
    assert caught.value.code == "capability_unreachable"
    assert caught.value.retryable
    assert not caught.value.unknown_outcome
    return caught.value


# --- calls ----------------------------------------------------------------------------------------


async def test_calls_share_one_process(side: Side) -> None:
    hanging = asyncio.create_task(side.call("hang"))
    sums = await asyncio.gather(*(side.call("add", {"a": n, "b": 1}) for n in range(50)))
    assert sums == [{"sum": n + 1} for n in range(50)]
    hanging.cancel()
    with pytest.raises(asyncio.CancelledError):
        await hanging
    methods = await side.methods()
    assert methods.count("server/discover") == 1
    assert methods[-1] == "notifications/cancelled"
    (cancelled,) = (m for m in await side.heard() if m["method"] == "notifications/cancelled")
    (hung,) = (m for m in await side.heard() if (m.get("params") or {}).get("name") == "hang")
    assert cancelled["params"] == {"requestId": hung["id"]}


async def test_a_death_in_mid_call_leaves_the_outcome_unknown(side: Side) -> None:
    side.adapter._servers["local"]._limits = StdioLimits(back_off_s=20.0)
    hanging = asyncio.create_task(side.failure("hang", effect=Effect.AT_MOST_ONCE))
    await side.call("add", {"a": 1, "b": 1})
    failed = await side.failure("die", effect=Effect.AT_MOST_ONCE)
    for each in (failed, await hanging):
        assert (each.code, each.unknown_outcome) == ("capability_connection_lost", True)
        assert each.target_failed
    # The first death costs no wait: the next call starts it again, the second death does.
    assert await side.call("add", {"a": 2, "b": 2}) == {"sum": 4}
    assert (await side.methods()).count("tools/call") == 1
    await side.failure("die")
    refused = await side.failure("add", {"a": 2, "b": 2})
    assert (refused.code, refused.unknown_outcome) == ("capability_unreachable", False)
    assert refused.retry_after_s is not None
    assert 0 < refused.retry_after_s <= 20


async def test_a_garbled_answer_is_definite(side: Side) -> None:
    for text in (
        '{"jsonrpc":"2.0","id":ID,"result":{"structuredContent":NaN}}',
        '{"jsonrpc":"2.0","id":ID,"result":{"structuredContent":123456789012345678901}}',
        '{"jsonrpc":"2.0","id":ID,"id":ID,"result":{}}',
        '{"jsonrpc":"2.0","id":ID,"result":[]}',
        '{"jsonrpc":"2.0","id":ID}',
    ):
        failed = await side.failure("raw", {"text": text}, effect=Effect.AT_MOST_ONCE)
        assert (failed.code, failed.retryable) == ("capability_garbage", False)
        assert not failed.unknown_outcome


async def test_chatter_is_passed_over(side: Side) -> None:
    for text in ("Listening on stdio", "", "[]", "[" * 100_000, "7", '{"id": [1]}', '{"id": 99}'):
        assert await side.call("raw", {"text": text})


async def test_too_long_a_line_ends_the_server(
    side: Side, caplog: pytest.LogCaptureFixture
) -> None:
    failed = await side.failure("big", {"letters": 2 * MESSAGE_MAX})
    assert (failed.code, failed.unknown_outcome) == ("capability_connection_lost", True)
    assert "MCP server local wrote too long a line and is ended" in caplog.messages
    assert await side.call("add", {"a": 1, "b": 1}) == {"sum": 2}


async def test_requests_of_the_server_are_answered(side: Side) -> None:
    await side.call("raw", {"text": '{"jsonrpc":"2.0","id":"p","method":"ping"}'})
    await side.call("raw", {"text": '{"jsonrpc":"2.0","id":"r","method":"roots/list"}'})
    answers = {m["id"]: m for m in await side.heard() if "method" not in m}
    assert answers["p"]["result"] == {}
    assert answers["r"]["error"]["code"] == -32601


async def test_a_server_that_does_not_read_gets_no_more(start: Starter) -> None:
    server = start(command(), exit_grace_s=0.1)
    session = await server.session()
    await session.call(asked("add", a=1, b=1))
    for letters in (1, 5_000_000, 5_000_000):
        stalled = asked("stall", text="x" * letters)
        call = asyncio.create_task(session.call(stalled))
        async with asyncio.timeout(PATIENCE_S):
            while not stalled.progress.sent:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    with pytest.raises(CallFailed) as caught:
        await session.call(asked("add", a=1, b=1))
    assert caught.value.code == "capability_unreachable"


async def test_the_environment_is_what_the_operator_gave(side: Side) -> None:
    found = await side.call("env")
    assert set(found) - {"LC_CTYPE"} == {"MCP_ERA", "PATH"}  # LC_CTYPE is Python's own doing
    assert found["PATH"] == os.pathsep.join(os.get_exec_path())


async def test_stderr_is_logged_for_those_who_look(
    side: Side, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "flexrun.mcp")
    await side.call("add", {"a": 1, "b": 1})
    await side.adapter.aclose()
    assert "stderr of MCP server local: hello from the server" in caplog.messages


# --- start and end --------------------------------------------------------------------------------


async def test_an_older_server_that_dies_of_the_probe(start: Starter) -> None:
    server = start(command("strict"), back_off_s=0.0)
    first = ["initialize", "notifications/initialized", "tools/list"]
    assert (await heard(server))[:3] == first
    with pytest.raises(CallFailed):
        await (await server.session()).call(asked("die"))
    # Known by now: the second start does without the probe.
    assert (await heard(server))[:3] == first


async def test_an_older_server_that_leaves_the_probe_unanswered(start: Starter) -> None:
    server = start(command("mute"), probe_s=0.2)
    assert (await heard(server))[:2] == ["server/discover", "initialize"]


@pytest.mark.parametrize(
    "arguments",
    [("/nowhere/at-all",), ("/",), (sys.executable, "-c", "pass"), (sys.executable, "-c", "1/0")],
)
async def test_a_command_that_can_not_serve(start: Starter, arguments: tuple[str, ...]) -> None:
    server = start(Command("broken", arguments), back_off_s=20.0)
    for _ in range(3):
        with pytest.raises(CallFailed) as caught:
            await server.session()
        assert caught.value.retryable
    assert (await unreachable(server)).retry_after_s is not None


async def test_a_server_that_does_not_come_up(start: Starter) -> None:
    code = "import time; time.sleep(1_000)"
    server = start(
        Command("slow", (sys.executable, "-c", code)), start_s=0.2, probe_s=1.0, exit_grace_s=0.1
    )
    assert "does not answer" in (await unreachable(server)).message


async def test_a_start_goes_on_when_its_first_caller_leaves(start: Starter) -> None:
    server = start(command())
    first = asyncio.create_task(server.session())
    second = asyncio.create_task(server.session())
    await asyncio.sleep(0)
    first.cancel()
    assert await second is await server.session()
    assert (await heard(server)).count("server/discover") == 1


@LINUX
async def test_the_end_takes_everybody_along(start: Starter) -> None:
    before = set(psutil.Process().children())
    server = start(command(), exit_grace_s=0.5)
    _tool, result = await (await server.session()).call(asked("spawn"))
    (child,) = set(psutil.Process().children()) - before
    grandchild = os.pidfd_open(result["structuredContent"]["pid"])
    hanging = asyncio.create_task((await server.session()).call(asked("hang")))
    await (await server.session()).call(asked("add", a=1, b=1))
    await server.aclose()
    with pytest.raises(CallFailed) as caught:
        await hanging
    assert caught.value.code == "capability_connection_lost"
    await gone(child)
    assert is_dead(grandchild)
    assert "ended" in (await unreachable(server)).message


async def test_a_child_that_will_not_go_is_killed() -> None:
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "print(flush=True); time.sleep(1_000)"
    )
    before = set(psutil.Process().children())
    child = await Child.start(Command("stubborn", (sys.executable, "-c", code)), 1_000, 0.1)
    await child.read_line()
    (process,) = set(psutil.Process().children()) - before
    await child.end()
    await gone(process)


@LINUX
async def test_a_child_dies_with_us() -> None:
    code = (
        "import asyncio\n"
        "from app.adapters.capabilities.mcp_process import Child, Command\n"
        "async def main():\n"
        "    child = await Child.start(Command('c', ('sleep', '1000')), 1_000, 1.0)\n"
        "    print(child._process.pid, flush=True)\n"
        "    await asyncio.sleep(1_000)\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    child = os.pidfd_open(int(await parent.stdout.readline()))
    parent.send_signal(signal.SIGKILL)
    await parent.wait()
    assert is_dead(child)
