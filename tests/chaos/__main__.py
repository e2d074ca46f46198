"""`python -m tests.chaos --seed N --size ci|full`: break everything, then look whether it held.

Exit code: 0 nothing was violated, 1 something was (the table says what), 2 wrong arguments, 130 it
was ended from outside (SIGINT, SIGTERM).
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import uvloop

from tests.chaos.plan import SIZES, make_plan
from tests.chaos.report import as_json, as_text, write_docs
from tests.chaos.suite import Result, run_suite


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
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            result = runner.run(_until_told(run_suite(given.seed, size, _tell, logs=given.logs)))
        except asyncio.CancelledError:
            _tell("ended from outside: nothing was judged")
            return 130
    _tell(as_text(result))
    if given.out is not None:
        given.out.write_bytes(as_json(result))
    if given.write_docs:
        write_docs(result)
    return 1 if result.violations else 0


async def _until_told(suite: Coroutine[Any, Any, Result]) -> Result:
    """An end from outside takes everything down in order, too: mounts, servers, processes."""
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    return await suite


def _tell(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
