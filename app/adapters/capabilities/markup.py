"""Markdown seen as blocks with places, and as the plain words that a reader sees.

markdown-it-py reads the grammar; this file only keeps where things stand in the source.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass

from markdown_it import MarkdownIt
from markdown_it.token import Token

_FRONT_MATTER = re.compile(
    r"\A---[ \t]*\r?\n(?:[^\r\n]{0,500}\r?\n){0,200}?(?:---|\.\.\.)[ \t]*\r?\n"
)
_ORDERED = ("ordered_list_open", "ordered_list_close")
_NOT_NEWLINE = re.compile(r"[^\r\n]")
_SPACES = re.compile(r"\s+")
_LEFT_OVER = re.compile(r"(?<!\w)[*_~]+(?=\S)|(?<=\S)[*_~]+(?!\w)")


@dataclass(frozen=True, slots=True)
class Block:
    """A heading or a paragraph. `content` is its Markdown without quote marks and indentation.

    `first_line` and `last_line` count from 1; `level` is the heading's, 0 for a paragraph.
    """

    kind: str
    content: str
    first_line: int
    last_line: int
    level: int
    in_list: bool
    in_quote: bool


class _Parsers(threading.local):
    """A parser compiles its rules at its first use, unguarded: one of each kind for each thread."""

    def __init__(self) -> None:
        self.blocks = MarkdownIt("commonmark").enable("table")
        # Only block structure: inline parsing of a whole document costs most and is not needed.
        self.blocks.core.ruler.enableOnly(["normalize", "block"])
        self.inline = MarkdownIt("commonmark").enable("strikethrough")


_parsers = _Parsers()


def front_matter_end(text: str) -> int:
    """Where the text goes on after a leading `---` block of metadata; 0 when there is none."""
    found = _FRONT_MATTER.match(text)
    return found.end() if found else 0


def blocks_of(text: str) -> list[Block]:
    """Headings of the top level and all paragraphs, in order; no tables, code or HTML."""
    end = front_matter_end(text)
    if end:
        text = _NOT_NEWLINE.sub(" ", text[:end]) + text[end:]
    blocks: list[Block] = []
    lists_open = quotes_open = 0
    tokens = _parsers.blocks.parse(text)
    for index, token in enumerate(tokens):
        if token.type in ("bullet_list_open", "bullet_list_close", *_ORDERED):
            lists_open += token.nesting
        elif token.type in ("blockquote_open", "blockquote_close"):
            quotes_open += token.nesting
        elif token.type == "paragraph_open" or (token.type == "heading_open" and not token.level):
            inside = {"in_list": lists_open > 0, "in_quote": quotes_open > 0}
            blocks.append(_block(token, tokens[index + 1], **inside))
    return blocks


def _block(opening: Token, inline: Token, *, in_list: bool, in_quote: bool) -> Block:
    assert opening.map is not None
    is_heading = opening.type == "heading_open"
    return Block(
        kind="heading" if is_heading else "paragraph",
        content=inline.content,
        first_line=opening.map[0] + 1,
        last_line=opening.map[1],
        level=int(opening.tag[1]) if is_heading else 0,
        in_list=in_list,
        in_quote=in_quote,
    )


def plain_text(markdown: str) -> str:
    """The words that a reader sees, on one line: no emphasis marks, link targets, tags, images."""
    parts: list[str] = []
    for token in _parsers.inline.parseInline(markdown)[0].children or []:
        if token.type in ("text", "code_inline"):
            parts.append(token.content)
        elif token.type in ("softbreak", "hardbreak"):
            parts.append(" ")
    joined = _SPACES.sub(" ", "".join(parts)).strip()
    return _LEFT_OVER.sub("", joined) if "`" not in markdown else joined
