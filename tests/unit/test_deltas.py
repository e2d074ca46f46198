"""Texts while they are said: pieces that are joined, kept in bounds and put in their place."""

from __future__ import annotations

import asyncio
from typing import cast
from uuid import UUID

import pytest
from pydantic import TypeAdapter

from app.api.run_schemas import DeltaFrame
from app.journal import delta_ring, deltas
from app.journal.delta_ring import DELTAS_MAX, DeltaRing, PlacedDelta
from app.journal.deltas import Deltas, Speech
from app.journal.feed import Channel, Feed, Filter
from app.journal.frames import Frame, delta_frame, frame_of
from app.journal.record import RunHandle
from app.kit.ids import new_id
from app.ports import Delta
from app.store.events import EventReader
from tests.sse import parse

RUN = UUID(int=1)
SHAPE = TypeAdapter(DeltaFrame)


def delta(
    seq: int, piece: int = 1, node_id: str = "A", call: int | None = 1, text: str = "x"
) -> Delta:
    return Delta(RUN, seq, node_id, 1, call, piece, text)


def frame(seq: int, event_type: str = "LOG", node_id: str | None = "A") -> Frame:
    return frame_of(seq, event_type, node_id, "INFO", b"%d" % seq)


# A text that is said


class Said:
    """What came of a speech."""

    def __init__(self) -> None:
        self.pieces: list[tuple[int, str]] = []
        self.came = asyncio.Event()

    def __call__(self, number: int, text: str) -> None:
        self.pieces.append((number, text))
        self.came.set()


async def test_what_is_said_at_once_is_one_piece_and_numbers_go_on() -> None:
    said = Said()
    with Speech(said) as speech:
        for word in ("oats", " and", "", " rye"):
            speech.add(word)
        assert said.pieces == [], "it waits for more"
        await asyncio.wait_for(said.came.wait(), 5)
        speech.add(" too")
    assert said.pieces == [(1, "oats and rye"), (2, " too")]


async def test_an_end_says_what_is_left_and_nothing_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(deltas, "JOIN_S", 0.0)
    said = Said()
    with Speech(said) as speech:
        speech.add("oats")
    speech.add("late")
    for _ in range(5):
        await asyncio.sleep(0)
    assert said.pieces == [(1, "oats")]


async def test_a_call_that_is_cut_off_says_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deltas, "JOIN_S", 0.0)
    said = Said()
    speaking, never = asyncio.Event(), asyncio.Event()

    async def call() -> None:
        with Speech(said) as speech:
            speech.add("oats")
            speaking.set()
            await never.wait()

    task = asyncio.create_task(call())
    await speaking.wait()
    task.cancel()
    for _ in range(5):
        await asyncio.sleep(0)
    assert task.cancelled()
    assert said.pieces == []


async def test_a_thread_may_speak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deltas, "JOIN_S", 0.0)
    said = Said()
    words = [f"{number} " for number in range(2_000)]

    def speak(speech: Speech) -> None:
        for word in words:
            speech.add(word)

    with Speech(said) as speech:
        await asyncio.to_thread(speak, speech)
    assert "".join(text for _, text in said.pieces) == "".join(words)
    assert [number for number, _ in said.pieces] == list(range(1, len(said.pieces) + 1))


