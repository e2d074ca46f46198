"""The tracer alone: what it keeps, what it reads again, and what it gives up."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from uuid import UUID

import pytest

from app.bootstrap import Services
from app.domain.event_json import decode_event, encode_event
from app.domain.events import Event, EventType
from app.journal import rested
from app.journal import tracer as module
from app.journal.frames import Frame, frame_of
from app.journal.tracer import TraceLimits, Tracer
from app.kit.ids import new_id
from app.kit.metrics import Metrics
from app.ports import Exported, RunTrace
from tests.envelopes import diamond
from tests.service import RunningService


class Kept:
    """An exporter that keeps what it is given, and may be held up."""

    def __init__(self, *, fails: bool = False) -> None:
        self.runs: list[RunTrace] = []
        self.is_closed = False
        self.go = asyncio.Event()
        self.go.set()
        self._fails = fails

    async def export(self, runs: Sequence[RunTrace]) -> Exported:
        await self.go.wait()
        if self._fails:
            raise RuntimeError("broken")
        self.runs += runs
        return Exported(arrived=True, cpu_s=0.0)

    async def aclose(self) -> None:
        self.is_closed = True


def seqs(run: RunTrace) -> list[int]:
    return [decode_event(body).seq for body in run.bodies]


def frame(seq: int, event_type: EventType, run_id: UUID) -> Frame:
    event = Event(event_type, {}, seq=seq, ts=1_764_000_000_000 + seq)
    body = encode_event(event, str(run_id), "a" * 32)
    return frame_of(seq, event_type, None, event.level, body)


async def journal_of(service: RunningService) -> tuple[UUID, list[Frame]]:
    """A run that has ended, with its frames."""
    run = await service.finished(diamond())
    run_id = UUID(run["run_id"])
    rows = await service.services.reader.page(run_id, 0, 100)
    return run_id, [frame_of(r.seq, r.type, r.node_id, r.level, r.body.encode()) for r in rows]


@pytest.mark.parametrize("kept_from", [0, 1, 5, 11])
async def test_events_that_are_not_at_hand_are_read_from_the_journal(
    service: RunningService, kept_from: int
) -> None:
    run_id, frames = await journal_of(service)
    exporter, metrics = Kept(), Metrics()
    tracer = Tracer(service.services.reader, exporter, metrics, TraceLimits())
    for one in frames[kept_from:]:
        tracer.publish(run_id, [one])
    await tracer.aclose()
    [run] = exporter.runs
    assert (run.run_id, seqs(run)) == (str(run_id), list(range(1, 13)))
    assert metrics.traced_runs["exported"] == 1
    assert exporter.is_closed
    assert (tracer.runs.bytes_kept, tracer.runs.under_way) == (0, {})


async def test_memory_that_is_short_costs_reading_and_no_trace(
    service: RunningService, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id, frames = await journal_of(service)
    monkeypatch.setattr(rested, "BYTES_MAX", 1_000)
    exporter = Kept()
    tracer = Tracer(service.services.reader, exporter, Metrics(), TraceLimits())
    for one in frames:
        tracer.publish(run_id, [one])
        assert tracer.runs.bytes_kept <= 1_000 + len(one.data)
    await tracer.aclose()
    assert [len(run.bodies) for run in exporter.runs] == [12]
    assert tracer.runs.bytes_kept == 0


async def test_runs_that_nobody_can_take_are_given_up_and_counted(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rested, "RUNS_WAITING_MAX", 3)
    metrics = Metrics()
    tracer = Tracer(services.reader, Kept(), metrics, TraceLimits())
    for run_id in [new_id() for _ in range(5)]:
        tracer.publish(run_id, [frame(1, EventType.RUN_DONE, run_id)])
    assert metrics.traced_runs["dropped"] == 2
    await tracer.aclose()
    assert metrics.traced_runs["unsampled"] == 3  # no such runs in the database
    assert tracer.runs.bytes_kept == 0


async def test_runs_under_way_are_bounded_in_number(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rested, "RUNS_UNDER_WAY_MAX", 2)
    tracer = Tracer(services.reader, Kept(), Metrics(), TraceLimits())
    run_ids = [new_id() for _ in range(4)]
    for run_id in run_ids:
        tracer.publish(run_id, [frame(1, EventType.RUN_QUEUED, run_id)])
    assert list(tracer.runs.under_way) == run_ids[2:]
    tracer.publish(run_ids[0], [])  # signals without an event
    await tracer.aclose()


async def test_a_pause_is_a_rest_also_when_the_run_goes_on_in_the_same_append(
    service: RunningService,
) -> None:
    run_id, _ = await journal_of(service)
    types = (EventType.RUN_QUEUED, EventType.RUN_PAUSED, EventType.RUN_RESUMED, EventType.RUN_DONE)
    frames = [frame(seq, event_type, run_id) for seq, event_type in enumerate(types, 1)]
    exporter = Kept()
    tracer = Tracer(service.services.reader, exporter, Metrics(), TraceLimits())
    tracer.publish(run_id, frames[:3])
    tracer.publish(run_id, [frame(12, EventType.RUN_DONE, run_id)])
    await tracer.aclose()
    # seq 3 is kept alone, so the end is read from the journal
    assert [len(run.bodies) for run in exporter.runs] == [2, 12]
    assert tracer.runs.bytes_kept == 0


async def test_an_exporter_that_breaks_does_not_end_the_tracer(service: RunningService) -> None:
    run_id, frames = await journal_of(service)
    metrics = Metrics()
    tracer = Tracer(service.services.reader, Kept(fails=True), metrics, TraceLimits())
    tracer.publish(run_id, frames)
    await tracer.aclose()
    assert metrics.traced_runs["failed"] == 1


async def test_an_exporter_that_hangs_is_left_behind(
    service: RunningService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LEAVING_S", 0.2)
    run_id, frames = await journal_of(service)
    exporter, metrics = Kept(), Metrics()
    exporter.go.clear()
    tracer = Tracer(service.services.reader, exporter, metrics, TraceLimits())
    tracer.publish(run_id, frames)
    async with asyncio.timeout(10):
        await tracer.aclose()
    assert exporter.runs == []
    assert exporter.is_closed
    assert metrics.traced_runs["failed"] == 1
