"""Deltas in a stream: in their place among the events, or not at all, at whatever pace."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import cast
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import Message

from app.api import stream as stream_module
from app.api.stream import EventStream
from app.journal import delta_ring
from app.journal import feed as feed_module
from app.journal.delta_ring import DELTA_BYTES_MAX
from app.journal.feed import Channel, Feed, Filter
from app.journal.frames import frame_of
from app.kit.drain import Drain
from app.ports import Delta
from app.store.events import EventReader, EventRow, Tail
from tests.sse import SseEvent, parse

RUN = UUID(int=1)


@dataclass
class Stored:
    """The rows of a run, for streams that fell behind the ring."""

    rows: list[EventRow] = field(default_factory=list)

    async def tails(
        self, after: Mapping[UUID, int], *, runs_max: int, rows_max: int, bytes_max: int
    ) -> dict[UUID, Tail]:
        [(run_id, seq)] = after.items()
        rows = [row for row in self.rows if row.seq > seq]
        return {run_id: Tail(rows[-1].seq, rows[:rows_max])} if rows else {}


class Client:
    """Takes what a stream sends as fast as `takes` lets it."""

    def __init__(self) -> None:
        self.takes = asyncio.Semaphore(0)
        self.raw = b""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.body":
            await self.takes.acquire()
            self.raw += message["body"]

    async def receive(self) -> Message:
        raise AssertionError("a stream asks its client nothing")

    @property
    def events(self) -> list[SseEvent]:
        return parse([self.raw]).events


class Run:
    """A followed run: what happens in it reaches the feed and the rows."""

    def __init__(self) -> None:
        self.stored = Stored()
        self.feed = Feed(cast(EventReader, self.stored))
        self.seq = 0
        self.pieces = 0

    def happens(self, event_type: str) -> None:
        self.seq += 1
        body = f'{{"seq":{self.seq}}}'
        self.stored.rows.append(EventRow(self.seq, event_type, "A", "INFO", body))
        frame = frame_of(self.seq, event_type, "A", "INFO", body.encode())
        self.feed.publish(RUN, [frame])

    def says(self, text: str = "x", lag: int = 0) -> None:
        self.pieces += 1
        self.feed.tell(Delta(RUN, max(self.seq - lag, 0), "A", 1, 1, self.pieces, text))

    @asynccontextmanager
    async def followed(self, after: int = 0) -> AsyncIterator[tuple[Client, Channel]]:
        channel = self.feed.enter(RUN, after, listens=True)
        stream = EventStream(self.feed, channel, after=after, wanted=Filter(), drain=Drain())
        client = Client()
        task = asyncio.create_task(stream({"type": "http"}, client.receive, client.send))
        yield client, channel
        client.takes = _Open(client.takes)
        await asyncio.wait_for(task, 5)


class _Open(asyncio.Semaphore):
    """Whoever waits goes through, and whoever comes."""

    def __init__(self, before: asyncio.Semaphore) -> None:
        super().__init__(1_000_000)
        for _ in range(1_000):
            before.release()


def check(events: list[SseEvent], last: int) -> list[int]:
    """Every event once and in order, no delta behind the end of its call; the pieces that came."""
    seqs = [event.seq for event in events if event.event != "delta"]
    assert seqs == list(range(1, last + 1))
    pieces = [event.json["piece"] for event in events if event.event == "delta"]
    assert pieces == sorted(set(pieces)), "in order, none twice"
    is_over = False
    for event in events:
        if event.event == "delta":
            assert not is_over
        else:
            is_over = event.event in ("LLM_RESPONSE", "RUN_DONE")
    return pieces


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_quick_client_gets_every_piece_in_its_place() -> None:
    run = Run()
    async with run.followed() as (client, _):
        client.takes.release()
        run.happens("LLM_REQUEST")
        for _ in range(3):
            client.takes.release()
            run.says()
            await settle()
        run.happens("LLM_RESPONSE")
        run.happens("RUN_DONE")
    assert [event.event for event in client.events] == [
        *("LLM_REQUEST", "delta", "delta", "delta", "LLM_RESPONSE", "RUN_DONE")
    ]
    assert check(client.events, 3) == [1, 2, 3]
    assert {event.id for event in client.events[:4]} == {"1"}, "a delta has no id of its own"


async def test_what_came_while_a_send_was_under_way_keeps_its_order() -> None:
    run = Run()
    async with run.followed() as (client, _):
        run.happens("LLM_REQUEST")
        await settle()
        for _ in range(3):
            run.says()
        run.happens("LLM_RESPONSE")
        run.happens("LLM_REQUEST")
        run.says()
        run.happens("RUN_DONE")
    assert [event.event for event in client.events] == [
        *("LLM_REQUEST", "delta", "delta", "delta", "LLM_RESPONSE"),
        *("LLM_REQUEST", "delta", "RUN_DONE"),
    ]


async def test_a_delta_waits_for_the_event_that_it_stands_behind() -> None:
    run = Run()
    async with run.followed() as (client, _):
        for _ in range(9):
            client.takes.release()
        run.happens("NODE_START")
        run.feed.tell(Delta(RUN, 2, "A", 1, 1, 1, "stamped, and not durable yet"))
        await settle()
        assert [event.event for event in client.events] == ["NODE_START"]
        run.happens("LLM_REQUEST")
        await settle()
        assert [event.event for event in client.events][1:] == ["LLM_REQUEST", "delta"]
        run.happens("RUN_DONE")


async def test_a_delta_that_came_during_a_send_does_not_wait_for_an_event() -> None:
    run = Run()
    async with run.followed() as (client, _):
        run.happens("LLM_REQUEST")
        await settle()
        run.says()
        for _ in range(9):
            client.takes.release()
        await settle()
        assert [event.event for event in client.events] == ["LLM_REQUEST", "delta"]
        run.happens("RUN_DONE")


async def test_who_comes_back_behind_a_call_is_told_nothing_of_it() -> None:
    run = Run()
    async with run.followed():
        run.happens("LLM_REQUEST")
        run.says()
        run.happens("LLM_RESPONSE")
        run.happens("LLM_REQUEST")
        run.says()
        async with run.followed(after=3) as (client, _):
            run.happens("RUN_DONE")
    assert [event.event for event in client.events] == ["delta", "RUN_DONE"]
    assert client.events[0].json["piece"] == 2


async def test_a_slow_client_loses_deltas_and_no_event_and_costs_no_more_than_the_ring() -> None:
    run = Run()
    async with run.followed() as (client, channel):
        run.happens("LLM_REQUEST")
        for _ in range(20):
            await settle()
            for _ in range(100):
                run.says("word " * 100)
            run.happens("LOG")
            ring = channel.deltas
            assert ring is not None
            held = sum(len(ring[number].data) for number in range(ring.first, ring.end))
            assert held <= DELTA_BYTES_MAX
        run.happens("LLM_RESPONSE")
        run.happens("RUN_DONE")
    pieces = check(client.events, 23)
    assert 0 < len(pieces) < 700
    assert pieces[-1] == 2_000


@settings(max_examples=100)
@given(st.lists(st.sampled_from(["says", "late", "ask", "log", "take", "turn"]), max_size=60))
def test_at_any_pace_events_are_whole_and_deltas_in_their_place(steps: list[str]) -> None:
    """Rings and sends are tiny, so that streams page and miss things; calls follow each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feed_module, "RING_FRAMES_MAX", 3)
        patch.setattr(delta_ring, "DELTAS_MAX", 4)
        patch.setattr(stream_module, "SEND_BYTES_MAX", 300)
        patch.setattr(stream_module, "SHARED_BYTES_MAX", 300)
        asyncio.run(_walk(steps))


async def _walk(steps: list[str]) -> None:
    run = Run()
    async with run.followed() as (client, _):
        run.happens("LLM_REQUEST")
        for step in steps:
            if step in ("says", "late"):
                run.says(lag=step == "late")
            elif step == "ask":
                run.happens("LLM_RESPONSE")
                run.happens("LLM_REQUEST")
            elif step == "log":
                run.happens("LOG")
            elif step == "take":
                client.takes.release()
            else:
                await settle()
        run.happens("LLM_RESPONSE")
        run.happens("RUN_DONE")
    check(client.events, run.seq)