async def test_too_much_at_once_is_dropped_and_the_numbers_show_where(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(deltas, "JOINED_CHARS_MAX", 4)
    said = Said()
    with Speech(said) as speech:
        for word in ("oats", "rye", "o"):
            speech.add(word)
        await asyncio.wait_for(said.came.wait(), 5)
        speech.add("end")
    assert said.pieces == [(1, "oats"), (3, "end")]


async def test_half_a_character_breaks_nothing() -> None:
    said = Said()
    with Speech(said) as speech:
        speech.add("\ud83d")
    assert said.pieces == [(1, "?")]


# The frame


def test_a_frame_has_no_id_and_the_shape_that_openapi_says() -> None:
    raw = delta_frame(delta(7, 3, text="a\n\nid: 9\r\ndata: {}\u2028"))
    assert b"\nid:" not in raw
    assert not raw.startswith(b"id:")
    [event] = parse([b"id: 7\nevent: LOG\ndata: {}\n\n", raw]).events[1:]
    assert (event.event, event.id) == ("delta", "7")
    found = SHAPE.validate_json(event.data)
    assert (found.node_id, found.attempt, found.call, found.piece) == ("A", 1, 1, 3)
    assert found.text == "a\n\nid: 9\r\ndata: {}\u2028"


def test_what_a_capability_says_itself_belongs_to_no_call_of_a_model() -> None:
    [event] = parse([delta_frame(delta(7, call=None))]).events
    assert "call" not in event.json
    SHAPE.validate_json(event.data)


# The ring


def placed(number: int, size: int = 10) -> PlacedDelta:
    return PlacedDelta(number, "A", b"x" * size)


def test_the_ring_keeps_the_newest_by_number() -> None:
    ring = DeltaRing()
    for number in range(DELTAS_MAX + 100):
        ring.push(placed(number))
        assert ring.end == number + 1
        assert ring[ring.first].after == ring.first
        assert ring[ring.end - 1].after == number
    assert ring.end - ring.first == DELTAS_MAX


def test_the_ring_is_bounded_in_bytes_and_keeps_the_newest_whatever_its_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(delta_ring, "DELTA_BYTES_MAX", 100)
    ring = DeltaRing()
    for number, size in enumerate((40, 40, 40, 1_000, 40, 60)):
        ring.push(placed(number, size))
        kept = [len(ring[n].data) for n in range(ring.first, ring.end)]
        assert sum(kept) <= 100 or len(kept) == 1
    assert (ring.first, ring.end) == (4, 6)


# Places


def places(channel: Channel) -> list[int]:
    ring = channel.deltas
    return [] if ring is None else [ring[n].after for n in range(ring.first, ring.end)]


def test_a_delta_stands_behind_all_that_is_known_here_or_was_when_it_was_said() -> None:
    channel = Channel(RUN, 0)
    channel.push([frame(1), frame(2)])
    for said_at in (2, 1, 4):
        channel.tell(delta(said_at))
    assert places(channel) == [2, 2, 4]


async def test_only_a_delta_that_need_not_wait_for_events_wakes_the_streams() -> None:
    channel = Channel(RUN, 2)
    waiter = channel.wait()
    channel.tell(delta(3))
    assert not waiter.done()
    channel.tell(delta(2))
    assert waiter.result()


@pytest.mark.parametrize(
    ("event", "is_late"),
    [
        (frame(5, "LLM_RESPONSE"), True),
        (frame(5, "NODE_DONE"), True),
        (frame(5, "NODE_RETRY"), True),
        (frame(5, "RUN_RECOVERED", None), True),
        (frame(5, "RUN_CANCELLED", None), True),
        (frame(5, "LLM_REQUEST"), False),
        (frame(5, "NODE_DONE", "B"), False),
        (frame(5, "RUN_PAUSED", None), False),
    ],
)
def test_a_delta_from_elsewhere_that_comes_behind_the_end_of_its_call_is_dropped(
    event: Frame, is_late: bool
) -> None:
    channel = Channel(RUN, 4)
    channel.push([event])
    channel.tell(delta(4))
    assert places(channel) == ([] if is_late else [5])
    if event.type != "RUN_CANCELLED":
        channel.tell(delta(5))
        assert places(channel)[-1:] == [5], "the next call, or the next attempt"


def test_a_delta_is_dropped_where_what_came_behind_it_is_not_known() -> None:
    channel = Channel(RUN, 9)
    channel.tell(delta(8))
    channel.tell(delta(9))
    assert places(channel) == [9]


@pytest.mark.parametrize(
    ("wanted", "is_taken"),
    [
        (Filter(), True),
        (Filter(types=frozenset({"NODE_DONE"})), False),
        (Filter(types=frozenset({"NODE_DONE", "delta"})), True),
        (Filter(nodes=frozenset({"A", "B"})), True),
        (Filter(nodes=frozenset({"B"})), False),
        (Filter(levels=frozenset({"INFO", "WARN"})), True),
        (Filter(levels=frozenset({"ERROR"})), False),
    ],
)
def test_filters(wanted: Filter, is_taken: bool) -> None:
    assert (wanted.takes_deltas and wanted.passes_delta(PlacedDelta(1, "A", b""))) is is_taken


# The feed


async def test_only_runs_with_a_stream_that_takes_deltas_have_any() -> None:
    feed = Feed(cast(EventReader, None))
    told: list[bool] = []
    feed.on_listener = lambda: told.append(True)
    feed.tell(delta(0))
    waiting = feed.enter(RUN, 0)
    feed.tell(delta(0))
    assert (feed.has_listeners(RUN), waiting.deltas, told) == (False, None, [])
    assert feed.enter(RUN, 0, listens=True) is waiting
    feed.tell(delta(0))
    assert (feed.has_listeners(RUN), feed.listeners) == (True, 1)
    assert (places(waiting), told) == ([0], [True])
    feed.leave(waiting, listens=True)
    assert (feed.has_listeners(RUN), feed.listeners) == (False, 0)
    assert not feed.has_listeners(UUID(int=2))


async def test_a_model_is_asked_to_stream_only_for_a_run_that_is_followed() -> None:
    feed = Feed(cast(EventReader, None))
    handle = RunHandle(new_id(), 1, 6, "t")
    speaking = Deltas(feed)
    channel = feed.enter(handle.run_id, 6)
    async with speaking.answer(handle, "A", 1, 1) as on_text:
        assert on_text is None
    feed.enter(handle.run_id, 6, listens=True)
    async with speaking.answer(handle, "A", 1, 2) as on_text:
        assert on_text is not None
        on_text("oats")
    ring = channel.deltas
    assert ring is not None
    [event] = parse([ring[0].data]).events
    who = {"run_id": str(handle.run_id), "node_id": "A", "attempt": 1}
    assert event.json == {**who, "call": 2, "piece": 1, "text": "oats"}
