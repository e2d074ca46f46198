"""Channels: a ring of the newest frames that many readers follow at their own pace."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain.errors import Unavailable
from app.journal import feed
from app.journal.feed import RING_FRAMES_MAX, Channel, Feed, Filter
from app.journal.frames import Frame, frame_of
from app.store.events import EventRow, Tail

RUN = UUID(int=1)
OTHER = UUID(int=2)


def _frame(seq: int, event_type: str = "LOG", node_id: str | None = None) -> Frame:
    return frame_of(seq, event_type, node_id, "INFO", b"%d" % seq)


def _frames(first: int, last: int) -> list[Frame]:
    return [_frame(seq) for seq in range(first, last + 1)]


def _seqs(frames: list[Frame] | None) -> list[int] | None:
    return None if frames is None else [frame.seq for frame in frames]


def _channel(last: int = 0) -> Channel:
    return Channel(RUN, last)


# What a channel takes


def test_frames_that_follow_are_taken() -> None:
    channel = _channel(4)
    assert channel.push(_frames(5, 6))
    assert channel.push(_frames(7, 7))
    assert (channel.last, _seqs(channel.frames)) == (7, [5, 6, 7])


def test_a_gap_is_refused_and_changes_nothing() -> None:
    channel = _channel(4)
    channel.push(_frames(5, 5))
    assert not channel.push(_frames(7, 8))
    assert (channel.last, _seqs(channel.frames)) == (5, [5])


def test_frames_that_are_known_change_nothing() -> None:
    channel = _channel(4)
    channel.push(_frames(5, 7))
    taken = list(channel.frames)
    for again in ([], _frames(1, 4), _frames(5, 7), _frames(6, 7)):
        assert channel.push(again)
        assert channel.frames == taken
        assert channel.last == 7


def test_of_frames_that_overlap_only_the_new_ones_are_taken() -> None:
    channel = _channel(4)
    channel.push(_frames(5, 7))
    assert channel.push(_frames(2, 9))
    assert (channel.last, _seqs(channel.frames)) == (9, [5, 6, 7, 8, 9])


def test_the_terminal_frame_ends_the_channel() -> None:
    channel = _channel()
    channel.push(_frames(1, 2))
    assert not channel.ended
    channel.push([_frame(3, "RUN_FAILED")])
    assert channel.ended
    channel.push(_frames(1, 2))
    assert channel.ended, "who comes second with old rows does not open it again"


def test_the_ring_forgets_the_oldest_frames() -> None:
    channel = _channel()
    for seq in range(1, RING_FRAMES_MAX + 500):
        channel.push([_frame(seq)])
        assert len(channel.frames) <= RING_FRAMES_MAX + 1
    assert channel.frames[-1].seq == channel.last
    assert len(channel.frames) >= RING_FRAMES_MAX
    assert channel.after(channel.last - RING_FRAMES_MAX) is not None
    assert channel.after(0) is None


def test_a_big_append_stays_until_the_next_one() -> None:
    channel = _channel()
    channel.push(_frames(1, 3 * RING_FRAMES_MAX))
    assert _seqs(channel.after(0)) == list(range(1, 3 * RING_FRAMES_MAX + 1))
    channel.push([_frame(3 * RING_FRAMES_MAX + 1)])
    assert len(channel.frames) == RING_FRAMES_MAX


def test_the_ring_is_bounded_in_bytes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(_frame(100).data)
    monkeypatch.setattr(feed, "RING_BYTES_MAX", 10 * size)
    channel = _channel(99)
    for seq in range(100, 200):
        channel.push([_frame(seq)])
        held = sum(len(frame.data) for frame in channel.frames)
        assert held <= 11 * size, "the bound and the newest append"
        assert held >= min(10, seq - 99) * size, "no more is forgotten than has to be"


def test_rows_that_are_gone_leave_room_in_the_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(_frame(100).data)
    monkeypatch.setattr(feed, "RING_BYTES_MAX", 10 * size)
    channel = _channel(99)
    channel.push(_frames(100, 120))
    channel.skip_to(199)
    for seq in range(200, 210):
        channel.push([_frame(seq)])
    assert _seqs(channel.after(199)) == list(range(200, 210))


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 8)), max_size=20), st.data())
def test_readers_at_any_pace_get_every_frame_once_or_must_page(
    pushes: list[tuple[int, int]], data: st.DataObject
) -> None:
    """Whatever comes, and however often: the ring is a run of seqs that ends at `last`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feed, "RING_FRAMES_MAX", 5)
        channel = _channel()
        for first, count in pushes:
            behind = channel.last
            taken = channel.push(_frames(first, first + count))
            assert taken is (first <= behind + 1)
            assert channel.last == (max(behind, first + count) if taken else behind)
            held = [frame.seq for frame in channel.frames]
            assert held == list(range(channel.last - len(held) + 1, channel.last + 1))
            cursor = data.draw(st.integers(0, channel.last + 2))
            wanted = list(range(cursor + 1, channel.last + 1))
            expected = wanted if set(wanted) <= set(held) else None
            assert _seqs(channel.after(cursor)) == expected


