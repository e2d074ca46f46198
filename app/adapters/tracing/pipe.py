"""What goes down the pipe to an exporter's process: lines, as many as it takes, and no more.

    {"run_id": …, "traceparent": …}      a run
    {"seq": 1, …}                        its events, as they were stored
    …
                                         an empty line: the run is complete
                                         another one: the batch is

JSON has no raw line breaks, so the events go as they are: the service reads none of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import orjson

from app.ports import RunTrace

END = b"\n"


def lines_of(run: RunTrace) -> bytes:
    """A run, with the line that completes it."""
    head = orjson.dumps({"run_id": run.run_id, "traceparent": run.traceparent})
    return b"\n".join((head, *run.bodies, END))


def batches(lines: Iterator[bytes]) -> Iterator[list[RunTrace]]:
    """The batches in these lines. What is not complete when they end is left out."""
    runs: list[RunTrace] = []
    for line in lines:
        if line == END:
            yield runs
            runs = []
        else:
            runs.append(_run_of(orjson.loads(line), lines))


def _run_of(head: dict[str, str], lines: Iterable[bytes]) -> RunTrace:
    bodies = []
    for line in lines:
        if line == END:
            break
        bodies.append(line[:-1])
    return RunTrace(head["run_id"], head["traceparent"], bodies)
