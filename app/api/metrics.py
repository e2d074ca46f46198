"""`GET /metrics`: what this process counts and measures, in the text format of Prometheus.

The page is put together when it is asked for, from plain numbers (`kit/metrics.py`), from what the
services know, and from the shared queue (`store/queue_stats.py`). A database that is away leaves
its part out and never fails the page: this is what somebody looks at when it is away.
`docs/METRICS.md` has a line for every family; a test compares them.

No label ever holds what a caller sent, except the ids of registered capabilities, and of those no
more than `WORDS_MAX`. Names of providers are the operator's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate

from fastapi import APIRouter, Request, Response
from prometheus_client import ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from app.api.deps import services_of
from app.bootstrap import Services
from app.domain.events import EventType
from app.domain.signals import SignalKind
from app.kit.clock import now_ms
from app.kit.metrics import CALL_BOUNDS_S, Histogram, Metrics
from app.llm.selector import Reason
from app.ports import BreakerStatus, TransitionKind
from app.store.queue_stats import QueueStats
from app.version import VERSION

router = APIRouter(tags=["probes"])

PREFIX = "flexrun_"
_RUN_ENDS = {
    "done": EventType.RUN_DONE,
    "failed": EventType.RUN_FAILED,
    "cancelled": EventType.RUN_CANCELLED,
}
_NODE_OUTCOMES = {
    "done": EventType.NODE_DONE,
    "failed": EventType.NODE_FAILED,
    "retry": EventType.NODE_RETRY,
    "blocked": EventType.NODE_BLOCKED,
    "skipped": EventType.NODE_SKIPPED,
}
_TRACE_OUTCOMES = ("exported", "failed", "dropped", "unsampled")
_process = ProcessCollector(registry=None)


@router.get(
    "/metrics",
    summary="What this process counts and measures, for Prometheus",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(request: Request) -> Response:
    services = services_of(request)
    stats = await services.queue_watch.stats()
    page = [
        *_own_families(services),
        *_queue_families(stats, now_ms()),
        *await _breaker_families(services),
        *_process.collect(),
    ]
    # Many capabilities make many lines: writing them must not hold up the loop.
    text = await asyncio.to_thread(render, page)
    headers = {"Cache-Control": "no-store", "Content-Type": CONTENT_TYPE_PLAIN_0_0_4}
    return Response(text, headers=headers)


def render(families: Iterable[Metric]) -> bytes:
    """The families as text; the library escapes the values of labels."""
    return generate_latest(_Page(families))


class _Page(Collector):
    """What the library wants to be given: something that can be collected."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


# --- this process ---------------------------------------------------------------------------------


def _own_families(services: Services) -> Iterator[Metric]:
    counted = services.metrics
    yield _gauge_by("build_info", "1, with the version that runs.", "version", {VERSION: 1})
    yield _gauge("runs_driven", "Runs that this process drives now.", services.runner.driven)
    yield from event_families(counted.events)
    yield _counter_by(
        "signals_applied",
        "Signals of operators that took effect.",
        "kind",
        {str(kind): counted.signals.get(kind, 0) for kind in SignalKind},
    )
    yield call_durations(counted)
    yield from model_families(counted, services.catalog.providers)
    yield from _journal_families(counted, services.journal.commits)
    yield from _reading_families(counted)
    yield _gauge(
        "streams", "Open event streams and requests that wait for a run.", services.feed.readers
    )
    yield _counter("stream_frames", "Events sent to streams.", counted.stream_frames)
    yield histogram(
        "wake_latency_seconds",
        "From the time of an event to its arrival here, for followed runs that others drive.",
        counted.wake_latency,
    )
    yield _counter(
        "lease_losses",
        "Times the worker's lease ran out and it let go of all runs.",
        counted.lease_losses,
    )
    yield _gauge(
        "event_loop_lag_seconds",
        "How late the event loop was at its last look, once a second.",
        counted.loop_lag.last,
    )
    yield _gauge(
        "event_loop_lag_max_seconds",
        "The worst lag of the event loop since the last scrape.",
        counted.loop_lag.take_worst(),
    )


def event_families(events: Mapping[str, int]) -> Iterator[Metric]:
    """What is read from the durable events of this process's own appends."""
    yield _counter_by(
        "runs_finished", "Runs that this process ended, by how.", "status", _of(events, _RUN_ENDS)
    )
    yield _counter_by(
        "node_outcomes",
        "Node attempts that ended, and nodes blocked or skipped, by outcome.",
        "outcome",
        _of(events, _NODE_OUTCOMES),
    )
    yield _counter(
        "takeovers",
        "Runs under way that this process took up from another that died, or that gave them back.",
        events.get(EventType.RUN_RECOVERED, 0),
    )


def call_durations(counted: Metrics) -> Metric:
    """One histogram a capability."""
    return _histogram_by(
        "node_duration_seconds",
        "How long calls of capabilities took; of more than 200, the rest is `other`.",
        "capability_id",
        counted.calls.of,
    )