# What readers get


def test_a_reader_gets_what_is_behind_its_cursor() -> None:
    channel = _channel(4)
    channel.push(_frames(5, 8))
    assert _seqs(channel.after(4)) == [5, 6, 7, 8]
    assert _seqs(channel.after(6)) == [7, 8]
    assert channel.after(8) == []
    assert channel.after(11) == []
    assert channel.after(3) is None, "the ring begins at 5"


def test_a_new_channel_sends_readers_of_the_past_to_the_journal() -> None:
    channel = _channel(4)
    assert channel.after(4) == []
    assert channel.after(0) is None


def test_joined_frames_are_the_frames() -> None:
    channel = _channel(4)
    channel.push(_frames(5, 7))
    assert channel.joined_after(5) == _frame(6).data + _frame(7).data
    assert channel.joined_after(7) == b""
    assert channel.joined_after(3) is None


def test_readers_that_wait_together_share_one_join() -> None:
    channel = _channel()
    channel.push(_frames(1, 3))
    first = channel.joined_after(1)
    assert channel.joined_after(1) is first
    assert channel.joined_after(2) == _frame(3).data
    assert channel.joined_after(1) == first


def test_a_join_is_made_anew_when_frames_came() -> None:
    channel = _channel()
    channel.push(_frames(1, 2))
    assert channel.joined_after(1) == _frame(2).data
    channel.push(_frames(3, 3))
    assert channel.joined_after(1) == _frame(2).data + _frame(3).data


def test_rows_that_are_gone_send_every_reader_to_the_journal() -> None:
    channel = _channel()
    channel.push(_frames(1, 3))
    assert channel.joined_after(2) is not None
    channel.skip_to(9)
    assert channel.last == 9
    assert channel.after(2) is None
    assert channel.joined_after(2) is None
    assert channel.push(_frames(10, 10))
    assert _seqs(channel.after(9)) == [10]
    assert channel.after(8) is None


# Waiting


async def test_all_who_wait_are_woken_once_when_frames_come() -> None:
    channel = _channel()
    first, second = channel.wait(), channel.wait()
    assert channel.push([])
    assert not channel.push(_frames(3, 3))
    assert not first.done(), "nothing new came"
    channel.push(_frames(1, 1))
    assert await first
    assert await second
    later = channel.wait()
    assert not later.done()
    channel.wake()
    assert later.result() is True


async def test_who_no_longer_waits_is_forgotten() -> None:
    channel = _channel()
    left, stays, cancelled = channel.wait(), channel.wait(), channel.wait()
    channel.forget(left)
    channel.forget(left)
    cancelled.cancel()
    channel.push(_frames(1, 1))
    assert not left.done()
    assert stays.result() is True
    assert cancelled.cancelled()


