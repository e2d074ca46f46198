"""Streams: every event once and in order, wherever the line is cut and whoever drives the run."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, closing
from datetime import timedelta
from functools import partial
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import httpx
import pytest
import pytest_asyncio

from app.api import stream as stream_module
from app.domain.events import Event, EventType
from app.domain.run import RunStatus
from app.journal import feed as feed_module
from app.journal.record import Append
from app.kit.clock import now_ms
from app.kit.ids import id_at, new_id, run_day
from app.store.database import Database
from app.store.partitions import prune
from tests.conftest import fresh_database, make_settings
from tests.envelopes import chain, diamond, echo_node, graph, wide
from tests.journal_kit import journal_kit
from tests.service import RunningService, running_service
from tests.shared_service import audit, problem, register, rows, shared_service, until
from tests.sse import SseEvent, SseParser, parse
from tests.tools import Tool, answer, answer_at_gate, http_capability, respond, running_tool

pytestmark = pytest.mark.asyncio(loop_scope="module")

SSE = {"Accept": "text/event-stream"}
NASTY = "line\nid: 99\r\nevent: RUN_DONE\rdata: {}\n\n\u2028\u2029\u0085 ünïcödé 日本 🚀 \t\x1b"


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def service(postgres_dsn: str) -> AsyncIterator[RunningService]:
    async with shared_service(postgres_dsn) as service:
        yield service


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def shared_dsn(postgres_dsn: str) -> AsyncIterator[str]:
    """A database for several services."""
    async with fresh_database(postgres_dsn) as dsn:
        yield dsn
        await audit(dsn)


def last_seen(parser: SseParser) -> int:
    """What a client would send as Last-Event-ID: that of the last event it dispatched."""
    return int(parser.events[-1].id) if parser.events else 0


def blocks(raw: bytes) -> list[bytes]:
    """The frames of a whole stream, as bytes."""
    assert raw.endswith(b"\n\n")
    return raw.removesuffix(b"\n\n").split(b"\n\n")


async def raw_stream(service: RunningService, run_id: str, after: int) -> bytes:
    """The bytes behind a seq until the server ends the stream; none for a 204."""
    headers = {**SSE, "Last-Event-ID": str(after)}
    response = await service.client.get(f"/v1/runs/{run_id}/events", headers=headers)
    assert response.status_code in (200, 204)
    return response.content


async def stored(service: RunningService, run_id: str) -> list[tuple[str, str, str]]:
    """The journal of a run as id, event and data of its frames."""
    found = await rows(
        service, "select seq, type, body from events where run_id = $1 order by seq", UUID(run_id)
    )
    return [(str(row["seq"]), row["type"], row["body"]) for row in found]


def seen(events: list[SseEvent]) -> list[tuple[str, str, str]]:
    return [(event.id, event.event, event.data) for event in events]


@asynccontextmanager
async def followed(
    service: RunningService, run_id: str, **query: Any
) -> AsyncIterator[Callable[[Callable[[SseParser], bool]], Any]]:
    """An open stream. What is yielded reads it until a condition holds, or to its end."""
    parser = SseParser()
    async with service.client.stream(
        "GET", f"/v1/runs/{run_id}/events", headers=SSE, params=query
    ) as response:
        assert response.status_code == 200, await response.aread()
        chunks = response.aiter_bytes()

        async def read(enough: Callable[[SseParser], bool]) -> SseParser:
            async with asyncio.timeout(20):
                while not enough(parser):
                    try:
                        parser.feed(await anext(chunks))
                    except StopAsyncIteration:
                        break
            return parser

        yield read


def has_more_than(count: int, parser: SseParser) -> bool:
    return len(parser.events) > count


def never(_parser: SseParser) -> bool:
    """Reads to the end of the stream."""
    return False


async def nobody_follows(service: RunningService) -> None:
    """Wait until the last stream was let go."""
    async with asyncio.timeout(10):
        while service.services.feed.readers:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)


async def gated_run(service: RunningService, tool: Tool) -> str:
    """A run that waits in its node A until the tool's gate opens."""
    await register(service, http_capability(tool, "gated", "idempotent"))
    run = await service.submit(graph(echo_node("A", capability="test.gated"), echo_node("B", "A")))
    await tool.called.wait()
    run_id: str = run["run_id"]
    return run_id