def model_families(counted: Metrics, providers: Iterable[str]) -> Iterator[Metric]:
    """Calls of models; the providers of the catalog are there from the start."""
    names = list(providers)
    yield _counter_by(
        "model_selections",
        "Choices of a model for a call, by reason.",
        "reason",
        {str(reason): counted.model_selections.get(reason, 0) for reason in Reason},
    )
    calls = dict.fromkeys(((name, "ok") for name in names), 0) | counted.llm_calls
    yield _counter_of(
        "llm_calls", "Calls of models that ended, by outcome.", ["provider", "outcome"], calls
    )
    tokens = {(name, way): 0 for name in names for way in ("in", "out")} | counted.llm_tokens
    yield _counter_of(
        "llm_tokens",
        "Tokens of prompts (in) and answers (out); projected where a provider does not count.",
        ["provider", "direction"],
        tokens,
    )
    costs = dict.fromkeys(names, 0.0) | {n: float(v) for n, v in counted.llm_cost_usd.items()}
    yield _counter_by(
        "llm_cost_usd", "What calls cost, by the prices of the catalog.", "provider", costs
    )
    durations = {name: Histogram(CALL_BOUNDS_S) for name in names} | counted.llm_durations.of
    yield _histogram_by(
        "llm_duration_seconds", "How long calls of models took.", "provider", durations
    )


def _journal_families(counted: Metrics, commits: int) -> Iterator[Metric]:
    yield _counter("journal_commits", "Commits of the journal's writers.", commits)
    yield histogram("journal_flush_runs", "Runs in one commit.", counted.flush_runs)
    yield histogram("journal_flush_events", "Events in one commit.", counted.flush_events)
    yield _counter(
        "journal_stale_writes",
        "Appends refused because another worker holds the run.",
        counted.stale_writes,
    )


def _reading_families(counted: Metrics) -> Iterator[Metric]:
    yield _counter_by(
        "traced_runs",
        "Runs that came to rest here, by what became of their traces.",
        "outcome",
        {outcome: counted.traced_runs.get(outcome, 0) for outcome in _TRACE_OUTCOMES},
    )
    yield _counter(
        "unlogged_events",
        "Events without a line in the log, or of runs without records: lines could not be written.",
        counted.unlogged_events,
    )


# --- what all processes share ---------------------------------------------------------------------


def _queue_families(stats: QueueStats | None, now: int) -> Iterator[Metric]:
    yield _gauge(
        "database_up",
        "Whether the last reading of the queue succeeded, 1 or 0.",
        int(stats is not None),
    )
    if stats is None:
        return
    yield _gauge_by(
        "runs_unfinished", "Runs of the whole service by status.", "status", stats.unfinished
    )
    yield _gauge_by(
        "queue_depth",
        "Runs that wait for a worker, by lane; counted up to 100,000.",
        "lane",
        stats.depth,
    )
    ages = {lane: max(now - stats.oldest_ms.get(lane, now), 0) / 1000 for lane in stats.depth}
    yield _gauge_by(
        "queue_oldest_age_seconds",
        "How long the oldest run of a lane has waited; 0 when none does.",
        "lane",
        ages,
    )
    yield _gauge_by("workers", "Processes with a lease that holds, by role.", "role", stats.workers)


async def _breaker_families(services: Services) -> list[Metric]:
    by_status = {str(status): 0 for status in BreakerStatus}
    for view in await services.breakers.views():
        by_status[view.status] += 1
    announced = services.metrics.breaker_transitions
    return [
        _gauge_by("breakers", "Breakers by status.", "status", by_status),
        _gauge(
            "breaker_degraded",
            "1 while Redis is away and this process judges alone, else 0.",
            int(services.breakers.is_degraded),
        ),
        _counter_by(
            "breaker_transitions",
            "Openings, trial calls and closings that runs of this process announced.",
            "kind",
            {str(kind): announced.get(kind, 0) for kind in TransitionKind},
        ),
    ]


# --- families -------------------------------------------------------------------------------------


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, text, value=value)


def _gauge_by(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, text, labels=[label])
    for word, value in values.items():
        family.add_metric([word], value)
    return family


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(PREFIX + name, text, value=value)


def _counter_by(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = CounterMetricFamily(PREFIX + name, text, labels=[label])
    for word, value in values.items():
        family.add_metric([word], value)
    return family


def _counter_of(
    name: str, text: str, labels: list[str], values: Mapping[tuple[str, str], float]
) -> Metric:
    family = CounterMetricFamily(PREFIX + name, text, labels=labels)
    for words, value in sorted(values.items()):
        family.add_metric(words, value)
    return family


def _histogram_by(name: str, text: str, label: str, found: Mapping[str, Histogram]) -> Metric:
    family = HistogramMetricFamily(PREFIX + name, text, labels=[label])
    for word, one in sorted(found.items()):
        family.add_metric([word], _buckets(one), one.total)
    return family


def histogram(name: str, text: str, found: Histogram) -> Metric:
    """A histogram without labels."""
    return HistogramMetricFamily(
        PREFIX + name, text, buckets=_buckets(found), sum_value=found.total
    )


def _buckets(found: Histogram) -> list[tuple[str, float]]:
    """Cumulated, as the format wants them."""
    bounds = [*map(str, found.bounds), "+Inf"]
    return list(zip(bounds, map(float, accumulate(found.counts)), strict=True))


def _of(events: Mapping[str, int], words: Mapping[str, str]) -> dict[str, int]:
    return {word: events.get(event_type, 0) for word, event_type in words.items()}