async def test_a_skip_wakes_readers() -> None:
    channel = _channel()
    waiter = channel.wait()
    channel.skip_to(5)
    assert waiter.result() is True


# Filters


@pytest.mark.parametrize(
    ("wanted", "passes"),
    [
        (Filter(), True),
        (Filter(types=frozenset({"NODE_DONE"})), True),
        (Filter(types=frozenset({"LOG"})), False),
        (Filter(nodes=frozenset({"A", "B"})), True),
        (Filter(nodes=frozenset({"B"})), False),
        (Filter(levels=frozenset({"INFO"})), True),
        (Filter(levels=frozenset({"ERROR"})), False),
        (Filter(types=frozenset({"NODE_DONE"}), nodes=frozenset({"B"})), False),
        (Filter(types=frozenset({"NODE_DONE"}), levels=frozenset({"WARN"})), False),
    ],
)
def test_a_frame_must_pass_every_part_of_a_filter(wanted: Filter, passes: bool) -> None:
    assert wanted.passes(_frame(1, "NODE_DONE", "A")) is passes
    assert wanted.is_open is (wanted == Filter())
    assert wanted.passes(_frame(9, "RUN_DONE")), "the terminal event passes always"


# The feed


class StoredEvents:
    """A reader over rows in memory; `from_seq` is the first that retention has left."""

    def __init__(self, heads: dict[UUID, int], from_seq: int = 1) -> None:
        self.heads = heads
        self.from_seq = from_seq
        self.pages: list[tuple[UUID, int]] = []
        self.looked = asyncio.Event()
        self.away = False
        self.meanwhile: Callable[[], None] = lambda: None

    async def tails(
        self, after: Mapping[UUID, int], *, runs_max: int, rows_max: int, bytes_max: int
    ) -> dict[UUID, Tail]:
        self.looked.set()
        if self.away:
            raise Unavailable("The database is away.")
        behind = [run_id for run_id, seq in after.items() if self.heads.get(run_id, 0) > seq]
        found = {
            run_id: self._tail(run_id, after[run_id], rows_max) for run_id in behind[:runs_max]
        }
        self.meanwhile()
        return found

    def _tail(self, run_id: UUID, after: int, rows_max: int) -> Tail:
        self.pages.append((run_id, after))
        first = max(after + 1, self.from_seq)
        last = min(self.heads[run_id], first + rows_max - 1)
        rows = [EventRow(seq, "LOG", None, "INFO", str(seq)) for seq in range(first, last + 1)]
        return Tail(self.heads[run_id], rows)


def _feed(stored: StoredEvents) -> Feed:
    return Feed(stored)  # type: ignore[arg-type]  # what the feed needs of an EventReader


async def test_readers_of_one_run_share_a_channel_until_the_last_one_leaves() -> None:
    following = _feed(StoredEvents({}))
    first = following.enter(RUN, 3)
    assert following.enter(RUN, 1) is first
    assert following.enter(OTHER, 0) is not first
    assert (following.readers, first.followers, first.last) == (3, 2, 3)
    following.leave(first)
    following.publish(RUN, _frames(4, 4))
    assert first.last == 4
    following.leave(first)
    following.publish(RUN, _frames(5, 5))
    assert first.last == 4, "nobody follows"
    assert following.readers == 1
    assert following.enter(RUN, 5) is not first


async def test_draining_wakes_every_stream() -> None:
    following = _feed(StoredEvents({}))
    waiters = [following.enter(run_id, 0).wait() for run_id in (RUN, OTHER)]
    following.wake_all()
    assert all(waiter.result() for waiter in waiters)


async def test_a_page_is_given_to_the_reader_and_to_the_ring() -> None:
    following = _feed(StoredEvents({RUN: 6}))
    channel = following.enter(RUN, 4)
    assert _seqs(await following.page(channel, 2)) == [3, 4, 5, 6]
    assert (channel.last, _seqs(channel.frames)) == (6, [5, 6])
    assert channel.joined_after(5) == frame_of(6, "LOG", None, "INFO", b"6").data