# Reconnecting


async def test_a_stream_cut_at_any_byte_is_completed_by_a_reconnect(
    service: RunningService,
) -> None:
    nodes = [echo_node("n0", inputs={"text": {"value": NASTY}})]
    nodes += [
        echo_node(f"n{i}", f"n{i - 1}", inputs={"text": {"from": "n0", "pointer": "/text"}})
        for i in range(1, 32)
    ]
    run = await service.finished(graph(*nodes, objective=NASTY))
    whole = await raw_stream(service, run["run_id"], 0)
    frames = blocks(whole)[1:]
    assert blocks(whole)[0] == b"retry: 2000"
    assert len(frames) >= 64
    journal = await stored(service, run["run_id"])
    assert seen(parse([whole]).events) == journal

    rests: list[list[bytes]] = []
    for after in range(len(frames) + 1):
        raw = await raw_stream(service, run["run_id"], after)
        rests.append(blocks(raw)[1:] if raw else [])
        assert rests[after] == frames[after:]

    # What a client has after a prefix is what it has when it got the prefix byte by byte.
    growing = SseParser()
    for offset in range(len(whole)):
        growing.feed(whole[offset : offset + 1])
        after = last_seen(growing)
        assert seen(growing.events) == journal[:after], offset
        assert len(rests[after]) == len(journal) - after, offset
    dice = random.Random(5)
    for offset in (0, 1, len(whole) - 1, *dice.sample(range(len(whole)), 60)):
        prefix = parse([whole[:offset]])
        rest = b"".join(frame + b"\n\n" for frame in rests[last_seen(prefix)])
        assert seen(prefix.events) + seen(parse([rest]).events) == journal


class CuttingProxy:
    """A TCP proxy that cuts every connection after a random number of bytes of the answer."""

    def __init__(self, url: str, seed: int) -> None:
        self._target = urlsplit(url)
        self._dice = random.Random(seed)
        self._tasks: set[asyncio.Task[None]] = set()
        self.cuts = 0
        self.url = ""

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(self._target.hostname, self._target.port)
        back.write(await reader.readuntil(b"\r\n\r\n"))
        left = self._dice.randint(1, 3_000)
        try:
            while left > 0 and (data := await there.read(left)):
                writer.write(data)
                await writer.drain()
                left -= len(data)
            if left == 0:
                self.cuts += 1
        except ConnectionError:
            pass
        finally:
            back.transport.abort()
            writer.close()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[CuttingProxy]:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)


async def follow_through_cuts(url: str, run_id: str) -> list[SseEvent]:
    """What a client has that reconnects whenever its line is cut."""
    events: list[SseEvent] = []
    while not events or events[-1].event != "RUN_DONE":
        parser = SseParser()
        headers = {**SSE, "Last-Event-ID": events[-1].id if events else "0"}
        async with httpx.AsyncClient(base_url=url, timeout=20) as client:
            try:
                async with client.stream(
                    "GET", f"/v1/runs/{run_id}/events", headers=headers
                ) as response:
                    assert response.status_code == 200
                    async for chunk in response.aiter_bytes():
                        parser.feed(chunk)
            except httpx.TransportError:
                pass
        events += parser.events
    return events


