"""An exporter in a process of its own, as the service sees it; `__main__.py` is the other side.

To make spans, pack and send them takes a third or half as long as to drive a small run. One
interpreter runs one thread at a time, so in a thread of the service this would be the time of its
loop. The child takes what a core has to spare, and its SDK is not in the service's memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping, Sequence

import orjson

from app.adapters.tracing.pipe import END, lines_of
from app.ports import Exported, RunTrace

log = logging.getLogger("flexrun.tracing")

AGAIN_S = 10.0
"""A child that died is not started again sooner than this after its last start."""
CLOSING_S = 2.0
"""How long a child that has nothing to do gets to end by itself."""

FAILED = Exported(arrived=False, cpu_s=0.0)


class ExporterProcess:
    """Starts its child with the first runs, and again when it died.

    `exporter`: the class that does the work there, as `module:name`; `arguments` are its own.
    """

    def __init__(self, exporter: str, arguments: Mapping[str, str]) -> None:
        self._exporter = exporter
        self._arguments = arguments
        self._child: Process | None = None
        self._started_at = -AGAIN_S
        self._is_exporting = False

    async def export(self, runs: Sequence[RunTrace]) -> Exported:
        """Raises OSError when no child can be started."""
        child = await self._running()
        if child is None:
            return FAILED
        self._is_exporting = True
        answer = await _ask(child, runs)
        self._is_exporting = False
        if not answer:
            self._child = None
            code = await child.wait()
            log.error("%s ended with %d; the next runs start it again", self._exporter, code)
            return FAILED
        return Exported(**orjson.loads(answer))

    async def _running(self) -> Process | None:
        if self._child is None and time.monotonic() - self._started_at >= AGAIN_S:
            self._started_at = time.monotonic()
            # -P: a folder `app` where the service was started is none of ours.
            command = (sys.executable, "-P", "-m", __package__, self._exporter)
            self._child = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE)
            assert self._child.stdin is not None
            start = {
                "arguments": self._arguments,  # not for the list of processes: there are keys
                "log_level": logging.getLevelName(log.getEffectiveLevel()),
            }
            self._child.stdin.write(orjson.dumps(start, option=orjson.OPT_APPEND_NEWLINE))
        return self._child

    async def aclose(self) -> None:
        """The end of its stdin tells a child to end. One that is busy is not waited for."""
        child, self._child = self._child, None
        if child is None:
            return
        assert child.stdin is not None
        child.stdin.close()
        if not self._is_exporting:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSING_S):
                    await child.wait()
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()


async def _ask(child: Process, runs: Sequence[RunTrace]) -> bytes:
    """The child's answer to a batch; b"" when it died."""
    assert child.stdin is not None
    assert child.stdout is not None
    with contextlib.suppress(ConnectionError):  # its end is read from stdout
        for run in runs:
            child.stdin.write(lines_of(run))
            await child.stdin.drain()
        child.stdin.write(END)
    return await child.stdout.readline()
