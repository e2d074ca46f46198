"""HTML reduced to the Markdown that a reader would write down: headings, paragraphs, lists, code.

selectolax (the lexbor engine) reads the HTML as browsers do. What surrounds the content (scripts,
navigation, forms) is left out; links of the text keep their target.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from selectolax.lexbor import LexborHTMLParser, LexborNode

from app.adapters.capabilities.text_lines import word_set

START_TAGS_MAX = 20_000
_MAIN_CHARS_MIN = 200
_DROPPED = (
    "script,style,noscript,template,svg,math,nav,footer,aside,form,button,select,iframe,object,"
    "canvas,audio,video,dialog,[hidden],[aria-hidden=true]"
)
_ALWAYS_DROPPED = "script,style,noscript,template,svg,iframe,object"
_HEADINGS = {f"h{level}": "#" * level for level in range(1, 7)}
_BLOCKS = word_set(
    """address article aside blockquote body center dd details div dl dt fieldset figcaption figure
    footer form header hr html legend li main menu nav ol p pre section summary table tbody td tfoot
    th thead tr ul"""
) | frozenset(_HEADINGS)

# The parser repeats open formatting elements in every following block and its time grows with the
# square of the depth. A hostile page could use both, so such elements become unknown ones and the
# page is cut after a number of tags that no readable page has.
_FORMATTING = re.compile(
    r"<(/?)(b|big|code|em|font|i|nobr|s|small|strike|strong|tt|u)(?=[\s/>])", re.IGNORECASE
)
_START_TAG = re.compile(r"<[A-Za-z]")
_SPACES = re.compile(r"[ \t\r\n\f]+")
_AWKWARD = re.compile(r"[\s()<>]")
_MARK_AT_START = re.compile(r"^(#{1,6}(?=\s)|[>+\-*](?=\s)|```|~~~)")


def html_to_markdown(html: str) -> tuple[str, str]:
    """`(title, markdown)` of a page; both may be empty. At most 20,000 tags are read."""
    html = _FORMATTING.sub(r"<\1x-\2", _cut(html))
    tree = LexborHTMLParser(html)
    found = tree.css_first("title") or tree.css_first("h1")
    title = _SPACES.sub(" ", found.text()).strip() if found is not None else ""
    text = _reduced(tree, _DROPPED) or _reduced(LexborHTMLParser(html), _ALWAYS_DROPPED)
    return title, text


def _cut(html: str) -> str:
    for count, found in enumerate(_START_TAG.finditer(html)):
        if count == START_TAGS_MAX:
            return html[: found.start()]
    return html


def _reduced(tree: LexborHTMLParser, dropped: str) -> str:
    for node in tree.css(dropped):
        node.decompose()
    for selector in ("main", "article", "body"):
        node_found = tree.css_first(selector)
        if node_found is None:
            continue
        text = _Writer().write(node_found)
        if len(text) >= _MAIN_CHARS_MIN or selector == "body":
            return text
    return ""


@dataclass(slots=True)
class _Writer:
    """Collects blocks while walking the tree with a stack of its own: depth is not limited."""

    blocks: list[str] = field(default_factory=list)
    inline: list[str] = field(default_factory=list)
    prefix: str = ""
    pre_depth: int = 0
    lists: list[int | None] = field(default_factory=list)
    link_at: int | None = None

    def write(self, root: LexborNode) -> str:
        stack: list[tuple[LexborNode, bool]] = [(root, False)]
        while stack:
            node, is_end = stack.pop()
            if is_end:
                self._leave(node)
                continue
            self._enter(node)
            stack.append((node, True))
            child = node.last_child
            while child is not None:
                stack.append((child, False))
                child = child.prev
        self._flush()
        return "\n\n".join(self.blocks)

    def _enter(self, node: LexborNode) -> None:
        tag = node.tag or ""
        if tag == "-text":
            self.inline.append(node.text_content or "")
        elif tag == "br":
            self.inline.append("\n" if self.pre_depth else " ")
        elif tag in ("td", "th"):
            self.inline.append(" ")
        elif tag == "a":
            self.link_at = len(self.inline)
        elif tag in _BLOCKS:
            self._open_block(tag)

    def _open_block(self, tag: str) -> None:
        self._flush()
        if tag == "pre":
            self.pre_depth += 1
        elif tag in ("ul", "menu", "ol"):
            self.lists.append(0 if tag == "ol" else None)
        elif tag == "li":
            self.prefix = self._item_mark()
        elif tag in _HEADINGS:
            self.prefix = _HEADINGS[tag] + " "

    def _item_mark(self) -> str:
        if not self.lists or (number := self.lists[-1]) is None:
            return "- "
        self.lists[-1] = number + 1
        return f"{number + 1}. "

    def _leave(self, node: LexborNode) -> None:
        tag = node.tag or ""
        if tag == "a":
            self._close_link(node)
        elif tag in _BLOCKS and tag not in ("td", "th"):
            self._flush()
            if tag == "pre":
                self.pre_depth -= 1
            elif tag in ("ul", "menu", "ol") and self.lists:
                self.lists.pop()
            self.prefix = ""

    def _close_link(self, node: LexborNode) -> None:
        if self.link_at is None:
            return
        label = _SPACES.sub(" ", "".join(self.inline[self.link_at :])).strip()
        target = (node.attributes.get("href") or "").strip()
        plain = target.startswith(("http://", "https://")) and not _AWKWARD.search(target)
        if plain and label and "[" not in label and not self.pre_depth:
            self.inline[self.link_at :] = [f"[{label}]({target})"]
        self.link_at = None

    def _flush(self) -> None:
        self.link_at = None
        text, self.inline = "".join(self.inline), []
        if self.pre_depth:
            if text.strip():
                fence = "~~~~" if "```" in text else "```"
                body = text.strip("\n")
                self.blocks.append(f"{fence}\n{body}\n{fence}")
            return
        shown = _SPACES.sub(" ", text).strip()
        if shown:
            marked = _MARK_AT_START.sub(r"\\\1", shown)
            self.blocks.append(self.prefix + marked)
            self.prefix = ""
