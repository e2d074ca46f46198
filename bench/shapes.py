"""Runs by their shape: the diamond, the chain, the wide one, and big plans against small ones."""

from __future__ import annotations

import statistics

from bench import client, envelopes
from bench.process import Running
from bench.rig import Rig
from bench.stats import Goal, percentile

AT_ONCE = 32

DIAMOND_FIRST = "diamond alone: first event, p50"
DIAMOND_DONE = "diamond alone: last event, p50"
DIAMOND_RATE = f"diamond, {AT_ONCE} at once"
CHAIN_STEP = "chain of 100: per step"
BIG, SMALL = 2_000, 100


def _post(body: bytes) -> bytes:
    return client.request("POST", "/v1/runs", body, client.EVENT_STREAM)


DIAMOND = _post(envelopes.encoded(envelopes.diamond(), at_least=envelopes.BODY_BYTES))
"""The request of a run in the shape of a diamond, whose answer is its stream."""


async def diamond(rig: Rig) -> None:
    """A run alone, then many at once. A run is POSTed and its stream is the answer."""
    service, book = await rig.service(), rig.book
    alone = await client.one_by_one(service.port, DIAMOND, rig.count(100, least=5))
    first = [run.first_s * 1000 for run in alone]
    done = [run.done_s * 1000 for run in alone]
    book.add(DIAMOND_FIRST, "ms", statistics.median(first))
    book.add("diamond alone: first event, p95", "ms", percentile(first, 0.95))
    book.add(DIAMOND_DONE, "ms", statistics.median(done))
    book.add("diamond alone: last event, p95", "ms", percentile(done, 0.95))
    rate, cpu_ms = await throughput(service, rig.count(600, least=AT_ONCE))
    book.add(DIAMOND_RATE, "runs/s", rate)
    book.add(f"{DIAMOND_RATE}: CPU of the service", "ms/run", cpu_ms)


async def throughput(service: Running, count: int) -> tuple[float, float]:
    """Diamonds per second, and the service's own CPU time (ms) for each."""
    before = service.cpu_s
    rate = await client.at_once(service.port, DIAMOND, count, clients=AT_ONCE)
    return rate, (service.cpu_s - before) * 1000 / count


async def chain(rig: Rig) -> None:
    """100 nodes one after the other."""
    took = await _whole_run(rig, envelopes.encoded(envelopes.chain(100)), rig.count(8, least=2))
    rig.book.add(CHAIN_STEP, "ms", took / 100)


async def wide(rig: Rig) -> None:
    """One root, 200 nodes side by side, one that joins them."""
    took = await _whole_run(rig, envelopes.encoded(envelopes.wide(200)), rig.count(8, least=2))
    rig.book.add("200 wide: whole run", "ms", took)


async def plans(rig: Rig) -> None:
    """What a node costs in a plan of 2,000 and in one of 100, as a chain and side by side."""
    big = rig.count(BIG, least=SMALL)
    for name, of_size in (
        ("chain", envelopes.chain),
        ("wide", lambda nodes: envelopes.wide(nodes - 2)),
    ):
        small_ms = await _whole_run(rig, envelopes.encoded(of_size(SMALL)), rig.count(8, least=2))
        big_ms = await _whole_run(rig, envelopes.encoded(of_size(big)), rig.count(2))
        rig.book.add(f"{name} of {SMALL}: per node", "ms", small_ms / SMALL)
        rig.book.add(f"{name} of {BIG}: per node", "ms", big_ms / big)
        ratio = (big_ms / big) / (small_ms / SMALL)
        rig.book.add(f"{name}: per node, {BIG} over {SMALL}", "x", ratio, goal=Goal(1.3, 1.0))


async def _whole_run(rig: Rig, body: bytes, count: int) -> float:
    """The median of POST to last event, in ms."""
    service = await rig.service()
    runs = await client.one_by_one(service.port, _post(body), count, warm=1)
    return statistics.median(run.done_s * 1000 for run in runs)
