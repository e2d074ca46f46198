"""`python -m bench`: all workloads in turn, round by round, and a table of what they gave.

Nothing here fails because something was slow; what can not be measured is said at the end, and
makes the exit code 1.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import platform
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import orjson
import uvloop

from app.version import VERSION
from bench import (
    claims,
    growth,
    limits,
    models,
    shapes,
    starts,
    streams,
    takeover,
    tracing,
    two_workers,
)
from bench.rig import Rig, scratch
from bench.stats import Book, Figure, Goal, Ratio, figures_table

Group = Callable[[Rig], Awaitable[None]]

GROUPS: dict[str, Group] = {
    "limits": limits.limits,
    "diamond": shapes.diamond,
    "chain": shapes.chain,
    "wide": shapes.wide,
    "plans": shapes.plans,
    "streams": streams.streams,
    "starts": starts.starts,
    "takeover": takeover.takeover,
    "frozen": takeover.frozen,
    "restart": takeover.restart,
    "claims": claims.claims,
    "models": models.models,
    "two_workers": two_workers.two_workers,
    "growth": growth.growth,
    "tracing": tracing.tracing,
}
RATIOS = (
    Ratio("bare FastAPI POST over diamond runs/s", limits.POST_RATE, shapes.DIAMOND_RATE),
    Ratio("diamond, first event, in one-row commits", shapes.DIAMOND_FIRST, limits.COMMIT),
    Ratio("diamond, last event, in one-row commits", shapes.DIAMOND_DONE, limits.COMMIT),
    Ratio("chain, per step, in one-row commits", shapes.CHAIN_STEP, limits.COMMIT),
    Ratio(
        "frames/s, flexrun over sse-starlette",
        streams.OURS,
        streams.STOCK,
        Goal(3, 5, better="more"),
    ),
    Ratio(
        "runs/s from the queue, two workers over one",
        two_workers.TWO,
        two_workers.ONE,
        Goal(1.2, 1.5, better="more"),
    ),
    Ratio(
        "runs/s over HTTP, two services over one", two_workers.TWO_SERVICES, two_workers.ONE_SERVICE
    ),
    Ratio("a call of a model, gateway without cache over httpx", models.GATEWAY, models.BARE),
    Ratio(
        "runs/s, 1 M events over an empty journal",
        growth.FULL,
        growth.EMPTY,
        Goal(0.9, 1.0, better="more"),
    ),
)
GROUP_S_LEAST = 90.0
"""What is begun may take so long, even when the time is nearly over."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and answer with the exit code."""
    asked = _parser().parse_args(arguments)
    book = Book(RATIOS)
    problems = uvloop.run(_measure(asked, book))
    _print(book, asked)
    if asked.json is not None:
        content = {"machine": machine(), "scale": asked.scale, **book.as_dict()}
        asked.json.write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2))
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--only", type=_groups, default=list(GROUPS), help=f"some of: {','.join(GROUPS)}"
    )
    parser.add_argument("--rounds", type=_positive, default=3, help="times each is measured [3]")
    parser.add_argument("--scale", type=float, default=1.0, help="size of the loads [1.0]")
    parser.add_argument(
        "--seconds", type=float, default=240.0, help="begin nothing new after this long [240]"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every value there")
    parser.add_argument("--markdown", action="store_true", help="print tables to be pasted")
    return parser


def _groups(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    unknown = [name for name in names if name not in GROUPS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"no such workload: {', '.join(unknown) or text!r}")
    return [name for name in GROUPS if name in names]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return value


async def _measure(asked: argparse.Namespace, book: Book) -> list[str]:
    """Every workload once, then again; what went wrong, in words."""
    problems: list[str] = []
    began = time.monotonic()
    with scratch() as folder:
        async with AsyncExitStack() as stack:
            rig = Rig(folder, book, stack, asked.scale)
            broken: set[str] = set()
            for number in range(1, asked.rounds + 1):
                for name in asked.only:
                    if name in broken:
                        continue
                    left = asked.seconds - (time.monotonic() - began)
                    if left <= 0:
                        return [*problems, *_out_of_time(number, asked)]
                    problem = await _one(name, rig, number, max(left, GROUP_S_LEAST))
                    if problem is not None:
                        problems.append(problem)
                        broken.add(name)
    return problems


def _out_of_time(number: int, asked: argparse.Namespace) -> list[str]:
    """That later rounds are missing is no problem, only said; that a first one is missing is."""
    text = f"--seconds {asked.seconds:g} were over in round {number} of {asked.rounds}"
    if number == 1:
        return [text]
    print(text, file=sys.stderr)
    return []


async def _one(name: str, rig: Rig, number: int, seconds: float) -> str | None:
    """One workload of one round; why it could not be measured, if so."""
    began = time.monotonic()
    gc.collect()
    try:
        async with asyncio.timeout(seconds):
            await GROUPS[name](rig)
    except Exception as error:
        why = f"{type(error).__name__}: {error}".strip(": ")
        return f"round {number}: {name} could not be measured: {why}"
    print(f"round {number}: {name} {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
    return None


def machine() -> dict[str, str]:
    """What the figures depend on."""
    return {
        "flexrun": VERSION,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": str(os.cpu_count()),
    }


def _print(book: Book, asked: argparse.Namespace) -> None:
    facts = ", ".join(f"{name} {value}" for name, value in machine().items())
    print(f"{facts}; rounds {asked.rounds}, scale {asked.scale:g}")
    tables: tuple[tuple[str, list[Figure]], ...] = (
        ("Figures", book.figures()),
        ("Ratios, taken round by round", book.ratios()),
    )
    for title, figures in tables:
        if figures:
            heading = f"### {title}" if asked.markdown else title
            print(f"\n{heading}\n\n{figures_table(figures, markdown=asked.markdown)}")


if __name__ == "__main__":
    sys.exit(main())
