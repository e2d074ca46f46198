"""Runs over real HTTP: submit, stream, wait, look, resume."""

from __future__ import annotations

from tests.envelopes import diamond
from tests.service import RunningService

DIAMOND_EVENTS = [
    *("RUN_QUEUED", "RUN_START", "PLAN_GENERATED", "NODE_START", "NODE_DONE", "NODE_START"),
    *("NODE_START", "NODE_DONE", "NODE_DONE", "NODE_START", "NODE_DONE", "RUN_DONE"),
]


async def test_a_post_that_accepts_sse_streams_the_whole_run(service: RunningService) -> None:
    events = await service.stream(diamond())

    assert [event.event for event in events] == DIAMOND_EVENTS
    assert [event.seq for event in events] == list(range(1, 13))
    assert [event.id for event in events] == [str(n) for n in range(1, 13)]
