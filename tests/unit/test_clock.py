"""The clock of a process follows a server's, and no jump of its own machine's."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.kit import clock
from app.kit.ids import created_ms, new_id

HOUR_MS = 3_600_000


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    ahead_ns = clock._ahead_ns
    yield
    clock._ahead_ns = ahead_ns


def _server_says(ms: float) -> None:
    asked_at = time.monotonic_ns()
    clock.follow(ms, asked_at, time.monotonic_ns())


@pytest.mark.parametrize("off_ms", [-24 * HOUR_MS, -HOUR_MS, 0, HOUR_MS, 24 * HOUR_MS])
def test_times_and_ids_are_the_servers(off_ms: int) -> None:
    told = clock.now_ms() + off_ms
    _server_says(told)
    before = clock.now_ms()
    run_id = new_id()
    assert told <= before <= created_ms(run_id) <= clock.now_ms()
    assert clock.now_ms() - told < HOUR_MS / 2, "on the server's clock, not on the machine's"


def test_a_jump_of_the_machines_clock_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = clock.now_ms()
    monkeypatch.setattr(time, "time_ns", lambda: 0)
    assert before <= clock.now_ms() < before + HOUR_MS


@given(
    st.integers(0, 4_000_000_000_000),
    st.integers(0, 10**15),
    st.integers(0, 10_000_000_000),
    st.integers(-20_000_000_000, 20_000_000_000),
)
def test_only_an_answer_that_contradicts_the_clock_moves_it_to_the_middle_of_its_round_trip(
    told_ms: int, asked_at: int, took: int, off: int
) -> None:
    told = told_ms * 1_000_000
    middle = told - (2 * asked_at + took) // 2
    clock._ahead_ns = middle + off
    clock.follow(told_ms, asked_at, asked_at + took)
    # What the clock says of the moment of the answer, and when that can have been.
    is_possible = asked_at <= told - (middle + off) <= asked_at + took
    assert clock._ahead_ns == (middle + off if is_possible else middle)