@pytest.mark.parametrize("seed", [1, 2])
async def test_a_line_cut_again_and_again_during_a_run_loses_nothing(
    service: RunningService, seed: int
) -> None:
    dice = random.Random(seed)

    async def drowsy(tool: Tool, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(dice.uniform(0, 0.01))
        respond(writer, 200, {"text": NASTY})

    async with (
        running_tool(drowsy=drowsy) as tool,
        CuttingProxy(service.url, seed).running() as proxy,
        asyncio.timeout(40),
    ):
        await register(service, http_capability(tool, "drowsy", "pure"))
        nodes = [echo_node("n0", capability="test.drowsy")]
        nodes += [
            echo_node(f"n{i}", f"n{i - 1}", inputs={}, capability="test.drowsy")
            for i in range(1, 30)
        ]
        run = await service.submit(graph(*nodes))
        clients = await asyncio.gather(
            *(follow_through_cuts(proxy.url, run["run_id"]) for _ in range(4))
        )
    journal = await stored(service, run["run_id"])
    for events in clients:
        assert seen(events) == journal
    assert proxy.cuts >= 4


async def test_only_events_carry_an_id(
    service: RunningService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "HEARTBEAT_S", 0.02)
    raw = b""
    async with running_tool(gated=answer_at_gate) as tool:
        run_id = await gated_run(service, tool)
        async with service.client.stream(
            "GET", f"/v1/runs/{run_id}/events", headers=SSE
        ) as response:
            async for chunk in response.aiter_bytes():
                raw += chunk
                if raw.count(b": heartbeat") == 3:
                    tool.gate.set()
    found = blocks(raw)
    assert found[0] == b"retry: 2000"
    for block in found[1:]:
        lines = block.split(b"\n")
        if lines[0].startswith(b": "):
            assert lines == [b": heartbeat"]
        else:
            assert [line.partition(b":")[0] for line in lines] == [b"id", b"event", b"data"]
    assert seen(parse([raw]).events) == await stored(service, run_id)


# Filters and cursors


async def test_filters_pass_what_is_asked_for_and_the_last_event(service: RunningService) -> None:
    run = await service.finished(diamond())
    journal = await stored(service, run["run_id"])
    url = f"/v1/runs/{run['run_id']}/events"
    cases: list[tuple[dict[str, Any], Callable[[SseEvent], bool]]] = [
        ({"type": "NODE_DONE"}, lambda e: e.event == "NODE_DONE"),
        (
            {"type": ["NODE_START", "RUN_START"]},
            lambda e: e.event in ("NODE_START", "RUN_START"),
        ),
        ({"node": "B"}, lambda e: e.json.get("node_id") == "B"),
        ({"node": ["B", "C"]}, lambda e: e.json.get("node_id") in ("B", "C")),
        (
            {"node": "B", "type": "NODE_DONE"},
            lambda e: (e.json.get("node_id"), e.event) == ("B", "NODE_DONE"),
        ),
        ({"level": "ERROR"}, lambda e: False),
        ({"level": ["INFO", "WARN"]}, lambda e: True),
        ({"node": "nobody"}, lambda e: False),
    ]
    every = await service.events(run["run_id"])
    for query, passes in cases:
        expected = [entry for entry, e in zip(journal, every, strict=True) if passes(e)]
        if journal[-1] not in expected:
            expected.append(journal[-1])
        async with followed(service, run["run_id"], **query) as read:
            assert seen((await read(never)).events) == expected, query
        page = (await service.client.get(url, params=query)).json()
        assert [str(event["seq"]) for event in page["events"]] == [e[0] for e in expected], query
        live = []
        async with running_tool(gated=answer_at_gate) as tool:
            run_id = await gated_run(service, tool)
            async with followed(service, run_id, **query) as read:
                tool.gate.set()
                live = seen((await read(never)).events)
        assert live[-1][1] == "RUN_DONE"
        assert live[-1] == (await stored(service, run_id))[-1]

    for query in ({"type": "NODE_SLEEPS"}, {"level": "LOUD"}, {"node": "\0"}, {"limit": "0"}):
        problem(await service.client.get(url, params=query), 422, "invalid_request")


async def test_pages_of_events_have_no_gaps(service: RunningService) -> None:
    run = await service.finished(chain(20))
    found: list[int] = []
    after = 0
    while True:
        page = (
            await service.client.get(
                f"/v1/runs/{run['run_id']}/events", params={"after": after, "limit": 7}
            )
        ).json()
        if not page["events"]:
            assert page["next_after"] == after
            break
        found += [event["seq"] for event in page["events"]]
        after = page["next_after"]
    assert found == list(range(1, 45))


async def test_pages_of_streams_are_bounded_in_bytes(service: RunningService) -> None:
    """A client that reads nothing holds one page: it must not be a thousand big outputs."""
    text = "x" * 50_000
    nodes = [
        {"id": f"n{i}", "capability": "util.echo", "inputs": {"text": {"value": text}}}
        for i in range(20)
    ]
    heads = {}
    for made in (graph(*nodes), diamond(), diamond()):
        run = await service.finished(made)
        heads[UUID(run["run_id"])] = run["last_seq"]
    reader = service.services.reader
    after = {**dict.fromkeys(heads, 0), new_id(): 0}
    found: dict[UUID, list[int]] = {run_id: [] for run_id in heads}
    while tails := await reader.tails(after, runs_max=2, rows_max=9, bytes_max=120_000):
        assert len(tails) <= 2
        for run_id, tail in tails.items():
            assert tail.head == heads[run_id]
            assert 1 <= len(tail.rows) <= 9
            sizes = [len(row.body) for row in tail.rows]
            assert sum(sizes[:-1]) < 120_000, "only the last one may reach over the bound"
            found[run_id] += [row.seq for row in tail.rows]
            after[run_id] = tail.rows[-1].seq
    assert found == {run_id: list(range(1, head + 1)) for run_id, head in heads.items()}
    big = next(iter(heads))
    assert [event.seq for event in await service.events(str(big))] == found[big]


async def test_nothing_is_left_behind_the_end(service: RunningService) -> None:
    run = await service.finished(diamond())
    url = f"/v1/runs/{run['run_id']}/events"
    for query in ({}, {"type": "NODE_DONE"}):
        response = await service.client.get(
            url, headers={**SSE, "Last-Event-ID": "12"}, params=query
        )
        assert (response.status_code, response.content) == (204, b"")
        before_last = await service.client.get(
            url, headers={**SSE, "Last-Event-ID": "11"}, params=query
        )
        assert [event.event for event in parse([before_last.content]).events] == ["RUN_DONE"]
    page = await service.client.get(url, params={"after": 12})
    assert page.json() == {"events": [], "next_after": 12}


@pytest.mark.parametrize("accept", ["text/event-stream", "application/json"])
async def test_a_cursor_that_is_none_or_in_the_future_is_refused(
    service: RunningService, accept: str
) -> None:
    run = await service.finished(diamond())
    url = f"/v1/runs/{run['run_id']}/events"

    async def get(given: str, *, by_header: bool) -> httpx.Response:
        if by_header:
            headers = [("Accept", accept), ("Last-Event-ID", given)]
            return await service.client.get(url, headers=headers)
        return await service.client.get(url, headers={"Accept": accept}, params={"after": given})

    for by_header in (True, False):
        for given in ("abc", "-1", "1.5", "1e2", "+1", "1 2", "99999999999999999999", "0x1", ""):
            response = await get(given, by_header=by_header)
            problem(response, 400, "bad_cursor")
        problem(await get("13", by_header=by_header), 400, "cursor_in_future")
        problem(await get("999999999", by_header=by_header), 400, "cursor_in_future")
    problem(await get("\u0663", by_header=False), 400, "bad_cursor")


async def test_last_event_id_wins_over_after(service: RunningService) -> None:
    run = await service.finished(diamond())
    url = f"/v1/runs/{run['run_id']}/events"
    for after in ("2", "99", "rubbish"):
        response = await service.client.get(
            url, headers={**SSE, "Last-Event-ID": "5"}, params={"after": after}
        )
        assert response.status_code == 200
        assert parse([response.content]).events[0].id == "6"
    response = await service.client.get(url, headers=SSE, params={"after": "2"})
    assert parse([response.content]).events[0].id == "3"


# Keeping a stream alive, and letting go of it


async def test_a_filter_that_passes_nothing_still_gets_heartbeats(
    service: RunningService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "HEARTBEAT_S", 0.05)

    async def steady(tool: Tool, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.02)
        await answer(tool, body, writer)

    async with running_tool(steady=steady) as tool:
        await register(service, http_capability(tool, "steady", "pure"))
        nodes = [echo_node("n0", capability="test.steady")]
        nodes += [
            echo_node(f"n{i}", f"n{i - 1}", inputs={}, capability="test.steady")
            for i in range(1, 30)
        ]
        run = await service.submit(graph(*nodes))
        async with followed(service, run["run_id"], type="RUN_DONE") as read:
            parser = await read(never)
    assert [event.event for event in parser.events] == ["RUN_DONE"]
    assert parser.comments.count("heartbeat") >= 3


async def test_clients_that_read_nothing_are_dropped_and_hurt_nobody(
    service: RunningService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "SEND_TIMEOUT_S", 3.0)
    copies = [
        echo_node(f"n{i}", inputs={"text": {"from": "inputs", "pointer": "/text"}})
        for i in range(160)
    ]
    names = [node["id"] for node in copies]
    join = echo_node("join", *names, inputs={})
    run = await service.finished(graph(*copies, join, inputs={"text": "x" * 60_000}))
    assert run["status"] == "done"

    loop = asyncio.get_running_loop()
    parts = urlsplit(service.url)
    request = (
        f"GET /v1/runs/{run['run_id']}/events HTTP/1.1\r\nHost: flexrun\r\n"
        "Accept: text/event-stream\r\n\r\n"
    ).encode()
    async with AsyncExitStack() as stack:
        lazy: list[socket.socket] = []
        for _ in range(8):
            client = stack.enter_context(closing(socket.socket()))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            client.setblocking(False)
            await loop.sock_connect(client, (parts.hostname, parts.port))
            await loop.sock_sendall(client, request)
            lazy.append(client)
        async with asyncio.timeout(10):
            while service.services.feed.readers < len(lazy):  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.005)
        healthy = await raw_stream(service, run["run_id"], 0)
        assert len(blocks(healthy)) == 1 + run["last_seq"]
        await nobody_follows(service)
        for client in lazy:
            received = 0
            try:
                async with asyncio.timeout(5):
                    while data := await loop.sock_recv(client, 1 << 20):
                        received += len(data)
            except ConnectionError:
                pass
            assert received < len(healthy)
    assert service.services.feed._channels == {}


