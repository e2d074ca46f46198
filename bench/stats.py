"""Figures, ratios and goals, and how they are printed. Nothing here measures anything."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Better = Literal["less", "more"]


def percentile(values: Sequence[float], q: float) -> float:
    """The nearest-rank percentile, `q` from 0 to 1. Raises ValueError when there are no values."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Two of the values between which the true median lies, 95 % sure; fewer than six are too few
    for that and give the least and the greatest.

    By rank, whatever the distribution: the sign test turned round (Conover, Practical Nonparametric
    Statistics, 3.2). Raises ValueError when there are no values.
    """
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    count = len(ordered)
    rank, both_tails = 0, 2 / 2**count
    while (both_tails := both_tails + 2 * math.comb(count, rank + 1) / 2**count) <= 0.05:
        rank += 1
    return ordered[rank], ordered[-1 - rank]


def shown(value: float) -> str:
    """A figure with three significant digits, and never in exponent form."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 1 else f"{value:.3f}"


def spread(values: Sequence[float]) -> str:
    """`median (min-max)`; one value stands alone."""
    middle = shown(statistics.median(values))
    if len(values) == 1:
        return middle
    return f"{middle} ({shown(min(values))}-{shown(max(values))})"


@dataclass(frozen=True, slots=True)
class Goal:
    """What a figure should reach: `must`, better still `aim`."""

    must: float
    aim: float
    better: Better = "less"

    def verdict(self, value: float) -> str:
        """`aim met`, `must met` or `not met`."""
        if self._reaches(value, self.aim):
            return "aim met"
        return "must met" if self._reaches(value, self.must) else "not met"

    def _reaches(self, value: float, bound: float) -> bool:
        return value <= bound if self.better == "less" else value >= bound


@dataclass(frozen=True, slots=True)
class Ratio:
    """One figure over another of the same round, both by their names in the book."""

    what: str
    figure: str
    over: str
    goal: Goal | None = None


@dataclass(slots=True)
class Figure:
    """One measured thing: a value a round, with its unit and perhaps a goal."""

    what: str
    unit: str
    goal: Goal | None = None
    values: list[float] = field(default_factory=list)


class Book:
    """All figures of a benchmark, in the order in which they first came."""

    def __init__(self, ratios: Iterable[Ratio] = ()) -> None:
        self._figures: dict[str, Figure] = {}
        self._ratios = tuple(ratios)

    def add(self, what: str, unit: str, *values: float, goal: Goal | None = None) -> None:
        """Note what one round gave for a figure: one value, or several samples."""
        figure = self._figures.setdefault(what, Figure(what, unit, goal))
        figure.values += values

    def replace(self, what: str, unit: str, *values: float, goal: Goal | None = None) -> None:
        """Note a figure that is made from all rounds, in place of what it was before."""
        self._figures[what] = Figure(what, unit, goal, list(values))

    def values(self, what: str) -> list[float]:
        """What was noted for a figure so far. Raises KeyError when nothing was."""
        return self._figures[what].values

    def figures(self) -> list[Figure]:
        """The figures that have values."""
        return [figure for figure in self._figures.values() if figure.values]

    def ratios(self) -> list[Figure]:
        """The ratios of which both sides were measured, taken round by round."""
        found = []
        for ratio in self._ratios:
            one, other = self._figures.get(ratio.figure), self._figures.get(ratio.over)
            if one is None or other is None:
                continue
            values = [a / b for a, b in zip(one.values, other.values, strict=False) if b]
            if values:
                found.append(Figure(ratio.what, "x", ratio.goal, values))
        return found

    def as_dict(self) -> dict[str, Any]:
        """Everything, for a file."""
        return {
            kind: [
                {
                    "what": figure.what,
                    "unit": figure.unit,
                    "median": statistics.median(figure.values),
                    "values": figure.values,
                }
                for figure in figures
            ]
            for kind, figures in (("figures", self.figures()), ("ratios", self.ratios()))
        }


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, markdown: bool) -> str:
    """Rows under a head, aligned; in Markdown ready to be pasted."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    padded = [
        [cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines
    ]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in padded)
    rule = "|".join("-" * (width + 2) for width in widths)
    first, *others = ["| " + " | ".join(line) + " |" for line in padded]
    return "\n".join([first, f"|{rule}|", *others])


def figures_table(figures: Iterable[Figure], *, markdown: bool) -> str:
    """Median (min-max) of each figure, its unit, its goal and whether that is met."""
    rows = [
        (figure.what, spread(figure.values), figure.unit, *_judged(figure)) for figure in figures
    ]
    head = ("what", "median (min-max)", "unit", "must", "aim", "")
    return table(head, rows, markdown=markdown)


def _judged(figure: Figure) -> tuple[str, str, str]:
    goal = figure.goal
    if goal is None:
        return ("", "", "")
    sign = "<=" if goal.better == "less" else ">="
    verdict = goal.verdict(statistics.median(figure.values))
    return (f"{sign} {goal.must:g}", f"{sign} {goal.aim:g}", verdict)
