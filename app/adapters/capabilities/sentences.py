"""The sentences of a text, each with the exact slice of the source that it came from."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from app.adapters.capabilities.markup import Block, blocks_of, plain_text
from app.adapters.capabilities.outline import is_markdown
from app.adapters.capabilities.text_lines import Lines

QUOTE_CHARS_MAX = 4_000
SENTENCES_MAX = 20_000

# The end of a sentence: its mark, closing quotes and emphasis, then space and a fresh start.
_END = re.compile(
    r"[.!?\u2026]{1,4}[\"'\u201d\u2019)\]*_]{0,4}"
    r"(?=\s+[\"'\u201c\u2018(\[*_`]{0,4}[A-Z0-9\u00c0-\u024f\u0370-\u04ff])"
    r"|(?<=[a-z)`]{3})\.(?=\s+[a-z\[])"
    r"|[\u3002\uff01\uff1f]"
)
_ABBREVIATION = re.compile(
    r"(?:\b(?:e\.g|i\.e|etc|vs|cf|al|approx|ca|no|nr|vol|ed|eds|fig|figs|eq|sec|ch|pp|dr|mr|mrs|ms"
    r"|prof|st|jr|sr|inc|ltd|co|corp|jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec|z\.b|d\.h|bzw"
    r"|usw|dept|est|min|max|resp|incl|excl)|\b[A-Z]|^\d{1,3})\.$",
    re.IGNORECASE,
)
_CODE = re.compile(r"(`{1,3})[^`]{1,400}\1")
_TARGET = re.compile(r"\]\([^()\s]{1,2000}(?:\s+\"[^\"]{0,200}\")?\)")
_FENCE = re.compile(r"^[ ]{0,3}(?:`{3,}|~{3,})")
_BULLET = re.compile(r"^\s{0,3}(?:[-*+\u2022]|\d{1,3}[.)])\s+")


@dataclass(frozen=True, slots=True)
class Sentence:
    """`text` is what a reader sees; `quote` is the source from `offset`, markup included.

    `paragraph` numbers the paragraphs from 0; `in_list` and `in_quote` tell a
    list item and a quoted block.
    """

    text: str
    quote: str
    offset: int
    line: int
    paragraph: int
    in_list: bool
    in_quote: bool


@dataclass(frozen=True, slots=True)
class _Paragraph:
    """Paragraph text on one line, with where each of its source lines begins in both texts."""

    text: str
    at: list[int]
    offsets: list[int]
    in_list: bool
    in_quote: bool = False

    def offset(self, position: int) -> int:
        index = bisect_right(self.at, position) - 1
        return self.offsets[index] + position - self.at[index]


def sentences_of(text: str, media_type: str | None) -> list[Sentence]:
    """All sentences of the prose in order: no headings, tables, code, HTML; at most 20,000.

    Always `text[s.offset : s.offset + len(s.quote)] == s.quote`.
    """
    markdown = is_markdown(media_type)
    lines = Lines(text)
    found: list[Sentence] = []
    paragraphs = _markdown_paragraphs(lines) if markdown else _plain_paragraphs(lines)
    for number, paragraph in enumerate(paragraphs):
        for start, end in _cut(paragraph.text):
            offset = paragraph.offset(start)
            quote = text[offset : paragraph.offset(end - 1) + 1]
            if len(quote) > QUOTE_CHARS_MAX:
                continue
            raw = paragraph.text[start:end]
            shown = plain_text(raw) if markdown else raw
            if shown:
                line = lines.at(offset)
                found.append(
                    Sentence(
                        shown, quote, offset, line, number, paragraph.in_list, paragraph.in_quote
                    )
                )
        if len(found) >= SENTENCES_MAX:
            break
    return found


def _cut(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of each sentence; dots in code and in link targets do not cut."""
    masked = _TARGET.sub(_blank, _CODE.sub(_blank, text))
    start = 0
    for end in _END.finditer(masked):
        if _is_abbreviation(masked[max(start, end.start() - 12) : end.start() + 1]):
            continue
        yield from _trimmed(text, start, end.end())
        start = end.end()
    yield from _trimmed(text, start, len(text))


def _blank(found: re.Match[str]) -> str:
    return "x" * len(found.group())


def _is_abbreviation(before: str) -> bool:
    found = _ABBREVIATION.search(before)
    if found is None:
        return False
    # IGNORECASE is for the list; a single letter is an initial only when it is a capital.
    word = found.group().rstrip(".")
    return len(word) > 1 or word.isdigit() or word.isupper()


def _trimmed(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    if end > start:
        yield start, end


def _markdown_paragraphs(lines: Lines) -> Iterator[_Paragraph]:
    for block in blocks_of(lines.text):
        if block.kind == "paragraph":
            yield _located(block, lines)


def _located(block: Block, lines: Lines) -> _Paragraph:
    """Find each line of the block's content in its source line, after quote marks and bullets."""
    parts: list[str] = []
    at: list[int] = []
    offsets: list[int] = []
    position = 0
    for index, content in enumerate(block.content.split("\n")):
        number = min(block.first_line + index, lines.count)
        column = lines.line(number).find(content.rstrip("\\ "))
        if column < 0:
            continue
        part = content.rstrip("\\ ")
        at.append(position)
        offsets.append(lines.starts[number - 1] + column)
        parts.append(part)
        position += len(part) + 1
    if not parts:
        return _Paragraph("", [0], [0], block.in_list)
    return _Paragraph(" ".join(parts), at, offsets, block.in_list, block.in_quote)


def _plain_paragraphs(lines: Lines) -> Iterator[_Paragraph]:
    """Runs of lines between blank lines, bullets and fences; indented lines count as code."""
    waiting: list[tuple[str, int]] = []
    in_list = in_fence = False
    for number in range(1, lines.count + 1):
        raw = lines.line(number)
        bullet = _BULLET.match(raw)
        fence = _FENCE.match(raw)
        in_fence ^= fence is not None
        code = in_fence or (raw.startswith(("    ", "\t")) and not waiting)
        breaks = not raw.strip() or bullet is not None or fence is not None or code
        if breaks and waiting:
            yield _joined(waiting, in_list)
            waiting, in_list = [], False
        if raw.strip() and fence is None and not code:
            column = bullet.end() if bullet else len(raw) - len(raw.lstrip())
            in_list = in_list or bullet is not None
            waiting.append((raw[column:].rstrip(), lines.starts[number - 1] + column))
    if waiting:
        yield _joined(waiting, in_list)


def _joined(parts: list[tuple[str, int]], in_list: bool) -> _Paragraph:
    at: list[int] = []
    position = 0
    for part, _ in parts:
        at.append(position)
        position += len(part) + 1
    text = " ".join(part for part, _ in parts)
    return _Paragraph(text, at, [offset for _, offset in parts], in_list)
