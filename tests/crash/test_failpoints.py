"""kill -9 at every named point, then start again: nothing accepted is lost, nothing is doubled.

Each case drives the same work through a service that dies at its point: a diamond by stream, a
node that is retried, one that is `idempotent`, one that is `at_most_once` and cut off in mid-call
(a human decides), one that is `at_most_once` and answers. Clients repeat what was not answered with
the same Idempotency-Key, reconnect with Last-Event-ID, and log every frame.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from app.kit.failpoints import FAILPOINTS
from tests.crash.checker import ClientLog, check
from tests.envelopes import diamond, echo_node, graph
from tests.process import ServiceProcess, start_service
from tests.sse import SseParser
from tests.tools import Tool, answer, fail_once, hang_up, http_capability, running_tool

RECOVERY_POINTS = [point for point in FAILPOINTS if point.startswith(("recover.", "claim."))]
WORK_POINTS = [point for point in FAILPOINTS if point not in RECOVERY_POINTS]
PATIENCE_S = 60.0


def test_there_are_enough_points() -> None:
    assert len(set(FAILPOINTS)) == len(FAILPOINTS) >= 20


@pytest.fixture
async def tool() -> AsyncIterator[Tool]:
    async with running_tool(
        answer=answer, fail=fail_once, once_cut=hang_up, once_ok=answer
    ) as tool:
        yield tool


def envelopes() -> dict[str, dict[str, Any]]:
    """The work, by Idempotency-Key."""
    return {
        "diamond": diamond(),
        "retried": graph(echo_node("A"), echo_node("B", "A", capability="test.fail")),
        "idempotent": graph(
            echo_node("A", capability="test.answer"), echo_node("B", "A", capability="test.answer")
        ),
        "cut": graph(echo_node("A"), echo_node("B", "A", capability="test.once_cut")),
        "once": graph(echo_node("A", capability="test.once_ok"), echo_node("B", "A")),
    }


class Client:
    """Clients that never give up, over however many lives of the service."""

    def __init__(self, dsn: str, tool: Tool) -> None:
        self.dsn = dsn
        self.tool = tool
        self.log = ClientLog()
        self.runs: dict[str, str] = {}
        self.service: ServiceProcess | None = None

    async def start(self, failpoint: str = "") -> bool:
        """A new life of the service; False when it died before it was ready."""
        self.service = await start_service(self.dsn, failpoint=failpoint)
        return self.service.url is not None

    @property
    def url(self) -> str:
        assert self.service is not None
        assert self.service.url is not None
        return self.service.url

    async def register(self) -> None:
        effects = {"answer": "idempotent", "fail": "idempotent"}
        async with httpx.AsyncClient(base_url=self.url, timeout=10) as http:
            for name in ("answer", "fail", "once_cut", "once_ok"):
                body = http_capability(self.tool, name, effects.get(name, "at_most_once"))
                response = await http.post("/v1/capabilities", json=body)
                assert response.status_code in (200, 201), response.text

    async def work(self) -> None:
        """Submit everything and follow it to its end; stops quietly when the service dies."""
        results = await asyncio.gather(
            *(self._one(key, envelope) for key, envelope in envelopes().items()),
            return_exceptions=True,
        )
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, httpx.TransportError):
                raise result

    async def _one(self, key: str, envelope: dict[str, Any]) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=PATIENCE_S) as http:
            if key not in self.runs:
                await self._submit(http, key, envelope)
            while not await self._follow(http, self.runs[key]):
                pass

    async def _submit(self, http: httpx.AsyncClient, key: str, envelope: dict[str, Any]) -> None:
        headers = {"Idempotency-Key": key, "Accept": "text/event-stream"}
        async with http.stream("POST", "/v1/runs", json=envelope, headers=headers) as response:
            assert response.status_code == 200, await response.aread()
            run_id = response.headers["location"].rpartition("/")[2]
            assert self.log.keys.setdefault(key, run_id) == run_id, "one key made two runs"
            self.log.accepted.add(run_id)
            self.runs[key] = run_id
            await self._read(http, run_id, response)

    async def _follow(self, http: httpx.AsyncClient, run_id: str) -> bool:
        """Follow from the last frame seen; True at the end of the run."""
        run = (await http.get(f"/v1/runs/{run_id}")).json()
        if run["status"] == "awaiting_human":  # the pause was seen in an earlier life
            waiting = [n["node_id"] for n in run["nodes"] if n["status"] == "blocked"]
            await self._decide(http, run_id, waiting)
        last = max((seq for run, seq in self.log.frames if run == run_id), default=0)
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(last)}
        async with http.stream("GET", f"/v1/runs/{run_id}/events", headers=headers) as response:
            if response.status_code == 204:
                return True
            assert response.status_code == 200, await response.aread()
            return await self._read(http, run_id, response)

    async def _read(self, http: httpx.AsyncClient, run_id: str, response: httpx.Response) -> bool:
        parser = SseParser()
        async for chunk in response.aiter_bytes():
            parser.feed(chunk)
            events, parser.events = parser.events, []
            for event in events:
                self.log.saw(run_id, event)
                if event.event == "RUN_PAUSED":
                    await self._decide(http, run_id, event.json["data"]["nodes"])
                if event.event in ("RUN_DONE", "RUN_FAILED"):
                    return True
        return False

    async def _decide(self, http: httpx.AsyncClient, run_id: str, nodes: list[str]) -> None:
        """The human at night: order it again. A 409 says that it was decided already."""
        body = {"nodes": {node: {"decision": "retry"} for node in nodes}, "note": "try again"}
        response = await http.post(f"/v1/runs/{run_id}/resume", json=body)
        assert response.status_code in (202, 409), response.text

    async def finish(self) -> None:
        """Every run ends, in a life that nothing disturbs."""
        async with asyncio.timeout(PATIENCE_S):
            await self.work()
            async with httpx.AsyncClient(base_url=self.url, timeout=10) as http:
                await self._end_orphans(http)

    async def _end_orphans(self, http: httpx.AsyncClient) -> None:
        """Runs whose acceptance the client never learned of end as well; a human helps if asked."""
        known = set(self.runs.values())
        listed = (await http.get("/v1/runs")).json()["runs"]
        for run_id in (run["run_id"] for run in listed if run["run_id"] not in known):
            while not await self._follow(http, run_id):
                pass


async def _prove(client: Client, point: str) -> None:
    """The end of every case: the service died at its point, and a last life puts all right."""
    assert client.service is not None
    code = await client.service.wait_dead()
    assert code == -9, f"{point} was not reached: {client.service.lines[-5:]}"
    assert await client.start()
    try:
        await client.register()
        await client.finish()
    finally:
        await client.service.stop()
    journals = await check(client.dsn, client.log, client.tool.ledger)
    types = [event["type"] for journal in journals.values() for event in journal]
    assert types.count("RUN_DONE") == len(journals), types


@pytest.mark.parametrize("point", WORK_POINTS)
async def test_killed_at_work(point: str, dsn: str, tool: Tool) -> None:
    client = Client(dsn, tool)
    if await client.start(failpoint=point):
        try:
            await client.register()
            await client.work()
        except httpx.TransportError:
            pass
    await _prove(client, point)


@pytest.mark.parametrize("point", RECOVERY_POINTS)
async def test_killed_while_it_takes_up_what_a_killed_one_left(
    point: str, dsn: str, tool: Tool
) -> None:
    client = Client(dsn, tool)
    assert await client.start()
    await client.register()
    tool.behaviours["/answer"] = _answer_after(tool.gate)
    tool.called.clear()
    working = asyncio.create_task(client.work())
    async with asyncio.timeout(PATIENCE_S):
        # Only this one is held up: its run is unfinished.
        while not any(call.path == "/answer" for call in tool.ledger):
            tool.called.clear()
            await tool.called.wait()
    assert client.service is not None
    await client.service.kill()
    await working
    tool.gate.set()

    if await client.start(failpoint=point):
        await asyncio.gather(client.work(), return_exceptions=True)
    await _prove(client, point)


def _answer_after(gate: asyncio.Event) -> Any:
    async def behave(tool: Tool, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await gate.wait()
        await answer(tool, body, writer)

    return behave


@pytest.mark.parametrize("nth", [2, 5])
@pytest.mark.parametrize("point", ["commit.after_durable", "call.after", "publish.before"])
async def test_killed_later_in_the_run(point: str, nth: int, dsn: str, tool: Tool) -> None:
    client = Client(dsn, tool)
    if await client.start(failpoint=f"{point}:{nth}"):
        try:
            await client.register()
            await client.work()
        except httpx.TransportError:
            pass
    await _prove(client, f"{point}:{nth}")


async def test_killed_again_and_again(dsn: str, tool: Tool) -> None:
    """A service that dies twice in a row, early, gets there all the same. A third time without any
    progress in between would make its runs poison."""
    client = Client(dsn, tool)
    for point in ("drive.after_record", "call.inline_after"):
        if await client.start(failpoint=f"{point}:2"):
            try:
                await client.register()
                await client.work()
            except httpx.TransportError:
                pass
        assert client.service is not None
        assert await client.service.wait_dead() == -9
    await _prove(client, "call.inline_after:2")
