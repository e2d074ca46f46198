"""Lines and places of a text: the one definition that outline, points and facts share."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

_NEWLINE = re.compile(r"\r\n|\r|\n")


def word_set(text: str) -> frozenset[str]:
    """The words of a text between white space: for lists that read better as text."""
    return frozenset(text.split())


class Lines:
    """The lines of a text, counted from 1. CRLF, CR and LF end a line, as in Markdown.

    A newline at the very end does not open another line; an empty text has one line.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.starts = [0, *(found.end() for found in _NEWLINE.finditer(text))]
        if len(self.starts) > 1 and self.starts[-1] == len(text):
            self.starts.pop()

    @property
    def count(self) -> int:
        return len(self.starts)

    def at(self, offset: int) -> int:
        """The line that holds the character at `offset`."""
        return bisect_right(self.starts, offset)

    def span(self, first: int, last: int) -> tuple[int, int]:
        """Start and end offset of the lines `first` to `last`, the last newline included."""
        end = self.starts[last] if last < self.count else len(self.text)
        return self.starts[first - 1], end

    def line(self, number: int) -> str:
        """One line without its newline."""
        start, end = self.span(number, number)
        return self.text[start:end].rstrip("\r\n")


class Sections:
    """Finds the section of an outline that holds a line."""

    def __init__(self, sections: Sequence[Mapping[str, Any]]) -> None:
        self._sections = sorted(sections, key=lambda section: section["start_line"])
        self._starts = [section["start_line"] for section in self._sections]

    def at(self, line: int) -> Mapping[str, Any]:
        """The section of this line; the first one for a line before all of them."""
        return self._sections[max(bisect_right(self._starts, line) - 1, 0)]
