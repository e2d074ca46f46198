"""`python -m tests.chaos --seed N --size ci|full`: break everything, then look whether it held.

Exit code: 0 nothing was violated, 1 something was (the table says what), 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from pathlib import Path

import uvloop

from tests.chaos.plan import SIZES, make_plan
from tests.chaos.report import as_json, as_text, write_docs
from tests.chaos.suite import run_suite


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="decides faults and envelopes")
    parser.add_argument("--size", choices=sorted(SIZES), default="ci")
    parser.add_argument("--out", type=Path, help="where the report goes as JSON")
    parser.add_argument(
        "--write-docs", action="store_true", help="put the table into docs/RELIABILITY.md"
    )
    parser.add_argument("--logs", type=Path, help="a folder that keeps the output of all processes")
    parser.add_argument("--plan", action="store_true", help="only print the schedule")
    given = parser.parse_args()
    size = SIZES[given.size]
    if given.plan:
        for phase in make_plan(given.seed, size):
            for lane in phase.lanes:
                for step in lane:
                    _tell(f"{phase.name}: {step.fault} {step.choice} {step.amount}")
        return 0
    if given.logs is not None:
        given.logs.mkdir(parents=True, exist_ok=True)
    # An end from outside takes everything down in order, too: mounts, servers, processes.
    signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        result = runner.run(run_suite(given.seed, size, _tell, logs=given.logs))
    _tell(as_text(result))
    if given.out is not None:
        given.out.write_bytes(as_json(result))
    if given.write_docs:
        write_docs(result)
    return 1 if result.violations else 0


def _tell(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
