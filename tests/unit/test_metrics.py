"""What a process counts about itself, and how it becomes text."""

from __future__ import annotations

import asyncio
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.api.metrics import call_durations, event_families, histogram, model_families, render
from app.domain.events import Event, EventType
from app.kit import metrics
from app.kit.metrics import (
    OTHER,
    WORDS_MAX,
    Histogram,
    HistogramBy,
    LoopLag,
    Metrics,
    watched_loop,
)
from app.orchestrator.ask import count_models
from app.orchestrator.run import Said


def samples(text: bytes) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


@pytest.mark.parametrize(
    ("value", "counts"),
    [(0.0, [1, 0, 0]), (1.0, [1, 0, 0]), (1.1, [0, 1, 0]), (2.0, [0, 1, 0]), (2.1, [0, 0, 1])],
)
def test_a_value_on_a_bound_belongs_below_it(value: float, counts: list[int]) -> None:
    found = Histogram((1.0, 2.0))
    found.observe(value)
    assert (found.counts, found.total, found.count) == (counts, value, 1)


def test_buckets_are_cumulated_and_closed_by_infinity() -> None:
    found = Histogram((1.0, 2.0))
    for value in (0.5, 1.5, 1.5, 9.0):
        found.observe(value)
    lines = samples(render([histogram("x_seconds", "x", found)]))
    assert lines == {
        ("flexrun_x_seconds_bucket", frozenset({("le", "1.0")})): 1,
        ("flexrun_x_seconds_bucket", frozenset({("le", "2.0")})): 3,
        ("flexrun_x_seconds_bucket", frozenset({("le", "+Inf")})): 4,
        ("flexrun_x_seconds_count", frozenset()): 4,
        ("flexrun_x_seconds_sum", frozenset()): 12.5,
    }


def test_words_are_bounded_and_the_rest_is_one_word() -> None:
    found = HistogramBy((1.0,))
    for number in range(WORDS_MAX + 7):
        found.observe(f"tool.{number}", 0.5)
    found.observe("tool.0", 0.5)
    assert len(found.of) == WORDS_MAX + 1
    assert found.of[OTHER].count == 7
    assert found.of["tool.0"].count == 2


def test_a_capability_that_is_called_other_takes_no_word_from_the_rest() -> None:
    found = HistogramBy((1.0,))
    found.observe(OTHER, 0.5)
    for number in range(WORDS_MAX + 1):
        found.observe(f"tool.{number}", 0.5)
    assert len(found.of) == WORDS_MAX + 1
    assert found.of[OTHER].count == 2


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb", '"} 1\nflexrun_up{x="', "ä°"])
def test_label_values_can_not_break_out_of_their_line(name: str) -> None:
    counted = Metrics()
    counted.calls.observe(name, 0.5)
    text = render([call_durations(counted)])
    found = samples(text)
    assert {dict(labels)["capability_id"] for _, labels in found} == {name}
    assert {line.split(b"{")[0].split(b" ")[0] for line in text.splitlines()} == {
        b"#",
        *(b"flexrun_node_duration_seconds_" + end for end in (b"bucket", b"count", b"sum")),
    }


def test_every_word_of_an_event_family_is_there_from_the_start() -> None:
    found = samples(render(event_families({EventType.RUN_DONE: 3, EventType.LOG: 8})))
    assert found[("flexrun_runs_finished_total", frozenset({("status", "done")}))] == 3
    assert sum(found.values()) == 3
    assert len(found) == 3 + 5 + 1


def test_calls_of_models_are_counted_by_provider() -> None:
    def ended(outcome: str, cost: str) -> Event:
        data = {"provider": "near", "outcome": outcome, "duration_ms": 250.0, "cost_usd": cost}
        return Event(EventType.LLM_RESPONSE, {**data, "tokens_in": 12, "tokens_out": 5})

    counted = Metrics()
    chosen = Event(EventType.MODEL_SELECTED, {"reason": "fallback"})
    for events in ((chosen, ended("ok", "0.1")), (ended("timeout", "0.2"),), (ended("ok", "0"),)):
        count_models(Said(events), counted)
    found = samples(render(model_families(counted, ["far", "near"])))

    def value(name: str, **labels: str) -> float:
        return found[f"flexrun_{name}", frozenset(labels.items())]

    assert value("llm_calls_total", provider="near", outcome="ok") == 2
    assert value("llm_calls_total", provider="near", outcome="timeout") == 1
    assert value("llm_calls_total", provider="far", outcome="ok") == 0
    assert value("llm_tokens_total", provider="near", direction="in") == 36
    assert value("llm_tokens_total", provider="near", direction="out") == 15
    assert value("llm_cost_usd_total", provider="near") == 0.3
    assert value("llm_duration_seconds_sum", provider="near") == 0.75
    assert value("llm_duration_seconds_count", provider="far") == 0
    assert value("model_selections_total", reason="fallback") == 1
    assert value("model_selections_total", reason="preferred") == 0


def test_calls_that_a_node_made_itself_are_measured_like_nodes() -> None:
    counted = Metrics()
    for duration_ms in (250.0, 0.0):  # the second was never called
        data = {"capability_id": "soil.lookup", "outcome": "ok", "duration_ms": duration_ms}
        count_models(Said((Event(EventType.TOOL_CALLED, data),)), counted)
    found = samples(render([call_durations(counted)]))
    label = frozenset({("capability_id", "soil.lookup")})
    assert found["flexrun_node_duration_seconds_count", label] == 1
    assert found["flexrun_node_duration_seconds_sum", label] == 0.25


async def test_a_loop_that_is_held_up_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "LAG_EVERY_S", 0.01)
    lag = LoopLag()
    async with watched_loop(lag):
        await asyncio.sleep(0)  # it sleeps now, and is due in 10 ms
        time.sleep(0.2)  # noqa: ASYNC251 - what holds a loop up
        while not lag.last:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.001)
    assert lag.take_worst() > 0.1
    assert [task for task in asyncio.all_tasks() if task.get_name() == "loop-lag"] == []


def test_the_worst_lag_is_told_once() -> None:
    lag = LoopLag()
    for seconds in (0.1, 0.4, 0.2, -0.1):
        lag.note(seconds)
    assert (lag.last, lag.take_worst(), lag.take_worst()) == (0.0, 0.4, 0.0)
