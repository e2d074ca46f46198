"""The result of the suite: as a table for people, as JSON, and in docs/RELIABILITY.md."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import orjson

from tests.chaos.checker import shown
from tests.chaos.suite import Result

DOCS = Path(__file__).parents[2] / "docs" / "RELIABILITY.md"
BEGIN = "<!-- report: begin -->"
END = "<!-- report: end -->"


def as_text(result: Result) -> str:
    """The table of counts and what was broken."""
    width = max(len(name) for name in result.counts)
    lines = [f"{name:<{width}}  {count:>9,}" for name, count in result.counts.items()]
    lines += [f"{name:<{width}}  {seconds:>9.0f} s" for name, seconds in result.seconds.items()]
    lines += [f"{name}: {note}" for name, note in result.notes.items()]
    lines.append(f"violations: {len(result.violations)}")
    if result.violations:
        lines.append(shown(result.violations))
    return "\n".join(lines)


def as_json(result: Result) -> bytes:
    """The machine-readable report."""
    found: dict[str, Any] = {
        "seed": result.seed,
        "size": result.size,
        "counts": result.counts,
        "seconds": {name: round(value, 1) for name, value in result.seconds.items()},
        "notes": result.notes,
        "violations": [
            {"rule": v.rule, "run_id": v.run_id, "what": v.what} for v in result.violations
        ],
        "machine": {"python": platform.python_version(), "system": platform.system()},
    }
    return orjson.dumps(found, option=orjson.OPT_INDENT_2)


def write_docs(result: Result, path: Path = DOCS) -> None:
    """Put the table between the markers of the document."""
    head, begin, rest = path.read_text().partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} has no place for the report")
    path.write_text(head + BEGIN + "\n" + _as_markdown(result) + "\n" + END + tail)


def _as_markdown(result: Result) -> str:
    command = f'make chaos ARGS="--seed {result.seed} --size {result.size}"'
    lines = [
        f"`{command}`, {result.seconds['in all'] / 60:.0f} minutes, "
        f"**{len(result.violations)} violations**.",
        "",
        "| what | how often |",
        "|---|---:|",
    ]
    lines += [f"| {name} | {count:,} |" for name, count in result.counts.items()]
    notes = [f"- {name}: {note}" for name, note in result.notes.items()]
    return "\n".join([*lines, "", *notes]).rstrip()
