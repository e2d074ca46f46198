"""The outline of a text: Markdown by its grammar, plain text by the look of its lines."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from app.adapters.capabilities.markup import blocks_of, front_matter_end, plain_text
from app.adapters.capabilities.text_lines import Lines

TITLE_CHARS_MAX = 500
SECTIONS_MAX = 20_000
_MARKDOWN = frozenset({"text/markdown", "text/x-markdown"})

_FRONT_TITLE = re.compile(r"""^title:[ \t]*["']?([^"'\r\n]{1,300})""", re.MULTILINE)
_UNDERLINE = re.compile(r"^[ ]{0,3}([=\-~*])\1{2,}[ \t]*$")
_NUMBERED = re.compile(r"^(\d{1,3}(?:\.\d{1,3}){0,5})[.)]?[ \t]+\S")
_NAMED = re.compile(r"^(?:chapter|part|section|appendix)[ \t]+[0-9A-Za-z]{1,8}\b", re.IGNORECASE)
_FENCE = re.compile(r"^[ ]{0,3}(`{3,}|~{3,})")


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading at its line (from 1); `level` 1 is the highest."""

    line: int
    level: int
    title: str


def is_markdown(media_type: str | None) -> bool:
    """Whether to read the text as Markdown: when it says so, or says nothing."""
    return media_type is None or media_type in _MARKDOWN


def outline_of(text: str, title: str | None, media_type: str | None) -> dict[str, Any]:
    """`{title, line_count, sections}`; the sections are in order and cover every line once.

    Text before the first heading is a section of level 0. A text without headings is one section.
    Headings inside quotes, lists and code are part of their section, not sections.
    """
    lines = Lines(text)
    headings = _headings(lines, media_type)[: SECTIONS_MAX - 1]
    named = title or _front_title(text, media_type) or _first_title(headings) or _first_line(lines)
    return {
        "title": named[:TITLE_CHARS_MAX],
        "line_count": lines.count,
        "sections": _sections(headings, lines, named),
    }


def _headings(lines: Lines, media_type: str | None) -> list[Heading]:
    if not is_markdown(media_type):
        return _plain_headings(lines) if _is_plain(media_type) else []
    found = [
        Heading(block.first_line, block.level, plain_text(block.content))
        for block in blocks_of(lines.text)
        if block.kind == "heading"
    ]
    # Without a media type a text with no Markdown heading at all is probably no Markdown.
    return found or (_plain_headings(lines) if media_type is None else [])


def _is_plain(media_type: str | None) -> bool:
    return media_type == "text/plain"


def _sections(headings: list[Heading], lines: Lines, title: str) -> list[dict[str, Any]]:
    if not headings or lines.text[: lines.starts[headings[0].line - 1]].strip():
        headings = [Heading(1, 0, title), *headings]
    headings[0] = replace(headings[0], line=1)
    sections: list[dict[str, Any]] = []
    parents: list[tuple[int, str]] = []
    for index, heading in enumerate(headings):
        following = headings[index + 1].line if index + 1 < len(headings) else lines.count + 1
        section: dict[str, Any] = {
            "id": f"s{index + 1}",
            "title": heading.title[:TITLE_CHARS_MAX],
            "level": heading.level,
            "start_line": heading.line,
            "end_line": following - 1,
        }
        while parents and parents[-1][0] >= heading.level:
            parents.pop()
        if parents and parents[-1][0] > 0:
            section["parent"] = parents[-1][1]
        parents.append((heading.level, section["id"]))
        sections.append(section)
    return sections


def _front_title(text: str, media_type: str | None) -> str:
    end = front_matter_end(text) if is_markdown(media_type) else 0
    found = _FRONT_TITLE.search(text, 0, end)
    return found.group(1).strip() if found else ""


def _first_title(headings: list[Heading]) -> str:
    """The first heading of the highest level, if it opens the text."""
    return headings[0].title if headings else ""


def _first_line(lines: Lines) -> str:
    for number in range(1, min(lines.count, 50) + 1):
        if stripped := lines.line(number).strip(" \t#=-*_"):
            return stripped[:120]
    return "Untitled"


def _plain_headings(lines: Lines) -> list[Heading]:
    """Lines that look like headings: underlined, numbered, in capitals, or short and alone."""
    found: list[Heading] = []
    fence = ""
    blank_before = True
    for number in range(1, lines.count + 1):
        raw = lines.line(number)
        if marker := _FENCE.match(raw):
            fence = _fence_after(fence, marker.group(1))
        elif not fence and blank_before and raw.strip() and not raw.startswith(("    ", "\t")):
            following = lines.line(number + 1) if number < lines.count else ""
            if level := _plain_level(raw.strip(), following):
                found.append(Heading(number, level, raw.strip()))
        blank_before = not raw.strip()
    return found


def _fence_after(open_fence: str, marker: str) -> str:
    if not open_fence:
        return marker
    closes = marker[0] == open_fence[0] and len(marker) >= len(open_fence)
    return "" if closes else open_fence


def _plain_level(line: str, following: str) -> int:
    """The level of a heading, 0 when the line is none. It stands after a blank line already."""
    if len(line) > 80 or not any(char.isalpha() for char in line):
        return 0
    if underline := _UNDERLINE.match(following):
        return 1 if underline.group(1) == "=" else 2
    if line[-1] in ".,;:!?" or following.strip():
        return 0
    if numbered := _NUMBERED.match(line):
        return min(1 + numbered.group(1).count("."), 6)
    if _NAMED.match(line) or line.isupper():
        return 1
    return 2 if _is_title_case(line) else 0


def _is_title_case(line: str) -> bool:
    words = [word for word in line.split() if word[0].isalpha()]
    capital = sum(word[0].isupper() for word in words)
    return 0 < len(words) <= 8 and words[0][0].isupper() and capital * 2 > len(words)