async def test_a_gap_between_published_frames_is_filled_from_the_journal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(feed, "POLL_S", 3_600)
    stored = StoredEvents({RUN: 9})
    following = _feed(stored)
    following.start()
    channel = following.enter(RUN, 4)
    waiter = channel.wait()
    following.publish(RUN, _frames(8, 9))
    assert await asyncio.wait_for(waiter, 5)
    assert (channel.last, _seqs(channel.frames)) == (9, [5, 6, 7, 8, 9])
    await following.close()


async def test_a_nudge_brings_every_open_channel_to_its_head(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(feed, "POLL_S", 3_600)
    monkeypatch.setattr(feed, "PAGE_ROWS_MAX", 2)
    stored = StoredEvents({RUN: 5, OTHER: 3})
    following = _feed(stored)
    behind, ended = following.enter(RUN, 0), following.enter(OTHER, 2)
    ended.push([_frame(3, "RUN_DONE")])
    following.start()
    following.nudge()
    while behind.last < 5:
        assert await asyncio.wait_for(behind.wait(), 5)
    assert stored.pages == [(RUN, 0), (RUN, 2), (RUN, 4)]
    await following.close()


async def test_what_was_published_while_it_was_read_came_by_no_wake_up() -> None:
    """A run of this process whose rows the tailer reads a moment before they are published."""
    stored = StoredEvents({RUN: 4})
    following = _feed(stored)
    channel = following.enter(RUN, 4)
    await following._catch_up()
    assert channel.is_live
    stored.heads[RUN] = 6
    stored.meanwhile = lambda: following.publish(RUN, _frames(5, 6))
    await following._catch_up()
    assert (channel.last, stored.pages) == (6, [(RUN, 4)])
    assert following.metrics.wake_latency.count == 0


async def test_rows_that_retention_took_are_skipped() -> None:
    following = _feed(StoredEvents({RUN: 9}, from_seq=8))
    following.start()
    channel = following.enter(RUN, 4)
    waiter = channel.wait()
    following.nudge()
    assert await asyncio.wait_for(waiter, 5)
    assert channel.last == 9
    assert channel.after(4) is None
    await following.close()


async def test_a_database_that_is_away_only_delays_the_feed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(feed, "POLL_S", 0.001)
    stored = StoredEvents({RUN: 1})
    stored.away = True
    following = _feed(stored)
    channel = following.enter(RUN, 0)
    waiter = channel.wait()
    following.start()
    await asyncio.wait_for(stored.looked.wait(), 5)
    stored.away = False
    assert await asyncio.wait_for(waiter, 5), "the poll alone found the row"
    assert "delayed" in caplog.text
    await following.close()


async def test_the_feed_asks_nothing_while_nobody_follows() -> None:
    stored = StoredEvents({RUN: 1})
    following = _feed(stored)
    following.start()
    following.nudge()
    for _ in range(3):
        await asyncio.sleep(0)
    assert not stored.looked.is_set()
    following.enter(RUN, 0)
    following.nudge()
    await asyncio.wait_for(stored.looked.wait(), 5)
    await following.close()


async def test_a_feed_that_never_started_can_be_closed() -> None:
    await _feed(StoredEvents({})).close()


async def test_a_closed_feed_has_no_tailer_and_asks_no_more() -> None:
    stored = StoredEvents({RUN: 1})
    following = _feed(stored)
    following.start()
    following.enter(RUN, 0)
    assert _tailers() == 1
    await following.close()
    assert _tailers() == 0
    following.nudge()
    await asyncio.sleep(0)
    assert not stored.looked.is_set()


def _tailers() -> int:
    return sum(task.get_name() == "feed-tailer" for task in asyncio.all_tasks())
