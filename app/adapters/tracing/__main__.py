"""The process of an exporter: `python -m app.adapters.tracing <exporter>`, started by `process.py`.

It takes what a core has to spare, and ends when its stdin does: with the service, however that
ended.
"""

from __future__ import annotations

import logging
import os
import pkgutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from typing import BinaryIO, Protocol

import orjson

from app.adapters.tracing.pipe import batches
from app.kit.log import configure
from app.ports import RunTrace

log = logging.getLogger("flexrun.tracing")

NICENESS = 19


class Exporter(Protocol):
    """What an SDK has to do for us."""

    def export(self, runs: Sequence[RunTrace]) -> bool:
        """Whether they arrived, if it is known. Logs why they did not."""
        ...

    def close(self) -> None: ...


def main() -> None:
    """Serve one service. The first line of stdin has the arguments of the exporter."""
    [_, name] = sys.argv
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the service, which closes our stdin
        signal.signal(number, signal.SIG_IGN)
    answers = _own_stdout()
    start = orjson.loads(sys.stdin.buffer.readline())
    configure(start["log_level"])
    try:
        exporter: Exporter = pkgutil.resolve_name(name)(**start["arguments"])
    except Exception:
        log.exception("%s can not be used as it is configured", name)
        sys.exit(1)
    os.nice(NICENESS)  # from here on: to get ready takes 0.3 s of CPU, once
    serve(exporter, sys.stdin.buffer, answers)


def _own_stdout() -> BinaryIO:
    """Standard output for our answers alone; whatever else is printed goes to stderr."""
    ours = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return ours


def serve(exporter: Exporter, lines: Iterator[bytes], answers: BinaryIO) -> None:
    """Export each batch and answer it with a line, until the lines end."""
    for runs in batches(lines):
        began = time.process_time()
        arrived = _export(exporter, runs)
        answer = {"arrived": arrived, "cpu_s": time.process_time() - began}
        answers.write(orjson.dumps(answer, option=orjson.OPT_APPEND_NEWLINE))
    exporter.close()


def _export(exporter: Exporter, runs: Sequence[RunTrace]) -> bool:
    try:
        return exporter.export(runs)
    except Exception:
        log.exception("%d runs are not traced", len(runs))
        return False


if __name__ == "__main__":
    main()
