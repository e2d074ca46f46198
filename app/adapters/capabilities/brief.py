"""A brief of a document: composed from its own sentences, then held against the document.

The check does not trust whoever wrote the draft. A bullet is grounded when its quote stands in the
document and the quote supports the bullet's words and numbers; a summary is kept sentence by
sentence, only where the document says it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from app.adapters.capabilities.key_points import form_of
from app.adapters.capabilities.ranking import terms_of, words_of
from app.adapters.capabilities.sentences import Sentence, sentences_of
from app.adapters.capabilities.text_lines import Lines, Sections

BULLETS_MAX = 7
SUMMARY_CHARS_MAX = 480
SUMMARY_SENTENCES_MAX = 3
SUPPORT_MIN = 0.6
_PER_SECTION = 2
_LEAD_FORM_MIN = 0.2
_LEAD_CHARS_MIN = 40
_LEAD_LINES_MIN = 30
_FACTS_MAX = 12
_FACTS_PER_KIND = 4
_FACT_ORDER = ("date", "version", "money", "percent", "number", "name")

_DIGITS = re.compile(r"\d+(?:[.,]\d+)*")
_TARGET = re.compile(r"\]\([^()\s]{0,2000}(?:\s+\"[^\"]{0,200}\")?\)")
_TAG = re.compile(r"</?[A-Za-z][^<>]{0,500}>")
_SPACES = re.compile(r"\s+")
_ENTITY = re.compile(r"&(?:#\d{1,7}|#x[0-9a-fA-F]{1,6}|[A-Za-z]{2,31});")


def compose_brief(
    document: Mapping[str, Any],
    outline: Mapping[str, Any],
    key_points: Sequence[Mapping[str, Any]],
    facts: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """A draft brief `{title, summary, bullets, facts}`.

    The summary is the first whole paragraph near the top, the bullets are the best key points that
    it does not hold already: at most 7, at most 2 of one section, in the order of the document.
    """
    sections = Sections(outline["sections"])
    points = _with_facts(key_points, facts)
    summary, told = _summary(document, points)
    if all(point["offset"] in told for point in points):
        told = set()  # Better the same sentence twice than a brief without bullets.
    chosen: list[Mapping[str, Any]] = []
    taken: Counter[str] = Counter()
    for point in points:
        section = point["section"]
        if point["offset"] in told or taken[section] == _PER_SECTION:
            continue
        taken[section] += 1
        chosen.append(point)
        if len(chosen) == BULLETS_MAX:
            break
    return {
        "title": outline["title"],
        "summary": summary,
        "bullets": [
            {
                "text": point["text"],
                "section": sections.at(point["line"])["title"],
                "section_id": point["section"],
                "line": point["line"],
                "offset": point["offset"],
                "quote": point["quote"],
            }
            for point in sorted(chosen, key=lambda point: point["offset"])
        ],
        "facts": _chosen_facts(facts),
    }


def _with_facts(
    points: Sequence[Mapping[str, Any]], facts: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """The points best first, those that state a fact slightly preferred."""
    offsets = [fact["offset"] for fact in facts if fact["kind"] != "link"]

    def standing(point: Mapping[str, Any]) -> tuple[float, int]:
        start, end = point["offset"], point["offset"] + len(point["quote"])
        stated = sum(start <= offset < end for offset in offsets)
        return (-round(point["score"] * (1 + 0.05 * min(stated, 3)), 6), start)

    return sorted(points, key=standing)


def _summary(
    document: Mapping[str, Any], points: Sequence[Mapping[str, Any]]
) -> tuple[str, set[int]]:
    """The start of the first readable paragraph, else the best points; and their offsets."""
    sentences = sentences_of(document["text"], document.get("media_type"))
    by_paragraph: dict[int, list[Sentence]] = {}
    for sentence in sentences:
        if not (sentence.in_list or sentence.in_quote):
            by_paragraph.setdefault(sentence.paragraph, []).append(sentence)
    lead_line_max = max(_LEAD_LINES_MIN, (sentences[-1].line if sentences else 0) // 10)
    for paragraph in by_paragraph.values():
        if paragraph[0].line > lead_line_max:
            break
        if form_of(paragraph[0]) >= _LEAD_FORM_MIN:
            kept = _readable([(one.text, one.offset) for one in paragraph if form_of(one) > 0.1])
            if len(kept) > 1 or sum(len(text) for text, _ in kept) > _LEAD_CHARS_MIN:
                return " ".join(text for text, _ in kept), {offset for _, offset in kept}
    best = _readable([(point["text"], point["offset"]) for point in points])
    ordered = sorted(best[:2], key=lambda one: one[1])
    return " ".join(text for text, _ in ordered), {offset for _, offset in ordered}


def _readable(sentences: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    kept: list[tuple[str, int]] = []
    room = SUMMARY_CHARS_MAX
    for text, offset in sentences:
        if len(kept) == SUMMARY_SENTENCES_MAX or (kept and len(text) > room):
            break
        kept.append((text, offset))
        room -= len(text) + 1
    return kept


def _chosen_facts(facts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    chosen: list[Mapping[str, Any]] = []
    for kind in _FACT_ORDER:
        of_kind = [fact for fact in facts if fact["kind"] == kind and _is_telling(fact)]
        of_kind.sort(key=lambda fact: (-fact.get("count", 1), fact["offset"]))
        chosen += of_kind[:_FACTS_PER_KIND]
    return [
        {
            "kind": fact["kind"],
            "text": fact["text"],
            "value": fact["value"],
            "section_id": fact["section"],
            "line": fact["line"],
        }
        for fact in sorted(chosen[:_FACTS_MAX], key=lambda fact: fact["offset"])
    ]


def _is_telling(fact: Mapping[str, Any]) -> bool:
    return fact["kind"] != "number" or "unit" in fact


@dataclass(slots=True)
class Checked:
    """What a check kept (`brief`) and what it left out, with reasons (`dropped`)."""

    brief: dict[str, Any]
    bullets_checked: int
    dropped: list[dict[str, str]] = field(default_factory=list)

    @property
    def report(self) -> dict[str, Any]:
        """The facet `brief_report`."""
        return {
            "bullets_checked": self.bullets_checked,
            "bullets_grounded": len(self.brief["bullets"]),
            "dropped": self.dropped,
        }


def check_brief(document: Mapping[str, Any], draft: Mapping[str, Any]) -> Checked:
    """Keep what the document supports; every bullet kept says `grounded: true`.

    A bullet's `offset` and `line` are corrected to where the quote stands. When no sentence of the
    summary holds, the first bullet takes its place.
    """
    evidence = Evidence(document["text"])
    dropped: list[dict[str, str]] = []
    bullets = []
    for index, bullet in enumerate(draft["bullets"]):
        offset = evidence.offset_of(bullet["quote"], bullet["offset"])
        if offset is None:
            dropped.append(_drop(f"/bullets/{index}", bullet["text"], "quote_not_found"))
            continue
        if reason := unsupported(bullet["text"], bullet["quote"]):
            dropped.append(_drop(f"/bullets/{index}", bullet["text"], reason))
            continue
        line = evidence.lines.at(offset)
        bullets.append({**bullet, "offset": offset, "line": line, "grounded": True})
    summary = _checked_summary(draft["summary"], evidence, dropped)
    facts = []
    for index, fact in enumerate(draft["facts"]):
        if evidence.has_on_line(fact["text"], fact["line"]):
            facts.append(fact)
        else:
            dropped.append(_drop(f"/facts/{index}", fact["text"], "fact_not_found"))
    if not summary and bullets:
        summary = bullets[0]["text"]
    brief = {"title": draft["title"], "summary": summary, "bullets": bullets, "facts": facts}
    return Checked(brief, len(draft["bullets"]), dropped)


def _checked_summary(summary: str, evidence: Evidence, dropped: list[dict[str, str]]) -> str:
    kept = []
    for sentence in sentences_of(summary, "text/plain"):
        if evidence.says(sentence.text):
            kept.append(sentence.text)
        else:
            dropped.append(_drop("/summary", sentence.text, "sentence_not_found"))
    return " ".join(kept)


def unsupported(text: str, quote: str) -> str:
    """Why a quote does not support a text, "" when it does.

    Every number of the text must stand in the quote, and at least 60 % of its meaningful words
    (by their stems).
    """
    if not set(_DIGITS.findall(text)) <= set(_DIGITS.findall(quote)):
        return "number_not_in_quote"
    terms, support = set(terms_of(text)), set(terms_of(quote))
    if terms and len(terms & support) < SUPPORT_MIN * len(terms):
        return "words_not_in_quote"
    if not terms and _said(text) not in _said(quote):
        return "words_not_in_quote"
    return ""


def _drop(pointer: str, text: str, reason: str) -> dict[str, str]:
    return {"pointer": pointer, "text": text[:4_000], "reason": reason}


class Evidence:
    """A document as whoever checks against it asks it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.lines = Lines(text)
        self._said = _said(text)

    def offset_of(self, quote: str, expected: int) -> int | None:
        """Where the quote stands, at `expected` if it does; white space may differ."""
        if self.text.startswith(quote, expected):
            return expected
        if (exact := self.text.find(quote)) >= 0:
            return exact
        parts = [re.escape(part) for part in _SPACES.split(quote) if part]
        found = re.search(r"\s+".join(parts), self.text) if parts else None
        return found.start() if found else None

    def says(self, sentence: str) -> bool:
        """Whether the words of the sentence stand in the document one after the other."""
        said = _said(sentence)
        return bool(said.strip()) and said in self._said

    def has_on_line(self, text: str, line: int) -> bool:
        if line > self.lines.count:
            return False
        start = self.lines.starts[line - 1]
        end = self.lines.span(line, line)[1]
        return self.text.find(text, start, end + len(text)) >= 0


def _said(text: str) -> str:
    """The words in order between single spaces, without link targets, tags and entities."""
    bare = _ENTITY.sub(" ", _TAG.sub(" ", _TARGET.sub("] ", text)))
    return f" {' '.join(words_of(bare))} "