async def test_the_ring_of_a_long_run_stays_bounded(
    service: RunningService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_module, "RING_FRAMES_MAX", 40)
    monkeypatch.setattr(feed_module, "PAGE_ROWS_MAX", 30)
    async with running_tool(gated=answer_at_gate) as tool:
        await register(service, http_capability(tool, "gated", "pure"))
        envelope = wide(150)
        envelope["goal_graph"]["nodes"][0]["capability"] = "test.gated"
        run = await service.submit(envelope)
        size_max = shown = 0
        async with followed(service, run["run_id"]) as read:
            await read(lambda parser: bool(parser.events))
            [channel] = service.services.feed._channels.values()
            tool.gate.set()
            while True:
                parser = await read(partial(has_more_than, shown))
                size_max = max(size_max, len(channel.frames))
                if len(parser.events) == shown:
                    break
                shown = len(parser.events)
        assert seen(parser.events) == await stored(service, run["run_id"])
        # One append of the run has up to 151 events; the ring keeps at most that much more.
        assert size_max <= 40 + 2 * 151
        late = await service.events(run["run_id"])
        assert seen(late) == seen(parser.events)


async def test_streams_of_one_run_share_frames_and_ask_the_database_nothing(
    service: RunningService, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed, reader = service.services.feed, service.services.reader
    readings = under_way = 0
    ask = reader.tails

    async def counted(*arguments: Any, **more: Any) -> Any:
        nonlocal readings, under_way
        readings += 1
        under_way += 1
        try:
            return await ask(*arguments, **more)
        finally:
            under_way -= 1

    monkeypatch.setattr(reader, "tails", counted)
    # What is left are looks that somebody asks for, as every stream does when it is opened.
    monkeypatch.setattr(feed_module, "POLL_S", 3_600.0)
    async with running_tool(gated=answer_at_gate) as tool:
        run_id = await gated_run(service, tool)
        await nobody_follows(service)
        async with AsyncExitStack() as stack:
            readers = [await stack.enter_async_context(followed(service, run_id)) for _ in range(5)]
            for read in readers:
                await read(lambda parser: len(parser.events) == 4)
            [channel] = feed._channels.values()
            assert channel.followers == 5
            async with asyncio.timeout(10):
                while feed._nudge.is_set() or under_way:  # noqa: ASYNC110 - nobody tells
                    await asyncio.sleep(0.01)
            assert readings > 0
            readings = 0
            tool.gate.set()
            found = [seen((await read(never)).events) for read in readers]
        assert readings == 0
    assert found == [await stored(service, run_id)] * 5
    await nobody_follows(service)
    assert feed._channels == {}


async def test_a_client_that_leaves_does_not_stop_its_run(service: RunningService) -> None:
    run_ids = []
    async with running_tool(gated=answer_at_gate) as tool:
        await register(service, http_capability(tool, "gated", "pure"))
        envelope = graph(echo_node("A", capability="test.gated"), echo_node("B", "A"))
        for _ in range(5):
            async with service.client.stream(
                "POST", "/v1/runs", json=envelope, headers=SSE
            ) as response:
                run_ids.append(response.headers["location"].rpartition("/")[2])
                await anext(response.aiter_bytes())
        tool.gate.set()
        for run_id in run_ids:
            await until(service, run_id, "RUN_DONE")
    await nobody_follows(service)


async def test_more_streams_than_there_may_be_are_refused_before_anything_happens(
    service: RunningService, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = service.services.settings.model_copy(update={"streams_max": 2})
    async with running_tool(gated=answer_at_gate) as tool:
        run_id = await gated_run(service, tool)
        await nobody_follows(service)
        async with followed(service, run_id) as first, followed(service, run_id) as second:
            monkeypatch.setattr(service.services, "settings", few)
            [before] = await rows(service, "select count(*) from runs")
            for response in (
                await service.client.get(f"/v1/runs/{run_id}/events", headers=SSE),
                await service.client.post("/v1/runs", json=diamond(), headers=SSE),
            ):
                problem(response, 503, "server_busy")
                assert int(response.headers["retry-after"]) > 0
            assert [before] == await rows(service, "select count(*) from runs")
            tool.gate.set()
            await first(never)
            await second(never)
        await nobody_follows(service)
        assert len(await service.stream(diamond())) == 12


async def test_head_is_answered_at_once_and_leaves_the_line_usable(
    service: RunningService,
) -> None:
    async with running_tool(gated=answer_at_gate) as tool:
        run_id = await gated_run(service, tool)
        limits = httpx.Limits(max_connections=1)
        async with httpx.AsyncClient(base_url=service.url, timeout=5, limits=limits) as client:
            head = await client.head(f"/v1/runs/{run_id}/events", headers=SSE)
            assert head.status_code in (200, 405)
            assert head.content == b""
            assert (await client.get(f"/v1/runs/{run_id}")).status_code == 200
        tool.gate.set()
        await until(service, run_id, "RUN_DONE")


# More than one process


async def test_a_run_is_followed_from_a_process_that_does_not_drive_it(shared_dsn: str) -> None:
    async with (
        running_tool(gated=answer_at_gate) as tool,
        running_service(make_settings(), shared_dsn) as driver,
        running_service(make_settings(runs_max=0), shared_dsn) as other,
    ):
        run_id = await gated_run(driver, tool)
        async with followed(other, run_id) as read, followed(other, run_id, node="B") as read_b:
            await read(lambda parser: len(parser.events) == 4)
            assert driver.services.runner.drives(UUID(run_id))
            assert not other.services.runner.drives(UUID(run_id))
            tool.gate.set()
            events = (await read(never)).events
            of_b = (await read_b(never)).events
        journal = await stored(driver, run_id)
        assert seen(events) == journal
        assert seen(of_b) == [e for e in journal if '"node_id":"B"' in e[2]] + journal[-1:]
        # A run that another process accepted is answered like one of our own.
        waited = await other.client.get(f"/v1/runs/{run_id}")
        assert waited.json()["status"] == "done"


async def test_a_process_that_drains_ends_its_streams_and_the_run_goes_on_elsewhere(
    shared_dsn: str,
) -> None:
    async with (
        running_tool(gated=answer_at_gate) as tool,
        running_service(make_settings(), shared_dsn) as stays,
    ):
        async with AsyncExitStack() as stack:
            settings = make_settings(drain_grace_s=0.05)
            leaves = await stack.enter_async_context(running_service(settings, shared_dsn))
            run_id = await gated_run(leaves, tool)
            read = await stack.enter_async_context(followed(leaves, run_id))
            await read(lambda parser: len(parser.events) == 4)
            leaves.services.drain.begin()
            first = await read(never)
            assert first.comments[-1] == "draining"
            refused = await leaves.client.post("/v1/runs", json=diamond())
            problem(refused, 503, "draining")
            assert (await leaves.client.get("/readyz")).status_code == 503
            assert (await leaves.client.get("/livez")).status_code == 200
        tool.gate.set()
        async with followed(stays, run_id, after=last_seen(first)) as resumed:
            second = await resumed(never)
        assert seen(first.events) + seen(second.events) == await stored(stays, run_id)
        types = [event.event for event in second.events]
        assert types[0] == "RUN_RECOVERED"
        assert types[-1] == "RUN_DONE"
        assert {call.key for call in tool.calls(run_id, "A")} == {f"{run_id}:A:1"}


async def test_what_retention_took_is_a_gap_and_then_the_end(shared_dsn: str) -> None:
    old = UUID(int=id_at(1_600_000_000_000).int | (new_id().int & ((1 << 62) - 1)))
    async with journal_kit(shared_dsn) as kit:
        handle, accepted = kit.submit(run_id=old)
        await accepted
        await kit.log(handle, *"abc")
        done = [Event(EventType.RUN_DONE, {"output": {}})]
        handle.stamp(done, now_ms())
        await kit.journal.record(handle, Append(done, RunStatus.DONE, None))
    database = await Database.open(shared_dsn)
    try:
        pruned = await prune(database, run_day(old) + timedelta(days=1))
        assert [(day.runs, day.dropped) for day in pruned] == [(1, True)]
    finally:
        await database.close()

    async with running_service(make_settings(), shared_dsn) as service, asyncio.timeout(20):
        url = f"/v1/runs/{old}/events"
        for after, first in ((0, 1), (3, 4)):
            response = await service.client.get(url, headers={**SSE, "Last-Event-ID": str(after)})
            parser = parse([response.content])
            [gap] = parser.events
            assert (gap.event, gap.json, gap.id) == ("gap", {"from": first, "to": 5}, "")
        ended = await service.client.get(url, headers={**SSE, "Last-Event-ID": "5"})
        assert ended.status_code == 204
        shown = (await service.client.get(f"/v1/runs/{old}")).json()
        assert (shown["status"], shown["last_seq"], shown["nodes"]) == ("done", 5, [])
