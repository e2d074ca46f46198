"""`flexrun`, whose tracing is on after SIGUSR1 and off after SIGUSR2: on at first.

    python -m bench.switched_tracing serve --port 0

Off means that no event is kept for the tracer and that no batch goes to the exporter. So one and
the same process can be measured with tracing and without.
"""

from __future__ import annotations

import asyncio
import signal
from typing import Any
from uuid import UUID

from app.cli.main import main
from app.journal import readings
from app.journal.frames import Frame
from app.journal.rested import RestedRun
from app.journal.tracer import Tracer

ON, OFF = signal.SIGUSR1, signal.SIGUSR2


class SwitchedTracer(Tracer):
    """A tracer that has nothing to do for some time."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._is_on = asyncio.Event()
        self._is_on.set()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(ON, self._is_on.set)
        loop.add_signal_handler(OFF, self._is_on.clear)

    def publish(self, run_id: UUID, frames: list[Frame]) -> None:
        if self._is_on.is_set():
            super().publish(run_id, frames)

    async def _export_and_count(self, runs: list[RestedRun]) -> float:
        await self._is_on.wait()
        return await super()._export_and_count(runs)


if __name__ == "__main__":
    vars(readings)["Tracer"] = SwitchedTracer  # there they are made
    main()
