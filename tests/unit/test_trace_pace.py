"""How long an exporter of traces rests, by what its service does besides."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.journal import tracer as module
from app.journal.tracer import CORE_IN_USE, LOOK_S, Pace

SHARE = 0.01
BATCH_S = 0.015
LONG_S = 30.0


@dataclass
class Clock:
    """A process whose loop takes `busy` of a core all the time."""

    busy: float = 0.0
    wall_s: float = 0.0
    cpu_s: float = 0.0

    def monotonic(self) -> float:
        return self.wall_s

    def process_time(self) -> float:
        return self.cpu_s

    def pass_by(self, seconds: float) -> None:
        self.wall_s += seconds
        self.cpu_s += seconds * self.busy


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def share_taken(pace: Pace, clock: Clock, batch_s: float = BATCH_S) -> float:
    """The share of a core that an exporter takes which always has something to tell."""
    began_s, worked_s = clock.wall_s, 0.0
    while clock.wall_s - began_s < LONG_S:
        clock.pass_by(batch_s)
        pace.worked(batch_s)
        worked_s += batch_s
        while rest_s := pace.rest_s():
            assert rest_s == LOOK_S
            clock.pass_by(rest_s)
    return worked_s / (clock.wall_s - began_s)


@pytest.mark.parametrize("busy", [0.0, 0.3, 0.7])
def test_a_service_with_time_to_spare_leaves_what_it_does_not_use(
    clock: Clock, busy: float
) -> None:
    clock.busy = busy
    assert share_taken(Pace(SHARE), clock) == pytest.approx(CORE_IN_USE - busy, rel=0.02)


@pytest.mark.parametrize("busy", [0.75, 1.0, 1.7])
def test_a_busy_one_leaves_the_share_that_is_set(clock: Clock, busy: float) -> None:
    clock.busy = busy
    assert share_taken(Pace(SHARE), clock) == pytest.approx(SHARE, rel=0.02)


@given(busy=st.floats(0, 2), batch_s=st.floats(0.001, 1))
def test_never_more_than_what_is_not_in_use_nor_less_than_the_share(
    busy: float, batch_s: float
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(busy)
        patch.setattr(module, "time", clock)
        share = share_taken(Pace(SHARE), clock, batch_s)
    assert SHARE * 0.99 <= share <= CORE_IN_USE * 1.01


def test_moments_without_work_do_not_make_a_service_idle(clock: Clock) -> None:
    pace, worked_s = Pace(SHARE), 0.0
    while clock.wall_s < LONG_S:
        clock.busy = 1.0 if clock.busy == 0.6 else 0.6  # 0.8 in all
        clock.pass_by(BATCH_S)
        pace.worked(BATCH_S)
        worked_s += BATCH_S
        while rest_s := pace.rest_s():
            for _ in range(10):
                clock.busy = 1.0 if clock.busy == 0.6 else 0.6
                clock.pass_by(rest_s / 10)
    assert worked_s / clock.wall_s == pytest.approx(SHARE, rel=0.1)


def test_load_is_seen_also_when_no_batch_was_followed_by_a_rest(clock: Clock) -> None:
    pace = Pace(SHARE)
    assert share_taken(pace, clock) == pytest.approx(CORE_IN_USE, rel=0.02)
    clock.busy = 1.0
    assert share_taken(pace, clock) < 2 * SHARE  # with the moments before the first look


def test_a_rest_ends_soon_after_the_load_does(clock: Clock) -> None:
    clock.busy = 1.0
    pace = Pace(SHARE)
    pace.worked(1.0)  # at this share worth a hundred seconds
    for _ in range(4):
        assert pace.rest_s() == LOOK_S
        clock.pass_by(LOOK_S)
    clock.busy, quiet_s = 0.0, 0.0
    while rest_s := pace.rest_s():
        clock.pass_by(rest_s)
        quiet_s += rest_s
    assert quiet_s < 1.0 / CORE_IN_USE + 2 * LOOK_S


def test_a_batch_that_took_no_time_asks_for_no_rest(clock: Clock) -> None:
    pace = Pace(SHARE)
    pace.worked(0.0)
    assert pace.rest_s() == 0.0
    assert clock.wall_s == 0.0
