"""The runs that a full process keeps ready in memory: bounded, in order, each given out once."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from app.orchestrator.runner import BACKLOG_BYTES_MAX, BACKLOG_MAX, _Backlog


def never() -> Any:
    raise AssertionError("nothing is driven here")


def test_it_is_bounded_in_number_and_in_bytes() -> None:
    backlog = _Backlog()
    for number in range(BACKLOG_MAX):
        assert backlog.has_room
        backlog.add(UUID(int=number), never, 1)
    assert not backlog.has_room
    backlog.clear()
    assert (len(backlog), backlog.has_room) == (0, True)
    backlog.add(UUID(int=1), never, BACKLOG_BYTES_MAX)
    assert not backlog.has_room
    assert backlog.take(UUID(int=1)) is never
    assert backlog.has_room


def test_each_is_given_out_once_and_the_oldest_first() -> None:
    backlog = _Backlog()
    for number in range(3):
        backlog.add(UUID(int=number), never, 1)
    assert backlog.take(UUID(int=1)) is never
    assert backlog.take(UUID(int=1)) is None
    assert [backlog.take_first()[0].int for _ in range(len(backlog))] == [0, 2]
